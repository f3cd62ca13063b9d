"""Figure of the study of all methods: what each costs at every sparsity, in every domain."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from .full_replacement import CEILING
from .looks import INK, METHOD_LOOKS, readable
from .style import draw_lines, log_ticks, parts_by, sparsity_axis

COLUMNS = "method", "sparsity_achieved", "perplexity_ratio", "ci_low", "ci_high"
REFERENCE = {"color": INK, "linewidth": 2.2, "marker": "", "alpha": 0.6, "zorder": 1}


def comparison(rows: pd.DataFrame, reference: str) -> plt.Figure:
    """Perplexity ratio with its interval against sparsity: a row of panels a unit that is removed, a column a domain.

    Every panel holds ``reference`` besides, as a broad grey line. Lines leave the panels above ×10.

    Args:
        rows: method, unit, sparsity_achieved, domain, perplexity_ratio, ci_low, ci_high; without the dense model.
        reference: the method to compare with.
    """
    known, others = rows[rows["method"] == reference], rows[rows["method"] != reference]
    units, domains = parts_by(others, "unit"), list(rows["domain"].unique())
    size = 1.9 * len(domains) + 1.6, 1.9 * len(units) + 0.6
    figure, grid = plt.subplots(len(units), len(domains) + 1, figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, (unit, part) in zip(grid, units.items(), strict=True):
        for axes, domain in zip(line, domains, strict=False):
            draw_lines(axes, part[part["domain"] == domain], COLUMNS, METHOD_LOOKS, markersize=4, linewidth=1)
            draw_lines(axes, known[known["domain"] == domain], COLUMNS[:3], METHOD_LOOKS, **REFERENCE)
            axes.set(yscale="log", ylim=(0.95, min(1.05 * rows["ci_high"].max(), CEILING)))
            log_ticks(axes.yaxis, "×{x:g}", (1, 1.5, 2, 3, 5, 7))
        line[0].set_ylabel(f"{unit} removed\nperplexity ÷ dense")
        entries = {name: entry for axes in line for entry, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        line[-1].legend(entries.values(), entries.keys(), loc="center left", borderaxespad=0)
        line[-1].set_axis_off()
    for axes, last, domain in zip(grid[0], grid[-1], domains, strict=False):
        axes.set_title(readable(domain))
        sparsity_axis(last)
        last.set_xlabel("sparsity")  # more would not fit below a panel
    return figure
