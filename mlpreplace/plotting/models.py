"""Figures of whole models: notebooks 03 and 04."""

from __future__ import annotations

from itertools import cycle

import matplotlib as mpl
import matplotlib.pyplot as plt
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


def damage_prediction(rows: pd.DataFrame) -> Figure:
    """Damage predicted from local error alone against KL measured end to end, a point a replaced block.

    Args:
        rows: family, layer, local_error (pooled), damage (over the residual stream), kl.
    """
    figure, panels = plt.subplots(1, 2, figsize=(6.8, 3.0), sharey=True)
    titles = {"local_error": "error ÷ the block's own output", "damage": "error ÷ the residual stream"}
    labels = {"local_error": "Σ‖g(x) − y‖² / Σ‖y‖², validation tokens", "damage": "mean of ‖g(x) − y‖² / ‖r‖², validation tokens"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for family, part in rows.groupby("family", sort=False):
            look = {k: v for k, v in LOOKS[family].items() if k != "linestyle"}
            axes.scatter(part[column], part["kl"], s=16, alpha=0.75, linewidths=0, label=family, **look)
        rank = rows[column].corr(rows["kl"], method="spearman")
        axes.text(0.03, 0.95, f"rank correlation {rank:.2f}", transform=axes.transAxes, fontsize=8, va="top")
        axes.set(xscale="log", yscale="log", title=title, xlabel=labels[column])
    panels[0].set_ylabel("measured KL (nats per token)")
    panels[1].legend(loc="lower right", fontsize=7, handletextpad=0.1)
    return figure


METHOD_LOOKS = {
    "NarrowMLP, greedy": LOOKS["NarrowMLP"],
    "all families, greedy": {"color": "#CC79A7", "marker": "^", "linestyle": "-."},
    "NarrowMLP, uniform": {"color": "#56B4E9", "marker": "v", "linestyle": "--"},
    "LowRank, uniform": LOOKS["LowRank"],
}


def pareto(rows: pd.DataFrame) -> Figure:
    """Perplexity ratio with its interval against sparsity, a panel a domain, a line a method; the dense model is 1.

    Args:
        rows: method, sparsity_achieved, domain, perplexity_ratio, ci_low, ci_high, tokens; method "dense" included.
    """
    domains = list(rows["domain"].unique())
    figure, panels = plt.subplots(1, len(domains), figsize=(6.8, 3.5), sharey=True, squeeze=False)
    for axes, domain in zip(panels[0], domains, strict=True):
        part = rows[rows["domain"] == domain]
        dense = part[part["method"] == "dense"].iloc[0]
        for method, line in part[part["method"] != "dense"].groupby("method", sort=False):
            x, y = line["sparsity_achieved"], line["perplexity_ratio"]
            span = [y - line["ci_low"], line["ci_high"] - y]
            axes.errorbar(x, y, yerr=span, capsize=2, elinewidth=0.8, label=method, **METHOD_LOOKS[method])
        axes.axhline(1, color="0.2", linewidth=1)
        axes.plot(0, 1, marker="*", color="0.2", markersize=9)
        text = f"dense: {dense['perplexity']:.1f}"
        axes.annotate(text, (0, 1), xytext=(-3, 7), textcoords="offset points", fontsize=7.5, color="0.2")
        axes.set(yscale="log", title=domain, xlabel="sparsity (of attention and MLP parameters)")
        axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.125))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        plain_log_ticks(axes.yaxis, "×%g", subs=(1, 1.5, 2, 3, 5, 7))
        axes.set_ylim(bottom=0.85)
    panels[0][0].set_ylabel("perplexity ÷ dense perplexity")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def kept_by_layer(rows: pd.DataFrame) -> Figure:
    """What an allocation keeps of every block: layer across, sparsity down, dark is kept.

    Args:
        rows: layer, sparsity, kept (share of the block's parameters).
    """
    table = rows.pivot(index="sparsity", columns="layer", values="kept")
    figure, axes = plt.subplots(figsize=(6.8, 0.9 + 0.32 * len(table)))
    bar = {"label": "parameters kept", "format": mpl.ticker.PercentFormatter(1), "fraction": 0.03, "pad": 0.01}
    sns.heatmap(table, ax=axes, cmap="Blues", vmin=0, vmax=1, linewidths=0.5, cbar_kws=bar)
    axes.set_yticks([i + 0.5 for i in range(len(table))], [f"{100 * s:.4g} %" for s in table.index], rotation=0)
    axes.set(xlabel="layer", ylabel="sparsity")
    axes.tick_params(length=0)
    return figure
