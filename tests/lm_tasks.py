"""Made-up items and tasks for lm-eval, and accuracies that are computed without it."""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from conftest import word_tokenizer

from mlpreplace.evaluation.tasks import run
from mlpreplace.evaluation.tasks.run import TaskResult, evaluate_tasks

WORDS = [f"w{i}" for i in range(100)]


def tokenizer():
    """One token a word, and an end of text, for which lm-eval asks."""
    made = word_tokenizer(WORDS)
    made.eos_token = "[UNK]"
    return made


def made_up(n: int, n_options: int = 2, seed: int = 0) -> str:
    """Items in the bundled format, of words the tiny tokenizer knows; options of one to three words."""
    rng = random.Random(seed)

    def words(count):
        return " ".join(rng.choices(WORDS, k=count))

    lines = []
    for _ in range(n):
        options = [f"{letter}. {words(rng.randint(1, 3))}" for letter in "ABCDE"[:n_options]]
        record = {"passage": words(4), "question": words(rng.randint(2, 6)), "options": "\n".join(options)}
        lines.append(json.dumps(record | {"answer": rng.choice(options)}))
    return "\n".join(lines) + "\n"


def items(monkeypatch):
    """Put 24 made-up items in the place of each bundled file; returns what takes others."""

    def put(text: str) -> None:
        monkeypatch.setattr(run, "read_member", lambda distribution, member: text.encode())

    put(made_up(24))
    return put


def index(tmp_path, monkeypatch) -> None:
    """lm-eval's index with tasks of other kinds: scored by mcc, by perplexity, on generated text; and one without data."""
    from lm_eval.tasks import TaskManager

    head = "dataset_kwargs: {member: ''}\ntest_split: test\ndoc_to_text: question\n"
    data = head + "custom_dataset: !function mlpreplace.evaluation.tasks.run.bundled_items\n"
    choice = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    until = (
        "output_type: generate_until\ndoc_to_target: '{{choices[gold]}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 2}\n"
    )
    bodies = {
        "a_mcc": data + choice + "tag: both\nmetric_list: [{metric: mcc}]\n",
        "b_acc": data + choice + "tag: both\nmetric_list: [{metric: acc}]\n",
        "rolling": data
        + "output_type: loglikelihood_rolling\ndoc_to_target: question\nmetric_list: [{metric: word_perplexity}]\n",
        "written": data + until + "metric_list: [{metric: exact_match}]\n",
        "nowhere": head + choice + "dataset_path: /no/such/folder\nmetric_list: [{metric: acc}]\n",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{body}")
    index = TaskManager(include_defaults=False, include_path=tmp_path)
    monkeypatch.setattr(run, "_manager", lambda defaults: index)


def evaluated(model, tokenizer, task="bundled/piqa", label="a model", **options) -> TaskResult:
    (result,) = evaluate_tasks(model, tokenizer, [task], label=label, **{"progress": False} | options)
    return result


def log_likelihoods(model, tokenizer, context: str, options: list[str]) -> list[float]:
    """Of each option after the context, one sequence at a time."""
    likelihoods = []
    for option in options:
        start, ids = len(tokenizer(context).input_ids), torch.tensor([tokenizer(f"{context} {option}").input_ids])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        likelihoods.append(float(log_p.gather(-1, ids[0, 1:, None])[start - 1 :].sum()))
    return likelihoods


def direct(model, tokenizer, docs: list[dict]) -> tuple[list[float], list[list[float]]]:
    """(whether the likeliest option per character is right, log-likelihoods) of PIQA items."""
    every = [log_likelihoods(model, tokenizer, f"Question: {d['question']}\nAnswer:", d["choices"]) for d in docs]
    best = [int(np.argmax(np.array(ll) / [len(c) for c in d["choices"]])) for d, ll in zip(docs, every, strict=True)]
    return [float(b == d["gold"]) for b, d in zip(best, docs, strict=True)], every
