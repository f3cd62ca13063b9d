"""Figures of notebook 04 and its studies: whole models, their perplexity, tasks, speed and size."""

from __future__ import annotations

import textwrap
from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .looks import FAMILY_LOOKS, INK, METHOD_LOOKS, QUANTIZATION_LOOKS, SERIES_LOOKS, Look, readable
from .style import (
    AVERAGE,
    WIDEST,
    draw_lines,
    error_bars,
    kept_maps,
    legend_above,
    log_ticks,
    note,
    panels,
    parts_by,
    percent,
    sparsity_axis,
)

CEILING = 10  # of perplexity ratios that are drawn: beyond it a model is broken, and how badly is of little interest
PHASES = {"prefill": "prefill: ideal is a ratio of FLOPs", "decode": "decode: ideal is a ratio of bytes read"}


def pareto(rows: pd.DataFrame) -> plt.Figure:
    """Perplexity ratio with its interval against sparsity, a panel a domain, a line a method; the dense model is 1.

    Lines leave the panel above ×10; a note in the panel says how far.

    Args:
        rows: method, sparsity_achieved, domain, perplexity, perplexity_ratio, ci_low, ci_high; method "dense" included.
    """
    figure, drawn = panels(parts_by(rows, "domain"), (6.8, 3.5), sharey=True)
    columns = "method", "sparsity_achieved", "perplexity_ratio", "ci_low", "ci_high"
    for axes, domain, part in drawn:
        dense = part[part["method"] == "dense"].iloc[0]
        draw_lines(axes, part[part["method"] != "dense"], columns, METHOD_LOOKS)
        axes.axhline(1, color=INK, linewidth=1)
        axes.plot(0, 1, marker="*", color=INK, markersize=9)
        note(axes, f"dense: {dense['perplexity']:.1f}", (0, 1), (-3, 7), fontsize=7.5, color=INK)
        sparsity_axis(axes)
        axes.set(yscale="log", title=readable(domain))
        log_ticks(axes.yaxis, "×{x:g}", (1, 1.5, 2, 3, 5, 7))
        axes.set_ylim(0.85, min(1.08 * rows["ci_high"].max(), CEILING))
        beyond = part[part["perplexity_ratio"] > CEILING].groupby("method")["perplexity_ratio"].max().sort_values()
        if len(beyond):
            off = f"above ×{CEILING}, at most: " + ", ".join(f"{readable(name)} ×{ratio:.0f}" for name, ratio in beyond.items())
            axes.text(0.02, 0.98, textwrap.fill(off, 34), transform=axes.transAxes, fontsize=6, color="0.35", va="top")
    drawn[0][0].set_ylabel("perplexity ÷ dense perplexity")
    legend_above(figure, 6, columnspacing=1)
    return figure


def kept_by_layer(rows: pd.DataFrame) -> plt.Figure:
    """What allocations keep of every block: layer across, sparsity down, dark is kept; a panel a method.

    Args:
        rows: method, layer, sparsity, kept (share of the block's parameters).
    """
    figure = kept_maps(rows, "sparsity", lambda s: f"{100 * s:.4g} %", inches=0.32)
    for axes in figure.axes[:-1]:  # the last one is the colour bar
        axes.set_ylabel("sparsity")
    return figure


def speed(rows: pd.DataFrame) -> plt.Figure:
    """Measured and ideal speed-up against sparsity, prefill and decode in a panel each; the dense model is 1.

    Args:
        rows: those of :func:`~mlpreplace.evaluation.speed_rows`, the dense model included, of one family of plans: a line
            connects them by sparsity_achieved.
    """
    rows = rows.sort_values("sparsity_achieved")
    x, look = rows["sparsity_achieved"], FAMILY_LOOKS["NarrowMLP"]
    figure, grid = plt.subplots(1, 2, figsize=(6.8, 3.0), sharey=True)
    for axes, (phase, title) in zip(grid, PHASES.items(), strict=True):
        y, ideal = rows[f"{phase}_speedup"], rows[f"{phase}_ideal"]
        axes.plot(x, ideal, color="0.45", linestyle="--", linewidth=1.2)
        _label(axes, "ideal", (x.iloc[-1], ideal.iloc[-1]), (-6, 4), "0.35")
        error_bars(axes, x, y, rows[f"{phase}_low"], rows[f"{phase}_high"], capsize=2.5, elinewidth=0.9, **look)
        for sparsity, value, most in zip(x, y, ideal, strict=True):
            if sparsity:
                _label(axes, f"{100 * value / most:.0f} % of ideal", (sparsity, value), (4, -12), look["color"])
        axes.axhline(1, color=INK, linewidth=1)
        axes.plot(0, 1, marker="*", color=INK, markersize=10, zorder=4)
        _label(axes, "dense", (0, 1), (5, -10), INK)
        axes.set_title(title)
        sparsity_axis(axes)
        axes.yaxis.set_major_formatter("×{x:g}")
        axes.margins(y=0.12)
        axes.set_xlim(-0.08 * x.max(), 1.3 * x.max())  # room for the labels
    grid[0].set_ylabel("speed-up over the dense model")
    return figure


def quantization(rows: pd.DataFrame) -> plt.Figure:
    """Do the gains of replacing and of int8 multiply? Four models as a parallelogram: size against perplexity and speed.

    Both axes are logarithmic: factors that multiply give parallel sides. A hollow mark shows the product of both factors. Where
    int8 was not measured, two models are left, and the title says so.

    Args:
        rows: method, quantized and replaced (bools; all four pairs, or those without int8), parameter_mb, perplexity, ci_low,
            ci_high (of the perplexity), prefill_speedup, prefill_low, prefill_high.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 3.3), sharex=True)
    _draw_parallelogram(left, rows, ("perplexity", "ci_low", "ci_high"), "{x:g}")
    _draw_parallelogram(right, rows, ("prefill_speedup", "prefill_low", "prefill_high"), "×{x:g}")
    left.set(ylabel="held-out perplexity", title="what it costs")
    right.set(ylabel="prefill speed-up", title="what it gains")
    if not rows["quantized"].any():
        figure.suptitle("int8 was not measured on this device")
    legend_above(figure, 5, columnspacing=1)
    return figure


def _draw_parallelogram(axes: plt.Axes, rows: pd.DataFrame, columns: tuple[str, str, str], form: str) -> None:
    """The four models by size and by one measure, whose ``columns`` are (value, low, high)."""
    corners = {(bool(r["quantized"]), bool(r["replaced"])): r for _, r in rows.iterrows()}
    place = {key: (row["parameter_mb"], row[columns[0]]) for key, row in corners.items()}
    dense, int8, replaced, both = (place.get(key) for key in QUANTIZATION_LOOKS)
    for start, end in ((dense, int8), (dense, replaced), (int8, both), (replaced, both)):
        if start and end:
            axes.plot(*zip(start, end, strict=True), color="0.6", linewidth=1, zorder=1)
    if int8:
        product = [a * b / d for a, b, d in zip(int8, replaced, dense, strict=True)]
        axes.plot(*product, **QUANTIZATION_LOOKS[True, True], ms=9, fillstyle="none", zorder=2, label="product of both factors")
    for (quantized, compressed), look in QUANTIZATION_LOOKS.items():
        if (quantized, compressed) not in place:
            continue
        value, low, high = corners[quantized, compressed][list(columns)]
        about = {"label": corners[quantized, compressed]["method"], "ms": 6 if quantized or compressed else 10}
        error_bars(axes, place[quantized, compressed][0], value, low, high, capsize=2.5, elinewidth=0.9, **look, **about)
    axes.set(xscale="log", yscale="log", xlabel="parameters (MB)")
    axes.margins(x=0.2, y=0.2)
    log_ticks(axes.xaxis, subs=(1, 1.5, 2, 3, 4, 6))
    log_ticks(axes.yaxis, form, subs=(1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6))


def megabytes(rows: pd.DataFrame) -> plt.Figure:
    """Perplexity ratio with its interval against megabytes, a panel a domain, a line a form of the weights.

    A line begins at the dense model, a star, and goes on to ever fewer parameters. No model is smaller and better than those on
    the grey steps. Ratios above ×10 are not drawn.

    Args:
        rows: form, sparsity, domain, megabytes, perplexity_ratio, ci_low, ci_high.
    """
    figure, drawn = panels(parts_by(rows, "domain"), (6.8, 3.8), sharey=True)
    columns = "form", "megabytes", "perplexity_ratio", "ci_low", "ci_high"
    looks = dict(zip(rows["form"].unique(), SERIES_LOOKS, strict=False))
    for axes, domain, part in drawn:
        best = part.sort_values("megabytes")
        best = best[best["perplexity_ratio"] < best["perplexity_ratio"].shift().cummin().fillna(np.inf)]
        axes.step(best["megabytes"], best["perplexity_ratio"], where="post", color="0.8", linewidth=4, zorder=0)
        draw_lines(axes, part, columns, looks)
        for _, row in part.iterrows():
            at = row["megabytes"], row["perplexity_ratio"]
            if row["sparsity"] == 0:
                axes.plot(*at, marker="*", color=INK, markersize=9, zorder=4)
            elif at[1] <= CEILING:
                note(axes, percent(row["sparsity"]), at, (5, 2), fontsize=6, color=looks[row["form"]]["color"])
        axes.set(xscale="log", yscale="log", xlabel="megabytes", title=readable(domain))
        log_ticks(axes.xaxis, subs=(1, 1.5, 2, 3, 4, 5, 6, 8))
        log_ticks(axes.yaxis, "×{x:g}", (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7))
        axes.set_ylim(0.95, min(1.08 * rows["ci_high"].max(), CEILING))
    drawn[0][0].set_ylabel("perplexity ÷ dense perplexity")
    legend_above(figure, 6)
    return figure


def _label(axes: plt.Axes, text: str, point: tuple[float, float], offset: tuple[int, int], color: str) -> None:
    """A note on a white ground, under which lines and bars pass."""
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    note(axes, text, point, offset, ha="right" if offset[0] < 0 else "left", fontsize=7.5, color=color, bbox=ground)


def healing_curves(rows: pd.DataFrame) -> plt.Figure:
    """KL divergence on validation windows against tokens that healing has read; a line a sparsity and number of steps.

    The first mark of a line is the plan before healing. A ring shows where a line is least: that state is kept.

    Args:
        rows: sparsity, steps, tokens, kl (nats per token).
    """
    figure, axes = plt.subplots(figsize=(6.8, 3.6))
    for (sparsity, part), look in zip(parts_by(rows, "sparsity").items(), cycle(SERIES_LOOKS), strict=False):
        for (steps, line), style in zip(parts_by(part, "steps").items(), cycle(("--", "-")), strict=False):
            label = f"{percent(sparsity)} sparsity, {steps} steps"
            axes.plot(line["tokens"], line["kl"], label=label, **look | {"linestyle": style, "markersize": 3})
            least = line.loc[line["kl"].idxmin()]
            axes.plot(least["tokens"], least["kl"], marker="o", markersize=10, fillstyle="none", color=look["color"])
            for row in (line.iloc[0], least):
                note(axes, f"{row['kl']:.3f}", (row["tokens"], row["kl"]), (0, 7), fontsize=7, ha="center")
    axes.set(yscale="log", xlabel="tokens read", ylabel="KL on validation windows (nats)")
    log_ticks(axes.yaxis, subs=(1, 2, 3, 5, 7))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.06, y=0.12)
    legend_above(figure, 3)
    return figure


def tasks(rows: pd.DataFrame) -> plt.Figure:
    """Accuracy retained above chance against sparsity, a panel a task and the average last, a line a method.

    1 is the dense model, 0 is guessing; bars are standard errors. Where the dense model is not above chance, nothing can be
    retained, and the panel says so.

    Args:
        rows: method, sparsity, task, accuracy, accuracy_se, chance, accuracy_retained, accuracy_retained_se, as of
            :func:`~mlpreplace.evaluation.task_rows`; method "dense" included, one row a task.
    """
    names = sorted(rows["task"].unique(), key=lambda task: task == AVERAGE)  # stable: the order of the rows otherwise
    columns = min(len(names), 3)
    deep = -(-len(names) // columns)
    size = (6.8, 0.5 + 2.3 * deep)
    figure, grid = plt.subplots(deep, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    methods = [method for method in rows["method"].unique() if method != "dense"]
    looks = dict(zip(methods, cycle(SERIES_LOOKS), strict=False))
    for axes, name in zip(grid.flat, names, strict=False):
        _draw_task(axes, rows[rows["task"] == name], name, looks)
    for axes in grid.flat[len(names) :]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("sparsity (%)")
        axes.tick_params(labelbottom=True)
    spread = rows["accuracy_retained_se"].fillna(0)
    low, high = (rows["accuracy_retained"] - spread).min(), (rows["accuracy_retained"] + spread).max()
    grid[0, 0].set_ylim(max(WIDEST[0], np.fmin(low, 0) - 0.1), min(WIDEST[1], np.fmax(high, 1) + 0.1))
    figure.supylabel("accuracy above chance ÷ dense", fontsize=9)
    legend_above(figure, 4)
    return figure


def _draw_task(axes: plt.Axes, rows: pd.DataFrame, name: str, looks: dict[str, Look]) -> None:
    dense = rows[rows["method"] == "dense"].iloc[0]
    axes.axhline(1, color=INK, linewidth=1)
    axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.plot(0, 1, marker="*", color=INK, markersize=8, clip_on=False)
    if np.isnan(dense["accuracy_retained"]):
        axes.text(0.5, 0.5, "dense model not\nabove chance", transform=axes.transAxes, ha="center", va="center", fontsize=8)
    for place, (method, look) in enumerate(looks.items()):
        line = rows[(rows["method"] == method) & rows["accuracy_retained"].notna()].sort_values("sparsity")
        x = line["sparsity"] + 0.004 * (place - (len(looks) - 1) / 2)  # beside each other
        y, bar = line["accuracy_retained"], line["accuracy_retained_se"]
        axes.errorbar(x, y, yerr=bar, capsize=2, elinewidth=0.8, markersize=4, label=readable(method), **look)
    axes.set_title(readable(name))
    small = {"fontsize": 7, "fontweight": "normal", "color": INK}
    axes.set_title(f"dense {dense['accuracy']:.2f} ± {dense['accuracy_se']:.2f}", loc="right", **small)
    note(axes, f"chance {dense['chance']:.2f}", (0, 0), (2, 3), **small)
    axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.125))
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
