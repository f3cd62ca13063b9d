"""Narrowed attention is refitted in front of the MLP of its layer, on what the compressed prefix gives."""

import pytest
import torch
from tiny_models import DECODERS, build, random_windows
from torch.testing import assert_close

from mlpreplace import NarrowMLP, capture, compare, find_blocks, fit, refit, spliced
from mlpreplace.replacements import NarrowAttention

WINDOWS = random_windows(12)
QUIET = dict(progress=False)
NORM_BEHIND = ("gemma2", "gemma3_text", "glm4")  # whose errors are weighted by what the norm lets through


def plan_of(model, both: bool):
    attentions, mlps = find_blocks(model, "attention"), find_blocks(model)
    stats = capture(model, attentions + mlps, WINDOWS, validation_windows=0, **QUIET)
    sizes = [NarrowAttention.sizes(block)[3] for block in attentions]
    plan = {b: fit(b, stats, size, ridge=1e-6) for b, size in zip(attentions, sizes, strict=True)}
    if both:
        plan |= {b: fit(b, stats, NarrowMLP(24)) for b in mlps if b.has_neurons}
    return plan


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in NORM_BEHIND])
def test_the_first_narrowed_attention_is_refitted_to_what_it_was(name):
    """It reads what it read when it was fitted, on the same windows."""
    model = build(name)
    block, replacement = next(iter(plan_of(model, both=False).items()))
    again, (record,) = refit(model, {block: replacement}, WINDOWS, ridge=1e-6, **QUIET)
    assert_close(again[block].body.output.weight, replacement.body.output.weight, rtol=1e-2, atol=1e-4)
    assert record["error_left"] == pytest.approx(record["error"], rel=1e-2)


@pytest.mark.parametrize("towards", ["stream", "output"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_refit_brings_the_model_nearer(name, towards):
    model = build(name)
    plan = plan_of(model, both=True)
    again, records = refit(model, plan, WINDOWS, ridge=1e-2, towards=towards, **QUIET)
    assert [record["block"] for record in records] == [b.name for b in sorted(plan, key=lambda b: (b.layer, b.kind))]
    assert all(record["error_left"] <= record["error"] for record in records)
    measured = compare(model, {"fitted": plan, "refitted": again}, WINDOWS, **QUIET)
    assert measured["refitted"].mean_kl < measured["fitted"].mean_kl


def between(model, plan, layer: int) -> torch.Tensor:
    """The residual stream between attention and MLP of a Llama's layer, with ``plan`` in place."""
    seen = []
    with spliced(model, plan):
        norm = model.model.layers[layer].post_attention_layernorm
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(WINDOWS, use_cache=False)
        handle.remove()
    return seen[0]


def test_no_other_output_weights_bring_the_stream_behind_attention_nearer():
    """With all before it refitted."""
    model = build("llama").double()
    plan = plan_of(model, both=True)
    again = refit(model, plan, WINDOWS, ridge=1e-10, **QUIET).plan

    def slope(of, block) -> float:
        weight = of[block].body.output.weight.requires_grad_(True)
        with torch.no_grad():
            dense = between(model, {}, block.layer)
        loss = (between(model, of, block.layer) - dense).square().sum()
        return torch.autograd.grad(loss, weight)[0].norm().item()

    for block in (b for b in plan if b.kind == "attention"):
        assert slope(again, block) < 1e-5 * slope(plan, block)


def test_each_part_of_a_layer_runs_once_in_each_model():
    """But for the MLP's neurons, which run again for its new output, and one batch that shows what the layer does."""
    model, ran = build("llama"), {}
    plan = plan_of(model, both=True)
    for i, layer in enumerate(model.model.layers):
        for name, module in (("dense attention", layer.self_attn), ("dense mlp", layer.mlp)):
            module.register_forward_hook(lambda *_, key=(name, i): ran.__setitem__(key, ran.get(key, 0) + 1))
    for block, replacement in plan.items():
        inner = replacement.body.query if block.kind == "attention" else replacement.body.up
        inner.register_forward_hook(lambda *_, key=(block.kind, block.layer): ran.__setitem__(key, ran.get(key, 0) + 1))
    refit(model, plan, WINDOWS, batch_size=3, **QUIET)
    layers = range(len(model.model.layers))
    each = {"dense attention": 4, "dense mlp": 4, "attention": 4, "mlp": 2 * 4 + 1}
    assert ran == {(name, i): n for name, n in each.items() for i in layers}
