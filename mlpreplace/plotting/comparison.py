"""Figures of methods side by side at one sparsity: notebook 05."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .models import BASELINE_LOOKS
from .style import plain_log_ticks
from .tasks import AVERAGE, WIDEST

KIND_LOOKS = {
    "attention": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "mlp": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
}
SINGLE_TASKS = "+x1234|_"  # a marker a task, of strokes only: a method's are filled, or hollow
HEALED = " + healing"


def speed_by_method(rows: pd.DataFrame) -> Figure:
    """Speed-up of prefill and of decoding, and the part of the cache that is left: a line a method, at one sparsity.

    Bars are 95 % intervals, ticks the ideal of each: a ratio of FLOPs, and one of bytes read.

    Args:
        rows: those of :func:`~mlpreplace.speed.speed_rows`, without the dense model; methods of the comparison.
    """
    figure, panels = plt.subplots(1, 3, figsize=(6.8, 1.1 + 0.22 * len(rows)), sharey=True)
    y = np.arange(len(rows))[::-1]
    for axes, phase in zip(panels, ("prefill", "decode"), strict=False):
        measured = rows[f"{phase}_speedup"]
        span = [measured - rows[f"{phase}_low"], rows[f"{phase}_high"] - measured]
        axes.errorbar(measured, y, xerr=span, linestyle="", elinewidth=0.9, capsize=2, color="0.5", zorder=1)
        axes.plot(rows[f"{phase}_ideal"], y, linestyle="", marker="|", markersize=11, color="0.1", label="ideal")
        _dots(axes, rows["method"], measured, y)
        axes.axvline(1, color="0.2", linewidth=1)
        axes.set(title=phase, xlabel="speed-up")
        axes.xaxis.set_major_formatter("×{x:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center")
    _dots(panels[2], rows["method"], rows["kv_cache_fraction"], y)
    panels[2].set(title="KV cache", xlabel="share kept", xlim=(0, 1.08))
    panels[2].axvline(1, color="0.2", linewidth=1)
    panels[2].xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    panels[0].set_yticks(y, rows["method"])
    return figure


def tasks_by_method(rows: pd.DataFrame) -> Figure:
    """Accuracy retained above chance, a line a method: the average with its standard error, and every task in small.

    1 is the dense model, 0 is guessing. A task on which the dense model is not above chance is left out.

    Args:
        rows: method, task, accuracy_retained, accuracy_retained_se as of :func:`~mlpreplace.tasks.task_rows`, without the dense
            model, at one sparsity; methods of the comparison.
    """
    methods = list(rows["method"].unique())
    y = pd.Series(np.arange(len(methods))[::-1], methods)
    figure, axes = plt.subplots(figsize=(6.8, 1.1 + 0.24 * len(methods)))
    single = rows[(rows["task"] != AVERAGE) & rows["accuracy_retained"].notna()]
    for (task, part), marker in zip(single.groupby("task", sort=False), SINGLE_TASKS, strict=False):
        look = {"linestyle": "", "marker": marker, "color": "0.45", "markersize": 6, "markeredgewidth": 1}
        axes.plot(part["accuracy_retained"].clip(*WIDEST), y[part["method"]], label=task.removeprefix("bundled/"), **look)
    mean = rows[rows["task"] == AVERAGE]
    places = y[mean["method"]]
    axes.errorbar(
        mean["accuracy_retained"], places, xerr=mean["accuracy_retained_se"], linestyle="", capsize=2, elinewidth=1, color="0.3"
    )
    _dots(axes, mean["method"], mean["accuracy_retained"], places)
    axes.axvline(1, color="0.2", linewidth=1)
    axes.axvline(0, color="0.2", linewidth=1, linestyle=(0, (1, 2)))
    axes.set(xlabel="accuracy above chance ÷ dense (large: average of the tasks)")
    axes.set_yticks(y, methods)
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.grid(axis="y", linewidth=0.4, color="0.9")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def redundancy(rows: pd.DataFrame) -> Figure:
    """Attention against MLP by layer: how much a block changes the residual stream, and what a bypass in its place costs.

    Args:
        rows: layer, kind ("attention" or "mlp"), magnitude and rotation (means over tokens), damage_per_million (nats per token
            and million parameters saved).
    """
    panels_of = {
        "magnitude": ("magnitude", "‖a‖ / ‖r‖"),
        "rotation": ("rotation", "1 − cos(r, r + a)"),
        "damage_per_million": ("cost of a bypass", "nats per million saved"),
    }
    figure, panels = plt.subplots(1, 3, figsize=(6.8, 2.6))
    for axes, (column, (title, label)) in zip(panels, panels_of.items(), strict=True):
        for kind, look in KIND_LOOKS.items():
            part = rows[rows["kind"] == kind].sort_values("layer")
            axes.plot(part["layer"], part[column], markersize=3, label={"mlp": "MLP"}.get(kind, kind), **look)
        axes.set(yscale="log", title=title, xlabel="layer", ylabel=label)
        plain_log_ticks(axes.yaxis, subs=(1, 3))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _dots(axes: Axes, methods: pd.Series, x: pd.Series, y) -> None:
    """A mark a method; hollow where its plan was healed."""
    for method, at, height in zip(methods, x, y, strict=True):
        name = method.removesuffix(HEALED)
        look = {k: v for k, v in BASELINE_LOOKS[name].items() if k != "linestyle"}
        axes.plot(at, height, linestyle="", markersize=6, fillstyle="full" if name == method else "none", **look)
