"""Healing and tuning where memory runs out: steps of the same batches, in smaller parts; and with less kept for gradients."""

from __future__ import annotations

import pytest
import torch
from tiny_models import batches_for, build, random_windows

from mlpreplace import ConvMLP, NarrowMLP, capture, find_blocks, fit, heal
from mlpreplace.fitting import state
from mlpreplace.fitting.state import TrainingState
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.models.inputs import token_batches
from mlpreplace.planning import objectives
from mlpreplace.planning.distil import Healing, Tuning, losses, tune
from mlpreplace.replacements.splice import bodies

HEALING = Healing(steps=6, batch_windows=4, learning_rate=3e-3, check_steps=3)
TUNING = Tuning(steps=6, learning_rate=3e-3, check_steps=3)
WINDOWS, VALIDATION = random_windows(16, 24), random_windows(7, 24, seed=7)


def fitted(model, family=None):
    blocks = find_blocks(model)
    stats = capture(model, blocks, WINDOWS, progress=False)
    return {b: fit(b, stats, family or NarrowMLP(12)) for b in blocks}


def fill(model, most: int = 1) -> list[int]:
    """Leave no room for more than ``most`` items in the last layer; the list of what it was asked for."""
    asked = []

    def full(module, args, kwargs):
        asked.append(len(args[0] if args else kwargs["hidden_states"]))
        if asked[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    *_, (_, last) = [found for found in model.named_modules() if found[0].rpartition(".")[2].isdigit()]
    last.register_forward_pre_hook(full, with_kwargs=True)
    return asked


def assert_close(one, other) -> None:
    """Two trained plans with their reports."""
    for name in ("train_curve", "validation_curve"):
        assert getattr(one.report, name) == pytest.approx(getattr(other.report, name), rel=1e-4)
    for a, b in zip(bodies(one.plan).parameters(), bodies(other.plan).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_healing_without_room_for_a_batch_runs_it_in_parts():
    model = build("llama")
    plan = fitted(model)
    expected = heal(model, plan, WINDOWS, VALIDATION, HEALING, progress=False)
    asked = fill(model)
    found = heal(model, plan, WINDOWS, VALIDATION, HEALING, progress=False)
    assert found.report.improved
    assert_close(found, expected)
    tries = [number for number in asked if number > 1]
    assert tries == [4, 2] * 4, "two teachers, the validation and the steps find it out, each once"


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_gradients_of_an_attempt_that_failed_are_not_in_the_next():
    """Memory runs out in the first backward pass, when the later layers have their gradients."""
    model = build("llama")
    plan, failed = fitted(model), []
    expected = heal(model, plan, WINDOWS, VALIDATION, HEALING, progress=False)

    def backward(gradient):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def forward(module, args, output):
        if output.requires_grad:
            output.register_hook(backward)

    model.model.layers[1].register_forward_hook(forward)
    found = heal(model, plan, WINDOWS, VALIDATION, HEALING, progress=False)
    assert failed
    assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_an_interrupted_healing_without_room_ends_the_same(results, monkeypatch):
    model = build("llama")
    plan, asked, kl, save = fitted(model), [], objectives.Teacher.kl, TrainingState.save

    def full(teacher, logits, windows):
        asked.append(len(logits))
        if asked[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return kl(teacher, logits, windows)

    monkeypatch.setattr(objectives.Teacher, "kl", full)
    undisturbed = heal(model, plan, WINDOWS, VALIDATION, HEALING, progress=False)

    def interrupted(training, entry):
        save(training, entry)
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "PAUSE", 0)
    monkeypatch.setattr(TrainingState, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heal(model, plan, WINDOWS, VALIDATION, HEALING, cached=True, progress=False)
    monkeypatch.setattr(TrainingState, "save", save)
    asked.clear()
    resumed = heal(model, plan, WINDOWS, VALIDATION, HEALING, cached=True, progress=False)
    assert resumed.report.validation_curve == undisturbed.report.validation_curve
    assert all(map(torch.equal, bodies(resumed.plan).parameters(), bodies(undisturbed.plan).parameters()))
    assert [number for number in asked if number > 1] == [4, 2], "only the validation finds it out again"


@pytest.mark.filterwarnings("ignore:Out of memory")
@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5"])
def test_tuning_without_room_for_a_batch_runs_it_in_parts(name):
    """Sentences of many lengths: parts weigh by their targets."""
    model, batches = build(name), batches_for(name, labels=True)
    if name != "vit":
        for batch in batches:
            batch["labels"] = batch["labels"].clone()
            for i, labels in enumerate(batch["labels"]):
                labels[: 1 if name == "bert" else 0] = labels[3 * i + 1 :] = -100
    plan = merge_mlps(find_blocks(model)[:2])
    expected = tune(model, plan, batches, batches, TUNING, progress=False)
    asked = fill(model)
    found = tune(model, plan, batches, batches, TUNING, progress=False)
    assert found.report.improved
    assert_close(found, expected)
    assert [number for number in asked if number > 1] == [3] * 2
    of_plans = losses(model, {"before": plan, "after": found.plan}, batches)
    assert list(of_plans.values()) == pytest.approx([found.report.validation_curve[i] for i in (0, found.report.best_check)])


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_a_loss_of_ones_own_weighs_by_items():
    model, batches = build("vit"), batches_for("vit", n=7, batch_size=7, labels=True)
    plan = merge_mlps(find_blocks(model))

    def squares(model, batch):
        return model(batch["pixel_values"]).logits.square().mean()

    expected = tune(model, plan, batches, batches, TUNING, loss=squares, progress=False)
    fill(model, most=3)
    assert_close(tune(model, plan, batches, batches, TUNING, loss=squares, progress=False), expected)


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_parts_without_a_target_are_left_out():
    model = build("llama")
    mask = torch.ones(3, 24, dtype=torch.bool)
    mask[0, 1:] = False  # a first token has nothing to predict it from
    batches, plan = token_batches(WINDOWS[:3], mask, labels=True), fitted(model)
    expected = tune(model, plan, batches, batches, TUNING, progress=False)
    fill(model)
    assert_close(tune(model, plan, batches, batches, TUNING, progress=False), expected)


@pytest.mark.filterwarnings("ignore:Out of memory")
def test_no_room_for_a_single_window_is_an_error_that_says_so():
    model = build("llama")
    plan = fitted(model)
    fill(model, most=0)
    with pytest.warns(UserWarning, match="going on with 1 windows"), pytest.raises(torch.OutOfMemoryError) as error:
        heal(model, plan, WINDOWS, VALIDATION, HEALING, progress=False)
    assert "Not even one window" in error.value.__notes__[0]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("name", "family"), [("llama", None), ("falcon", None), ("opt", ConvMLP(12))])
def test_gradient_checkpointing_changes_nothing_but_what_is_kept(name, family):
    model = build(name)
    plan, runs = fitted(model, family), []
    find_blocks(model)[1].modules[0].register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    plan.pop(find_blocks(model)[1])
    how = dict(steps=4, batch_windows=4, learning_rate=3e-3, check_steps=2)
    plain, checkpointed = (
        heal(model, plan, WINDOWS, VALIDATION, Healing(**how, gradient_checkpointing=on), progress=False) for on in (False, True)
    )
    assert plain.report.train_curve == checkpointed.report.train_curve
    assert plain.report.validation_curve == checkpointed.report.validation_curve
    assert all(map(torch.equal, bodies(plain.plan).parameters(), bodies(checkpointed.plan).parameters()))
    assert sum(runs) == 4 + 2 * 4, "the insides of layers ran again in each step"


def test_token_ids_of_a_teacher_take_four_bytes():
    teacher = objectives.teach(build("llama"), WINDOWS, top_k=8, batch_size=4)
    assert teacher.tokens.dtype == torch.int32 and teacher.log_p.shape == teacher.tokens.shape == (16, 24, 8)
