"""Every notebook on a device that is not the CPU: a stand-in that refuses CPU tensors, and a GPU where there is one.

Studies are slow tests on the stand-in, which takes a minute for each of them. ``pytest -m gpu`` runs all on a GPU.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import BYTES, byte_tokenizer, save_locally
from fake_device import without_hardware
from forked import launch_kernel
from jupyter_client.provisioning import local_provisioner
from running import NOTEBOOKS, STUDIES, run
from tiny_models import build

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 256  # windows, and what is decoded behind them
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
PATHS = [pytest.param(path, id=run.name_of(path), marks=[pytest.mark.slow] * (path in STUDIES)) for path in NOTEBOOKS]
FEWER = {"06_ff_merging": ["VISION_STEPS", "TRANSLATION_STEPS", "HELD_PAIRS"]}  # parameters that are 2
DEVICES = ["fake", pytest.param("cuda", marks=GPU)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The folder of a model in the precision that a GPU is given."""
    sizes = dict(num_hidden_layers=6, intermediate_size=128, vocab_size=BYTES, max_position_embeddings=CONTEXT)
    model = build("llama", **sizes).to(torch.bfloat16)
    return save_locally(model, tmp_path_factory.mktemp("models") / "tiny-llama", byte_tokenizer())


@pytest.mark.notebooks
@pytest.mark.bundled
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
def test_a_notebook_runs_on_another_device(path, device, tiny, results, capsys, monkeypatch):
    prepare = without_hardware if device == "fake" else None
    monkeypatch.setattr(local_provisioner, "launch_kernel", partial(launch_kernel, prepare=prepare))
    arguments = ["--profile", "smoke", "-p", "MODEL", tiny, "-p", "DEVICE", device, "--only", path.stem]
    arguments += [word for name in FEWER.get(path.stem, []) for word in ("-p", name, "2")]
    assert run.main(arguments + ["--studies"] * (path in STUDIES)) == 0, capsys.readouterr().err
    copies = ROOT / run.copies_folder("smoke", tiny)
    figures = {p.stem: json.loads(p.read_text()) for p in (copies / "figures").glob("*.json")}
    shutil.rmtree(copies)
    committed = {p.stem: json.loads(p.read_text())["provenance"]["notebook"] for p in (ROOT / "figures").glob("*.json")}
    assert figures.keys() == {name for name, notebook in committed.items() if notebook == run.name_of(path)}
    assert {(f["provenance"]["device"], f["provenance"]["dtype"]) for f in figures.values()} == {(f"{device}:0", "bfloat16")}
    if path.stem == "04_full_replacement":
        figure, left_out = figures["04_quantization"], device == "fake"
        assert len(figure["rows"]) == (2 if left_out else 4)
        assert ("int8" in figure["provenance"]["left_out"]) == ("not measured on fake:0" in figure["claim"]) == left_out
