"""What of the dense model's accuracy a compressed model retains, with standard errors paired over items."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluate import RESAMPLES
from .run import TaskResult

AVERAGE = "average"  # the row of all tasks together
ABOVE_CHANCE = 0.95  # of the resamples, in so many the dense model is above chance, or what it retains is not defined


@dataclass(frozen=True)
class Retained:
    """Shares of the dense accuracy that are left, each with its standard error."""

    above_chance: float  # (accuracy − chance) ÷ (dense accuracy − chance); nan where the dense model is not above chance
    above_chance_se: float
    ratio: float  # accuracy ÷ dense accuracy
    ratio_se: float


def accuracy_retained(result: TaskResult, dense: TaskResult, *, seed: int = 0) -> Retained:
    """How much of the dense model's accuracy on a task a model retains.

    The plain ratio flatters: a model that guesses retains half of a perfect score on two options. Above chance it retains 0.
    Standard errors are half the width of the central 68 % of a paired bootstrap over items, both models on the same draws.

    Raises:
        ValueError: the two results are not of the same items.

    Warns:
        UserWarning: the dense model is not above chance in at least 95 % of the resamples; ``above_chance`` is then nan.
    """
    return _retained([result], [dense], dense.task, seed)


def task_rows(results: Iterable[TaskResult], dense_label: str, *, seed: int = 0) -> list[dict]:
    """One record a label and task, and one a label for all tasks together (task "average") where there are several.

    The average is of accuracies and of chances, every task with the same weight; what is retained is computed from these.

    Args:
        results: of any number of models, each on the same tasks and items.
        dense_label: which of them is the dense model.

    Returns:
        Records with label, task, metric, accuracy, accuracy_se, chance, accuracy_retained (above chance),
        accuracy_retained_se, accuracy_ratio, accuracy_ratio_se, items.

    Raises:
        ValueError: no dense model among the results, or models that were not measured on the same tasks and items.
    """
    by_label: dict[str, dict[str, TaskResult]] = {}
    for result in results:
        of_label = by_label.setdefault(result.label, {})
        if result.task in of_label:
            raise ValueError(f"Two results of {result.label!r} on {result.task}; each model needs a label of its own.")
        of_label[result.task] = result
    if dense_label not in by_label:
        raise ValueError(f"No result of the dense model, {dense_label!r}, among {', '.join(map(repr, by_label))}.")
    dense = by_label[dense_label]
    rows = []
    for label, of_label in by_label.items():
        if of_label.keys() != dense.keys():
            raise ValueError(f"{label!r} was measured on {', '.join(of_label)}, {dense_label!r} on {', '.join(dense)}.")
        rows += [_row(label, task, [of_label[task]], [dense[task]], seed) for task in dense]
        if len(dense) > 1:
            rows.append(_row(label, AVERAGE, [of_label[task] for task in dense], list(dense.values()), seed))
    return rows


def _row(label: str, task: str, results: Sequence[TaskResult], dense: Sequence[TaskResult], seed: int) -> dict:
    retained = _retained(results, dense, task, seed)
    return {
        "label": label,
        "task": task,
        "metric": ", ".join(dict.fromkeys(r.metric for r in results)),
        "accuracy": float(np.mean([r.accuracy for r in results])),
        "accuracy_se": float(np.sqrt(np.sum([r.standard_error**2 for r in results])) / len(results)),
        "chance": float(np.mean([r.chance for r in results])),
        "accuracy_retained": retained.above_chance,
        "accuracy_retained_se": retained.above_chance_se,
        "accuracy_ratio": retained.ratio,
        "accuracy_ratio_se": retained.ratio_se,
        "items": sum(r.n_items for r in results),
    }


def _retained(results: Sequence[TaskResult], dense: Sequence[TaskResult], name: str, seed: int) -> Retained:
    """Of the mean accuracy over tasks; items are drawn within each task."""
    for r, d in zip(results, dense, strict=True):
        if (r.task, r.metric) != (d.task, d.metric) or not np.array_equal(r.items, d.items):
            raise ValueError(
                f"{r.label!r} on {r.task} ({r.metric}, {r.n_items} items) and {d.label!r} on {d.task} ({d.metric}, "
                f"{d.n_items} items) are not of the same items: evaluate both with the same tasks and limit."
            )
    rng = np.random.default_rng(seed)
    draws = [rng.integers(d.n_items, size=(RESAMPLES, d.n_items)) for d in dense]
    chance = np.mean([d.chance for d in dense])
    accuracy, dense_accuracy = (np.mean([r.accuracy for r in of]) for of in (results, dense))
    drawn, dense_drawn = (np.mean([r.correct[i].mean(1) for r, i in zip(of, draws, strict=True)], 0) for of in (results, dense))

    ratio, ratio_se = _quotient(accuracy, dense_accuracy, drawn, dense_drawn)
    if np.mean(dense_drawn > chance) >= ABOVE_CHANCE:
        above, above_se = _quotient(accuracy - chance, dense_accuracy - chance, drawn - chance, dense_drawn - chance)
    else:
        above = above_se = float("nan")
        warnings.warn(
            f"{name}: the dense model's accuracy of {dense_accuracy:.3f} is not reliably above chance ({chance:.3f}) on "
            f"{sum(d.n_items for d in dense)} items, so what is retained of it is not defined; take more items.",
            stacklevel=3,
        )
    return Retained(above, above_se, ratio, ratio_se)


def _quotient(top: float, bottom: float, tops: np.ndarray, bottoms: np.ndarray) -> tuple[float, float]:
    """top ÷ bottom and its standard error from resamples: by quantiles, as a few draws may have a bottom near zero."""
    if bottom <= 0:
        return float("nan"), float("nan")
    low, high = np.quantile(tops[bottoms > 0] / bottoms[bottoms > 0], [0.1587, 0.8413])
    return float(top / bottom), float((high - low) / 2)
