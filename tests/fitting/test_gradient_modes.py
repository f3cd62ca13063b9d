"""Training under torch.no_grad() is training; under torch.inference_mode() nothing can learn, and nothing is tried."""

import copy

import pytest
import torch
from conftest import captured_whole
from tiny_models import build, random_windows

import mlpreplace as m
from mlpreplace.beyond_language import pretrain
from mlpreplace.fitting.fit import fit_all
from mlpreplace.fitting.training import Training
from mlpreplace.models.forward import check_gradients
from mlpreplace.models.inputs import token_batches
from mlpreplace.planning.damage import second_order_damage
from mlpreplace.planning.distil import Healing, Tuning, tune
from mlpreplace.planning.search import search

WINDOWS = random_windows(8)
BATCHES = token_batches(WINDOWS, labels=True)
SHORT, TRAINING = Tuning(steps=3, check_steps=2), Training(epochs=1)


@pytest.fixture(scope="module")
def case():
    model = build("gpt2")
    blocks, stats = captured_whole(model, WINDOWS)
    return model, blocks, stats, {b: m.fit(b, stats, m.NarrowMLP(24)) for b in blocks}


def pretrained(model) -> dict:
    model = copy.deepcopy(model)
    report = pretrain(model, BATCHES, BATCHES, SHORT, progress=False)
    return {"curve": torch.tensor(report.validation_curve), **model.state_dict()}


LEARNS = {
    "heal": lambda model, blocks, stats, plan: m.heal(model, plan, WINDOWS, WINDOWS, Healing(steps=3), progress=False).plan,
    "tune": lambda model, blocks, stats, plan: tune(model, plan, BATCHES, BATCHES, SHORT, progress=False).plan,
    "pretrain": lambda model, blocks, stats, plan: pretrained(model),
    "fit": lambda model, blocks, stats, plan: m.fit(blocks[0], stats, m.NarrowMLP(8), training=TRAINING, progress=False),
    "fit_all": lambda model, blocks, stats, plan: fit_all(blocks, stats, [m.Linear()], training=TRAINING, progress=False),
    "fit_all, one job": lambda *case: fit_all(case[1], case[2], [m.Linear()], training=TRAINING, n_jobs=1, progress=False),
    "damage": lambda model, blocks, stats, plan: second_order_damage(model, {b: [r] for b, r in plan.items()}, WINDOWS).felt,
    "search": lambda *case: search(case[0], case[3], {b: [r] for b, r in case[3].items()}, WINDOWS, progress=False).plan,
    "allocate": lambda *case: m.allocate(case[0], case[2], 0.2, windows=WINDOWS, progress=False),
}


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.nn.Module):
        return list(value.state_dict().values())
    if isinstance(value, (dict, list)):
        return [t for item in (value.values() if isinstance(value, dict) else value) for t in tensors(item)]
    return [torch.as_tensor(value)]


def assert_equal(found, expected) -> None:
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


@pytest.mark.parametrize("name", LEARNS)
def test_without_gradients_outside_the_same_is_learnt(name, case):
    expected = LEARNS[name](*case)
    with torch.no_grad():
        assert_equal(LEARNS[name](*case), expected)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("name", LEARNS)
def test_under_inference_mode_nothing_is_begun(name, case, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "embedding", None)  # no model runs
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)  # and nothing is solved
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.*leave it first"):
        LEARNS[name](*case)


def test_closed_forms_and_measurements_need_no_gradients(case):
    model, blocks, stats, plan = case
    uses = [
        lambda: m.capture(model, blocks, WINDOWS, progress=False)[blocks[0]].xx,
        lambda: m.fit(blocks[1], stats, m.NarrowMLP(8)),
        lambda: m.compare(model, {"": plan}, WINDOWS, progress=False)[""].mean_kl,
        lambda: m.refit(model, plan, WINDOWS, progress=False).plan,
    ]
    for use in uses:
        expected = use()
        with torch.inference_mode():
            assert_equal(use(), expected)


def test_what_was_made_under_inference_mode_is_data_like_any_other(case):
    model, blocks, stats, plan = case
    with torch.inference_mode():
        windows, found = WINDOWS.clone(), m.capture(model, blocks, WINDOWS, sample_windows=None, progress=False)
        batches = token_batches(windows, labels=True)
        made = {b: m.fit(b, stats, m.NarrowMLP(24)) for b in blocks}
    assert windows.is_inference() and next(made[blocks[0]].parameters()).is_inference()
    assert m.perplexity(model, windows, progress=False) == m.perplexity(model, WINDOWS, progress=False)
    assert_equal(m.heal(model, made, windows, windows, Healing(steps=3), progress=False).plan, LEARNS["heal"](*case))
    assert_equal(tune(model, made, batches, batches, SHORT, progress=False).plan, LEARNS["tune"](*case))
    for family in (m.NarrowMLP(8), m.ConvMLP(8)):
        trained = [m.fit(blocks[0], s, family, training=TRAINING, progress=False) for s in (found, stats)]
        assert trained[0].report.training is not None and trained[1].report.training is not None
    learner = copy.deepcopy(model)
    pretrain(learner, batches, batches, SHORT, progress=False)
    assert_equal(learner.state_dict(), {k: v for k, v in pretrained(model).items() if k != "curve"})
    second_order_damage(model, {b: [r] for b, r in made.items()}, windows, progress=False)


def test_weights_that_were_made_under_inference_mode_are_named(case):
    plan = case[3]
    with torch.inference_mode():
        model = build("gpt2")
    for learn in (
        lambda: m.heal(model, plan, WINDOWS, WINDOWS, progress=False),
        lambda: tune(model, plan, BATCHES, BATCHES, SHORT, progress=False),
        lambda: pretrain(model, BATCHES, BATCHES, SHORT, progress=False),
        lambda: second_order_damage(model, {b: [r] for b, r in plan.items()}, WINDOWS, progress=False),
    ):
        with pytest.raises(ValueError, match=r"transformer\.wte\.weight of GPT2LMHeadModel was made under torch\.inference_mode"):
            learn()
    m.perplexity(model, WINDOWS, progress=False)
    check_gradients(copy.deepcopy(model))  # as the message advises
