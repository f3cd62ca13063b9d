"""Notebooks as a student reads them: no number that can go stale, nothing that the rows contradict, and one idea at a time."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from running import NOTEBOOKS, STUDIES

PLAIN = re.compile(  # what may hold digits: code, formulas, links, names with a number, the items of a list
    r"```.*?```|<code>.*?</code>|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\[[^]]*\]\([^)]*\)"
    r"|\b(?:Gemma|[Nn]otebooks?|arXiv|R²) [\d.]+|\d:\d zeros|^\d+\. ",
    re.DOTALL | re.MULTILINE,
)
ALWAYS = {0.0, 1.0, 95.0}  # nothing, one, and the level of every interval
TAUGHT = [path for path in NOTEBOOKS if path not in STUDIES]

taught = pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)


def sources(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def parameters(path: Path) -> set[float]:
    """All numbers in the parameters cell, and each as a percentage."""
    values = set()
    for node in ast.walk(ast.parse(sources(path, "code")[0])):
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            values |= {float(node.value), round(100 * node.value, 6)}
    return values


def typed_numbers(markdown: str, allowed: set[float]) -> list[str]:
    """Numbers in a text that stand for themselves: not part of a word, a formula, code, a link or a list, and not allowed."""
    found = re.findall(r"[^\s\[\](){}*_~,;:]*\d[^\s\[\](){}*_~;:]*", PLAIN.sub(" ", markdown))
    found = [word.strip(".,%×") for word in found if not re.search(r"[A-Za-z]", word)]
    return [word for word in found if not re.fullmatch(r"[\d.,]+", word) or float(word.replace(",", "")) not in allowed]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_result_is_typed(path):
    """Results are printed by the cells that have them: claims above figures, and conclusions that check themselves."""
    allowed = parameters(path) | ALWAYS
    assert [n for text in sources(path, "markdown") for n in typed_numbers(text, allowed)] == []


def test_a_typed_result_is_found():
    for planted in ("costs ×1.37 there", "by 41–46 %", "of 25,000 tokens.", "(12)", "layers 11 and 28"):
        assert typed_numbers(planted, ALWAYS), planted
    for plain in ("Llama-3-8B in float32", "$d^2$ and `x = 3`", "1. Why?", "Gemma 3", "[03](03_x.ipynb)", "95 % intervals"):
        assert not typed_numbers(plain, ALWAYS), plain


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_conclusions_hold_on_what_is_committed(path):
    cells = nbformat.read(path, as_version=4).cells
    said = [str(o.get("data", o)) for c in cells if c.cell_type == "code" for o in c.outputs]
    assert not [text for text in said if "Not here:" in text or "Not measured here:" in text]


@taught
def test_the_notebook_teaches_one_thing(path):
    markdown, code = sources(path, "markdown"), sources(path, "code")
    text = "\n\n".join(markdown)
    assert "$$" in text and "## By hand" in text, "the idea, as a formula and by hand"
    assert "<details>" in text and "Next: [" in text and "What it does not say" in text
    assert len(code[1].splitlines()) <= 20, "what is imported, and the run"
    by_hand = next(i for i, c in enumerate(nbformat.read(path, as_version=4).cells) if "## By hand" in c.source)
    hand = nbformat.read(path, as_version=4).cells[by_hand + 1].source
    assert "mlpreplace" not in hand and len(hand.splitlines()) <= 13, "plain torch, and short"
    parts = re.split(r"^# ", text, flags=re.MULTILINE)[1:]
    assert all(len(part.split("\n## ")) <= 30 for part in parts)


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path not in STUDIES], ids=lambda path: path.stem)
def test_paragraphs_are_short(path):
    paragraphs = [p for text in sources(path, "markdown") for p in re.split(r"\n\s*\n|\n- |\n\d+\. |\n *<details>", text)]
    assert not [p for p in paragraphs if len(p.split()) > 90 and not p.startswith("|")]
