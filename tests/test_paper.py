"""The paper compiles from the committed figures, and holds no number that is typed by hand."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import typst

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "paper"
sys.path.insert(0, str(PAPER))
from typeset import compile_paper  # noqa: E402

NAMES = [  # what may hold a digit: names of models, of figures, and the inverse of a matrix
    r"SmolLM2(-135M)?",
    r"GPT-2",
    r"Llama-2-7B",
    r'"\d\d_\w+"',
    r"@\d\d_\w+",
    r"merged\.gpt2_\w+",
    r"minus 1\)",
]
WORDS = ["one token in a hundred", "four-bit", "eight-bit", "eight bits"]  # what may hold the word for one
NUMBER_WORDS = (
    "three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen"
).split()

LAYOUT = {'"04_pareto"', '"#1b3a57"', '"a4"', '"1"', '"1.1"', '"0"', '".0"', '"< 1 s"'}  # strings of lib.typ with a digit


def typed_numbers(text: str) -> list[str]:
    """Digits and number words of a .typ file that are not part of an allowed name; comments do not count."""
    text = re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)
    text = re.sub("|".join(NAMES), "", text)
    text = re.sub("|".join(WORDS), "", text, flags=re.IGNORECASE)
    return re.findall(rf"[^\s]*\d[^\s]*|(?i:\b(?:{'|'.join(NUMBER_WORDS)})\b)", text)


def typed_in_strings(text: str) -> list[str]:
    """Digits in the strings and the content of a file of helpers, where sizes of the layout are plain code."""
    text = re.sub(r"//.*$", "", text, flags=re.MULTILINE)
    text = text.replace(r"\u{a0}", " ")
    found = re.findall(r'"[^"\n]*"', text) + re.findall(r"\[[^\[\]\n]*\]", re.sub(r'"[^"\n]*"', '""', text))
    return [piece for piece in found if re.search(r"\d", piece) and piece not in LAYOUT]


@pytest.fixture
def copy(tmp_path):
    """A copy of what the paper is made of, to plant something in."""
    shutil.copytree(PAPER, tmp_path / "paper", ignore=shutil.ignore_patterns("*.pdf", "__pycache__"))
    shutil.copytree(ROOT / "figures", tmp_path / "figures", ignore=shutil.ignore_patterns("*.png"))
    return tmp_path


def test_the_paper_compiles():
    assert compile_paper().startswith(b"%PDF-")


def test_no_number_is_typed_by_hand():
    assert typed_numbers((PAPER / "main.typ").read_text()) == []
    assert typed_in_strings((PAPER / "lib.typ").read_text()) == []


@pytest.mark.parametrize(
    "planted", ["It costs ×1.34 at most.", "keeps 92 % of it", "#times(1.34)", "All seven of them", "[a 25 % plan]"]
)
def test_a_number_typed_by_hand_is_found(planted):
    text = (PAPER / "main.typ").read_text()
    place = text.index("= The question")
    assert typed_numbers(text[:place] + planted + "\n\n" + text[place:])


def test_a_number_typed_in_a_helper_is_found():
    assert typed_in_strings('#let best() = "×1.09"') and typed_in_strings("#let best() = [about 92 %]")


def test_a_new_number_in_a_figure_changes_the_paper(copy):
    before = compile_paper(copy)
    path = copy / "figures" / "06_merging.json"
    figure = json.loads(path.read_text())
    (row,) = [r for r in figure["rows"] if (r["task"], r["method"]) == ("vision", "dense")]
    row["score"] += 0.001
    path.write_text(json.dumps(figure))
    assert compile_paper(copy) != before


def test_a_sentence_that_is_no_longer_true_does_not_compile(copy):
    path = copy / "figures" / "04_pareto.json"
    figure = json.loads(path.read_text())
    for row in figure["rows"]:
        if row["method"] == "recipe":
            row["perplexity_ratio"] *= 2
    path.write_text(json.dumps(figure))
    with pytest.raises(typst.TypstError, match="no longer true: the recipe loses less than the knapsack"):
        compile_paper(copy)


def test_a_row_that_is_missing_does_not_compile(copy):
    path = copy / "figures" / "04_pareto.json"
    figure = json.loads(path.read_text())
    figure["rows"] = [r for r in figure["rows"] if (r["method"], r["sparsity"]) != ("nested", 0.25)]
    path.write_text(json.dumps(figure))
    with pytest.raises(typst.TypstError, match="04_pareto: expected one row, found 0"):
        compile_paper(copy)


def test_every_reference_is_cited():
    """And cites what exists: an unknown key does not compile."""
    keys = re.findall(r"^@\w+\{(\w+),", (PAPER / "refs.bib").read_text(), re.MULTILINE)
    text = (PAPER / "main.typ").read_text()
    assert keys and [key for key in keys if f"@{key}" not in text] == []


def test_what_papers_report_is_used():
    """reported.json holds what no figure has; a number that nothing reads does not stay in it."""
    used = (PAPER / "main.typ").read_text()
    for values in json.loads((PAPER / "reported.json").read_text()).values():
        assert [key for key in values if f".{key}" not in used] == []
