"""Figures of notebook 05 and its study: methods side by side at one sparsity."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .looks import INK, KIND_LOOKS, METHOD_LOOKS, readable
from .style import AVERAGE, WIDEST, draw_lines, error_bars, kept_maps, legend_above, log_ticks

KIND_NAMES = {"attention": "attention", "mlp": "MLP"}
SINGLE_TASKS = "+x1234|_"  # a marker a task, of strokes only: those of methods are filled or hollow
HEALED = " + healing"


def selection_map(rows: pd.DataFrame) -> plt.Figure:
    """What methods keep of attention and of MLP: layer across, dark is kept; a panel a method.

    Args:
        rows: method, layer, kind ("attention" or "mlp"), kept (share of the block's parameters); one sparsity.
    """
    return kept_maps(rows, "kind", KIND_NAMES.get, inches=0.2)


def redundancy(rows: pd.DataFrame) -> plt.Figure:
    """Attention against MLP by layer: how much a block changes the residual stream, and what a bypass in its place costs.

    Args:
        rows: layer, kind ("attention" or "mlp"), magnitude and rotation (means over tokens), damage_per_million (nats per token
            and million parameters saved).
    """
    measures = {
        "magnitude": ("magnitude", "‖a‖ / ‖r‖"),
        "rotation": ("rotation", "1 − cos(r, r + a)"),
        "damage_per_million": ("cost of a bypass", "nats per million saved"),
    }
    figure, grid = plt.subplots(1, 3, figsize=(6.8, 2.6))
    for axes, (column, (title, label)) in zip(grid, measures.items(), strict=True):
        draw_lines(axes, rows.replace({"kind": KIND_NAMES}), ("kind", "layer", column), KIND_LOOKS, markersize=3)
        axes.set(yscale="log", title=title, xlabel="layer", ylabel=label)
        log_ticks(axes.yaxis, subs=(1, 3))
    legend_above(figure, 2)
    return figure


def speed_by_method(rows: pd.DataFrame) -> plt.Figure:
    """Speed-up of prefill and of decoding, and the share of the KV cache that is left: a line a method, at one sparsity.

    Bars are 95 % intervals. Ticks are the ideal of each: a ratio of FLOPs for prefill, of bytes read for decoding.

    Args:
        rows: those of :func:`~mlpreplace.evaluation.speed_rows`, without the dense model; methods of the comparison.
    """
    figure, grid = plt.subplots(1, 3, figsize=(6.8, 1.1 + 0.22 * len(rows)), sharey=True)
    y = np.arange(len(rows))[::-1]
    bar = {"linestyle": "", "elinewidth": 0.9, "color": "0.5", "zorder": 1}
    ideal = {"linestyle": "", "marker": "|", "markersize": 11, "color": "0.1"}
    for axes, phase in zip(grid, ("prefill", "decode"), strict=False):
        error_bars(axes, rows[f"{phase}_speedup"], y, rows[f"{phase}_low"], rows[f"{phase}_high"], across=True, **bar)
        axes.plot(rows[f"{phase}_ideal"], y, label="ideal", **ideal)
        _draw_marks(axes, rows["method"], rows[f"{phase}_speedup"], y)
        axes.set(title=phase, xlabel="speed-up")
        axes.xaxis.set_major_formatter("×{x:g}")
    _draw_marks(grid[2], rows["method"], rows["kv_cache_fraction"], y)
    grid[2].set(title="KV cache", xlabel="share kept", xlim=(0, 1.08))
    grid[2].xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    for axes in grid:
        axes.axvline(1, color=INK, linewidth=1)
    grid[0].set_yticks(y, rows["method"].map(readable))
    legend_above(figure, 1)
    return figure


def tasks_by_method(rows: pd.DataFrame) -> plt.Figure:
    """Accuracy retained above chance, a line a method: the average with its standard error, and every task in small.

    1 is the dense model, 0 is guessing. A task on which the dense model is not above chance is left out.

    Args:
        rows: method, task, accuracy_retained, accuracy_retained_se as of :func:`~mlpreplace.evaluation.task_rows`, without the
            dense model, at one sparsity; methods of the comparison.
    """
    methods = list(rows["method"].unique())
    y = pd.Series(np.arange(len(methods))[::-1], methods)
    figure, axes = plt.subplots(figsize=(6.8, 1.1 + 0.24 * len(methods)))
    single = rows[(rows["task"] != AVERAGE) & rows["accuracy_retained"].notna()]
    for (task, part), marker in zip(single.groupby("task", sort=False), SINGLE_TASKS, strict=False):
        look = {"linestyle": "", "marker": marker, "color": "0.45", "markersize": 6, "markeredgewidth": 1}
        axes.plot(part["accuracy_retained"].clip(*WIDEST), y[part["method"]], label=readable(task), **look)
    mean = rows[rows["task"] == AVERAGE]
    x, places = mean["accuracy_retained"], y[mean["method"]]
    axes.errorbar(x, places, xerr=mean["accuracy_retained_se"], linestyle="", capsize=2, elinewidth=1, color="0.3")
    _draw_marks(axes, mean["method"], x, places)
    axes.axvline(1, color=INK, linewidth=1)
    axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.set(xlabel="accuracy above chance ÷ dense (large: average of the tasks)")
    axes.set_yticks(y, map(readable, methods))
    axes.set_ylim(-0.6, len(methods) - 0.4)
    axes.grid(axis="y", linewidth=0.4, color="0.9")
    legend_above(figure, 4)
    return figure


def _draw_marks(axes: plt.Axes, methods: pd.Series, x: pd.Series, y) -> None:
    """A mark a method; hollow where its plan was healed."""
    for method, at, height in zip(methods, x, y, strict=True):
        name = method.removesuffix(HEALED)
        style = {"linestyle": "", "markersize": 6, "fillstyle": "full" if name == method else "none"}
        axes.plot(at, height, **METHOD_LOOKS[name] | style)
