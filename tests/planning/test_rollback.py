"""Rolling back: planted mistakes go, good plans stay, and the model is left as it was."""

import copy

import pytest
import torch
from conftest import captured_whole
from hybrid_blocks import shaken
from tiny_models import build, random_windows

from mlpreplace import NarrowMLP, compare
from mlpreplace.fitting.fit import fit_all
from mlpreplace.planning.rollback import rollback
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.splice import sparsity_of


def pristine(model, modules) -> bool:
    return all(module is modules[name] for name, module in model.named_modules()) and not any(
        "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )


@pytest.fixture(scope="module")
def choices():
    """(model, {block: NarrowMLPs from large to small}, validation windows) of a Llama with five layers."""
    model = build("llama", num_hidden_layers=5)
    blocks, stats = captured_whole(model, random_windows(16, 24), validation_windows=4)
    fitted = fit_all(blocks, stats, [NarrowMLP(width) for width in (40, 32, 24, 16)], progress=False)
    return model, fitted, random_windows(6, 24, seed=9)


def kl(model, plan, windows) -> float:
    return compare(model, {"plan": plan}, windows, progress=False)["plan"].mean_kl


@pytest.mark.parametrize("layer", range(5))
def test_a_planted_mistake_is_rolled_back(layer, choices):
    """Its report, by which parameters are saved elsewhere, says that it is as good as others."""
    model, candidates, windows = choices
    modules, weights = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    good = {b: fitted[0] for b, fitted in candidates.items()}
    bad = [*candidates][layer]
    plan = good | {bad: copy.deepcopy(good[bad])}
    plan[bad].body.down.weight.normal_(generator=torch.Generator().manual_seed(0))
    given = dict(plan)
    new, history = rollback(model, plan, candidates, windows, progress=False)
    assert new.get(bad) is not plan[bad]
    assert sparsity_of(model, new) >= sparsity_of(model, plan)
    assert kl(model, new, windows) < kl(model, plan, windows)
    first = history[0]
    assert first["block"] == bad.name and first["params"] == bad.n_params - plan[bad].n_params
    assert first["kl_after"] < 0.5 * first["kl_before"]
    assert [record["kept"] for record in history if record["round"] == 0].count(True) == 1
    assert plan == given
    assert pristine(model, modules)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in weights.items())


@pytest.mark.parametrize("seed", range(4))
def test_kl_falls_from_round_to_round_and_the_saving_does_not(seed, choices):
    """From random plans on, which hold some blocks and not others; the record agrees with a measurement of the result."""
    model, candidates, windows = choices
    rng = torch.Generator().manual_seed(seed)
    picks = [int(torch.randint(-1, 4, (), generator=rng)) for _ in candidates]
    plan = {b: fitted[i] for (b, fitted), i in zip(candidates.items(), picks, strict=True) if i >= 0}
    new, history = rollback(model, plan, candidates, windows, tries=2, progress=False)
    assert sparsity_of(model, new) >= sparsity_of(model, plan)
    kept = [record for record in history if record["kept"]]
    ends = [kl(model, plan, windows), *(record["kl_after"] for record in kept)]
    assert [record["kl_before"] for record in kept] == pytest.approx(ends[:-1], rel=1e-4)
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] == pytest.approx(kl(model, new, windows), rel=1e-4)
    rounds = {record["round"] for record in history}
    assert len(rounds) in (len(kept), len(kept) + 1)
    assert all(sum(record["round"] == number for record in history) <= 2 for number in rounds)
    again, tried = rollback(model, new, candidates, windows, tries=2, progress=False)
    assert again == new and not any(record["kept"] for record in tried)


def test_a_good_plan_is_left_alone(choices):
    """The neurons that its one replacement lacks gave nothing; any other way to save as much costs something."""
    model, candidates, windows = choices
    model = copy.deepcopy(model)
    model.model.layers[2].mlp.down_proj.weight.data[:, 40:] = 0
    blocks, stats = captured_whole(model, random_windows(16, 24), validation_windows=4)
    candidates = fit_all(blocks, stats, [NarrowMLP(40), NarrowMLP(32)], progress=False)
    plan = {blocks[2]: candidates[blocks[2]][0]}
    new, history = rollback(model, plan, candidates, windows, progress=False)
    assert new == plan
    assert [(record["block"], record["kept"]) for record in history] == [(blocks[2].name, False)]
    assert history[0]["kl_before"] < 1e-6 < history[0]["kl_after"]


def test_what_no_other_block_can_save_is_not_tried(choices):
    model, candidates, windows = choices
    block = next(iter(candidates))
    plan = {block: shaken(copy.deepcopy(candidates[block][0]))}
    assert rollback(model, plan, {block: candidates[block]}, windows, progress=False) == (plan, [])


def test_a_replacement_without_validation_error_is_refused(choices):
    model, candidates, windows = choices
    block = next(iter(candidates))
    with pytest.raises(ValueError, match="no validation error"):
        rollback(model, {block: Replacement(NarrowMLP(40), block)}, candidates, windows)


def test_a_plan_whose_divergence_is_no_number_is_refused(choices):
    model, candidates, windows = choices
    block = next(iter(candidates))
    broken = copy.deepcopy(candidates[block][0])
    next(broken.parameters()).data[0] = float("nan")
    with pytest.raises(ValueError, match="KL divergence of a plan is not finite"):
        rollback(model, {block: broken}, candidates, windows, progress=False)
