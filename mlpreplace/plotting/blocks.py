"""Figures of single blocks: notebook 02."""

from __future__ import annotations

from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import LOOKS, plain_log_ticks


def output_concentration(rows: pd.DataFrame) -> Figure:
    """Share of a block's output energy that its top tokens own, by layer, and what that does to two error measures.

    Args:
        rows: layer, top_share (of energy, top 1 % of tokens), pooled, median (errors of one replacement).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 2.7))
    left.bar(rows["layer"], rows["top_share"], color="#56B4E9", edgecolor="0.3", linewidth=0.4)
    left.axhline(0.01, color="0.3", linewidth=0.9, linestyle="--")
    left.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    left.set(title="owned by the top 1 % of tokens", ylabel="share of output energy")
    left.set_xlabel("layer (dashed: if all tokens were alike)")
    right.plot(rows["layer"], rows["median"], color="#0072B2", marker="o", markersize=3, label="median per token")
    right.plot(rows["layer"], rows["pooled"], color="#D55E00", linestyle="--", marker="s", markersize=3, label="pooled (1 − R²)")
    right.set(yscale="log", xlabel="layer", ylabel="validation error", title="so a pooled error hides the others")
    right.legend(loc="lower right")
    return figure


def _blocks(rows: pd.DataFrame) -> list[tuple[int, str]]:
    """(layer, "early: layer 3") of every block, in order of depth."""
    found = rows[["layer", "position"]].drop_duplicates().sort_values("layer").itertuples(index=False)
    return [(layer, f"{position}: layer {layer}") for layer, position in found]


def _percent(axis: mpl.axis.Axis, subs: tuple[float, ...] = (1, 3)) -> None:
    axis.set_major_locator(mpl.ticker.LogLocator(subs=subs))
    axis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def error_vs_parameters(rows: pd.DataFrame) -> Figure:
    """Median per-token error on held-out text against the share of the block's parameters kept; a column a block.

    Above, closed forms (thin: on fitting tokens; band: quartiles). Below, trained replacements, as a ratio to the closed-form
    NarrowMLP of the same size, interpolated (TwoLayerMLP, where the blocks have no neurons to keep); hollow: a mixture of
    experts at the parameters one token uses.

    Args:
        rows: family, trained (the loss, or none), layer, position, share_of_block, active_share_of_block,
            split ("train", "heldout", others are not drawn), median, q25, q75.
    """
    blocks = _blocks(rows)
    reference = "NarrowMLP" if "NarrowMLP" in set(rows["family"]) else "TwoLayerMLP"
    figure, panels = plt.subplots(2, len(blocks), figsize=(7.2, 5.2), sharey="row", squeeze=False)
    seen: dict[str, mpl.artist.Artist] = {}
    for (above, below), (layer, title) in zip(panels.T, blocks, strict=True):
        part = rows[rows["layer"] == layer].sort_values("share_of_block")
        solved, trained = part[part["trained"].isna()], part[part["trained"].notna() & (part["split"] == "heldout")]
        for family, fits in solved.groupby("family", sort=False):
            look = LOOKS[family] | {"markersize": 4, "linewidth": 1.1}
            held, train = (fits[fits["split"] == split] for split in ("heldout", "train"))
            above.plot(train["share_of_block"], train["median"], color=look["color"], linewidth=0.6, alpha=0.6)
            (seen[family],) = above.plot(held["share_of_block"], held["median"], **look)
            if family == reference:
                above.fill_between(held["share_of_block"], held["q25"], held["q75"], color=look["color"], alpha=0.12, lw=0)
                size, error = np.log(held["share_of_block"]), np.log(held["median"])
        for family, fits in trained.groupby("family", sort=False):
            look = LOOKS[family] | {"markersize": 4, "linewidth": 1.1}
            for share, style in (("share_of_block", {}), ("active_share_of_block", {"linestyle": "", "mfc": "white"})):
                known = fits[(np.log(fits[share]) > size.min() - 0.1) & (fits[share] <= fits["share_of_block"])]
                ratio = known["median"] / np.exp(np.interp(np.log(known[share]), size, error))
                if not style:
                    (seen[family],) = below.plot(known[share], ratio, **look)
                elif (known[share] < known["share_of_block"]).any():
                    below.plot(known[share], ratio, **look | style)
        for axes in (above, below):
            axes.axhline(1, color="0.4", linewidth=0.8)
            axes.set(xscale="log", yscale="log")
        above.set_title(title)
        _percent(above.xaxis, (1,))
        _percent(below.xaxis)
        plain_log_ticks(above.yaxis)
        plain_log_ticks(below.yaxis, "×%g", subs=(0.7, 0.8, 0.9, 1, 1.5, 2, 3, 5))
        below.set_xlabel("parameters kept in the block")
    panels[1][0].set_ylim(0.6, 3.2)  # what is far worse leaves the panel
    panels[0][0].set_ylabel("closed form\n‖g(x) − y‖² / ‖y‖² per token")
    panels[1][0].set_ylabel(f"trained ÷ closed-form\n{reference} of that size")
    zero = panels[0][0]
    zero.text(0.98, 1.05, "output of zero", transform=zero.get_yaxis_transform(), fontsize=7, color="0.4", ha="right")
    thin = mpl.lines.Line2D([], [], color="0.4", linewidth=0.6)
    hollow = mpl.lines.Line2D([], [], color="0.4", marker="h", mfc="white", linestyle="")
    families = [family for family in LOOKS if family in seen]
    handles = [*(seen[family] for family in families), thin, hollow]
    names = [*families, "on fitting tokens", "active parameters"]
    figure.legend(handles, names, loc="outside upper center", ncols=4)
    return figure


def loss_curves(rows: pd.DataFrame) -> Figure:
    """Validation loss (thick) and training loss (thin) against tokens seen, a panel a block, a line a family.

    Args:
        rows: family, layer, position, curve_tokens, train_loss, validation_loss.
    """
    blocks = _blocks(rows)
    figure, panels = plt.subplots(1, len(blocks), figsize=(7.2, 3.1), sharex=True, squeeze=False)
    for axes, (layer, title) in zip(panels[0], blocks, strict=True):
        for family, line in rows[rows["layer"] == layer].groupby("family", sort=False):
            look = LOOKS[family] | {"markersize": 3, "linewidth": 1.1}
            axes.plot(line["curve_tokens"], line["train_loss"], color=look["color"], linewidth=0.6, alpha=0.6)
            axes.plot(line["curve_tokens"], line["validation_loss"], markevery=(0.0, 0.25), label=family, **look)
        axes.set(yscale="log", title=title, xlabel="tokens trained on")
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k" if tokens else "0")
        axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(_round_step(rows["curve_tokens"].max())))
        plain_log_ticks(axes.yaxis, subs=tuple(range(1, 10)))
    panels[0][0].set_ylabel("loss (Σ‖g(x) − y‖² / Σ‖y‖²)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    thin = mpl.lines.Line2D([], [], color="0.4", linewidth=0.6)
    figure.legend([*handles, thin], [*labels, "thin: training loss"], loc="outside upper center", ncols=4)
    return figure


def _round_step(most: int) -> int:
    """A tick step of a power of two times 1024 that gives about four steps."""
    return max(256, 2 ** round(np.log2(most / 4)))


def training_gain(rows: pd.DataFrame) -> Figure:
    """Held-out error against the seconds a fit took: from the closed form an arrow leads to what training made of it.

    Args:
        rows: layer, position, share_of_block, trained, fit_seconds, median, trained_tokens; one family, held-out rows.
    """
    blocks = _blocks(rows)
    figure, panels = plt.subplots(1, len(blocks), figsize=(7.2, 3.0), sharex=True, sharey=True, squeeze=False)
    color = LOOKS["NarrowMLP"]["color"]
    for axes, (layer, title) in zip(panels[0], blocks, strict=True):
        for _, pair in rows[rows["layer"] == layer].groupby("label", sort=False):
            start, end = pair[pair["trained"].isna()].iloc[0], pair[pair["trained"].notna()].iloc[0]
            axes.annotate(
                "", (end["fit_seconds"], end["median"]), (start["fit_seconds"], start["median"]),
                arrowprops={"arrowstyle": "->", "color": "0.5", "linewidth": 0.8, "shrinkA": 3, "shrinkB": 3},
            )  # fmt: skip
            axes.plot(start["fit_seconds"], start["median"], "o", mfc="white", color=color, label="closed form")
            axes.plot(end["fit_seconds"], end["median"], "o", color=color, label="trained")
            text = f"{end['share_of_block']:.0%}: −{1 - end['median'] / start['median']:.0%}"
            axes.annotate(
                text, (end["fit_seconds"], end["median"]), xytext=(5, -2), textcoords="offset points", fontsize=7, va="center"
            )
        axes.set(xscale="log", yscale="log", title=title, xlabel="seconds of fitting (one thread)")
        axes.set_xlim(right=rows["fit_seconds"].max() * 12)  # room for the labels
        axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    plain_log_ticks(panels[0][0].yaxis)
    panels[0][0].set_ylabel("median held-out error per token")
    tokens = rows["trained_tokens"].max()
    names = ["closed form", f"trained on {tokens:,.0f} tokens (epochs × fitting tokens)"]
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend([handles[labels.index(n)] for n in ("closed form", "trained")], names, loc="outside upper center", ncols=2)
    return figure


def objectives(rows: pd.DataFrame) -> Figure:
    """What each training objective does to three measures, as a ratio to the closed form; a panel a measure.

    Args:
        rows: layer, position, objective ("closed form" included), pooled, cosine, kl; held-out.
    """
    measures = {
        "pooled": "squared error\nΣ‖g − y‖² / Σ‖y‖²",
        "cosine": "cosine error\n1 − cos(g, y)",
        "kl": "KL to the dense model\nwhen spliced",
    }
    looks = {
        "mse": {"color": "#0072B2", "marker": "o"},
        "cosine": {"color": "#E69F00", "marker": "D"},
        "both": {"color": "#117733", "marker": "P"},
    }
    figure, panels = plt.subplots(1, len(measures), figsize=(7.2, 2.9), sharey=True)
    blocks = _blocks(rows)
    for axes, (measure, title) in zip(panels, measures.items(), strict=True):
        for shift, (objective, look) in zip((-0.2, 0, 0.2), looks.items(), strict=True):
            for at, (layer, _) in enumerate(blocks):
                part = rows[rows["layer"] == layer].set_index("objective")[measure]
                ratio = part[objective] / part["closed form"]
                axes.plot([at + shift] * 2, [1, ratio], color=look["color"], linewidth=1)
                axes.plot(at + shift, ratio, linestyle="", label=objective, **look)
        axes.axhline(1, color="0.2", linewidth=1)
        axes.set_xticks(range(len(blocks)), [name.replace(": ", "\n") for _, name in blocks])
        axes.set_title(title, fontsize=8.5)
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("÷ that of the closed form")
    handles, labels = panels[0].get_legend_handles_labels()
    first = {label: handle for handle, label in zip(handles, labels, strict=True)}
    figure.legend(first.values(), [f"trained with {label}" for label in first], loc="outside upper center", ncols=3)
    return figure


def selections(rows: pd.DataFrame) -> Figure:
    """Held-out error of a NarrowMLP against its size for each rule that chooses its neurons; a panel a block.

    Args:
        rows: layer, position, selection, share_of_block, pooled; held-out.
    """
    looks = {
        "energy": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
        "leverage": {"color": "#E69F00", "marker": "D", "linestyle": "-."},
        "obs": {"color": "#117733", "marker": "P", "linestyle": "--"},
        "random": {"color": "#999999", "marker": "X", "linestyle": ":"},
    }
    blocks = _blocks(rows)
    figure, panels = plt.subplots(1, len(blocks), figsize=(7.2, 2.8), sharey=True, squeeze=False)
    for axes, (layer, title) in zip(panels[0], blocks, strict=True):
        for selection, line in rows[rows["layer"] == layer].groupby("selection", sort=False):
            line = line.sort_values("share_of_block")
            axes.plot(line["share_of_block"], line["median"], label=selection, **looks[selection])
        axes.set(xscale="log", yscale="log", title=title, xlabel="parameters kept in the block")
        _percent(axes.xaxis)
    plain_log_ticks(panels[0][0].yaxis)
    panels[0][0].set_ylabel("median held-out error per token")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def calibration_curves(rows: pd.DataFrame) -> Figure:
    """Error of one family against the number of fitting tokens; a column a block, a row a tested text, a line a fitted text.

    Args:
        rows: layer, position, fitted_on, tested_on, tokens, median; thin lines where ``split`` is "train".
    """
    blocks, texts = _blocks(rows), list(rows["tested_on"].unique())
    looks = cycle((("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#117733", "P", "-.")))
    styles = dict(zip(rows["fitted_on"].unique(), looks, strict=False))
    figure, panels = plt.subplots(len(texts), len(blocks), figsize=(7.2, 4.6), sharex=True, sharey="col", squeeze=False)
    for line_of_panels, text in zip(panels, texts, strict=True):
        for axes, (layer, title) in zip(line_of_panels, blocks, strict=True):
            part = rows[(rows["layer"] == layer) & (rows["tested_on"] == text)]
            for source, line in part.groupby("fitted_on", sort=False):
                color, marker, style = styles[source]
                held, train = (line[line["split"] == s].sort_values("tokens") for s in ("heldout", "train"))
                axes.plot(train["tokens"], train["median"], color=color, linewidth=0.7, alpha=0.6)
                axes.plot(held["tokens"], held["median"], color=color, marker=marker, linestyle=style, label=source)
            axes.set(xscale="log", yscale="log", title=title if text == texts[0] else None)
            plain_log_ticks(axes.yaxis, subs=(1, 1.5, 2, 3, 4, 6))
        line_of_panels[0].set_ylabel(f"tested on {text}\nmedian error per token")
    ticks = sorted(rows["tokens"].unique())
    for axes in panels[-1]:
        axes.set_xlabel("fitting tokens")
        axes.set_xticks(ticks, [f"{t / 1024:g}k" for t in ticks], minor=False)
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    handles, labels = panels[0][0].get_legend_handles_labels()
    thin = mpl.lines.Line2D([], [], color="0.4", linewidth=0.7)
    names = [*(f"fitted on {label}" for label in labels), "thin: on fitting tokens"]
    figure.legend([*handles, thin], names, loc="outside upper center", ncols=4, columnspacing=1)
    return figure
