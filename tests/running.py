"""What tests of notebooks/run.py share: the runner, and requests that run nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
sys.path.insert(0, str(FOLDER))
import parameters  # noqa: E402, F401
import run  # noqa: E402

STUDIES = sorted((FOLDER / "studies").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb")) + STUDIES


@pytest.fixture(name="seen")
def what_runs(monkeypatch) -> list[tuple[str, dict, str]]:
    """(notebook, parameters, folder of the copy) of what would be executed."""
    seen = []
    monkeypatch.setattr(run, "execute", lambda path, given, folder: seen.append((run.name_of(path), given, folder)) or (path, ""))
    return seen


@pytest.fixture(name="refused")
def what_is_refused(monkeypatch, capsys):
    """refused(arguments): the one line that says why nothing was run."""
    monkeypatch.setattr(run, "execute", lambda *a: pytest.fail("a notebook was started"))

    def refused(arguments: list[str]) -> str:
        assert run.main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return printed.err

    return refused
