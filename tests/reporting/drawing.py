"""What tests of figures share: no window, a fresh style, and the points of a panel."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest


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
