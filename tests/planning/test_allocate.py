"""The sparsity that every strategy promises on a model, and where it takes the parameters from."""

from importlib import import_module

import numpy as np
import pytest
from conftest import capture_quietly
from tiny_models import HIDDEN, INTERMEDIATE, build, random_windows

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, TwoLayerMLP, allocate, compare, find_blocks
from mlpreplace.fitting.fit import fit_all
from mlpreplace.models.parameters import block_parameters
from mlpreplace.replacements.splice import sparsity_of
from mlpreplace.runtime.fingerprint import fingerprint

WINDOWS = random_windows(4, seed=7)


@pytest.mark.parametrize("strategy", ["greedy", "milp"])
@pytest.mark.parametrize("target", [0.05, 0.2, 0.35])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_sparsity_is_reached_within_one_candidate(name, strategy, target):
    model = build(name)
    blocks, stats = capture_quietly(model, random_windows())
    plan = allocate(model, stats, target, strategy, progress=False)
    dense = sum(b.n_params for kind in ("mlp", "attention") for b in find_blocks(model, kind))
    step = NarrowMLP(INTERMEDIATE // 16).n_params(blocks[0]) / dense
    assert target <= sparsity_of(model, plan) < target + step


def test_the_exact_plan_does_no_more_damage_than_the_greedy_one(captured):
    model, _, stats = captured
    damage = {}
    for strategy in ("greedy", "milp"):
        plan = allocate(model, stats, 0.3, strategy, progress=False)
        damage[strategy] = sum(r.report.validation.damage for r in plan.values())
    assert damage["milp"] <= damage["greedy"] * (1 + 1e-9)


def test_an_unneeded_block_is_replaced_first(windows):
    """A block whose output is a thousandth of the others' is where the parameters are taken."""
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 1e-3
    blocks, stats = capture_quietly(model, windows)
    for strategy in ("greedy", "milp"):
        assert list(allocate(model, stats, 0.1, strategy, progress=False)) == [blocks[1]]


def test_uniform_narrow_is_one_width_and_the_widest(captured):
    model, blocks, stats = captured
    plan = allocate(model, stats, 0.2, "uniform")
    assert list(plan) == blocks
    (width,) = {r.family.width for r in plan.values()}
    assert sparsity_of(model, plan) >= 0.2
    wider = sum(b.n_params - NarrowMLP(width + 1).n_params(b) for b in blocks)
    assert wider < 0.2 * sum(b.n_params + 4 * HIDDEN**2 for b in blocks)


@pytest.mark.parametrize("target", [0.05, 0.15, 0.25, 0.35, 0.45, 0.5])
@pytest.mark.parametrize("layers", [1, 2, 4, 5])
def test_uniform_low_rank_reaches_the_target_in_as_few_blocks_as_can(layers, target):
    model = build("llama", num_hidden_layers=layers)
    blocks, stats = capture_quietly(model, random_windows(4))
    plan = allocate(model, stats, target, "uniform", family=LowRank)
    assert sparsity_of(model, plan) >= target
    assert len({r.family for r in plan.values()}) == 1
    dense = sum(b.n_params + 4 * HIDDEN**2 for b in blocks)
    assert (len(plan) - 1) * (blocks[0].n_params - LowRank(1).n_params(blocks[0])) < target * dense


def test_uniform_low_rank_spreads_the_blocks():
    model = build("llama", num_hidden_layers=9)
    blocks, stats = capture_quietly(model, random_windows(4))
    layers = [b.layer for b in allocate(model, stats, 0.15, "uniform", family=LowRank)]
    assert 1 < len(layers) < 9
    assert np.diff([-1, *layers, 9]).min() > 1


def test_candidates_of_ones_own(captured):
    model, blocks, stats = captured
    candidates = fit_all(blocks, stats, [Mean(), Linear(), NarrowMLP(8)], progress=False)
    plan = allocate(model, stats, 0.3, "milp", candidates=candidates)
    assert sparsity_of(model, plan) >= 0.3
    assert all(any(r is c for c in candidates[b]) for b, r in plan.items())


def test_with_windows_second_order_damages_decide(captured, monkeypatch):
    """And not those of the reports."""
    model, blocks, stats = captured
    planted = {b: [100.0 if b == blocks[0] else 1.0] for b in blocks}
    monkeypatch.setattr(import_module("mlpreplace.planning.allocate"), "second_order_damage", lambda *args, **options: planted)
    candidates = fit_all(blocks, stats, [NarrowMLP(12)], progress=False)
    plan = allocate(model, stats, 0.2, "milp", candidates=candidates, windows=random_windows())
    assert blocks[0] not in plan


def test_damages_may_be_given(captured):
    model, blocks, stats = captured
    candidates = fit_all(blocks, stats, [NarrowMLP(12)], progress=False)
    damages = {b: [100.0 if b == blocks[0] else 1.0] for b in blocks}
    plan = allocate(model, stats, 0.2, "milp", candidates=candidates, damages=damages)
    assert blocks[0] not in plan
    with pytest.raises(ValueError, match="one number for each of candidates"):
        allocate(model, stats, 0.2, "milp", candidates=candidates, damages={b: [1.0, 2.0] for b in blocks})


@pytest.mark.parametrize("strategy", ["uniform", "greedy", "milp"])
def test_a_cached_plan_is_neither_priced_nor_fitted_again(strategy, captured, results, monkeypatch):
    model, _, stats = captured
    options = dict(windows=WINDOWS if strategy == "milp" else None, progress=False)
    plan = fingerprint(allocate(model, stats, 0.2, strategy, **options, cached=True))
    assert plan == fingerprint(allocate(model, stats, 0.2, strategy, **options))
    for module, function in (("fitting.fit", "solve"), ("planning.damage", "candidate_errors")):
        monkeypatch.setattr(import_module(f"mlpreplace.{module}"), function, None)
    assert plan == fingerprint(allocate(model, stats, 0.2, strategy, **options, cached=True))


def test_the_heuristic_leaves_the_ends_alone():
    """One layer in ten, rounded up; one width elsewhere."""
    model = build("llama", num_hidden_layers=11)
    blocks, stats = capture_quietly(model, random_windows(4))
    plan = allocate(model, stats, 0.2, "heuristic")
    assert list(plan) == blocks[2:9]
    assert len({r.family.width for r in plan.values()}) == 1
    assert sparsity_of(model, plan) >= 0.2
    spread = allocate(model, stats, 0.1, "heuristic", family=LowRank)
    assert set(spread) < set(blocks[2:9])
    assert sparsity_of(model, spread) >= 0.1


def test_the_ends_are_the_models_not_those_of_the_statistics():
    model = build("llama", num_hidden_layers=5)
    blocks, stats = capture_quietly(model, random_windows(4))
    inner = {block: stats[block] for block in blocks[1:3]}
    assert list(allocate(model, inner, 0.1, "heuristic")) == blocks[1:3]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_of_nothing_but_ends_has_no_heuristic(layers):
    model = build("llama", num_hidden_layers=layers)
    _, stats = capture_quietly(model, random_windows(4))
    with pytest.raises(ValueError, match="'heuristic'.* a tenth of the layers, at least one, at each end.* hold none"):
        allocate(model, stats, 0.1, "heuristic")
    assert sparsity_of(model, allocate(model, stats, 0.1, "uniform")) >= 0.1


def test_uniform_replaces_mlp_blocks():
    model = build("llama")
    _, stats = capture_quietly(model, random_windows(4), "attention", moments=("input",))
    with pytest.raises(ValueError, match="'uniform' replaces MLP blocks: the statistics hold none"):
        allocate(model, stats, 0.1, "uniform")


@pytest.mark.parametrize("target", [0.15, 0.35])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_search_diverges_no_more_than_the_knapsack_it_starts_from(name, target):
    model = build(name)
    _, stats = capture_quietly(model, random_windows())
    validation = random_windows(4, seed=9)
    plans = {
        "search": allocate(model, stats, target, "search", windows=validation, rounds=3, progress=False),
        "milp": allocate(model, stats, target, "milp", windows=validation, progress=False),
    }
    assert sparsity_of(model, plans["search"]) >= target
    measured = compare(model, plans, validation, progress=False)
    assert measured["search"].mean_kl <= measured["milp"].mean_kl * (1 + 1e-6)


def test_the_search_takes_attention_too(captured):
    """Where attention is what can be spared, as reports do not say."""
    model, blocks, stats = captured
    attention, of_attention = capture_quietly(model, random_windows(), "attention", moments=("input",))
    candidates = fit_all(blocks, stats, [NarrowMLP(12), NarrowMLP(36)], progress=False)
    candidates |= fit_all(attention, of_attention, [Linear(), LowRank(4)], progress=False)
    plan = allocate(model, stats, 0.6, "search", candidates=candidates, windows=random_windows(4, seed=9), progress=False)
    assert {block.kind for block in plan} == {"mlp", "attention"}
    assert sparsity_of(model, plan) >= 0.6


@pytest.mark.parametrize("strategy", ["uniform", "greedy", "milp"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_allocated_small_dense_mlps(name, strategy):
    """A block of experts has no neurons to keep; another layer of the same model may have."""
    model = build(name)
    blocks, stats = capture_quietly(model, random_windows())
    plan = allocate(model, stats, 0.3, strategy, progress=False)
    assert sparsity_of(model, plan) >= 0.3
    families = {type(r.family) for b, r in plan.items() if not b.has_neurons}
    assert families == {TwoLayerMLP}
    if strategy == "uniform":
        (width,) = {r.family.width for r in plan.values()}
        wider = sum(b.n_params - TwoLayerMLP(width + 1).n_params(b) for b in blocks)
        assert set(plan) == set(blocks) and wider < 0.3 * block_parameters(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "random"}, "'random'.*uniform"),
        ({"sparsity": 0}, "0 < sparsity < 1, got 0"),
        ({"sparsity": 1}, "0 < sparsity < 1, got 1"),
        ({"sparsity": -0.1}, "0 < sparsity < 1"),
        ({"sparsity": 0.9}, "sparsity=0.9 asks to remove"),
        ({"sparsity": 0.9, "strategy": "milp"}, "sparsity=0.9 asks to remove"),
        ({"sparsity": 0.9, "strategy": "uniform"}, "Uniform NarrowMLP cannot save"),
        ({"sparsity": 0.9, "strategy": "uniform", "family": LowRank}, "Uniform LowRank cannot save"),
        ({"sparsity": 0.5, "strategy": "heuristic"}, "Uniform NarrowMLP cannot save .* in 1 MLP blocks"),
        ({"strategy": "uniform", "family": Linear}, "takes NarrowMLP or LowRank, got Linear"),
        ({"strategy": "heuristic", "family": Mean}, "takes NarrowMLP or LowRank, got Mean"),
        ({"strategy": "search"}, 'strategy="search" measures plans: pass windows='),
        ({"strategy": "joint"}, 'strategy="joint" asks what blocks cost together: pass windows='),
    ],
)
def test_what_cannot_be_allocated(options, message, captured):
    model, _, stats = captured
    with pytest.raises(ValueError, match=message):
        allocate(model, stats, **{"sparsity": 0.2, "progress": False} | options)


def test_an_estimate_needs_validation_windows(llama, windows):
    _, stats = capture_quietly(llama, windows, validation_windows=0)
    with pytest.raises(ValueError, match="validation_windows"):
        allocate(llama, stats, 0.2, progress=False)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf"), np.float32("nan")])
@pytest.mark.parametrize("strategy", ["greedy", "milp", "search"])
def test_a_damage_that_is_no_number_is_refused_by_the_name_of_its_block(strategy, damage, captured):
    model, blocks, stats = captured
    candidates = fit_all(blocks, stats, [NarrowMLP(12), NarrowMLP(24)], progress=False)
    damages = {b: [1.0, damage if b == blocks[1] else 0.5] for b in blocks}
    options = dict(candidates=candidates, damages=damages, windows=random_windows(4), progress=False)
    with pytest.raises(ValueError, match=rf"not finite for {blocks[1].name}:"):
        allocate(model, stats, 0.2, strategy, **options)
    damages[blocks[1]][1] = 0.5
    assert sparsity_of(model, allocate(model, stats, 0.2, strategy, **options)) >= 0.2
