"""A module in two places is refused where blocks are found, and counted once; what is compressed already says so."""

import copy

import pytest
import torch
from conftest import capture_quietly
from tiny_models import build, outputs, random_windows
from torch import nn

from mlpreplace import NarrowMLP, find_blocks, fit, splice
from mlpreplace.evaluation.int8 import quantized
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.models.blocks import NotApplicable
from mlpreplace.models.parameters import block_parameters, count_parameters
from mlpreplace.planning.candidates import narrow_widths
from mlpreplace.replacements.splice import sparsity_of


def one_mlp(model):
    model.model.layers[2].mlp = model.model.layers[1].mlp


def one_layer(model):
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)


def one_attention(model):
    model.model.layers[2].self_attn = model.model.layers[1].self_attn


def one_weight(model):
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight


def one_weight_of_a_block(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.gate_proj.weight


def one_outside(model):
    model.also = model.model.layers[1].mlp.down_proj


SHARED = {  # of a kind of block: the two places
    one_mlp: ("mlp", "layers.1.mlp", "layers.2.mlp"),
    one_layer: ("mlp", "layers.0.mlp", "layers.1.mlp"),
    one_attention: ("attention", "layers.1.self_attn", "layers.2.self_attn"),
    one_weight: ("mlp", "layers.0.mlp.gate_proj", "layers.2.mlp.up_proj"),
    one_weight_of_a_block: ("mlp", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"),
    one_outside: ("mlp", "layers.1.mlp.down_proj", "also"),
}


@pytest.mark.parametrize("share", SHARED)
def test_a_module_in_two_places_is_refused_with_both_and_counted_once(share, llama):
    kind, *places = SHARED[share]
    share(llama)
    with pytest.raises(ValueError, match="copy.deepcopy") as error:
        find_blocks(llama, kind)
    assert all(place in str(error.value) for place in places)
    layers = {id(p): p.numel() for n, p in llama.model.layers.named_parameters() if "norm" not in n}
    assert block_parameters(llama) == sum(layers.values())
    parts = count_parameters(llama)
    assert parts["total"] == sum(p.numel() for p in llama.parameters()) == sum(parts.values()) - parts["total"]


def test_copies_of_a_shared_module_are_the_way_out(llama):
    one_mlp(llama)
    expected = outputs(llama, "llama")
    llama.model.layers[2].mlp = copy.deepcopy(llama.model.layers[2].mlp)
    assert torch.equal(outputs(llama, "llama"), expected)
    blocks, stats = capture_quietly(llama, random_windows())
    plan = {b: fit(b, stats, NarrowMLP(20)) for b in blocks}
    size = [sum(p.numel() for p in m.parameters()) for m in (llama, splice(llama, plan))]
    assert sparsity_of(llama, plan) == (size[0] - size[1]) / block_parameters(llama)


def test_a_body_that_replacements_share_is_in_one_place(llama):
    blocks, _ = capture_quietly(llama, random_windows())
    merged = splice(llama, merge_mlps(blocks[:2]))
    assert find_blocks(merged) == blocks and count_parameters(merged)["mlp"] == 2 * blocks[0].n_params


# what is compressed already


def compressed(how):
    model = build("llama")
    blocks, stats = capture_quietly(model, random_windows())
    if how == "int8":
        return model, quantized(model)
    plan = merge_mlps(blocks[:2]) if how == "merged" else {blocks[0]: fit(blocks[0], stats, NarrowMLP(16))}
    small = splice(model, plan)
    return model, quantized(small) if how == "both" else small


@pytest.mark.parametrize("how", ["replaced", "merged", "int8", "both"])
def test_a_compressed_block_is_found_and_says_that_it_is_compressed(how):
    model, small = compressed(how)
    dense, block = find_blocks(model), find_blocks(small)[0]
    assert find_blocks(small) == dense and block.compressed and not dense[0].compressed
    assert not block.holds_experts and not block.has_neurons and not block.opaque
    _, stats = capture_quietly(small, random_windows())
    for act in (block.weights, lambda: narrow_widths(block, 3), lambda: fit(block, stats, NarrowMLP(8))):
        with pytest.raises(NotApplicable, match=r"model\.layers\.0\.mlp is compressed already.*of the dense model"):
            act()


def test_only_a_mixture_holds_experts():
    assert all(b.holds_experts for b in find_blocks(build("mixtral")))
    assert [b.holds_experts for b in find_blocks(build("qwen3_moe"))] == [True, False, True]
    assert not any(b.holds_experts for name in ("llama", "opt", "bert") for b in find_blocks(build(name)))
    assert not any(b.holds_experts for b in find_blocks(build("mixtral"), "attention"))
