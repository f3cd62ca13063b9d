"""The files around the code agree with each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"pytorch": "torch", "python-xxhash": "xxhash", "playwright-python": "playwright"}


def requirements() -> dict[str, str]:
    extras = PROJECT["optional-dependencies"].values()
    return {r.name: str(r.specifier) for r in map(Requirement, chain(PROJECT["dependencies"], *extras))}


def test_make_setup_installs_every_extra():
    """Or tests of what it leaves out would be skipped, and nobody would notice."""
    installed = re.search(r"-e '\.\[([\w,]+)\]'", (ROOT / "Makefile").read_text()).group(1)
    assert set(installed.split(",")) == set(PROJECT["optional-dependencies"])


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split()]


def test_environment_yml_is_in_step_with_pyproject():
    found = [Requirement(d) for d in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]]
    conda = {CONDA_NAMES.get(r.name, r.name): str(r.specifier) for r in found if r.name not in ("python", "make", "pip")}
    assert conda == requirements()
    python = next(r for r in found if r.name == "python")
    assert str(python.specifier) == PROJECT["requires-python"]


def test_constraints_pin_what_pyproject_asks_for():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower(): line.split("==")[1] for line in lines if "==" in line}
    for name, specifier in requirements().items():
        assert pins[name] in Requirement(f"{name}{specifier}").specifier, name


def test_tests_run_on_the_pinned_versions():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "transformers", "numpy"):
        assert version(name).split("+")[0] == pins[name], f"{name}: run make setup"


def test_every_asset_has_a_hash():
    lines = [line for line in (ROOT / "assets.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_no_path_of_one_machine_is_tracked():
    for path in tracked_files():
        if path.suffix in (".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", ".txt", ".json", ""):
            assert not re.search(r"/(root|home/\w+|tmp/\w+)/", path.read_text(errors="ignore")), path.name


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^  {target}\s", shown, re.MULTILINE) for target in phony)


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"\n')
    old.chmod(0o755)
    command = ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Python 3.11 or newer is needed" in done.stderr
    assert not (tmp_path / "venv").exists()


ALLOCATIONS = ["search + healing", "search", "knapsack", "nested", "greedy", "uniform"]
COMPARED = {
    "joint allocation + refit": "allocated + refit",
    "joint allocation": "allocated",
    "one width everywhere": "uniform",
    "SubFit-style": "subfit",
    "ShortGPT + linear maps": "shortgpt_linear",
    "ReplaceMe": "replaceme",
    "ReplaceMe, cosine": "replaceme_cosine",
    "LLM-Streamline": "streamline_layer",
    "UIDL": "uidl",
    "ShortGPT": "shortgpt",
}


@pytest.mark.parametrize(
    ("figure", "head", "names"),
    [
        ("04_pareto", "| method | 12.5 % |", dict(zip(ALLOCATIONS, ALLOCATIONS, strict=True))),
        ("05_perplexity_vs_sparsity", "| method | removes |", COMPARED),
    ],
)
def test_readme_results_are_those_of_the_figure(figure, head, names):
    """Every ×number in a results table of the README is a perplexity ratio of the figure, and no method is left out."""
    rows = json.loads((ROOT / "figures" / f"{figure}.json").read_text())["rows"]
    ratios = {(r["method"], r["sparsity"], r["domain"]): r["perplexity_ratio"] for r in rows}
    table = (ROOT / "README.md").read_text().partition(head)[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {names[method] for method, *_ in lines} == {r["method"] for r in rows} - {"dense"}
    for method, *cells in lines:
        for sparsity, cell in zip((0.125, 0.25, 0.375), (c for c in cells if "×" in c), strict=True):
            for domain, shown in zip(("bundled/wiki", "bundled/speeches"), re.findall(r"×([\d.]+)", cell), strict=True):
                digits = len(shown.partition(".")[2])
                assert float(shown) == pytest.approx(ratios[names[method], sparsity, domain], abs=0.6 * 10**-digits), method


def test_readme_scores_are_those_of_the_figure():
    """Before → after tuning, a column a task: language, vision, encoder, decoder."""
    rows = json.loads((ROOT / "figures" / "06_merging.json").read_text())["rows"]
    scores = {(r["method"], r["task"], r["tuned"]): r["score"] for r in rows if r["saved"] == 0.5}
    tasks = list(dict.fromkeys(task for _, task, _ in scores))
    table = (ROOT / "README.md").read_text().partition("| a half of the MLPs saved |")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {method for method, *_ in lines} == {method for method, *_ in scores}
    for method, *cells in lines:
        for task, cell in zip(tasks, cells, strict=True):
            for tuned, shown in zip((False, True), cell.split(" → "), strict=True):
                number, share = re.search(r"[\d.]+", shown).group(), 0.01 if shown.endswith("%") else 1
                close = 0.6 * share * 10 ** -len(number.partition(".")[2])
                assert float(number) * share == pytest.approx(scores[method, task, tuned], abs=close), (method, task)


def test_readme_errors_are_those_of_the_figure():
    """Every family's row: mean over the blocks of the median held-out error at a quarter of a block's parameters."""
    rows = json.loads((ROOT / "figures" / "02_error_vs_parameters.json").read_text())["rows"]
    errors: dict[tuple[str, bool], list[float]] = {}
    for r in rows:
        if r["split"] == "heldout" and abs(r["share_of_block"] / 0.25 - 1) < 0.1:
            errors.setdefault((r["family"], r["trained"] is not None), []).append(r["median"])
    lines = re.findall(r"^\| `(\w+)` \| ([\d.–]+) \| ([\d.]+) \|", (ROOT / "README.md").read_text(), re.M)
    assert {family for family, *_ in lines} == {family for family, _ in errors}
    for family, *cells in lines:
        for trained, cell in zip((False, True), cells, strict=True):
            of_blocks = errors.get((family, trained))
            expected = "–" if of_blocks is None else f"{sum(of_blocks) / len(of_blocks):.3f}"
            assert cell == expected, family
