"""Figures of whole models: notebooks 03 and 04."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .style import LOOKS, plain_log_ticks


def sensitivity(rows: pd.DataFrame) -> Figure:
    """KL divergence to the dense model when one block alone is replaced, by layer; a panel a family, a line a size.

    Args:
        rows: layer, family, label, kl, kl_low, kl_high.
    """
    families = list(rows["family"].unique())
    figure, panels = plt.subplots(1, len(families), figsize=(7.2, 2.9), sharey=True, squeeze=False)
    for axes, family in zip(panels[0], families, strict=True):
        part = rows[rows["family"] == family]
        color, marker = LOOKS[family]["color"], LOOKS[family]["marker"]
        for (label, line), style in zip(part.groupby("label", sort=False), cycle(("-", "--", ":")), strict=False):
            size = label.removeprefix(family).strip("()")
            axes.fill_between(line["layer"], line["kl_low"].clip(lower=1e-5), line["kl_high"], color=color, alpha=0.15, lw=0)
            axes.plot(line["layer"], line["kl"], style, color=color, marker=marker, ms=3, label=size)
        axes.set(yscale="log", xlabel="layer", title=family)
        if part["label"].nunique() > 1:
            axes.legend(loc="upper right", fontsize=7, handlelength=2.2, borderaxespad=0.1)
    panels[0][0].set_ylabel("KL to the dense model\n(nats per token)")
    return figure


ESTIMATES = {  # column, title and axis of each way to predict the damage of one replacement
    "local_error": ("error ÷ the block's own output", "Σ‖g(x) − y‖² / Σ‖y‖², validation tokens"),
    "damage": ("error ÷ the residual stream", "mean of ‖g(x) − y‖² / ‖r‖², validation tokens"),
    "second_order": ("second order", "½ E (gᵀe)², nats per validation token"),
    "validation_kl": ("KL on other windows", "nats per validation token"),
}


def damage_prediction(rows: pd.DataFrame) -> Figure:
    """What predicts the damage of one replacement, against KL measured on held-out windows, a point a replaced block.

    Args:
        rows: family, layer, kl, and a column for each estimate to draw: some of local_error (pooled), damage (over the
            residual stream), second_order, validation_kl.
    """
    drawn = {column: titles for column, titles in ESTIMATES.items() if column in rows}
    deep = -(-len(drawn) // 2)
    figure, panels = plt.subplots(deep, 2, figsize=(6.8, 0.3 + 2.5 * deep), sharey=True, squeeze=False)
    for axes, (column, (title, label)) in zip(panels.flat, drawn.items(), strict=False):
        for family, part in rows.groupby("family", sort=False):
            look = {k: v for k, v in LOOKS[family].items() if k != "linestyle"}
            axes.scatter(part[column], part["kl"], s=12, alpha=0.75, linewidths=0, label=family, **look)
        rank = rows[column].corr(rows["kl"], method="spearman")
        axes.text(0.03, 0.95, f"rank correlation {rank:.2f}", transform=axes.transAxes, fontsize=7, va="top")
        axes.set(xscale="log", yscale="log", title=title, xlabel=label)
    for axes in panels[:, 0]:
        axes.set_ylabel("measured KL (nats per token)")
    for axes in panels.flat[len(drawn) :]:
        axes.set_visible(False)
    panels.flat[min(1, len(drawn) - 1)].legend(loc="lower right", fontsize=7, handletextpad=0.1)
    return figure


def additivity(pairs: pd.DataFrame, sets: pd.DataFrame) -> Figure:
    """Do damages add up? Pairs of blocks by layer, and sets of growing size, measured against the sum of single damages.

    Args:
        pairs: layer_a, layer_b, label (of the replacement), kl (of both replaced), kl_sum (of each alone).
        sets: label (of the replacement), blocks (how many are replaced), kl, kl_sum.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 3.1), width_ratios=(1.15, 1))
    ratio = (pairs["kl"] / pairs["kl_sum"]).rename("ratio")
    table = pd.concat([pairs, ratio], axis=1).pivot(index="layer_b", columns="layer_a", values="ratio")
    reach = max(1.2, float(max(ratio.max(), 1 / ratio.min())))
    scale = mpl.colors.LogNorm(1 / reach, reach)
    bar = {"label": "KL of both ÷ sum of KLs", "fraction": 0.045, "pad": 0.02}
    sns.heatmap(
        table, ax=left, cmap="PuOr_r", norm=scale, annot=True, fmt=".2f", annot_kws={"size": 5.5}, cbar_kws=bar, square=True
    )
    plain_log_ticks(left.collections[0].colorbar.ax.yaxis, "%g", subs=(1, 1.2, 1.5, 2, 3, 5, 7, 9))
    left.set(xlabel="one block: layer", ylabel="the other: layer")
    left.set_title(pairs["label"].iloc[0], fontsize=8)
    left.tick_params(length=0)
    left.tick_params(axis="y", labelrotation=0)
    ends = sets["kl_sum"].min() * 0.8, sets["kl_sum"].max() * 1.25
    right.plot(ends, ends, color="0.4", linewidth=0.8, linestyle=":")
    right.text(ends[1], ends[1], "sum", fontsize=7, color="0.4", ha="right", va="bottom")
    looks = cycle((LOOKS["NarrowMLP"], LOOKS["NarrowPlusLinear"], LOOKS["LowRank"]))
    sides = cycle(((-5, 4), (6, -6)))  # lines lie on one another: the numbers of one above it, of the other below
    for (label, line), look, side in zip(sets.groupby("label", sort=False), looks, sides, strict=False):
        right.plot(line["kl_sum"], line["kl"], label=label, **look)
        note = {"xytext": side, "textcoords": "offset points", "fontsize": 6, "ha": "center", "color": look["color"]}
        for _, row in line.iterrows():
            right.annotate(f"{row['blocks']:.0f}", (row["kl_sum"], row["kl"]), **note)
    right.set(xscale="log", yscale="log", xlabel="sum of single KLs (nats per token)", ylabel="KL of all together")
    for axis in (right.xaxis, right.yaxis):
        plain_log_ticks(axis, subs=(1, 3))
    right.set_title("numbers: blocks replaced", fontsize=8)
    right.legend(loc="lower right", fontsize=7)
    return figure


METHOD_LOOKS = {
    "uniform": {"color": "#56B4E9", "marker": "v", "linestyle": "--"},
    "ends protected": {"color": "#999999", "marker": "X", "linestyle": ":"},
    "greedy": {"color": "#E69F00", "marker": "D", "linestyle": "-."},
    "nested": {"color": "#009E73", "marker": "P", "linestyle": "--"},
    "knapsack": {"color": "#CC79A7", "marker": "^", "linestyle": ":"},
    "search": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "search + healing": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
}
BASELINE_LOOKS = METHOD_LOOKS | {  # the methods of mlpreplace.baselines
    "allocated": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "allocated + refit": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "subfit": {"color": "#CC79A7", "marker": "^", "linestyle": "--"},
    "shortgpt": {"color": "#999999", "marker": "X", "linestyle": ":"},
    "shortgpt_linear": {"color": "#117733", "marker": "P", "linestyle": "-."},
    "uidl": {"color": "#000000", "marker": "*", "linestyle": ":"},
    "uidl_linear": {"color": "#882255", "marker": ">", "linestyle": "-."},
    "replaceme": {"color": "#009E73", "marker": "D", "linestyle": "-."},
    "replaceme_cosine": {"color": "#44AA99", "marker": "<", "linestyle": "-."},
    "streamline_layer": {"color": "#7B6FD0", "marker": "h", "linestyle": "--"},
    "streamline_mlp": {"color": "#332288", "marker": "d", "linestyle": "--"},
}


CEILING = 10  # of perplexity ratios that are drawn: beyond it a model is broken, and how badly is of little interest


def pareto(rows: pd.DataFrame) -> Figure:
    """Perplexity ratio with its interval against sparsity, a panel a domain, a line a method; the dense model is 1.

    Lines leave the panel above ×10; what they reach is written there.

    Args:
        rows: method, sparsity_achieved, domain, perplexity_ratio, ci_low, ci_high, tokens; method "dense" included.
    """
    domains = list(rows["domain"].unique())
    figure, panels = plt.subplots(1, len(domains), figsize=(6.8, 3.5), sharey=True, squeeze=False)
    for axes, domain in zip(panels[0], domains, strict=True):
        part = rows[rows["domain"] == domain]
        dense = part[part["method"] == "dense"].iloc[0]
        for method, line in part[part["method"] != "dense"].groupby("method", sort=False):
            line = line.sort_values("sparsity_achieved")
            x, y = line["sparsity_achieved"], line["perplexity_ratio"]
            span = [y - line["ci_low"], line["ci_high"] - y]
            axes.errorbar(x, y, yerr=span, capsize=2, elinewidth=0.8, label=method, **BASELINE_LOOKS[method])
        axes.axhline(1, color="0.2", linewidth=1)
        axes.plot(0, 1, marker="*", color="0.2", markersize=9)
        text = f"dense: {dense['perplexity']:.1f}"
        axes.annotate(text, (0, 1), xytext=(-3, 7), textcoords="offset points", fontsize=7.5, color="0.2")
        axes.set(yscale="log", title=domain, xlabel="sparsity (of attention and MLP parameters)")
        axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.125))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        plain_log_ticks(axes.yaxis, "×%g", subs=(1, 1.5, 2, 3, 5, 7))
        axes.set_ylim(0.85, min(1.08 * rows["ci_high"].max(), CEILING))
        beyond = part[part["perplexity_ratio"] > CEILING].groupby("method")["perplexity_ratio"].max().sort_values()
        if len(beyond):
            off = f"above ×{CEILING}, at most: " + ", ".join(f"{name} ×{ratio:.0f}" for name, ratio in beyond.items())
            axes.text(0.02, 0.98, textwrap.fill(off, 34), transform=axes.transAxes, fontsize=6, color="0.35", va="top")
    panels[0][0].set_ylabel("perplexity ÷ dense perplexity")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=6, columnspacing=1)
    return figure


def kept_by_layer(rows: pd.DataFrame) -> Figure:
    """What allocations keep of every block: layer across, sparsity down, dark is kept; a panel a method.

    Args:
        rows: method, layer, sparsity, kept (share of the block's parameters).
    """
    return _kept(rows, "sparsity", lambda s: f"{100 * s:.4g} %")


def selection_map(rows: pd.DataFrame) -> Figure:
    """What methods keep of attention and of MLP: layer across, dark is kept; a panel a method.

    Args:
        rows: method, layer, kind ("attention" or "mlp"), kept (share of the block's parameters); one sparsity.
    """
    return _kept(rows, "kind", {"attention": "attention", "mlp": "MLP"}.get)


def _kept(rows: pd.DataFrame, down: str, label: Callable[[Any], str]) -> Figure:
    methods = list(rows["method"].unique())
    size = 6.8, 0.8 + len(methods) * (0.35 + (0.32 if down == "sparsity" else 0.2) * rows[down].nunique())
    figure, panels = plt.subplots(len(methods), 1, figsize=size, sharex=True, squeeze=False)
    bar = {"label": "parameters kept", "format": mpl.ticker.PercentFormatter(1), "fraction": 0.03, "pad": 0.01}
    for axes, method in zip(panels[:, 0], methods, strict=True):
        table = rows[rows["method"] == method].pivot(index=down, columns="layer", values="kept")
        sns.heatmap(table, ax=axes, cmap="Blues", vmin=0, vmax=1, linewidths=0.5, cbar=False)
        axes.set_yticks([i + 0.5 for i in range(len(table))], [label(value) for value in table.index], rotation=0)
        axes.set(title=method, xlabel="", ylabel="sparsity" if down == "sparsity" else "")
        axes.tick_params(length=0)
    panels[-1, 0].set_xlabel("layer")
    figure.colorbar(panels[0, 0].collections[0], ax=panels[:, 0], **bar)
    return figure


def calibration_texts(rows: pd.DataFrame) -> Figure:
    """Perplexity ratio by what the fits saw: a line a calibration text, a mark a text that is measured on.

    Args:
        rows: method (the calibration text), split ("validation" or "heldout"), domain, perplexity_ratio, ci_low, ci_high,
            log_damage.
    """
    names = list(rows["method"].unique())
    places = {name: len(names) - i for i, name in enumerate(names)}
    figure, axes = plt.subplots(figsize=(6.8, 0.9 + 0.27 * len(names)))
    heldout = rows[rows["split"] == "heldout"]
    looks = ({"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "s"})
    for (domain, part), look in zip(heldout.groupby("domain", sort=False), looks, strict=False):
        y = part["method"].map(places)
        span = [part["perplexity_ratio"] - part["ci_low"], part["ci_high"] - part["perplexity_ratio"]]
        axes.errorbar(part["perplexity_ratio"], y, xerr=span, linestyle="", capsize=2, elinewidth=0.8, label=domain, **look)
    chosen_by = np.exp(rows[rows["split"] == "validation"].groupby("method")["log_damage"].mean())
    label = "validation windows of prose, mean"
    axes.plot(chosen_by, chosen_by.index.map(places), linestyle="", marker="|", markersize=11, color="0.1", label=label)
    axes.set(xscale="log", xlabel="perplexity ÷ dense perplexity")
    plain_log_ticks(axes.xaxis, "×%g", subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7))
    axes.set_yticks(list(places.values()), list(places))
    axes.grid(axis="y", linewidth=0.4, color="0.9")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def ablation(rows: pd.DataFrame) -> Figure:
    """Perplexity ratio of recipes that differ by one ingredient, best at the bottom; a mark a domain.

    Args:
        rows: method (the recipe), note (what it adds and to which), domain, perplexity_ratio, ci_low, ci_high; one sparsity.
    """
    names = list(rows["method"].unique())
    places = {name: len(names) - i for i, name in enumerate(names)}
    notes = rows.drop_duplicates("method").set_index("method")["note"]
    figure, axes = plt.subplots(figsize=(6.8, 1.0 + 0.29 * len(names)))
    looks = ({"color": "#0072B2", "marker": "o"}, {"color": "#D55E00", "marker": "s"})
    sides = ((0, 4), (0, -9))  # above and below the mark: two domains may be close
    for (domain, part), look, side in zip(rows.groupby("domain", sort=False), looks, sides, strict=False):
        y = part["method"].map(places)
        span = [part["perplexity_ratio"] - part["ci_low"], part["ci_high"] - part["perplexity_ratio"]]
        axes.errorbar(part["perplexity_ratio"], y, xerr=span, linestyle="", capsize=2, elinewidth=0.8, label=domain, **look)
        for value, place in zip(part["perplexity_ratio"], y, strict=True):
            axes.annotate(f"{value:.2f}", (value, place), xytext=side, textcoords="offset points", fontsize=6, ha="center")
    axes.set(xscale="log", xlabel="perplexity ÷ dense perplexity")
    plain_log_ticks(axes.xaxis, "×%g", subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7))
    axes.set_yticks(list(places.values()), [f"{name}: {notes[name]}" if notes[name] else name for name in places])
    axes.set_ylim(0.4, len(names) + 0.6)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="y", linewidth=0.4, color="0.9")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure
