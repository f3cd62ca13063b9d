"""Figures of task accuracy: what of the dense model's ability is left."""

from __future__ import annotations

from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# By a method's place among the methods: Okabe-Ito colours; markers and lines tell them apart in greyscale.
METHOD_CYCLE = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "D", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "^", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": "--"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "-"},
    {"color": "#000000", "marker": "X", "linestyle": "-."},
)
WIDEST = (-0.75, 1.75)  # of the shared axis: an error bar may be longer
AVERAGE = "average"


def tasks(rows: pd.DataFrame) -> Figure:
    """Accuracy retained above chance against sparsity, a panel a task and the average last, a line a method.

    1 is the dense model, 0 is guessing; bars are standard errors. A task on which the dense model is not above chance has
    nothing to retain, and its panel says so.

    Args:
        rows: method, sparsity, task, accuracy, accuracy_se, chance, accuracy_retained, accuracy_retained_se, as of
            :func:`~mlpreplace.tasks.task_rows`; method "dense" included, one row a task.
    """
    names = sorted(rows["task"].unique(), key=lambda task: task == AVERAGE)  # stable: the order of the rows otherwise
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    size = (6.8, 0.5 + 2.3 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    methods = [method for method in rows["method"].unique() if method != "dense"]
    looks = dict(zip(methods, cycle(METHOD_CYCLE), strict=False))
    for axes, name in zip(panels.flat, names, strict=False):
        _panel(axes, rows[rows["task"] == name], name, looks)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    for axes in panels.flat[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("sparsity (%)")
        axes.tick_params(labelbottom=True)
    spread = rows["accuracy_retained_se"].fillna(0)
    low, high = (rows["accuracy_retained"] - spread).min(), (rows["accuracy_retained"] + spread).max()
    axes.set_ylim(max(WIDEST[0], np.fmin(low, 0) - 0.1), min(WIDEST[1], np.fmax(high, 1) + 0.1))
    figure.supylabel("accuracy above chance ÷ dense", fontsize=9)
    handles = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    return figure


def _panel(axes: Axes, part: pd.DataFrame, name: str, looks: dict[str, dict]) -> None:
    dense = part[part["method"] == "dense"].iloc[0]
    axes.axhline(1, color="0.2", linewidth=1)
    axes.axhline(0, color="0.2", linewidth=1, linestyle=(0, (1, 2)))
    axes.plot(0, 1, marker="*", color="0.2", markersize=8, clip_on=False)
    if np.isnan(dense["accuracy_retained"]):
        axes.text(0.5, 0.5, "dense model not\nabove chance", transform=axes.transAxes, ha="center", va="center", fontsize=8)
    for place, (method, look) in enumerate(looks.items()):
        line = part[(part["method"] == method) & part["accuracy_retained"].notna()].sort_values("sparsity")
        x = line["sparsity"] + 0.004 * (place - (len(looks) - 1) / 2)  # beside each other
        y, bar = line["accuracy_retained"], line["accuracy_retained_se"]
        axes.errorbar(x, y, yerr=bar, capsize=2, elinewidth=0.8, markersize=4, label=method, **look)
    axes.set_title(name.removeprefix("bundled/"))
    small = {"fontsize": 7, "fontweight": "normal", "color": "0.2"}
    axes.set_title(f"dense {dense['accuracy']:.2f} ± {dense['accuracy_se']:.2f}", loc="right", **small)
    axes.annotate(f"chance {dense['chance']:.2f}", (0, 0), xytext=(2, 3), textcoords="offset points", **small)
    axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.125))
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
