"""Figures of notebook 03: the damage of single replacements, and whether damages add up."""

from __future__ import annotations

from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from .looks import FAMILY_LOOKS, SKY
from .style import legend_above, log_ticks, note, panels, parts_by

ESTIMATES = {  # column, title and axis of each way to predict the damage of one replacement
    "local_error": ("error ÷ the block's own output", "Σ‖g(x) − y‖² / Σ‖y‖², validation tokens"),
    "damage": ("error ÷ the residual stream", "mean of ‖g(x) − y‖² / ‖r‖², validation tokens"),
    "second_order": ("second order", "½ E (gᵀe)², nats per validation token"),
    "validation_kl": ("KL on other windows", "nats per validation token"),
}


def sensitivity(rows: pd.DataFrame) -> plt.Figure:
    """KL divergence to the dense model when one block alone is replaced, by layer; a panel a family, a line a size.

    Args:
        rows: layer, family, label, kl, kl_low, kl_high.
    """
    figure, drawn = panels(parts_by(rows, "family"), (7.2, 2.9), sharey=True)
    for axes, family, part in drawn:
        color, marker = FAMILY_LOOKS[family]["color"], FAMILY_LOOKS[family]["marker"]
        for (label, line), style in zip(part.groupby("label", sort=False), cycle(("-", "--", ":")), strict=False):
            size = label.removeprefix(family).strip("()")
            axes.fill_between(line["layer"], line["kl_low"].clip(lower=1e-5), line["kl_high"], color=color, alpha=0.15, lw=0)
            axes.plot(line["layer"], line["kl"], style, color=color, marker=marker, ms=3, label=size)
        axes.set(yscale="log", xlabel="layer", title=family)
        if part["label"].nunique() > 1:
            axes.legend(loc="upper right", fontsize=7, handlelength=2.2, borderaxespad=0.1)
    drawn[0][0].set_ylabel("KL to the dense model\n(nats per token)")
    return figure


def sensitivity_of_models(rows: pd.DataFrame, concentration: pd.DataFrame) -> plt.Figure:
    """A column a model: the damage of single replacements by layer, and below it who owns the output of each block.

    Args:
        rows: model, layer, family, share_of_block, kl.
        concentration: model, layer, top_share (of output energy, top 1 % of tokens).
    """
    models = parts_by(rows, "model")
    figure, grid = plt.subplots(2, len(models), figsize=(6.8, 4.3), sharex="col", sharey="row", squeeze=False)
    for (upper, lower), (model, part) in zip(grid.T, models.items(), strict=True):
        for family, lines in parts_by(part, "family").items():
            shares = lines.groupby(lines["share_of_block"].round(3))
            for (share, line), style in zip(shares, cycle(("--", "-")), strict=False):
                look = FAMILY_LOOKS[family] | {"markersize": 3, "linestyle": style, "label": f"{family} {share:.0%}"}
                upper.plot(line["layer"], line["kl"], **look)
        owned = concentration[concentration["model"] == model]
        lower.bar(owned["layer"], owned["top_share"], color=SKY, edgecolor="0.3", linewidth=0.4)
        lower.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
        upper.set(yscale="log", title=model)
        lower.set_xlabel("layer")
        lower.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    grid[0, 0].set_ylabel("KL to the dense model\n(nats per token)")
    grid[1, 0].set_ylabel("output energy owned by\nthe top 1 % of tokens")
    legend_above(figure, 4)
    return figure


def damage_prediction(rows: pd.DataFrame) -> plt.Figure:
    """Predicted damage of one replacement against the KL measured on held-out windows; a panel an estimate, a point a block.

    Args:
        rows: family, layer, kl, and a column for each estimate to draw: some of local_error (pooled), damage (over the
            residual stream), second_order, validation_kl.
    """
    drawn = {column: titles for column, titles in ESTIMATES.items() if column in rows}
    deep = -(-len(drawn) // 2)
    figure, grid = plt.subplots(deep, 2, figsize=(6.8, 0.3 + 2.5 * deep), sharey=True, squeeze=False)
    for axes, (column, (title, label)) in zip(grid.flat, drawn.items(), strict=False):
        for family, part in rows.groupby("family", sort=False):
            look = {k: v for k, v in FAMILY_LOOKS[family].items() if k != "linestyle"}
            axes.scatter(part[column], part["kl"], s=12, alpha=0.75, linewidths=0, label=family, **look)
        rank = rows[column].corr(rows["kl"], method="spearman")
        axes.text(0.03, 0.95, f"rank correlation {rank:.2f}", transform=axes.transAxes, fontsize=7, va="top")
        axes.set(xscale="log", yscale="log", title=title, xlabel=label)
    for axes in grid[:, 0]:
        axes.set_ylabel("measured KL (nats per token)")
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    grid.flat[min(1, len(drawn) - 1)].legend(loc="lower right", fontsize=7, handletextpad=0.1)
    return figure


def additivity(pairs: pd.DataFrame, sets: pd.DataFrame) -> plt.Figure:
    """Do damages add up? Pairs of blocks by layer, and sets of growing size, measured against the sum of single damages.

    Args:
        pairs: layer_a, layer_b, label (of the replacement), kl (of both replaced), kl_sum (of each alone).
        sets: label (of the replacement), blocks (how many are replaced), kl, kl_sum.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 3.1), width_ratios=(1.15, 1))
    _draw_pairs(left, pairs)
    _draw_sets(right, sets)
    return figure


def _draw_pairs(axes: plt.Axes, pairs: pd.DataFrame) -> None:
    ratio = (pairs["kl"] / pairs["kl_sum"]).rename("ratio")
    table = pd.concat([pairs, ratio], axis=1).pivot(index="layer_b", columns="layer_a", values="ratio")
    reach = max(1.2, float(max(ratio.max(), 1 / ratio.min())))
    scale = mpl.colors.LogNorm(1 / reach, reach)
    bar = {"label": "KL of both ÷ sum of KLs", "fraction": 0.045, "pad": 0.02}
    numbers = {"annot": True, "fmt": ".2f", "annot_kws": {"size": 5.5}}
    sns.heatmap(table, ax=axes, cmap="PuOr_r", norm=scale, cbar_kws=bar, square=True, **numbers)
    log_ticks(axes.collections[0].colorbar.ax.yaxis, subs=(1, 1.2, 1.5, 2, 3, 5, 7, 9))
    axes.set(xlabel="one block: layer", ylabel="the other: layer")
    axes.set_title(pairs["label"].iloc[0], fontsize=8)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelrotation=0)


def _draw_sets(axes: plt.Axes, sets: pd.DataFrame) -> None:
    ends = sets["kl_sum"].min() * 0.8, sets["kl_sum"].max() * 1.25
    axes.plot(ends, ends, color="0.4", linewidth=0.8, linestyle=":")
    axes.text(ends[1], ends[1], "sum", fontsize=7, color="0.4", ha="right", va="bottom")
    looks = cycle(FAMILY_LOOKS[family] for family in ("NarrowMLP", "NarrowPlusLinear", "LowRank"))
    sides = cycle(((-5, 4), (6, -6)))  # lines nearly coincide: numbers above the one, below the other
    for (label, line), look, side in zip(sets.groupby("label", sort=False), looks, sides, strict=False):
        axes.plot(line["kl_sum"], line["kl"], label=label, **look)
        for _, row in line.iterrows():
            text = f"{row['blocks']:.0f}"
            note(axes, text, (row["kl_sum"], row["kl"]), side, fontsize=6, ha="center", color=look["color"])
    axes.set(xscale="log", yscale="log", xlabel="sum of single KLs (nats per token)", ylabel="KL of all together")
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis, subs=(1, 3))
    axes.set_title("numbers: blocks replaced", fontsize=8)
    axes.legend(loc="lower right", fontsize=7)
