"""The share of the dense model's accuracy that a compressed model retains, with standard errors paired over items."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import numpy as np

from ..perplexity import resample
from .run import TaskResult

AVERAGE = "average"  # the row of all tasks together
ABOVE_CHANCE = 0.95  # share of resamples in which the dense model has to be above chance


def accuracy_retained(results: Sequence[TaskResult], dense: Sequence[TaskResult], *, seed: int = 0) -> dict[str, float]:
    """Share that a model retains of the dense model's accuracy on a task, or of the mean accuracy over several tasks.

    A plain ratio is misleading: with two options, a model that guesses retains half of a perfect score, and 0 above chance.
    A standard error is half the width of the central 68 % of a paired bootstrap over items, which are drawn within each task.

    Args:
        results: one of each task.
        dense: those of the dense model, in the same order.

    Returns:
        accuracy_retained, (accuracy − chance) ÷ (dense accuracy − chance); accuracy_ratio, accuracy ÷ dense accuracy; and their
        standard errors, accuracy_retained_se and accuracy_ratio_se.

    Raises:
        ValueError: the results are not of the same items.

    Warns:
        UserWarning: the dense model is above chance in less than 95 % of the resamples; accuracy_retained is then nan.
    """
    for r, d in zip(results, dense, strict=True):
        if (r.task, r.metric) != (d.task, d.metric) or not np.array_equal(r.items, d.items):
            raise ValueError(
                f"{r.label!r} on {r.task} ({r.metric}, {r.n_items} items) and {d.label!r} on {d.task} ({d.metric}, "
                f"{d.n_items} items) are not of the same items: evaluate both with the same tasks and limit."
            )
    rng = np.random.default_rng(seed)
    draws = [resample(d.n_items, rng) for d in dense]  # the same for both models
    chance = np.mean([d.chance for d in dense])
    accuracy, dense_accuracy = (np.mean([r.accuracy for r in of]) for of in (results, dense))
    drawn, dense_drawn = (np.mean([r.correct[i].mean(1) for r, i in zip(of, draws, strict=True)], 0) for of in (results, dense))

    ratio, ratio_se = _quotient(accuracy, dense_accuracy, drawn, dense_drawn)
    if np.mean(dense_drawn > chance) >= ABOVE_CHANCE:
        above, above_se = _quotient(accuracy - chance, dense_accuracy - chance, drawn - chance, dense_drawn - chance)
    else:
        above = above_se = float("nan")
        warnings.warn(
            f"{' + '.join(d.task for d in dense)}: the dense model's accuracy of {dense_accuracy:.3f} is not reliably above "
            f"chance ({chance:.3f}) on {sum(d.n_items for d in dense)} items, so accuracy_retained is nan; take more items.",
            stacklevel=2,
        )
    return {
        "accuracy_retained": above,
        "accuracy_retained_se": above_se,
        "accuracy_ratio": ratio,
        "accuracy_ratio_se": ratio_se,
    }


def above_chance(dense: TaskResult, *, seed: int = 0) -> bool:
    """Whether the accuracy is above chance in 95 % of the resamples of the items, or more."""
    drawn = dense.correct[resample(dense.n_items, np.random.default_rng(seed))].mean(1)
    return bool(np.mean(drawn > dense.chance) >= ABOVE_CHANCE)


def _quotient(top: float, bottom: float, tops: np.ndarray, bottoms: np.ndarray) -> tuple[float, float]:
    """top ÷ bottom and its standard error, from quantiles of resamples: in a few resamples the bottom may be near zero."""
    if bottom <= 0:
        return float("nan"), float("nan")
    low, high = np.quantile(tops[bottoms > 0] / bottoms[bottoms > 0], [0.1587, 0.8413])
    return float(top / bottom), float((high - low) / 2)


def task_rows(results: Iterable[TaskResult], dense_label: str, *, seed: int = 0) -> list[dict]:
    """One record for each label and task, and one for the average over tasks (task "average") where there are several.

    Accuracies and chances are averaged with the same weight for every task; retained shares are computed from the averages. A
    task at which the dense model is not reliably above chance has records and is left out of the average: it would add noise to
    both sides of the ratio. Where it is above chance at none, all are averaged.

    Args:
        results: those of all models, each on the same tasks and items.
        dense_label: the label of the dense model.

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
    averaged = [task for task, r in dense.items() if above_chance(r, seed=seed)] or list(dense)
    rows = []
    for label, of_label in by_label.items():
        if of_label.keys() != dense.keys():
            raise ValueError(f"{label!r} was measured on {', '.join(of_label)}, {dense_label!r} on {', '.join(dense)}.")
        rows += [_row(label, task, [of_label[task]], [dense[task]], seed) for task in dense]
        if len(dense) > 1:
            rows.append(_row(label, AVERAGE, [of_label[task] for task in averaged], [dense[task] for task in averaged], seed))
    return rows


def _row(label: str, task: str, results: Sequence[TaskResult], dense: Sequence[TaskResult], seed: int) -> dict:
    return {
        "label": label,
        "task": task,
        "metric": ", ".join(dict.fromkeys(r.metric for r in results)),
        "accuracy": float(np.mean([r.accuracy for r in results])),
        "accuracy_se": float(np.sqrt(np.sum([r.standard_error**2 for r in results])) / len(results)),
        "chance": float(np.mean([r.chance for r in results])),
        **accuracy_retained(results, dense, seed=seed),
        "items": sum(r.n_items for r in results),
    }
