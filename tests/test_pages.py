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


def test_the_readme_is_read_in_a_minute():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 250 and max(len(line) for line in lines if not line.startswith("|")) <= 160


def test_every_figure_is_in_the_results_once():
    named = re.findall(r"\]\(\.\./figures/([^)]*)\.png\)", (ROOT / "docs" / "results.md").read_text())
    drawn = {path.stem: json.loads(path.read_text()) for path in (ROOT / "figures").glob("*.json")}
    assert sorted(named) == sorted(drawn)
