"""What tests of saving and of export share: plans of every family, logits, and processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import capture_quietly
from hybrid_blocks import shaken
from tiny_models import random_windows

from mlpreplace import NarrowMLP, fit

TESTS = Path(__file__).resolve().parent


def logits(model, windows) -> torch.Tensor:
    with torch.no_grad():
        return model(windows).logits


def narrow_plan(model, *widths: int):
    """Every MLP narrowed, to one width or each to its own."""
    blocks, stats = capture_quietly(model, random_windows())
    each = widths if len(widths) > 1 else widths * len(blocks)
    return {b: shaken(fit(b, stats, NarrowMLP(width)), i) for i, (b, width) in enumerate(zip(blocks, each, strict=True))}


def run_python(code: str, *arguments) -> None:
    """``code`` in a fresh process that finds this package and its tests."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
