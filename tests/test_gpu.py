"""The whole path on a GPU, where there is one."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import captured_whole, save_locally
from tiny_models import build, random_windows

import mlpreplace as m
from mlpreplace.runtime import memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def test_the_whole_path_on_a_gpu_is_that_on_the_cpu():
    windows, unseen = random_windows(6), random_windows(2, seed=1)
    logits, measured = [], []
    for device in ("cpu", "cuda"):
        model = build("llama").to(device)
        blocks, stats = captured_whole(model, windows)
        assert {s.hh.device.type for s in stats.values()} == {device}
        assert {s.hh.dtype for s in stats.values()} == {torch.float64}
        assert {s.train.x.device.type for s in stats.values()} == {"cpu"}
        plan = {block: m.fit(block, stats, m.NarrowMLP(24)) for block in blocks}
        plan[blocks[0]] = m.fit(blocks[0], stats, m.NarrowMLP(24), training=m.Training(epochs=1))
        healed, _ = m.heal(model, plan, windows, unseen, m.planning.distil.Healing(steps=1), progress=False)
        logits.append(m.splice(model, healed)(unseen.to(device)).logits.detach().cpu())
        measured.append(m.compare(model, {"healed": healed}, unseen, progress=False)["healed"].perplexity)
    torch.testing.assert_close(*logits, rtol=1e-2, atol=1e-3)
    assert measured[0] == pytest.approx(measured[1], rel=1e-2)


@pytest.mark.parametrize("device", ["auto", "cuda", "balanced", "sequential"])
def test_a_model_lands_on_the_gpu_in_the_precision_of_its_checkpoint(device, tmp_path):
    folder = save_locally(build("llama").to(torch.bfloat16), tmp_path / "model")
    model, _ = m.load_model(folder, device=device)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", torch.bfloat16)}
    blocks, stats = captured_whole(model, random_windows(6))
    compressed = m.splice(model, {block: m.fit(block, stats, m.NarrowMLP(24)) for block in blocks})
    assert {p.dtype for p in compressed.parameters()} == {torch.bfloat16}
    assert m.perplexity(compressed, random_windows(2), progress=False).value > 1


def test_int8_on_a_gpu_is_that_on_the_cpu():
    """Many tokens and one; an MLP of a width that is no multiple of 8."""
    model = build("llama", intermediate_size=43)
    expected, found = (m.evaluation.quantized(copy.deepcopy(model).to(device)) for device in ("cpu", "cuda"))
    for ids in (random_windows(6), random_windows(1, 1)):
        torch.testing.assert_close(found(ids.cuda()).logits.cpu(), expected(ids).logits, rtol=1e-2, atol=1e-2)


def test_the_cache_changes_no_logits_on_a_gpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        error, tolerance = m.models.cache_error(build("llama").to("cuda", dtype), random_windows(2), prompt=4)
        assert error <= tolerance, dtype


def test_free_memory_is_that_of_the_gpu_and_shrinks():
    before = memory.free_bytes(torch.device("cuda", 0))
    held = torch.empty(2**26, dtype=torch.uint8, device="cuda")
    assert memory.free_bytes(held.device) <= before - len(held)
