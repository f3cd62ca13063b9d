"""Healing: only replacements learn, towards the dense model, the same way each time."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from tiny_models import CAUSAL, build, random_windows

from mlpreplace import NarrowMLP, capture, compare, find_blocks, fit, heal, spliced
from mlpreplace.fitting import state
from mlpreplace.fitting.state import TrainingState
from mlpreplace.planning.distil import Healing
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.whole_layers import Removed

HOW = Healing(steps=12, batch_windows=2, learning_rate=3e-3, top_k=64, check_steps=4)


def narrow_plan(model, windows, width: int = 12):
    blocks = [b for b in find_blocks(model) if b.has_neurons]
    stats = capture(model, blocks, windows, validation_windows=2, progress=False)
    return {b: fit(b, stats, NarrowMLP(width)) for b in blocks}


@pytest.fixture(scope="module")
def case():
    model = build("llama")
    windows, validation = random_windows(16, 24), random_windows(6, 24, seed=7)
    return model, narrow_plan(model, windows), windows, validation


def test_it_lowers_the_kl_and_touches_nothing_else(case):
    model, plan, windows, validation = case
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    fitted = {b: copy.deepcopy(r.state_dict()) for b, r in plan.items()}
    healed, report = heal(model, plan, windows, validation, HOW, progress=False)
    assert report.improved and report.steps == HOW.steps and report.loss == "kl"
    assert report.curve_tokens[-1] == HOW.steps * 2 * 24
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in weights.items())
    assert all(torch.equal(t, plan[b].state_dict()[name]) for b in plan for name, t in fitted[b].items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for r in healed.values() for p in r.parameters())
    for ids, bound in ((windows, 0.9), (validation, 1.0)):
        measured = compare(model, {"dense": {}, "before": plan, "after": healed}, ids, progress=False)
        assert measured["after"].mean_kl < bound * measured["before"].mean_kl


@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "mixtral"])
def test_every_architecture_learns(name):
    model = build(name)
    windows = random_windows(8, 16)
    plan = narrow_plan(model, windows)
    healed, report = heal(model, plan, windows, windows[:4], Healing(steps=8, learning_rate=1e-3, check_steps=4), progress=False)
    assert report.validation_curve[report.best_check] < report.validation_curve[0]
    assert any(not torch.equal(a, b) for r in plan for a, b in zip(plan[r].parameters(), healed[r].parameters(), strict=True))


def test_a_top_k_of_the_whole_vocabulary_is_the_kl_divergence(case):
    model, plan, windows, validation = case
    whole = Healing(steps=1, top_k=10**6, learning_rate=1e-9)
    _, report = heal(model, plan, windows, validation, whole, progress=False)
    with spliced(model, plan), torch.no_grad():
        log_q = model(validation).logits.double().log_softmax(-1)
    log_p = model(validation).logits.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert report.validation_curve[0] == pytest.approx(expected, rel=1e-4)
    _, few = heal(model, plan, windows, validation, Healing(steps=1, top_k=4), progress=False)
    assert few.validation_curve[0] < expected, "fewer buckets tell less"


def test_a_plan_without_error_has_nothing_to_learn(case):
    model, _, windows, validation = case
    blocks = find_blocks(model)
    stats = capture(model, blocks, windows, progress=False)
    whole = {b: fit(b, stats, NarrowMLP(b.intermediate_size)) for b in blocks}
    _, report = heal(model, whole, windows, validation, HOW, progress=False)
    assert abs(report.validation_curve[0]) < 1e-5


def test_a_start_that_no_check_beats_is_returned(case):
    model, plan, windows, validation = case
    wild = Healing(steps=4, learning_rate=50.0, check_steps=4)
    healed, report = heal(model, plan, windows, validation, wild, progress=False)
    assert not report.improved
    assert all(torch.equal(a, b) for r in plan for a, b in zip(plan[r].parameters(), healed[r].parameters(), strict=True))


def test_same_seed_same_bits_and_an_interrupted_run_ends_the_same(case, tmp_path, monkeypatch):
    model, plan, windows, validation = case
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path))
    undisturbed, report = heal(model, plan, windows, validation, HOW, seed=3, progress=False)
    other, _ = heal(model, plan, windows, validation, HOW, seed=4, progress=False)
    save, seen = TrainingState.save, []

    def interrupted(training, entry):
        save(training, entry)
        seen.append(training.step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", interrupted)
    monkeypatch.setattr(state, "PAUSE", 0)  # a checkpoint at every check
    with pytest.raises(KeyboardInterrupt):
        heal(model, plan, windows, validation, HOW, seed=3, cached=True, progress=False)
    assert all(p.requires_grad for p in model.parameters())
    again, after = heal(model, plan, windows, validation, HOW, seed=3, cached=True, progress=False)
    assert seen == [4, 8, 12]
    assert after.validation_curve == report.validation_curve
    monkeypatch.setattr(import_module("mlpreplace.planning.distil"), "_distillation", lambda *a: pytest.fail("it was kept"))
    kept, record = heal(model, plan, windows, validation, HOW, seed=3, cached=True, progress=False)
    assert record == after
    for block in plan:
        same = [r[block].state_dict() for r in (undisturbed, again, kept)]
        assert all(torch.equal(same[0][k], s[k]) for s in same[1:] for k in s)
        assert any(not torch.equal(same[0][k], t) for k, t in other[block].state_dict().items())


@pytest.mark.parametrize(
    "change", [dict(steps=0), dict(learning_rate=0), dict(top_k=0), dict(warmup=1), dict(batch_windows=0), dict(check_steps=-1)]
)
def test_impossible_settings(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Healing(**change)


def test_bad_requests(case):
    model, plan, windows, validation = case
    with pytest.raises(ValueError, match="empty"):
        heal(model, {}, windows, validation)
    removed = {b: Replacement(Removed(), b) for b in plan}
    with pytest.raises(ValueError, match="Nothing in the plan has parameters"):
        heal(model, removed, windows, validation, HOW, progress=False)
    with pytest.raises(ValueError, match="vocabulary"):
        heal(model, plan, windows + 1000, validation)
    wider = build("llama", hidden_size=64)
    foreign = {b: Replacement(NarrowMLP(4), b) for b in find_blocks(wider)}
    with pytest.raises(ValueError, match="another model"):
        heal(model, foreign, windows, validation, HOW, progress=False)
