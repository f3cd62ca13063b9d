"""Figures of merged feed-forward sublayers: notebook 06."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .style import LOOKS, plain_log_ticks

MERGING_LOOKS = {
    "merged": LOOKS["Merged"],
    "unpermuted": {"color": "#E69F00", "marker": "D", "linestyle": "-."},
    "dropped": LOOKS["Removed"],
    "replaced": LOOKS["NarrowMLP"] | {"linestyle": "--"},
}
DENSE = "dense"
RATIO = "perplexity ÷ dense"  # the measure that is drawn on a log axis: less is better


def merging(rows: pd.DataFrame) -> Figure:
    """Score by the share of MLPs that is saved: a column of panels a task, above as they stand, below after tuning.

    Bars are 95 % intervals, the thin line is the dense model.

    Args:
        rows: task, measure (the axis), method (a look here, or "dense"), saved (share of MLPs), tuned (bool), score, ci_low,
            ci_high; and where it is known, tuned_on (tokens). A task of which nothing was tuned leaves its lower panel out.
    """
    tasks = list(rows["task"].unique())
    size = (2.5 * len(tasks) + 0.3, 4.6)
    figure, panels = plt.subplots(2, len(tasks), figsize=size, sharex="col", squeeze=False)
    for column, task in zip(panels.T, tasks, strict=True):
        of_task = rows[rows["task"] == task]
        dense = of_task[of_task["method"] == DENSE].iloc[0]
        for axes, tuned in zip(column, (False, True), strict=True):
            part = of_task[(of_task["tuned"] == tuned) & (of_task["method"] != DENSE)]
            if part.empty:
                axes.set_visible(False)
                continue
            _scores(axes, part)
            axes.axhline(dense["score"], color="0.2", linewidth=1)
            axes.set_title(f"{task}\n{_tuning(part) if tuned else 'not tuned'}", fontsize=8)  # two lines: a panel is narrow
            axes.set_ylabel(dense["measure"])
            axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
            if dense["measure"] == RATIO:
                axes.set_yscale("log")
                plain_log_ticks(axes.yaxis, "×%g")
        shown = [axes for axes in column if axes.get_visible()]
        shown[-1].set_xlabel("share of MLPs saved")
        shown[-1].tick_params(labelbottom=True)
    figure.legend(*_legend(rows["method"]), loc="outside upper center", ncols=len(MERGING_LOOKS) + 1)
    return figure


def _scores(axes: Axes, rows: pd.DataFrame) -> None:
    for method, line in rows.groupby("method", sort=False):
        line = line.sort_values("saved")
        span = np.stack([line["score"] - line["ci_low"], line["ci_high"] - line["score"]]).clip(0)
        axes.errorbar(line["saved"], line["score"], yerr=span, capsize=2, elinewidth=0.8, **MERGING_LOOKS[method])


def _tuning(rows: pd.DataFrame) -> str:
    tokens = rows["tuned_on"].max() if "tuned_on" in rows else float("nan")
    return "tuned" if np.isnan(tokens) else f"tuned on {tokens:,.0f} tokens"


def _legend(methods: pd.Series) -> tuple[list[Line2D], list[str]]:
    """A handle a method that is drawn, in the order of the looks, and the dense model."""
    names = [name for name in MERGING_LOOKS if name in set(methods)]
    dense = Line2D([], [], color="0.2", linewidth=1)
    return [*(Line2D([], [], **MERGING_LOOKS[name]) for name in names), dense], [*names, DENSE]


def similarity_maps(rows: pd.DataFrame) -> Figure:
    """Linear CKA between the hidden units of every two layers, a panel a stack of layers.

    Args:
        rows: stack (the title), layer_a, layer_b, cka; both orders of every pair and the diagonal.
    """
    stacks = list(rows["stack"].unique())
    figure, panels = plt.subplots(1, len(stacks), figsize=(1.75 * len(stacks) + 0.7, 2.3), squeeze=False)
    for axes, stack in zip(panels[0], stacks, strict=True):
        table = rows[rows["stack"] == stack].pivot(index="layer_b", columns="layer_a", values="cka")
        every = -(-len(table) // 6)
        options = dict(xticklabels=every, yticklabels=every, cbar=False, square=True, rasterized=True)
        sns.heatmap(table, ax=axes, cmap="viridis", vmin=0, vmax=1, **options)
        axes.set(title=stack, xlabel="layer", ylabel="layer" if stack == stacks[0] else "")
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelrotation=0)
        axes.invert_yaxis()
    figure.colorbar(panels[0, 0].collections[0], ax=panels[0], label="linear CKA", fraction=0.03, pad=0.01)
    return figure


def start_of_window(rows: pd.DataFrame) -> Figure:
    """Score on validation data by the first layer of the window that is merged or dropped; a ring around the best.

    Args:
        rows: stack (a panel), method, start, score (a loss: less is better), best (bool); one size of window a panel and method.
    """
    stacks = list(rows["stack"].unique())
    figure, panels = plt.subplots(1, len(stacks), figsize=(1.9 * len(stacks) + 0.4, 2.6), squeeze=False)
    for axes, stack in zip(panels[0], stacks, strict=True):
        part = rows[rows["stack"] == stack]
        for method, line in part.groupby("method", sort=False):
            axes.plot(line["start"], line["score"], markersize=3, **MERGING_LOOKS[method])
        best = part[part["best"]]
        axes.plot(best["start"], best["score"], linestyle="", marker="o", markersize=8, fillstyle="none", color="0.2")
        axes.set(yscale="log", title=stack, xlabel="first layer of the window")
        plain_log_ticks(axes.yaxis)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    panels[0][0].set_ylabel("validation loss")
    handles, names = _legend(rows["method"])
    figure.legend(handles[:-1], names[:-1], loc="outside upper center", ncols=len(names))
    return figure
