"""Devices without room, and models spread over two of them, on stand-ins: no GPU is needed to see what must not happen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import capture_quietly, captured_whole, save_locally
from tiny_models import random_windows

import mlpreplace as m
from mlpreplace.models import loading
from mlpreplace.models.blocks import find_blocks
from mlpreplace.runtime import memory

ROOT = Path(__file__).resolve().parents[1]


def test_what_models_on_two_devices_do_in_a_process_of_its_own():
    """The second device is PyTorch's accelerator from its registration on, of which other tests should know nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/two_devices.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]


def test_a_model_larger_than_its_gpus_is_refused(llama, tmp_path, monkeypatch):
    folder = save_locally(llama, tmp_path / "model")
    llama.model.layers[2].to("meta")  # as transformers leaves it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "pretrained", lambda model_class, path, **how: llama)
    with pytest.raises(ValueError, match="offloaded.*larger GPUs"):
        m.load_model(folder, device="balanced")


def test_offloaded_weights_are_refused_with_what_to_do(llama):
    llama.model.layers[0].to("meta")
    blocks = find_blocks(llama)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp are not on any device.*balanced"):
        capture_quietly(llama, random_windows(4))
    with pytest.raises(ValueError, match="offloaded"):
        m.replacements.Replacement(m.NarrowMLP(24), blocks[0])


@pytest.fixture
def small_memory(llama):
    """The device has no room for more than 2 windows; what it was asked for."""
    asked = []

    def full(module, args, kwargs):
        asked.append(len(args[0] if args else kwargs["hidden_states"]))
        if asked[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    llama.model.layers[2].register_forward_pre_hook(full, with_kwargs=True)
    return asked


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_a_capture_without_room_starts_again_with_half_the_batch(llama, small_memory):
    windows = random_windows(11)
    blocks, found = captured_whole(llama, windows)
    _, expected = captured_whole(llama, windows, batch_size=2)
    assert 4 in small_memory
    for block in blocks:
        assert found[block].tokens == expected[block].tokens == 9 * windows.shape[1]
        for name in ("sum_x", "sum_y", "sum_h", "xx", "xy", "hh", "hx"):
            assert torch.equal(getattr(found[block], name), getattr(expected[block], name))
        assert torch.equal(found[block].train.y, expected[block].train.y)


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_a_comparison_without_room_runs_batches_in_halves(llama, small_memory):
    windows = random_windows(7)
    _, stats = capture_quietly(llama, windows, batch_size=2)
    plans = {"small": {block: m.fit(block, stats, m.NarrowMLP(24)) for block in stats}, "dense": {}}
    expected = m.compare(llama, plans, windows, batch_size=2, progress=False)
    small_memory.clear()
    found = m.compare(llama, plans, windows, progress=False)
    assert 4 in small_memory
    for label in plans:
        assert found[label].nll.tolist() == expected[label].nll.tolist()
        assert found[label].kl.tolist() == expected[label].kl.tolist()


def test_a_host_without_room_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert memory.is_full(error.value) and not memory.is_full(RuntimeError("shapes differ"))


def test_no_room_for_a_single_window_is_an_error_that_says_so():
    def run(windows):
        raise torch.OutOfMemoryError

    with pytest.warns(UserWarning, match="going on with 1 windows"), pytest.raises(torch.OutOfMemoryError) as error:
        memory.halving(run, 2)
    assert "Not even one window" in error.value.__notes__[0]
