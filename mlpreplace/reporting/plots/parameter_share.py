"""The figure of notebook 01: where a model's parameters are."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

from .looks import BLUE, ORANGE
from .style import legend_above, note


def parameter_share(rows: pd.DataFrame, claimed: float = 0.8) -> plt.Figure:
    """Where each model's parameters are, and the MLP share of its FLOPs; sorted by the MLP share of the blocks.

    Args:
        rows: model, measured, total, mlp, attention, embedding, head, other, mlp_share_of_blocks, mlp_share_of_all,
            mlp_share_of_flops, context (tokens).
        claimed: MLP share drawn as a dashed line.
    """
    rows = rows.sort_values(["mlp_share_of_blocks", "mlp_share_of_all"])
    parts = {
        "MLP": (rows["mlp"], {"color": BLUE}),
        "attention": (rows["attention"], {"color": ORANGE}),
        "embedding and head": (rows["embedding"] + rows["head"], {"color": "0.93", "hatch": "//////", "edgecolor": "0.65"}),
        "other": (rows["other"], {"color": "0.15"}),
    }
    size = 6.8, 0.9 + 0.185 * len(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=(2.1, 1))
    at, start = range(len(rows)), 0.0
    for name, (count, look) in parts.items():
        left.barh(at, count / rows["total"], left=start, height=0.74, linewidth=0, label=name, **look)
        start = start + count / rows["total"]
    diamond = {"marker": "D", "color": "white", "markeredgecolor": "black", "markersize": 4.5, "linestyle": "", "zorder": 3}
    left.plot(rows["mlp_share_of_blocks"], at, label="MLP ÷ (MLP + attention)", **diamond)
    right.barh(at, rows["mlp_share_of_flops"], height=0.74, color=BLUE)
    for y, share in zip(at, rows["mlp_share_of_flops"], strict=True):  # at the bar's foot, clear of the dashed line
        note(right, f"{100 * share:.0f}", (0, y), (3, 0), va="center", color="white", fontsize=7)
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
    legend_above(figure, 5, handlelength=1.4, columnspacing=1.2)
    return figure
