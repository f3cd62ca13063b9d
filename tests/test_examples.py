"""The README's Python runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_has_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.bundled
def test_readme_code_runs(tmp_path, monkeypatch, capsys, registry):
    """All blocks in order, in one namespace, in an empty folder: a reader pasting them one after the other."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "tokens" in capsys.readouterr().out
    assert all((tmp_path / folder / "replacements.json").exists() for folder in ("out", "whole", "plain"))
