"""Tables to figures. A figure is saved as pdf and png together with the json of the rows it shows and their provenance."""

from __future__ import annotations

import json
import textwrap
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .assets import ROOT
from .cache import write_atomically
from .provenance import Run

STYLE = Path(__file__).with_name("thesis.mplstyle")

# A name keeps its colour, marker and line in every figure; markers and lines tell them apart in greyscale.
LOOKS = {
    "Mean": {"color": "#999999", "marker": "X", "linestyle": ":"},
    "Linear": {"color": "#E69F00", "marker": "D", "linestyle": ":"},
    "LowRank": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "NarrowMLP": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
}


def use_style() -> None:
    """Draw everything that follows in the style of the thesis."""
    plt.style.use(STYLE)


def save_figure(figure: Figure, name: str, *, claim: str, rows: pd.DataFrame, run: Run, folder: str | Path = "figures") -> Path:
    """Write ``<folder>/<name>.pdf``, ``.png`` and ``.json``; the json holds the claim, the rows and the run's record.

    Args:
        name: "<nn>_<claim>", as in "04_pareto".
        claim: one sentence that the figure proves.
        rows: tidy table of everything drawn; missing values become null.
        folder: relative to the repository's root.

    Returns:
        Path of the json.
    """
    folder = ROOT / folder
    figure.supxlabel(textwrap.fill(_measured_on(run), int(17 * figure.get_figwidth())), fontsize=5.5, color="0.45")
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    record = {"claim": claim, "rows": records, "provenance": run.record()}
    content = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    with plt.style.context(STYLE):
        # no date inside: the same rows give the same file
        write_atomically(folder / f"{name}.pdf", lambda path: figure.savefig(path, metadata={"CreationDate": None}))
        write_atomically(folder / f"{name}.png", lambda path: figure.savefig(path, metadata={"Software": None}))
    path = folder / f"{name}.json"
    write_atomically(path, lambda scratch: scratch.write_text(content + "\n"))
    return path


def _measured_on(run: Run) -> str:
    """What no number may be quoted without: the model, and text, windows and sequence length of every split."""
    texts = run.facts.get("texts", {}).items()
    splits = [f"{name.replace('_', ' ')} {t['text']} {t['windows']} × {t['sequence_length']} tokens" for name, t in texts]
    return "  ·  ".join([run.facts.get("model", {}).get("id", ""), *splits])


def _plain_log_ticks(axis: mpl.axis.Axis, form: str = "%g", subs: tuple[float, ...] = (1, 2, 3, 5)) -> None:
    """0.1, 0.2, 0.3, 0.5 … instead of powers of ten."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=subs))
    axis.set_major_formatter(mpl.ticker.FormatStrFormatter(form))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def error_vs_parameters(rows: pd.DataFrame) -> Figure:
    """One panel a block: median per-token error (band: quartiles) against the share of the block's parameters kept.

    Args:
        rows: family, layer, position, share_of_block, split ("train", "heldout"), median, q25, q75.
    """
    layers = rows[["layer", "position"]].drop_duplicates().itertuples(index=False)
    figure, panels = plt.subplots(1, rows["layer"].nunique(), figsize=(6.8, 2.9), sharey=True, squeeze=False)
    for axes, (layer, position) in zip(panels[0], layers, strict=True):
        for family, part in rows[rows["layer"] == layer].groupby("family", sort=False):
            look = LOOKS[family]
            held, train = (part[part["split"] == s].sort_values("share_of_block") for s in ("validation", "train"))
            axes.plot(train["share_of_block"], train["median"], color=look["color"], linewidth=0.8, alpha=0.6)
            axes.plot(held["share_of_block"], held["median"], label=family, **look)
            if len(held) > 1:
                axes.fill_between(held["share_of_block"], held["q25"], held["q75"], color=look["color"], alpha=0.12, lw=0)
        axes.axhline(1, color="0.4", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=f"{position}: layer {layer}", xlabel="parameters kept in the block")
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    _plain_log_ticks(panels[0][0].yaxis)
    panels[0][0].set_ylabel("error per token\n‖g(x) − y‖² / ‖y‖²")
    panels[0][0].text(
        0.98, 1.05, "output of zero", transform=panels[0][0].get_yaxis_transform(), fontsize=7, color="0.4", ha="right"
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    handles.append(mpl.lines.Line2D([], [], color="0.4", linewidth=0.8))
    figure.legend(handles, [*labels, "thin: on fitting tokens"], loc="outside upper center", ncols=len(labels) + 1)
    return figure


def error_vs_tokens(rows: pd.DataFrame) -> Figure:
    """Held-out (markers) and training error (thin) of one family against the number of fitting tokens, a line a block.

    Args:
        rows: layer, position, tokens, split, median.
    """
    figure, axes = plt.subplots(figsize=(4.6, 3.0))
    looks = cycle((("#0072B2", "o"), ("#009E73", "^"), ("#D55E00", "s"), ("#CC79A7", "v")))
    for layer, (color, marker) in zip(rows["layer"].unique(), looks, strict=False):
        part = rows[rows["layer"] == layer]
        held, train = (part[part["split"] == s].sort_values("tokens") for s in ("validation", "train"))
        axes.plot(held["tokens"], held["median"], color=color, marker=marker)
        axes.plot(train["tokens"], train["median"], color=color, linewidth=0.8, alpha=0.7)
        name = f"{held['position'].iloc[0]} (layer {layer})"
        axes.annotate(
            name, (held["tokens"].iloc[-1], held["median"].iloc[-1]), xytext=(6, 0), textcoords="offset points",
            color=color, fontsize=8, va="center",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="fitting tokens", ylabel="median error per token")
    ticks = sorted(rows["tokens"].unique())
    axes.set_xticks(ticks, [f"{t / 1024:g}k" for t in ticks], minor=False)
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    _plain_log_ticks(axes.yaxis)
    axes.margins(x=0.05)
    axes.set_xlim(right=ticks[-1] * 3)  # room for the names
    axes.text(0.02, 0.02, "markers: held-out, thin: on fitting tokens", transform=axes.transAxes, fontsize=7, color="0.4")
    return figure


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
    right.set(yscale="log", xlabel="layer", ylabel="held-out error", title="so a pooled error hides the others")
    right.legend(loc="lower right")
    return figure


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
    labels = {"local_error": "Σ‖g(x) − y‖² / Σ‖y‖², held-out", "damage": "mean of ‖g(x) − y‖² / ‖r‖², held-out"}
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
        _plain_log_ticks(axes.yaxis, "×%g", subs=(1, 1.5, 2, 3, 5, 7))
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


def parameter_share(rows: pd.DataFrame, claimed: float = 0.8) -> Figure:
    """Where each model's parameters are, and beside it the MLP's share of its arithmetic, sorted by MLP share of the blocks.

    Args:
        rows: model, measured, total, mlp, attention, embedding, head, other, mlp_share_of_blocks, mlp_share_of_all,
            mlp_share_of_flops, context (tokens).
        claimed: MLP share drawn as a dashed line.
    """
    rows = rows.sort_values(["mlp_share_of_blocks", "mlp_share_of_all"])
    parts = {
        "MLP": (rows["mlp"], {"color": "#0072B2"}),
        "attention": (rows["attention"], {"color": "#E69F00"}),
        "embedding and head": (rows["embedding"] + rows["head"], {"color": "0.93", "hatch": "//////", "edgecolor": "0.65"}),
        "other": (rows["other"], {"color": "0.15"}),
    }
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(6.8, 0.9 + 0.185 * len(rows)), sharey=True, gridspec_kw={"width_ratios": [2.1, 1]}
    )
    at, start = range(len(rows)), 0.0
    for name, (count, look) in parts.items():
        left.barh(at, count / rows["total"], left=start, height=0.74, linewidth=0, label=name, **look)
        start = start + count / rows["total"]
    diamond = {"marker": "D", "color": "white", "markeredgecolor": "black", "markersize": 4.5, "linestyle": "", "zorder": 3}
    left.plot(rows["mlp_share_of_blocks"], at, label="MLP ÷ (MLP + attention)", **diamond)
    right.barh(at, rows["mlp_share_of_flops"], height=0.74, color="#0072B2")
    for y, share in zip(at, rows["mlp_share_of_flops"], strict=True):  # at the bar's foot, clear of the dashed line
        right.annotate(
            f"{100 * share:.0f}", (0, y), xytext=(3, 0), textcoords="offset points", va="center", color="white", fontsize=7
        )
    for axes, title in ((left, "share of all parameters"), (right, "MLP share of FLOPs")):
        axes.axvline(claimed, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"claimed: {100 * claimed:.0f} %", (claimed, len(rows) - 0.45), ha="center", va="bottom", fontsize=7.5)
        axes.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
        axes.set_title(title, pad=11)
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
        axes.grid(axis="y", visible=False)
    right.set_xlabel(f"per token, context up to {rows['context'].max():,}", fontsize=8)
    left.set_yticks(at, rows["model"])
    for label, measured in zip(left.get_yticklabels(), rows["measured"], strict=True):
        label.set_fontweight("bold" if measured else "normal")
    figure.legend(loc="outside upper center", ncols=5, handlelength=1.4, columnspacing=1.2)
    return figure
