"""What a refit costs and leaves behind, and what it refuses."""

import copy
from importlib import import_module

import pytest
import torch
import transformers
from conftest import fail_after
from refitted import fitted_plan, pristine, same, stream_error
from tiny_models import CONTEXT, GROUPED, MODELS, build, random_windows

import mlpreplace.models.architectures
from mlpreplace import (
    LowRank,
    Mean,
    NarrowMLP,
    NarrowPlusLinear,
    capture,
    find_blocks,
    fit,
    load_windows,
)
from mlpreplace.planning.refit import refit
from mlpreplace.replacements.families import Replacement
from mlpreplace.statistics.moments import MOMENTS


@pytest.mark.parametrize("replaced", [(0, 1, 2, 3, 4), (1, 3), (2,), ()])
def test_two_passes_from_the_first_replaced_layer_to_the_last(replaced):
    model, plan = fitted_plan("llama", NarrowMLP(12), num_hidden_layers=5)
    ran = [0] * 5
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    refit(model, {b: r for b, r in plan.items() if b.layer in replaced}, random_windows(7), batch_size=2, progress=False)
    first, last = min(replaced, default=5), max(replaced, default=-1)
    checks = [i in replaced for i in range(5)]  # of one batch, whether the layer just adds what the block gives
    assert ran == [4 * ((i <= last) + (first <= i <= last)) + checks[i] for i in range(5)]


def test_neither_plan_nor_model_changes_also_after_an_error(monkeypatch):
    model, plan = fitted_plan("gemma2", NarrowMLP(12))
    modules, weights, before = dict(model.named_modules()), copy.deepcopy(model.state_dict()), copy.deepcopy(plan)
    new = refit(model, plan, random_windows(), progress=False).plan
    assert same(plan, before) and not same(plan, new)
    assert not any(p.requires_grad for r in new.values() for p in r.parameters())
    assert all(new[b].report == r.report for b, r in plan.items())
    layer = model.model.layers[1]
    failing = fail_after(3, layer.forward, RuntimeError("in the layer"))
    monkeypatch.setattr(layer, "forward", failing, raising=False)
    with pytest.raises(RuntimeError, match="in the layer"):
        refit(model, plan, random_windows(), progress=False)
    assert layer.forward is failing, "a layer's own forward, as a device-placement library sets one"
    monkeypatch.undo()
    vars(layer).pop("forward", None)
    assert pristine(model, modules)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in weights.items())


def test_a_second_call_takes_it_from_the_cache(results, monkeypatch):
    model, plan = fitted_plan("llama", NarrowMLP(12))
    first = refit(model, plan, random_windows(), cached=True, progress=False)
    other = refit(model, plan, random_windows(), towards="output", cached=True, progress=False)
    monkeypatch.setattr(import_module("mlpreplace.planning.refit"), "Walk", lambda *args: pytest.fail("it was kept"))
    again = refit(model, plan, random_windows(), cached=True, progress=False)
    assert same(first.plan, again.plan) and first.report == again.report
    assert not same(first.plan, other.plan)


@pytest.mark.parametrize("name", ["bert", "granite"])
def test_a_layer_that_does_more_than_add_is_refused(name, monkeypatch):
    """BERT normalises the sum, Granite scales what its blocks give."""
    scaled = transformers.GraniteConfig(**GROUPED, residual_multiplier=0.2)
    monkeypatch.setitem(MODELS, "granite", (transformers.GraniteForCausalLM, scaled))
    monkeypatch.setitem(
        mlpreplace.models.architectures.ARCHITECTURES, "granite", mlpreplace.models.architectures.ARCHITECTURES["llama"]
    )
    model, plan = fitted_plan(name, NarrowMLP(12))
    with pytest.raises(ValueError, match=r"0.*does more than add"):
        refit(model, plan, random_windows(), progress=False)


def test_bad_requests():
    model, plan = fitted_plan("llama", NarrowMLP(12))
    windows = random_windows()
    with pytest.raises(ValueError, match="towards='input'"):
        refit(model, plan, windows, towards="input")
    with pytest.raises(ValueError, match="ridge ≥ 0, got -1"):
        refit(model, plan, windows, ridge=-1)
    with pytest.raises(ValueError, match=f"context of {CONTEXT}"):
        refit(model, plan, random_windows(seq_len=CONTEXT + 1))
    with pytest.raises(ValueError, match="moments are singular"):
        refit(model, plan, windows[:1, :6], ridge=0, progress=False)
    with pytest.raises(ValueError, match="another model"):
        refit(build("llama", num_hidden_layers=1), plan, windows, progress=False)
    marian = build("marian")
    with pytest.raises(ValueError, match="2 stacks"):
        refit(marian, {b: Replacement(Mean(), b) for b in find_blocks(marian)}, windows, progress=False)


@pytest.mark.bundled
def test_refit_of_the_bundled_model(bundled):
    model, tokenizer = bundled
    windows = load_windows("bundled/wiki", tokenizer, seq_len=64, n_windows=6)
    blocks = find_blocks(model)[:3]
    stats = capture(model, blocks, windows, moments=MOMENTS, validation_windows=2, progress=False)
    plan = {blocks[i]: fit(blocks[i], stats, f) for i, f in ((0, NarrowPlusLinear(256, 64)), (2, LowRank(32)))}
    new = refit(model, plan, windows, progress=False).plan
    assert stream_error(model, new, windows) < stream_error(model, plan, windows)
