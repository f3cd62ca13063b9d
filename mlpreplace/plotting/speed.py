"""Figures of what compression is worth when a model is served: time, memory, and both together with quantization."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import LOOKS, plain_log_ticks

INK = "0.2"
MEASURED = LOOKS["NarrowMLP"] | {"linestyle": "-"}
PHASES = {"prefill": "prefill: ideal is a ratio of FLOPs", "decode": "decode: ideal is a ratio of bytes read"}
KINDS = {  # quantized, replaced
    (False, False): {"color": INK, "marker": "*", "ms": 10},
    (True, False): {"color": "#E69F00", "marker": "s", "ms": 6},
    (False, True): {"color": "#0072B2", "marker": "o", "ms": 6},
    (True, True): {"color": "#882255", "marker": "D", "ms": 6},
}


def speed(rows: pd.DataFrame) -> Figure:
    """Measured and ideal speed-up against sparsity, prefill and decode in a panel each; the dense model is 1.

    Args:
        rows: those of :func:`~mlpreplace.speed.speed_rows`, the dense model included, of one family of plans: a line
            goes through them by sparsity_achieved.
    """
    rows = rows.sort_values("sparsity_achieved")
    x = rows["sparsity_achieved"]
    figure, panels = plt.subplots(1, 2, figsize=(6.8, 3.0), sharey=True)
    for axes, (phase, title) in zip(panels, PHASES.items(), strict=True):
        y, ideal = rows[f"{phase}_speedup"], rows[f"{phase}_ideal"]
        axes.plot(x, ideal, color="0.45", linestyle="--", linewidth=1.2)
        _note(axes, "ideal", (x.iloc[-1], ideal.iloc[-1]), (-6, 4), "0.35")
        span = [y - rows[f"{phase}_low"], rows[f"{phase}_high"] - y]
        axes.errorbar(x, y, yerr=span, capsize=2.5, elinewidth=0.9, **MEASURED)
        for sparsity, value, most in zip(x, y, ideal, strict=True):
            if sparsity:
                _note(axes, f"{100 * value / most:.0f} % of ideal", (sparsity, value), (4, -12), MEASURED["color"])
        axes.axhline(1, color=INK, linewidth=1)
        axes.plot(0, 1, marker="*", color=INK, markersize=10, zorder=4)
        _note(axes, "dense", (0, 1), (5, -10), INK)
        axes.set(title=title, xlabel="sparsity (of attention and MLP parameters)")
        axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.125))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.yaxis.set_major_formatter("×{x:g}")
        axes.margins(y=0.12)
        axes.set_xlim(-0.08 * x.max(), 1.3 * x.max())  # room for the labels
    panels[0].set_ylabel("speed-up over the dense model")
    return figure


def quantization(rows: pd.DataFrame) -> Figure:
    """Do the gains of replacing and of int8 multiply? Four models as a parallelogram: size against perplexity and speed.

    Both axes are logarithmic, so that what multiplies makes parallel sides; the fourth corner as the product of
    both factors is drawn hollow.

    Args:
        rows: method, quantized and replaced (bools; all four pairs), parameter_mb, perplexity, ci_low, ci_high (of the
            perplexity), prefill_speedup, prefill_low, prefill_high.
    """
    figure, panels = plt.subplots(1, 2, figsize=(6.8, 3.3), sharex=True)
    _parallelogram(panels[0], rows, "perplexity", "ci_low", "ci_high", "%g")
    _parallelogram(panels[1], rows, "prefill_speedup", "prefill_low", "prefill_high", "×%g")
    panels[0].set(ylabel="held-out perplexity", title="what it costs")
    panels[1].set(ylabel="prefill speed-up", title="what it gains")
    return figure


def _parallelogram(axes: Axes, rows: pd.DataFrame, column: str, low: str, high: str, form: str) -> None:
    corners = {(bool(r["quantized"]), bool(r["replaced"])): r for _, r in rows.iterrows()}
    place = {key: (row["parameter_mb"], row[column]) for key, row in corners.items()}
    dense, int8, replaced, both = (place[key] for key in KINDS)
    for start, end in ((dense, int8), (dense, replaced), (int8, both), (replaced, both)):
        axes.plot(*zip(start, end, strict=True), color="0.6", linewidth=1, zorder=1)
    product = [a * b / d for a, b, d in zip(int8, replaced, dense, strict=True)]
    color = KINDS[True, True]["color"]
    axes.plot(*product, marker="D", ms=9, color=color, fillstyle="none", linestyle="none", zorder=2)
    _note(axes, "product", product, (-1, 9), color)
    for key, look in KINDS.items():
        row, (x, y) = corners[key], place[key]
        axes.errorbar(x, y, yerr=[[y - row[low]], [row[high] - y]], capsize=2.5, elinewidth=0.9, linestyle="none", **look)
        _note(
            axes,
            row["method"].replace(", ", ",\n") if key == (True, True) else row["method"],
            (x, y),
            (-8, -3) if key == (True, False) else (6, 5),
            look["color"],
        )
    axes.set(xscale="log", yscale="log", xlabel="parameters (MB)")
    axes.margins(x=0.45, y=0.3)  # room for the labels
    plain_log_ticks(axes.xaxis, subs=(1, 1.5, 2, 3, 4, 6))
    plain_log_ticks(axes.yaxis, form, subs=(1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6))


def _note(axes: Axes, text: str, point: tuple[float, float], offset: tuple[int, int], color: str) -> None:
    side = "right" if offset[0] < 0 else "left"
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # lines and bars pass under it
    axes.annotate(text, point, xytext=offset, textcoords="offset points", ha=side, fontsize=7.5, color=color, bbox=ground)
