"""Figures of notebook 02: what stands in for a single block."""

from __future__ import annotations

from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .looks import BLUE, FAMILY_LOOKS, OBJECTIVE_LOOKS, SELECTION_LOOKS, SKY, TEXT_LOOKS, VERMILION, readable
from .style import draw_lines, error_bars, legend_above, log_ticks, note, panels, percent

WIDTH = 7.2  # inches, of figures with a column a block
SMALL = {"markersize": 4, "linewidth": 1.1}
THIN = {"linewidth": 0.6, "alpha": 0.6}  # lines of tokens that were fitted on
KEPT = "parameters kept in the block"


def output_concentration(rows: pd.DataFrame) -> plt.Figure:
    """Share of a block's output energy in its top tokens, by layer, and what it does to two error measures.

    Args:
        rows: layer, top_share (of energy, top 1 % of tokens), pooled, median (errors of one replacement).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.7))
    left.bar(rows["layer"], rows["top_share"], color=SKY, edgecolor="0.3", linewidth=0.4)
    left.axhline(0.01, color="0.3", linewidth=0.9, linestyle="--")
    left.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    left.set(title="owned by the top 1 % of tokens", ylabel="share of output energy")
    left.set_xlabel("layer (dashed: if all tokens were alike)")
    right.plot(rows["layer"], rows["median"], color=BLUE, marker="o", markersize=3, label="median per token")
    right.plot(rows["layer"], rows["pooled"], color=VERMILION, linestyle="--", marker="s", markersize=3, label="pooled (1 − R²)")
    right.set(yscale="log", xlabel="layer", ylabel="validation error", title="so a pooled error hides the others")
    right.legend(loc="lower right")
    return figure


def _blocks(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """{"early: layer 3": rows of that block}, in order of depth."""
    return {f"{part['position'].iloc[0]}: layer {layer}": part for layer, part in rows.groupby("layer")}


def error_vs_parameters(rows: pd.DataFrame) -> plt.Figure:
    """Median per-token error on held-out text against the share of the block's parameters kept; a column a block.

    The upper panels show closed forms (thin: on fitting tokens; band: quartiles). The lower ones show trained replacements, as
    a ratio to the closed-form NarrowMLP of the same size, interpolated. TwoLayerMLP takes its place where blocks have no neurons
    to keep. Hollow marks place a mixture of experts at the parameters that one token uses.

    Args:
        rows: family, trained (the loss, or none), layer, position, share_of_block, active_share_of_block,
            split ("train", "heldout", others are not drawn), median, q25, q75.
    """
    blocks, families = _blocks(rows), set(rows["family"])
    reference = "NarrowMLP" if "NarrowMLP" in families else "TwoLayerMLP"
    figure, grid = plt.subplots(2, len(blocks), figsize=(WIDTH, 5.2), sharey="row", squeeze=False)
    for (above, below), (title, part) in zip(grid.T, blocks.items(), strict=True):
        part = part.sort_values("share_of_block")
        solved, trained = part[part["trained"].isna()], part[part["trained"].notna() & (part["split"] == "heldout")]
        _draw_solved(above, solved, band=reference)
        _draw_trained(below, trained, solved[(solved["family"] == reference) & (solved["split"] == "heldout")])
        for axes in (above, below):
            axes.axhline(1, color="0.4", linewidth=0.8)
            axes.set(xscale="log", yscale="log")
        above.set_title(title)
        below.set_xlabel(KEPT)
        log_ticks(above.xaxis, percent, (1,))
        log_ticks(below.xaxis, percent, (1, 3))
        log_ticks(above.yaxis)
        log_ticks(below.yaxis, "×{x:g}", (0.7, 0.8, 0.9, 1, 1.5, 2, 3, 5))
    above, below = grid[:, 0]
    below.set_ylim(0.6, 3.2)  # what is far worse leaves the panel
    above.set_ylabel("closed form\n‖g(x) − y‖² / ‖y‖² per token")
    below.set_ylabel(f"trained ÷ closed-form\n{reference} of that size")
    above.text(0.98, 1.05, "output of zero", transform=above.get_yaxis_transform(), fontsize=7, color="0.4", ha="right")
    entries = {family: plt.Line2D([], [], **look, **SMALL) for family, look in FAMILY_LOOKS.items() if family in families}
    entries["on fitting tokens"] = plt.Line2D([], [], color="0.4", linewidth=0.6)
    entries["active parameters"] = plt.Line2D([], [], color="0.4", marker="h", mfc="white", linestyle="")
    legend_above(figure, 4, entries)
    return figure


def _draw_solved(axes: plt.Axes, rows: pd.DataFrame, band: str) -> None:
    """A line a family of closed forms; quartiles of the family ``band``."""
    for family, fits in rows.groupby("family", sort=False):
        look = FAMILY_LOOKS[family]
        heldout, train = (fits[fits["split"] == split] for split in ("heldout", "train"))
        axes.plot(train["share_of_block"], train["median"], color=look["color"], **THIN)
        axes.plot(heldout["share_of_block"], heldout["median"], **look, **SMALL)
        if family == band:
            axes.fill_between(heldout["share_of_block"], heldout["q25"], heldout["q75"], color=look["color"], alpha=0.12, lw=0)


def _draw_trained(axes: plt.Axes, rows: pd.DataFrame, reference: pd.DataFrame) -> None:
    """A line a family of trained replacements, ÷ the error of ``reference`` at the same size."""
    size, error = np.log(reference["share_of_block"]), np.log(reference["median"])
    for family, fits in rows.groupby("family", sort=False):
        look = FAMILY_LOOKS[family] | SMALL
        for share, style in (("share_of_block", {}), ("active_share_of_block", {"linestyle": "", "mfc": "white"})):
            known = fits[(np.log(fits[share]) > size.min() - 0.1) & (fits[share] <= fits["share_of_block"])]
            ratio = known["median"] / np.exp(np.interp(np.log(known[share]), size, error))
            if share == "share_of_block" or (known[share] < known["share_of_block"]).any():
                axes.plot(known[share], ratio, **look | style)


def loss_curves(rows: pd.DataFrame) -> plt.Figure:
    """Validation loss (thick) and training loss (thin) against tokens seen, a panel a block, a line a family.

    Args:
        rows: family, layer, position, curve_tokens, train_loss, validation_loss.
    """
    figure, drawn = panels(_blocks(rows), (WIDTH, 3.1), sharex=True)
    step = max(256, 2 ** round(np.log2(rows["curve_tokens"].max() / 4)))  # gives about four ticks
    for axes, title, part in drawn:
        for family, line in part.groupby("family", sort=False):
            look = FAMILY_LOOKS[family] | SMALL | {"markersize": 3}
            axes.plot(line["curve_tokens"], line["train_loss"], color=look["color"], **THIN)
            axes.plot(line["curve_tokens"], line["validation_loss"], markevery=(0.0, 0.25), label=family, **look)
        axes.set(yscale="log", title=title, xlabel="tokens trained on")
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens else "0")
        axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(step))
        log_ticks(axes.yaxis, subs=tuple(range(1, 10)))
    drawn[0][0].set_ylabel("loss (Σ‖g(x) − y‖² / Σ‖y‖²)")
    legend_above(figure, 4, {"thin: training loss": plt.Line2D([], [], color="0.4", linewidth=0.6)})
    return figure


def training_gain(rows: pd.DataFrame) -> plt.Figure:
    """Held-out error against the seconds of a fit; an arrow leads from the closed form to the trained replacement.

    Args:
        rows: layer, position, share_of_block, label, trained, fit_seconds, median, trained_tokens; one family, held-out rows.
    """
    figure, drawn = panels(_blocks(rows), (WIDTH, 3.0), sharex=True, sharey=True)
    dot = {"marker": "o", "linestyle": "", "color": BLUE}
    arrow = {"arrowstyle": "->", "color": "0.5", "linewidth": 0.8, "shrinkA": 3, "shrinkB": 3}
    trained = f"trained on {rows['trained_tokens'].max():,.0f} tokens (epochs × fitting tokens)"
    for axes, title, part in drawn:
        for _, pair in part.groupby("label", sort=False):
            before, after = pair[pair["trained"].isna()].iloc[0], pair[pair["trained"].notna()].iloc[0]
            start, end = ((fit["fit_seconds"], fit["median"]) for fit in (before, after))
            axes.annotate("", end, start, arrowprops=arrow)
            axes.plot(*start, mfc="white", label="closed form", **dot)
            axes.plot(*end, label=trained, **dot)
            text = f"{after['share_of_block']:.0%}: −{1 - after['median'] / before['median']:.0%}"
            note(axes, text, end, (5, -2), fontsize=7, va="center")
        axes.set(xscale="log", yscale="log", title=title, xlabel="seconds of fitting (one thread)")
        axes.set_xlim(right=rows["fit_seconds"].max() * 12)  # room for the labels
        axes.xaxis.set_major_formatter("{x:g}")
    log_ticks(drawn[0][0].yaxis)
    drawn[0][0].set_ylabel("median held-out error per token")
    legend_above(figure, 2)
    return figure


def objectives(rows: pd.DataFrame) -> plt.Figure:
    """What each training objective does to three measures, as a ratio to the closed form; a panel a measure.

    Args:
        rows: layer, position, objective ("closed form" included), pooled, cosine, kl; held-out.
    """
    measures = {
        "pooled": "squared error\nΣ‖g − y‖² / Σ‖y‖²",
        "cosine": "cosine error\n1 − cos(g, y)",
        "kl": "KL to the dense model\nwhen spliced",
    }
    figure, grid = plt.subplots(1, len(measures), figsize=(WIDTH, 2.9), sharey=True)
    blocks = {title: part.set_index("objective") for title, part in _blocks(rows).items()}
    for axes, (measure, title) in zip(grid, measures.items(), strict=True):
        for shift, (objective, look) in zip((-0.2, 0, 0.2), OBJECTIVE_LOOKS.items(), strict=True):
            for at, part in enumerate(blocks.values()):
                ratio = part[measure][objective] / part[measure]["closed form"]
                axes.plot([at + shift] * 2, [1, ratio], color=look["color"], linewidth=1)
                axes.plot(at + shift, ratio, label=f"trained with {objective}", **look)
        axes.axhline(1, color="0.2", linewidth=1)
        axes.set_xticks(range(len(blocks)), [name.replace(": ", "\n") for name in blocks])
        axes.set_title(title, fontsize=8.5)
        axes.grid(axis="x", visible=False)
    grid[0].set_ylabel("÷ that of the closed form")
    legend_above(figure, 3)
    return figure


def selections(rows: pd.DataFrame) -> plt.Figure:
    """Error of a NarrowMLP against its size for each rule that chooses its neurons; below, what one size costs the model.

    A column a block.

    Args:
        rows: layer, position, selection, share_of_block, median (held-out, per token). At one size also kl and kl_other, of the
            model with this block alone replaced, in two domains, nats per token, and their intervals kl_low … kl_other_high.
    """
    blocks = _blocks(rows)
    figure, (upper, lower) = plt.subplots(2, len(blocks), figsize=(WIDTH, 4.6), sharey="row", squeeze=False)
    for above, below, (title, part) in zip(upper, lower, blocks.items(), strict=True):
        draw_lines(above, part, ("selection", "share_of_block", "median"), SELECTION_LOOKS)
        above.set(xscale="log", yscale="log", title=title, xlabel=KEPT)
        log_ticks(above.xaxis, percent, (1, 3))
        measured = part.dropna(subset="kl")
        for column, style in (("kl", {}), ("kl_other", {"mfc": "white"})):
            for at, (_, row) in enumerate(measured.iterrows()):
                look = SELECTION_LOOKS[row["selection"]] | {"linestyle": "", "markersize": 5} | style
                value, low, high = row[column], row[f"{column}_low"], row[f"{column}_high"]
                error_bars(below, value, at, low, high, across=True, **look)
        below.set_yticks(range(len(measured)), measured["selection"].map(readable))
        below.set_xlabel(f"KL of the model at {percent(round(measured['share_of_block'].iloc[0], 3))} (nats)")
    lower[0].invert_yaxis()
    log_ticks(upper[0].yaxis)
    upper[0].set_ylabel("median held-out\nerror per token")
    hollow = plt.Line2D([], [], color="0.4", marker="o", mfc="white", linestyle="")
    legend_above(figure, 7, {"hollow: another domain": hollow}, columnspacing=0.8, handlelength=1.5, handletextpad=0.4)
    return figure


def calibration_curves(rows: pd.DataFrame) -> plt.Figure:
    """Error of one family against the number of fitting tokens; a column a block, a row a tested text, a line a fitted text.

    Args:
        rows: layer, position, fitted_on, tested_on, tokens, median; thin lines where ``split`` is "train".
    """
    blocks, texts = _blocks(rows), list(rows["tested_on"].unique())
    looks = dict(zip(rows["fitted_on"].unique(), cycle(TEXT_LOOKS), strict=False))
    figure, grid = plt.subplots(len(texts), len(blocks), figsize=(WIDTH, 4.6), sharex=True, sharey="col", squeeze=False)
    for row, text in zip(grid, texts, strict=True):
        for axes, part in zip(row, blocks.values(), strict=True):
            for source, line in part[part["tested_on"] == text].groupby("fitted_on", sort=False):
                held, train = (line[line["split"] == s].sort_values("tokens") for s in ("heldout", "train"))
                axes.plot(train["tokens"], train["median"], color=looks[source]["color"], **THIN | {"linewidth": 0.7})
                axes.plot(held["tokens"], held["median"], label=f"fitted on {readable(source)}", **looks[source])
            axes.set(xscale="log", yscale="log")
            log_ticks(axes.yaxis, subs=(1, 1.5, 2, 3, 4, 6))
        row[0].set_ylabel(f"tested on {readable(text)}\nmedian error per token")
    ticks = sorted(rows["tokens"].unique())
    for above, below, title in zip(grid[0], grid[-1], blocks, strict=True):
        above.set_title(title)
        below.set_xlabel("fitting tokens")
        below.set_xticks(ticks, [f"{t / 1024:g}k" for t in ticks], minor=False)
        below.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    legend_above(figure, 4, {"thin: on fitting tokens": plt.Line2D([], [], color="0.4", linewidth=0.7)}, columnspacing=1)
    return figure
