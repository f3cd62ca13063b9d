"""Models in several precisions: a replacement computes in the widest of its block, and gives what the block gave."""

import copy

import pytest
import torch
from conftest import capture_quietly, captured_whole
from tiny_models import INTERMEDIATE, build, outputs, random_windows
from torch import nn
from torch.testing import assert_close

from mlpreplace import (
    Linear,
    LowRank,
    Mean,
    NarrowMLP,
    NarrowPlusLinear,
    Stack,
    TwoLayerMLP,
    fit,
    load,
    register_architecture,
    save,
    splice,
)
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.models.layers import find_layers, find_parts
from mlpreplace.models.loading import Source
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.nested import NestedMLP
from mlpreplace.replacements.whole_layers import Tuned, without_layers

FAMILIES = [Mean(), Linear(), LowRank(4), NarrowMLP(24), NarrowPlusLinear(16, 2), TwoLayerMLP(24)]


def t5(tmp_path, name, dtype=torch.float16):
    """In half precision but for the output projections, as ``from_pretrained`` keeps them, which float16 cannot hold."""
    model = build(name)
    for stack in (model.encoder, model.decoder):
        for layer in stack.block:
            layer.layer[-1].DenseReluDense.wo.weight.data *= 1e5
    model.save_pretrained(tmp_path / name)
    return type(model).from_pretrained(tmp_path / name, dtype=dtype).eval()


def batch(n=6):
    ids = random_windows(n)
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(params=["t5", "t5_gated"])
def mixed(request, tmp_path):
    """(name, model, blocks, statistics)"""
    model = t5(tmp_path, request.param)
    return request.param, model, *captured_whole(model, batch(20), validation_windows=4)


def test_a_block_is_in_its_widest_precision(mixed):
    _, model, blocks, stats = mixed
    assert {b.dtype for b in blocks} == {torch.float32} and model.dtype == torch.float16
    for block in blocks:
        assert (block.up.weight.dtype, block.down.weight.dtype) == (torch.float16, torch.float32)
        assert stats[block].train.y.abs().max() > torch.finfo(torch.float16).max


def test_full_width_is_the_dense_model(mixed):
    name, model, blocks, stats = mixed
    dense = outputs(model, name)
    full = splice(model, {b: fit(b, stats, NarrowMLP(INTERMEDIATE)) for b in blocks})
    assert dense.isfinite().all() and full(**batch()).logits.dtype == torch.float16
    assert (outputs(full, name) - dense).float().norm() < 1e-2 * dense.float().norm()
    own = splice(model, {b: Replacement(Tuned(), b) for b in blocks})
    assert torch.equal(outputs(own, name), dense)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_gives_what_the_block_gave(mixed, family, tmp_path):
    name, model, blocks, stats = mixed
    plan = {b: fit(b, stats, family) for b in blocks}
    for block, small in plan.items():
        assert {p.dtype for p in small.parameters()} == {torch.float32}
        x = stats[block].train.x[:2]
        for precision in (torch.float16, torch.float32):
            assert small(x.to(precision)).dtype == torch.float32
        assert small.report.validation.pooled < 10
    compressed = splice(model, plan)
    assert outputs(compressed, name).isfinite().all()
    again = load(save(compressed, tmp_path / "alone", standalone=True), device="cpu")
    assert {n: t.dtype for n, t in again.named_parameters()} == {n: t.dtype for n, t in compressed.named_parameters()}
    assert torch.equal(outputs(again, name), outputs(compressed, name))


def test_what_is_shared_nested_and_saved_beside_its_base_is_mixed_too(mixed, tmp_path):
    name, model, blocks, stats = mixed
    model.source = Source.of(model, "hub/somewhere")
    plan = merge_mlps(blocks[:2]) | {blocks[2]: fit(blocks[2], stats, NestedMLP(((0.1, 48), (0.2, 24))))}
    compressed = splice(model, plan)
    again = load(save(compressed, tmp_path / "delta"), base=model, device="cpu")
    assert outputs(compressed, name).isfinite().all() and torch.equal(outputs(again, name), outputs(compressed, name))


def test_a_replacement_follows_the_model_to_another_precision(mixed):
    name, model, blocks, stats = mixed
    compressed = splice(model, {b: fit(b, stats, NarrowMLP(INTERMEDIATE)) for b in blocks})
    for precision in (torch.bfloat16, torch.float32, torch.float64):
        dense, small = copy.deepcopy(model).to(precision), copy.deepcopy(compressed).to(precision)
        assert small(**batch()).logits.dtype == precision
        assert_close(outputs(small, name), outputs(dense, name), rtol=0.1, atol=0.1)


def norms_in_float32(name):
    """In bfloat16 but for the norms, whose outputs are in the precision of their inputs."""
    model = build(name).bfloat16()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__:
            module.float()
    return model


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_norms_in_float32_leave_blocks_in_half_precision(name):
    model, ids = norms_in_float32(name), random_windows()
    blocks, stats = capture_quietly(model, ids)
    dense = model(ids).logits
    assert {b.dtype for b in (*blocks, *find_layers(model))} == {torch.bfloat16} and dense.dtype == torch.bfloat16
    full = splice(model, {b: fit(b, stats, NarrowMLP(INTERMEDIATE)) for b in blocks})
    assert {p.dtype for b in blocks for p in full.get_submodule(b.name).parameters()} == {torch.bfloat16}
    assert (full(ids).logits - dense).norm() < 0.1 * dense.norm()
    assert splice(model, without_layers(model, [1]))(ids).logits.isfinite().all()


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_a_part_that_is_tuned_keeps_the_precision_of_each_weight(name):
    model, ids = norms_in_float32(name), random_windows()
    tuned = splice(model, {part: Replacement(Tuned(), part) for part in find_parts(model, 1)})
    assert {t.dtype for t in tuned.parameters()} == {torch.bfloat16, torch.float32}
    assert torch.equal(tuned(ids).logits, model(ids).logits)


class Careful(nn.Module):
    """In float32 inside, whatever it reads and gives."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(32, INTERMEDIATE), nn.Linear(INTERMEDIATE, 32), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.up(x.float()))).to(x.dtype)


@pytest.mark.parametrize("neurons", [(), ("mlp.up", "mlp.down", None, "mlp.act")], ids=["opaque", "neurons"])
def test_a_block_in_float32_that_gives_half_precision_is_replaced_by_one_that_does(neurons, registry):
    register_architecture("llama", Stack("layers", ("mlp",), ("self_attn",), *neurons))
    model, ids = build("llama").bfloat16(), random_windows()
    for layer in model.model.layers:
        layer.mlp = Careful()
    blocks, stats = captured_whole(model, random_windows(20))
    for family in (Linear(), TwoLayerMLP(24)):
        small = fit(blocks[1], stats, family)
        assert {p.dtype for p in small.parameters()} == {torch.float32}
        assert splice(model, {blocks[1]: small})(ids).logits.dtype == torch.bfloat16
