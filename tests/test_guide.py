"""The guide shows the house as it is: every room with its files, in their order."""

from __future__ import annotations

import re
from pathlib import Path

from test_house import HOUSE, PACKAGE

GUIDE = (Path(__file__).resolve().parents[1] / "docs" / "guide.md").read_text()


def test_the_table_of_rooms_lists_every_file_in_order():
    lines = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", GUIDE.partition("\n## The house\n")[2], re.MULTILINE)
    files = {room: [name.split(".")[0] for name in names.split()] for room, names in HOUSE.items()}
    expected = {
        room: list(dict.fromkeys(f"{name}/" if (PACKAGE / room / name).is_dir() else name for name in names))
        for room, names in files.items()
    }
    assert {room: re.findall(r"`([^`]+)`", shown) for room, shown in lines} == expected
