"""README.md and docs/results.md are made of their templates, and every number in them is one of a figure's json."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from test_teaching import ALWAYS, typed_numbers

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "docs" / "templates"
PLACED = r"\{%.*?%\}|\{\{.*?\}\}"  # what a template leaves to the figures
# numbers that are no results: the bundled model's size, what a command is asked, what conda and pip need, bits of a weight
ASKED = {2.0, 3.0, 3.11, 8.0, 13.0, 24.0, 25.0, 1.5}

spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)
pages = pytest.mark.parametrize(("template", "page"), readme.PAGES.items(), ids=readme.PAGES.values())


@pages
def test_a_page_is_what_its_template_makes(template, page):
    """Where it is not: python docs/readme.py."""
    assert (ROOT / page).read_text() == readme.rendered(template)


@pages
def test_a_template_holds_no_result(template, page):
    text = re.sub(PLACED, " ", (TEMPLATES / template).read_text(), flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))  # commands
    assert typed_numbers(text, ALWAYS | ASKED) == []


def test_a_number_that_is_typed_into_a_page_is_found(monkeypatch, tmp_path):
    """Or changed there: the page is not what its template makes any more."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "rendered", lambda template: "×1.35\n")
    (tmp_path / "docs").mkdir()
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    (tmp_path / "README.md").write_text("×1.25\n")
    assert readme.main(["--check"]) == 1 and (tmp_path / "README.md").read_text() == "×1.25\n"


# Settings, versions, memory of tests and bounds of checks, in the guide and the page of models. The table of an 8B model is
# tested by test_estimates.py. Any other number there would be a result, which belongs to a figure.
KNOWN = {2.0, 3.0, 4.0, 5.23, 6.0, 7.5, 8.0, 15.0, 16.0, 20.0, 1.5, 2.94, 3.05, 32.0, 48.0, 200.0, 238.0, 560.0, 1000.0, 1024.0}
KNOWN |= {50_000.0, 65_536.0}


@pytest.mark.parametrize("page", ["guide.md", "models.md", "adding_a_method.md", "licences.md"])
def test_other_pages_hold_no_result(page):
    text = (ROOT / "docs" / page).read_text()
    text = re.sub(r"\n## An 8B model on one GPU\n.*?\n## ", "\n## ", text, flags=re.DOTALL)
    text = re.sub(r"\d{4}\)|\d{4}–\d{4}|[\d,]+ (?:of its|validation|images)|\d\.\d\b(?= and| or|;)|et al\. \d{4}", "", text)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("    ", "|")))
    assert typed_numbers(text, ALWAYS | KNOWN) == []


def test_a_result_that_is_typed_into_the_guide_is_found():
    text = (ROOT / "docs" / "guide.md").read_text() + "\nIt costs ×1.37 there, and keeps 92 %.\n"
    assert len(typed_numbers(text, ALWAYS | KNOWN)) >= 2


def test_the_readme_is_read_in_a_minute():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250 and max(len(line) for line in lines if not line.startswith("|")) <= 160


def test_every_figure_is_in_the_results_once():
    named = re.findall(r"\]\(\.\./figures/([^)]*)\.png\)", (ROOT / "docs" / "results.md").read_text())
    drawn = {path.stem: json.loads(path.read_text()) for path in (ROOT / "figures").glob("*.json")}
    assert sorted(named) == sorted(drawn)
