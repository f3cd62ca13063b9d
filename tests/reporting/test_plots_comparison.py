"""The figure of all methods shows each of them in every domain, beside one that is in all panels."""

import numpy as np
from drawing import DOMAINS, closed, measured, pairs, points, titles  # noqa: F401

from mlpreplace.reporting.plots import comparison, readable

UNITS = {"shortgpt": "layers", "uidl": "layers", "subfit": "blocks", "uniform": "widths", "recipe": "widths"}


def test_a_row_of_panels_a_unit_and_a_column_a_domain():
    rows = measured(UNITS, (0.125, 0.25))
    rows["unit"] = rows["method"].map(UNITS)
    figure = comparison(rows, "recipe")
    assert titles(figure) == [readable(domain) for domain in DOMAINS]
    grid = np.array(figure.axes).reshape(3, len(DOMAINS) + 1)
    for unit, line in zip(("layers", "blocks", "widths"), grid, strict=True):
        members = [m for m, of in UNITS.items() if of == unit and m != "recipe"]
        shown = [text.get_text() for text in line[-1].get_legend().get_texts()]
        assert sorted(shown) == sorted(map(readable, [*members, "recipe"]))
        for axes, domain in zip(line, DOMAINS, strict=False):
            there = rows[(rows["domain"] == domain) & rows["method"].isin([*members, "recipe"])]
            assert pairs(there["sparsity_achieved"], there["perplexity_ratio"]) <= points(axes)
            others = rows[(rows["domain"] == domain) & ~rows["method"].isin([*members, "recipe"])]
            assert not pairs(others["sparsity_achieved"], others["perplexity_ratio"]) & points(axes)


def test_the_legend_names_what_is_in_any_domain():
    rows = measured(UNITS, (0.125, 0.25))
    rows["unit"] = rows["method"].map(UNITS)
    rows = rows[(rows["method"] != "uidl") | (rows["domain"] == DOMAINS[-1])]
    legend = comparison(rows, "recipe").axes[len(DOMAINS)].get_legend()
    assert "UIDL" in [text.get_text() for text in legend.get_texts()]
