"""Narrowed attention is refitted in front of the MLP of its layer, on what the compressed prefix gives."""

import pytest
from tiny_models import DECODERS, build, random_windows
from torch.testing import assert_close

from mlpreplace import NarrowMLP, capture, compare, find_blocks, fit, refit
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
