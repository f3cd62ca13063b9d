"""Tuning: a plan learns in place from any loss, what is tied stays tied, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import batches_for, build, random_windows

from mlpreplace import compare, find_blocks, heal, refit, splice
from mlpreplace.fitting import state
from mlpreplace.fitting.state import TrainingState
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.models.inputs import token_batches
from mlpreplace.planning.distil import Healing, Tuning, losses, tune, with_rest
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.splice import bodies, copied, sparsity_of
from mlpreplace.replacements.whole_layers import Tuned

HOW = Tuning(steps=8, learning_rate=3e-3, check_steps=4)


def weights(module) -> list[torch.Tensor]:
    return [t.clone() for t in module.state_dict().values()]


def equal(before: list[torch.Tensor], module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True))


def one_body(plan) -> bool:
    return len({id(r.body) for r in plan.values()}) == 1 == len({r.body.up.weight.data_ptr() for r in plan.values()})


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vit", "marian", "t5"])
def test_a_merged_plan_learns_as_one(name):
    """On the model's own loss: of next tokens, masked tokens, images and translations."""
    model = build(name)
    plan = merge_mlps(find_blocks(model)[:2])
    before, of_plan, learns = weights(model), weights(bodies(plan)), [p.requires_grad for p in model.parameters()]
    batches, unseen = batches_for(name, labels=True), batches_for(name, seed=5, labels=True)
    tuned, report = tune(model, plan, batches, batches, HOW, progress=False)
    assert report.improved and report.steps == 8 and report.stopped == "finished" and report.curve_tokens == [0, 12, 24]
    assert one_body(tuned) and one_body(plan) and equal(of_plan, bodies(plan)) and not equal(of_plan, bodies(tuned))
    assert equal(before, model) and [p.requires_grad for p in model.parameters()] == learns
    assert not any(p.requires_grad for p in bodies(tuned).parameters())
    assert [r.family for r in tuned.values()] == [r.family for r in plan.values()]
    found = losses(model, {"dense": {}, "before": plan, "after": tuned}, batches)
    assert found["after"] == pytest.approx(report.validation_curve[report.best_check], rel=1e-5)
    assert found["after"] < found["before"] == pytest.approx(report.validation_curve[0], rel=1e-5)
    assert losses(model, {"dense": {}}, unseen)["dense"] != found["dense"]


def test_an_optimizer_step_keeps_all_layers_tied():
    """In the model that splice makes, in a deep copy of it, and in another precision."""
    for change in (lambda m: m, copy.deepcopy, lambda m: m.to(torch.bfloat16), lambda m: copy.deepcopy(m).double()):
        model = build("llama")
        plan = merge_mlps(find_blocks(model))
        other = change(splice(model, plan))
        body, *rest = (other.get_submodule(b.name).body for b in plan)
        before = body.up.weight.detach().clone()
        other.requires_grad_(True)
        optimizer = torch.optim.Adam(other.parameters(), lr=1e-2)
        assert sum(p.shape == (48, 32) for group in optimizer.param_groups for p in group["params"]) == 2, "gate and up, once"
        other(**batches_for("llama", labels=True)[0]).loss.backward()
        optimizer.step()
        assert not torch.equal(before, body.up.weight)
        assert all(b.up.weight is body.up.weight and b.down.weight is body.down.weight for b in rest)


def test_the_gradient_is_the_sum_over_layers():
    model = build("gpt2").double()
    plan = merge_mlps(find_blocks(model))
    (batch,) = batches_for("gpt2", batch_size=6, labels=True)
    tied, apart = (splice(model, p) for p in (copied(plan), {b: copy.deepcopy(r) for b, r in plan.items()}))
    for m in (tied, apart):
        m.requires_grad_(True)
        m(**batch).loss.backward()
    own = [apart.get_submodule(b.name).body.up.weight for b in plan]
    assert len({p.data_ptr() for p in own}) == 3
    torch.testing.assert_close(tied.get_submodule("transformer.h.0.mlp").body.up.weight.grad, sum(p.grad for p in own))


def test_healing_and_refitting_keep_what_is_tied():
    model, windows = build("llama"), random_windows(8, 16)
    plan = merge_mlps(find_blocks(model)[1:])
    before = weights(bodies(plan))
    healed, report = heal(model, plan, windows, windows, Healing(steps=8, learning_rate=3e-3, check_steps=4), progress=False)
    assert one_body(healed) and report.improved and equal(before, bodies(plan))
    measured = compare(model, {"dense": {}, "before": plan, "after": healed}, windows, progress=False)
    assert measured["after"].mean_kl < measured["before"].mean_kl
    refitted = refit(model, healed, windows, progress=False).plan
    assert one_body(refitted) and equal(weights(bodies(healed)), bodies(refitted)), "it belongs to no single layer"


def test_what_is_kept_is_tied_and_an_interrupted_run_ends_the_same(results, monkeypatch):
    model, windows = build("llama"), random_windows(8, 16)
    plan, batches = merge_mlps(find_blocks(model)[:2]), batches_for("llama", labels=True)
    how = Healing(steps=4, learning_rate=3e-3, check_steps=2)
    first, again = (heal(model, plan, windows, windows, how, cached=True, progress=False) for _ in range(2))
    assert first[1] == again[1] and one_body(again[0]) and equal(weights(bodies(first[0])), bodies(again[0]))
    apart = {b: copy.deepcopy(r) for b, r in plan.items()}
    assert heal(model, apart, windows, windows, how, cached=True, progress=False)[1] != first[1], "not tied, another result"

    undisturbed, report = tune(model, plan, batches, batches, HOW, progress=False)
    save = TrainingState.save

    def interrupted(training, entry):
        save(training, entry)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", interrupted)
    monkeypatch.setattr(state, "PAUSE", 0)  # a checkpoint at every check
    with pytest.raises(KeyboardInterrupt):
        tune(model, plan, batches, batches, HOW, cached=True, progress=False)
    monkeypatch.setattr(TrainingState, "save", save)
    for _ in range(2):  # trained to the end, then taken from disk
        tuned, record = tune(model, plan, batches, batches, HOW, cached=True, progress=False)
        assert record.validation_curve == report.validation_curve
        assert one_body(tuned) and equal(weights(bodies(undisturbed)), bodies(tuned))


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_rest_of_the_layers_can_learn_as_well(name):
    model, batches = build(name), batches_for(name, labels=True)
    plan = merge_mlps(find_blocks(model)[:2])
    whole = with_rest(model, plan)
    assert sparsity_of(model, whole) == pytest.approx(sparsity_of(model, plan))
    values = losses(model, {"merged": plan, "whole": whole}, batches)
    assert values["whole"] == pytest.approx(values["merged"], rel=1e-6)
    before = weights(model)
    alone, together = (tune(model, p, batches, batches, HOW, progress=False)[1] for p in (plan, whole))
    assert min(together.validation_curve) < min(alone.validation_curve) and equal(before, model)
    in_layers = {id(p) for n, p in model.named_parameters() if ".layers." in n or ".h." in n or ".layer." in n}
    mlps = {id(p) for b in plan for m in b.modules for p in m.parameters()}
    held = sum(p.numel() for p in bodies(whole).parameters()) - sum(p.numel() for p in bodies(plan).parameters())
    assert held == sum(p.numel() for p in model.parameters() if id(p) in in_layers - mlps)


def test_the_other_mlps_of_an_encoder_decoder_can_learn_as_well():
    model, batches = build("marian"), batches_for("marian", labels=True)
    plan = merge_mlps(find_blocks(model)[:2])
    whole = {b: Replacement(Tuned(), b) for b in find_blocks(model)} | plan
    tuned, report = tune(model, whole, batches, batches, HOW, progress=False)
    assert report.improved and len(bodies(tuned)) == 3
    with pytest.raises(ValueError, match="2 stacks"):
        with_rest(model, plan)


def test_a_loss_of_ones_own():
    model, batches = build("vit"), batches_for("vit", labels=True)
    plan = merge_mlps(find_blocks(model))

    def squares(model, batch):
        return model(batch["pixel_values"]).logits.square().mean()

    _, report = tune(model, plan, batches, batches, HOW, loss=squares, progress=False)
    assert report.loss == "squares" and report.improved
    uneven = [*batches, {k: t[:1] for k, t in batches[0].items()}]  # of 3, 3 and 1 images
    sizes = losses(model, {0: plan}, uneven, lambda model, batch: torch.tensor(len(batch["labels"])))
    assert sizes[0] == pytest.approx((3 * 3 + 3 * 3 + 1) / 7), "batches weigh by their items"


def test_a_start_that_no_check_beats_is_returned():
    model, batches = build("llama"), batches_for("llama")
    plan = merge_mlps(find_blocks(model))
    goal = bodies(plan)[0].up.weight + 1e-3  # which steps of fifty overshoot

    def distance(model, batch):
        return (model.model.layers[0].mlp.body.up.weight - goal).square().mean()

    how = Tuning(steps=4, learning_rate=50.0, check_steps=2)
    tuned, report = tune(model, plan, batches, batches, how, loss=distance, progress=False)
    assert not report.improved and len(report.validation_curve) == 3 and equal(weights(bodies(plan)), bodies(tuned))


@pytest.mark.parametrize("change", [dict(steps=0), dict(learning_rate=0), dict(warmup=1), dict(check_steps=-1)])
def test_impossible_settings(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Tuning(**change)


def test_bad_requests():
    model, batches = build("llama"), batches_for("llama", labels=True)
    plan = merge_mlps(find_blocks(model))
    with pytest.raises(ValueError, match="empty"):
        tune(model, {}, batches, batches)
    with pytest.raises(ValueError, match="no validation batches"):
        tune(model, plan, batches, [])
    with pytest.raises(ValueError, match="No labels among input_ids"):
        tune(model, plan, batches_for("llama"), batches, progress=False)
    with pytest.raises(ValueError, match="loss at the start is not finite"):
        tune(model, plan, batches, batches, loss=lambda m, b: m(**b).loss * float("nan"), progress=False)
    with pytest.raises(ValueError, match="cached=False"):
        tune(model, plan, batches, batches, loss=lambda m, b: m(**b).loss, cached=True)
    with pytest.raises(ValueError, match="another model"):
        tune(build("gpt2"), plan, batches, batches, progress=False)


def test_padding_is_no_label():
    windows, mask = random_windows(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    first, second = token_batches(windows, mask, batch_size=2, labels=True)
    assert torch.equal(first["labels"] == -100, ~mask[:2]) and torch.equal(second["labels"], windows[2:])
    assert torch.equal(first["attention_mask"], mask[:2].long()) and len(second["input_ids"]) == 1
    assert list(token_batches(windows)[0]) == ["input_ids"]
