"""Shared by the tests of saving and of export: compressed models, logits, folders, and code in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import capture_quietly, save_locally
from hybrid_blocks import shaken
from tiny_models import ENCODERS, SEQ2SEQ, VISION_ONLY, build, random_windows

from mlpreplace import Linear, LowRank, NarrowMLP, fit, load, load_model, save, splice
from mlpreplace.models.loading import Source
from mlpreplace.runtime.files import SUMS, sha256

TESTS = Path(__file__).resolve().parent
LOADED_WITH_A_BASE = [*ENCODERS, *SEQ2SEQ, *VISION_ONLY, "llava"]  # load_model loads causal language models
FORMS = pytest.mark.parametrize("standalone", [False, True], ids=["delta", "standalone"])


def logits(model, windows) -> torch.Tensor:
    with torch.no_grad():
        return model(windows).logits


def narrow_plan(model, *widths: int):
    """Every MLP narrowed, to one width or each to its own."""
    blocks, stats = capture_quietly(model, random_windows())
    each = widths if len(widths) > 1 else widths * len(blocks)
    return {b: shaken(fit(b, stats, NarrowMLP(width)), i) for i, (b, width) in enumerate(zip(blocks, each, strict=True))}


def three_families(model):
    """``model``, which has three layers, with an MLP replaced by each of three families."""
    blocks, stats = capture_quietly(model, random_windows())
    families = [Linear(), LowRank(4), NarrowMLP(24)]
    return splice(model, {b: fit(b, stats, family) for b, family in zip(blocks, families, strict=True)})


def saved_and_loaded(name: str, plan, folder):
    """The model of ``plan``, saved and loaded again; by its folder alone where load_model loads the base."""
    if name in LOADED_WITH_A_BASE:
        model = build(name)
        model.source = Source.of(model, "hub/somewhere")
        return load(save(splice(model, plan), folder / "out"), base=build(name))
    model, _ = load_model(save_locally(build(name), folder / "base"), device="cpu")
    return load(save(splice(model, plan), folder / "out"), device="cpu")


def record_of(folder) -> dict:
    return json.loads((folder / "replacements.json").read_text())


def change_record(folder, change) -> None:
    """replacements.json after ``change(record)``, and SHA256SUMS that says so."""
    record = record_of(folder)
    change(record)
    (folder / "replacements.json").write_text(json.dumps(record))
    reseal(folder)


def reseal(folder) -> None:
    """SHA256SUMS of the files as they are now: the folder of somebody who means what it says."""
    names = [line.partition("  ")[2] for line in (folder / SUMS).read_text().splitlines()]
    (folder / SUMS).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names if (folder / name).exists()))


def address(tensor: torch.Tensor) -> int:
    """Of its memory, which two tensors share that nobody has written to. Asking for data_ptr() would be writing."""
    return torch._C._data_address(tensor)


def run_python(code: str, *arguments) -> None:
    """``code`` in a fresh process that finds this package and its tests."""
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
