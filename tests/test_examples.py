"""The Python of README and guide runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/guide.md")
BLOCKS = {page: re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) for page in PAGES}


def test_pages_have_examples_and_the_first_is_ten_lines():
    assert all(BLOCKS.values())
    lines = [line for line in BLOCKS["README.md"][0].splitlines() if line and not line.startswith("from ")]
    assert len(lines) <= 10


@pytest.mark.bundled
def test_their_code_runs(tmp_path, monkeypatch, capsys, registry):
    """All blocks in order, in one namespace, in an empty folder: a reader pasting them one after the other."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for page, blocks in BLOCKS.items():
        for block in blocks:
            exec(compile(block, page, "exec"), namespace)
    assert "tokens" in capsys.readouterr().out
    assert torch.equal(namespace["again"](namespace["held"]).logits, namespace["compressed"](namespace["held"]).logits)
    assert all((tmp_path / folder / "replacements.json").exists() for folder in ("out", "whole", "plain"))
