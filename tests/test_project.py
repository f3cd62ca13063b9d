"""The files around the code agree with each other."""

from __future__ import annotations

import ast
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
CONDA_NAMES = {"pytorch": "torch", "python-xxhash": "xxhash", "typst-py": "typst", "playwright-python": "playwright"}


def requirements() -> dict[str, str]:
    extras = PROJECT["optional-dependencies"].values()
    return {r.name: str(r.specifier) for r in map(Requirement, chain(PROJECT["dependencies"], *extras))}


def test_make_setup_installs_every_extra():
    """Or tests of what it leaves out would be skipped, and nobody would notice."""
    installed = re.search(r'^EXTRAS = "([\w,]+)"', (ROOT / "make.py").read_text(), re.MULTILINE).group(1)
    assert set(installed.split(",")) == set(PROJECT["optional-dependencies"])


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


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
    content = "".join(path.read_text() for path in ROOT.glob("assets*.txt"))
    lines = [line for line in content.splitlines() if line and not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_no_path_of_one_machine_is_tracked():
    for path in tracked_files():
        if path.suffix in (".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", ".txt", ".json", ""):
            assert not re.search(r"/(root|home/\w+|tmp/\w+)/", path.read_text(errors="ignore")), path.name


def in_the_locale(source: str) -> list[str]:
    """Calls that read or write text without a word on its encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and all(keyword.arg != "encoding" for keyword in node.keywords):
            name, arguments = ast.unparse(node.func), list(map(ast.unparse, node.args))
            modes = [text for text in arguments if re.fullmatch(r"'[rwaxbt+]+'", text)]
            opens = name == "open" or name.endswith(".open") and (modes or not arguments)
            whole = name.endswith(".read_text") and not arguments or name.endswith(".write_text")
            if whole or opens and not any("b" in mode for mode in modes):
                found.append(ast.unparse(node))
    return found


def test_text_is_utf_8_whatever_the_locale():
    """Of everything that is installed or run; tests are run on one machine."""
    folders = ("mlpreplace", "notebooks", "docs", "paper", "benchmarks")
    sources = [ROOT / "make.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): in_the_locale(path.read_text(encoding="utf-8")) for path in sources}
    assert len(found) > 50 and not {path: calls for path, calls in found.items() if calls}


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        *((call, True) for call in ("p.read_text()", "p.write_text(x)", "open(p)", "open(p, 'w')", "p.open('a')", "p.open()")),
        *((call, False) for call in ("p.read_text(encoding='utf-8')", "open(p, 'rb')", "p.open('wb')", "Image.open(p)")),
    ],
)
def test_a_call_without_an_encoding_would_be_seen(call, seen):
    assert bool(in_the_locale(call)) is seen


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
