"""Figures of notebook 06 and its study: merged feed-forward sublayers."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from .looks import INK, MERGING_LOOKS, readable
from .style import draw_lines, legend_above, log_ticks, panels, parts_by

DENSE = "dense"
RATIO = "perplexity ÷ dense"  # the measure that is drawn on a log axis: less is better


def merging(rows: pd.DataFrame) -> plt.Figure:
    """Score by the share of MLPs that is saved: a column of panels a task, above without tuning, below after it.

    Bars are 95 % intervals, the thin line is the dense model.

    Args:
        rows: task, measure (the axis), method (a look here, or "dense"), saved (share of MLPs), tuned (bool), score, ci_low,
            ci_high; and where it is known, tuned_on (tokens). A task of which nothing was tuned leaves its lower panel out.
    """
    tasks = parts_by(rows, "task")
    size = (2.5 * len(tasks) + 0.3, 4.6)
    figure, grid = plt.subplots(2, len(tasks), figsize=size, sharex="col", squeeze=False)
    for column, (task, of_task) in zip(grid.T, tasks.items(), strict=True):
        dense = of_task[of_task["method"] == DENSE].iloc[0]
        for axes, tuned in zip(column, (False, True), strict=True):
            part = of_task[(of_task["tuned"] == tuned) & (of_task["method"] != DENSE)]
            if part.empty:
                axes.set_visible(False)
                continue
            _draw_scores(axes, part, dense)
            axes.set_title(
                f"{readable(task)}\n{_tuning(part) if tuned else 'not tuned'}", fontsize=8
            )  # two lines: a panel is narrow
        lowest = [axes for axes in column if axes.get_visible()][-1]
        lowest.set_xlabel("share of MLPs saved")
        lowest.tick_params(labelbottom=True)
    legend_above(figure, len(MERGING_LOOKS) + 1, _methods(rows) | {DENSE: plt.Line2D([], [], color=INK, linewidth=1)})
    return figure


def _draw_scores(axes: plt.Axes, rows: pd.DataFrame, dense: pd.Series) -> None:
    """A line a method, and the score of the dense model."""
    draw_lines(axes, rows, ("method", "saved", "score", "ci_low", "ci_high"), MERGING_LOOKS)
    axes.axhline(dense["score"], color=INK, linewidth=1)
    axes.set_ylabel(dense["measure"])
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    if dense["measure"] == RATIO:
        axes.set_yscale("log")
        log_ticks(axes.yaxis, "×{x:g}")


def _tuning(rows: pd.DataFrame) -> str:
    tokens = rows["tuned_on"].max() if "tuned_on" in rows else float("nan")
    return "tuned" if np.isnan(tokens) else f"tuned on {tokens:,.0f} tokens"


def _methods(rows: pd.DataFrame) -> dict[str, plt.Line2D]:
    """Entries of a legend for the methods in ``rows``, at full size and without bars."""
    return {name: plt.Line2D([], [], **look) for name, look in MERGING_LOOKS.items() if name in set(rows["method"])}


def matching(rows: pd.DataFrame) -> plt.Figure:
    """Correlations between the units of two MLPs, with a ring around those that are matched.

    Args:
        rows: unit, other (of either MLP), correlation, matched (bool).
    """
    figure, axes = plt.subplots(figsize=(3.2, 2.6))
    table = rows.pivot(index="unit", columns="other", values="correlation")
    sns.heatmap(table, ax=axes, cmap="PuOr_r", vmin=-1, vmax=1, annot=True, fmt=".2f", square=True, cbar=False)
    pairs = rows[rows["matched"]]
    ring = dict(s=700, facecolors="none", edgecolors=INK, linewidths=1.5)
    axes.scatter(pairs["other"] + 0.5, pairs["unit"] + 0.5, **ring)
    axes.set(xlabel="unit of the other MLP", ylabel="unit of the one", title="correlation on the same tokens")
    axes.tick_params(length=0)
    return figure


def similarity_maps(rows: pd.DataFrame) -> plt.Figure:
    """Linear CKA between the hidden units of every two layers, a panel a stack of layers.

    Args:
        rows: stack (the title), layer_a, layer_b, cka; both orders of every pair and the diagonal.
    """
    stacks = parts_by(rows, "stack")
    figure, drawn = panels(stacks, (1.75 * len(stacks) + 0.7, 2.3))
    for axes, stack, part in drawn:
        table = part.pivot(index="layer_b", columns="layer_a", values="cka")
        every = -(-len(table) // 6)
        options = dict(xticklabels=every, yticklabels=every, cbar=False, square=True, rasterized=True)
        sns.heatmap(table, ax=axes, cmap="viridis", vmin=0, vmax=1, **options)
        axes.set(title=stack, xlabel="layer", ylabel="layer" if axes is drawn[0][0] else "")
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelrotation=0)
        axes.invert_yaxis()
    bar = {"label": "linear CKA", "fraction": 0.03, "pad": 0.01}
    figure.colorbar(drawn[0][0].collections[0], ax=[axes for axes, *_ in drawn], **bar)
    return figure


def start_of_window(rows: pd.DataFrame) -> plt.Figure:
    """Score on validation data by the first layer of the window that is merged or dropped; a ring around the best.

    Args:
        rows: stack (a panel), method, start, score (a loss: less is better), best (bool); one size of window a panel and method.
    """
    stacks = parts_by(rows, "stack")
    figure, drawn = panels(stacks, (1.9 * len(stacks) + 0.4, 2.6))
    for axes, stack, part in drawn:
        draw_lines(axes, part, ("method", "start", "score"), MERGING_LOOKS, markersize=3)
        best = part[part["best"]]
        axes.plot(best["start"], best["score"], linestyle="", marker="o", markersize=8, fillstyle="none", color=INK)
        axes.set(yscale="log", title=stack, xlabel="first layer of the window")
        log_ticks(axes.yaxis)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    drawn[0][0].set_ylabel("validation loss")
    methods = _methods(rows)
    legend_above(figure, len(methods), methods)
    return figure
