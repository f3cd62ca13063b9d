"""A name has one look, and names that meet in a panel differ in it."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from mlpreplace import METHODS
from mlpreplace.replacements.families import FAMILIES
from mlpreplace.reporting.plots.looks import (
    ALLOCATION_LOOKS,
    FAMILY_LOOKS,
    KIND_LOOKS,
    MERGING_LOOKS,
    METHOD_LOOKS,
    OBJECTIVE_LOOKS,
    QUANTIZATION_LOOKS,
    SELECTION_LOOKS,
    SERIES_LOOKS,
    TEXT_LOOKS,
)

TABLES = {
    "allocations": ALLOCATION_LOOKS.values(),
    "comparison": [METHOD_LOOKS[name] for name in METHODS],
    "merging": MERGING_LOOKS.values(),
    "kinds": KIND_LOOKS.values(),
    "objectives": OBJECTIVE_LOOKS.values(),
    "quantization": QUANTIZATION_LOOKS.values(),
    "selections": SELECTION_LOOKS.values(),
    "series": SERIES_LOOKS,
    "texts": TEXT_LOOKS,
}


# What meets in a panel of the comparison: methods that remove the same unit, and the recipe.
MEETING = {k: v for k, v in TABLES.items() if k != "comparison"} | {
    unit: [METHOD_LOOKS[m.name] for m in METHODS.values() if m.unit == unit or m.name == "recipe"]
    for unit in ("layers", "blocks", "widths")
}
DEUTERANOPIA = [  # in linear RGB, at full strength (Machado, Oliveira and Fernandes 2009)
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
]
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
WHITE = [0.95047, 1.0, 1.08883]


def seen(colour: str) -> np.ndarray:
    """CIE Lab of a colour as a deuteranope sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = XYZ @ np.clip(DEUTERANOPIA @ linear, 0, 1) / WHITE
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("looks", MEETING.values(), ids=MEETING)
def test_names_that_meet_differ_for_who_sees_no_green(looks):
    """By ΔE ≥ 12, where 2 can just be noticed."""
    for a, b in combinations([look["color"] for look in looks], 2):
        assert np.linalg.norm(seen(a) - seen(b)) >= 12, (a, b)


@pytest.mark.parametrize("looks", TABLES.values(), ids=TABLES)
def test_names_differ_without_colour(looks):
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == len(looks) == len({look["color"] for look in looks})


def test_every_family_has_looks_of_its_own():
    assert FAMILIES.keys() <= FAMILY_LOOKS.keys()
    for key in ("color", "marker"):
        assert len({look[key] for look in FAMILY_LOOKS.values()}) == len(FAMILY_LOOKS)
