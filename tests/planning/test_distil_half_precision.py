"""Healing and tuning in half precision learn what they learn in float32, and return the model's precision."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import batches_for, build, random_windows

from mlpreplace import NarrowMLP, capture, compare, find_blocks, fit, heal
from mlpreplace.fitting import state
from mlpreplace.fitting.state import TrainingState
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.planning.distil import Healing, Tuning, losses, own_loss, tune, with_rest
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.splice import bodies, copied
from mlpreplace.replacements.whole_layers import Tuned

HALVES = [torch.bfloat16, torch.float16]
CASES = [*((name, dtype) for name in ("llama", "gpt2", "gemma2", "vit") for dtype in HALVES), ("t5", torch.float16)]
HEALING = Healing(steps=12, learning_rate=3e-3, check_steps=4)
TUNING = Tuning(steps=8, learning_rate=3e-3, check_steps=4)
WINDOWS, VALIDATION = random_windows(16, 24), random_windows(6, 24, seed=7)
TOLERANCE = 0.15  # of what training changes in float32, as a norm over all weights: bfloat16 keeps 8 bits of a weight


def narrow(model):
    """A plan of NarrowMLPs, fitted to the model."""
    blocks = find_blocks(model)
    stats = capture(model, blocks, WINDOWS, progress=False)
    return {b: fit(b, stats, NarrowMLP(12)) for b in blocks}


def in_float32(model, plan):
    """The same model and the same plan in float32."""
    wide = copy.deepcopy(model).float()
    found = {block.name: block for block in find_blocks(wide)}
    if {block.name for block in plan} - found.keys():
        found |= {block.name: block for block in with_rest(wide, {})}
    return wide, {found[block.name]: r.float() for block, r in copied(plan).items()}


def off(model, plan, learned, train) -> float:
    """How far what ``learned`` changes in ``plan`` is from what ``train`` changes in float32, relative to the latter."""

    def change(before, after):
        pairs = zip(bodies(before).parameters(), bodies(after).parameters(), strict=True)
        return torch.cat([(b.float() - a.float()).flatten() for a, b in pairs])

    wide_model, wide = in_float32(model, plan)
    expected = change(wide, train(wide_model, wide))
    return ((change(plan, learned) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_healing_is_that_of_float32(name, dtype):
    model = build(name).to(dtype)
    plan = narrow(model)
    healed, report = heal(model, plan, WINDOWS, VALIDATION, HEALING, progress=False)
    assert report.improved and report.stopped == "finished"
    assert {p.dtype for p in bodies(healed).parameters()} == {dtype} == {p.dtype for p in bodies(plan).parameters()}
    found = compare(model, {"dense": {}, "before": plan, "after": healed}, VALIDATION, progress=False)
    assert found["after"].mean_kl < found["before"].mean_kl
    assert off(model, plan, healed, lambda *wide: heal(*wide, WINDOWS, VALIDATION, HEALING, progress=False).plan) < TOLERANCE


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_tuning_is_that_of_float32(name, dtype):
    """Of a shared MLP and of copies of the model's own modules, whose inputs nothing else casts."""
    model, batches = build(name).to(dtype), batches_for(name, labels=True)
    plan = merge_mlps(find_blocks(model)[:2])
    plan = {b: Replacement(Tuned(), b) for b in find_blocks(model)} | plan if name == "t5" else with_rest(model, plan)
    tuned, report = tune(model, plan, batches, batches, TUNING, progress=False)
    assert report.improved and report.stopped == "finished"
    assert {p.dtype for p in bodies(tuned).parameters()} == {dtype}
    assert len(bodies(tuned)) == len(bodies(plan)), "a shared one stays shared"
    found = losses(model, {"before": plan, "after": tuned}, batches)
    assert found["before"] == report.validation_curve[0], "what is measured is what is returned"
    assert found["after"] == report.validation_curve[report.best_check] < found["before"]
    assert off(model, plan, tuned, lambda *wide: tune(*wide, batches, batches, TUNING, progress=False).plan) < TOLERANCE


def test_weights_of_several_precisions_keep_their_own():
    """As T5's in float16, whose output projections transformers keeps in float32: what they give, float16 cannot hold."""
    model, batches = build("t5").half(), batches_for("t5", labels=True)
    for block in find_blocks(model):
        block.down.float().weight.data *= 1e5
    plan = {b: Replacement(Tuned(), b) for b in find_blocks(model)}
    tuned, report = tune(model, plan, batches, batches, TUNING, progress=False)
    assert report.improved and report.stopped == "finished"
    dtypes = [[p.dtype for p in bodies(some).parameters()] for some in (plan, tuned)]
    assert dtypes[0] == dtypes[1] and set(dtypes[0]) == {torch.float16, torch.float32}


def test_small_gradients_pass_through_float16():
    """Of a loss so small that its gradients would be zero between the layers."""
    model, batches = build("llama").half(), batches_for("llama", labels=True)
    plan = narrow(model)

    def small(model, batch):
        return own_loss(model, batch) * 1e-4

    def train(model, plan):
        return tune(model, plan, batches, batches, TUNING, loss=small, progress=False).plan

    assert off(model, plan, train(model, plan), train) < TOLERANCE


def test_what_rounding_undoes_is_no_improvement():
    model = build("llama").bfloat16()
    plan = narrow(model)
    slow = Healing(steps=8, learning_rate=1e-8, check_steps=4)
    healed, report = heal(model, plan, WINDOWS, VALIDATION, slow, progress=False)
    assert not report.improved and len(set(report.validation_curve)) == 1
    assert all(torch.equal(a, b) for a, b in zip(bodies(plan).parameters(), bodies(healed).parameters(), strict=True))


def test_an_interrupted_run_ends_the_same(results, monkeypatch):
    """Gemma 2's gradients overflow at the first scale of the loss; the one that was found is in the checkpoint."""
    model, batches = build("gemma2").half(), batches_for("gemma2", labels=True)
    plan = with_rest(model, merge_mlps(find_blocks(model)[:2]))
    undisturbed, report = tune(model, plan, batches, batches, TUNING, progress=False)
    save, load, scales = TrainingState.save, TrainingState.load, []

    def interrupted(training, entry):
        save(training, entry)
        raise KeyboardInterrupt

    def watched(training, entry):
        found = load(training, entry)
        scales.append(training.scaler.get_scale())
        return found

    monkeypatch.setattr(state, "PAUSE", 0)
    monkeypatch.setattr(TrainingState, "save", interrupted)
    monkeypatch.setattr(TrainingState, "load", watched)
    with pytest.raises(KeyboardInterrupt):
        tune(model, plan, batches, batches, TUNING, cached=True, progress=False)
    monkeypatch.setattr(TrainingState, "save", save)
    resumed, record = tune(model, plan, batches, batches, TUNING, cached=True, progress=False)
    assert record.validation_curve == report.validation_curve and record.train_curve == report.train_curve
    assert all(torch.equal(a, b) for a, b in zip(bodies(undisturbed).parameters(), bodies(resumed).parameters(), strict=True))
    assert scales[1] < scales[0] == 2**15
