"""A name has one look, and names that meet in a panel differ in it."""

import pytest

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


@pytest.mark.parametrize("looks", TABLES.values(), ids=TABLES)
def test_names_differ_without_colour(looks):
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == len(looks) == len({look["color"] for look in looks})


def test_every_family_has_looks_of_its_own():
    assert FAMILIES.keys() <= FAMILY_LOOKS.keys()
    for key in ("color", "marker"):
        assert len({look[key] for look in FAMILY_LOOKS.values()}) == len(FAMILY_LOOKS)
