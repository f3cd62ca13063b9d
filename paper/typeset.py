"""Compile the paper: python paper/typeset.py writes paper/mlpreplace.pdf. Offline; every number comes from figures/*.json."""

from __future__ import annotations

import os
from pathlib import Path

import typst

ROOT = Path(__file__).resolve().parents[1]


def compile_paper(root: Path = ROOT) -> bytes:
    """The pdf. Fonts are those within typst, so that every machine sets the same pages.

    Raises typst.TypstError where a row is missing or a sentence is not true of the rows any more; the message says which.
    """
    return typst.compile(root / "paper" / "main.typ", root=root, ignore_system_fonts=True)


if __name__ == "__main__":
    target = ROOT / "paper" / "mlpreplace.pdf"
    partial = target.with_suffix(".partial")
    partial.write_bytes(compile_paper())
    os.replace(partial, target)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e3:,.0f} kB")
