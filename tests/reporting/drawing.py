"""What tests of figures share: no window, a fresh style, and the points of a panel."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

DOMAINS = ("bundled/wiki", "bundled/speeches")


@pytest.fixture(autouse=True)
def closed():
    """Every figure is closed and every setting of matplotlib put back after a test."""
    with plt.rc_context():
        yield
    plt.close("all")


def points(axes) -> set[tuple[float, float]]:
    """(x, y) of everything that lines and marks of a panel go through."""
    return {(round(float(x), 6), round(float(y), 6)) for line in axes.lines for x, y in np.column_stack(line.get_data())}


def pairs(x, y) -> set[tuple[float, float]]:
    """The same of two columns."""
    return {(round(float(a), 6), round(float(b), 6)) for a, b in zip(x, y, strict=True)}


def titles(figure) -> list[str]:
    """Of the panels that have one."""
    return [title for axes in figure.axes if (title := axes.get_title() or axes.get_title("left"))]


def labels(ticks) -> list[str]:
    return [label.get_text() for label in ticks]


def measured(methods, sparsities=(0.25,)) -> pd.DataFrame:
    """Rows of plans as result_rows gives them."""
    rows = []
    for d, domain in enumerate(DOMAINS):
        for m, method in enumerate(methods):
            for s in sparsities:
                ratio = 1.0 if method == "dense" else 1.1 + 0.2 * m + d + s
                ends = {"ci_low": 0.95 * ratio, "ci_high": 1.05 * ratio}
                about = {"method": method, "sparsity": s, "sparsity_achieved": s, "domain": domain, "perplexity": 15 * ratio}
                rows.append({**about, "perplexity_ratio": ratio, **ends, "tokens": 1000})
    return pd.DataFrame(rows)
