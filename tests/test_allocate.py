"""Allocations against brute force on small random cases, and the sparsity they promise on a model."""

from importlib import import_module
from itertools import product

import numpy as np
import pytest
from conftest import HIDDEN, INTERMEDIATE, build, capture_quietly, random_windows

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, allocate, compare, find_blocks, fit_all, narrow_widths, sparsity
from mlpreplace.damage import local_damage, measured_damage
from mlpreplace.knapsack import greedy, knapsack

SEEDS = range(12)


def random_case(seed: int, blocks: int = 4, sizes: int = 3, convex: bool = False):
    """(savings, damages, target): candidates of each block by size, damages of any shape or convex in the saving."""
    rng = np.random.default_rng(seed)
    savings, damages = {}, {}
    for block in "abcdefgh"[:blocks]:
        savings[block] = sorted(int(s) for s in rng.choice(np.arange(10, 100), sizes, replace=False))
        slopes = rng.gamma(1, 1, sizes) * rng.gamma(1, 1)
        steps = np.diff([0, *savings[block]])
        damages[block] = list(np.cumsum(np.sort(slopes) * steps) if convex else rng.gamma(1, 1, sizes) * savings[block])
    most = sum(max(s) for s in savings.values())
    return savings, damages, float(rng.uniform(0.2, 0.95) * most)


def total(values, choice) -> float:
    return sum(values[block][i] for block, i in choice.items())


def brute_force(savings, damages, target) -> float:
    """Least damage of all choices that save enough."""
    best = np.inf
    for choice in product(*([None, *range(len(s))] for s in savings.values())):
        chosen = {block: i for block, i in zip(savings, choice, strict=True) if i is not None}
        if total(savings, chosen) >= target:
            best = min(best, total(damages, chosen))
    return best


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_knapsack_is_optimal(seed, convex):
    savings, damages, target = random_case(seed, convex=convex)
    choice = knapsack(savings, damages, target)
    assert total(savings, choice) >= target
    assert total(damages, choice) == pytest.approx(brute_force(savings, damages, target))


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6])
@pytest.mark.parametrize("seed", SEEDS[:6])
def test_the_knapsack_is_optimal_for_damages_of_any_scale(seed, scale):
    savings, damages, target = random_case(seed)
    damages = {block: [d * scale for d in of_block] for block, of_block in damages.items()}
    best = brute_force(savings, damages, target)
    assert total(damages, knapsack(savings, damages, target)) == pytest.approx(best, rel=1e-6, abs=0)


def test_the_knapsack_does_not_stop_a_parameter_short():
    """A solver's tolerance is a share of the target: a saving just below it must not count as enough."""
    savings, damages = {"a": [100_000_000, 100_000_010]}, {"a": [0.1, 1.0]}
    assert knapsack(savings, damages, 100_000_001) == {"a": 1}


def test_a_target_beyond_all_savings():
    with pytest.raises(ValueError, match="No plan saves 31 parameters"):
        knapsack({"a": [10, 20], "b": [10]}, {"a": [1, 2], "b": [1]}, 31)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_greedy_reaches_the_target_and_is_no_better_than_the_knapsack(seed, convex):
    savings, damages, target = random_case(seed, blocks=7, sizes=6, convex=convex)
    quick, exact = greedy(savings, damages, target), knapsack(savings, damages, target)
    assert min(total(savings, quick), total(savings, exact)) >= target
    assert total(damages, exact) <= total(damages, quick) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_within_one_step_for_convex_damages(seed):
    savings, damages, target = random_case(seed, blocks=7, sizes=6, convex=True)
    steps = [np.diff([0, *damages[block]]).max() for block in savings]
    excess = total(damages, greedy(savings, damages, target)) - total(damages, knapsack(savings, damages, target))
    assert excess <= max(steps) + 1e-9


def test_greedy_takes_the_cheapest_per_parameter_first():
    savings = {"cheap": [10, 20], "dear": [10, 20]}
    damages = {"cheap": [1, 3], "dear": [5, 30]}
    assert greedy(savings, damages, 10) == {"cheap": 0}
    assert greedy(savings, damages, 20) == {"cheap": 1}
    assert greedy(savings, damages, 30) == {"cheap": 1, "dear": 0}


def test_greedy_skips_what_saves_nothing():
    assert greedy({"a": [-5, 0, 10]}, {"a": [0.0, 0.0, 4.0]}, 8) == {"a": 2}


# on a model


@pytest.mark.parametrize("strategy", ["greedy", "milp"])
@pytest.mark.parametrize("target", [0.05, 0.2, 0.35])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_sparsity_is_reached_within_one_candidate(name, strategy, target):
    model = build(name)
    blocks, stats = capture_quietly(model, random_windows())
    plan = allocate(model, stats, target, strategy, progress=False)
    dense = sum(b.n_params for kind in ("mlp", "attention") for b in find_blocks(model, kind))
    step = NarrowMLP(INTERMEDIATE // 16).n_params(blocks[0]) / dense
    assert target <= sparsity(model, plan) < target + step


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
    assert sparsity(model, plan) >= 0.2
    wider = sum(b.n_params - NarrowMLP(width + 1).n_params(b) for b in blocks)
    assert wider < 0.2 * sum(b.n_params + 4 * HIDDEN**2 for b in blocks)


@pytest.mark.parametrize("target", [0.05, 0.15, 0.25, 0.35, 0.45, 0.5])
@pytest.mark.parametrize("layers", [1, 2, 4, 5])
def test_uniform_low_rank_reaches_the_target_in_as_few_blocks_as_can(layers, target):
    model = build("llama", num_hidden_layers=layers)
    blocks, stats = capture_quietly(model, random_windows(4))
    plan = allocate(model, stats, target, "uniform", family=LowRank)
    assert sparsity(model, plan) >= target
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
    assert sparsity(model, plan) >= 0.3
    assert all(any(r is c for c in candidates[b]) for b, r in plan.items())


@pytest.mark.parametrize("strategy", ["greedy", "milp"])
def test_damages_can_be_measured(strategy, captured):
    model, blocks, stats = captured
    validation = random_windows(4, seed=9)
    candidates = fit_all(blocks, stats, [NarrowMLP(12), NarrowMLP(36)], progress=False)
    plan = allocate(model, stats, 0.2, strategy, candidates=candidates, windows=validation, progress=False)
    assert sparsity(model, plan) >= 0.2
    damages = measured_damage(model, candidates, validation, progress=False)
    for b in blocks:
        for small, damage in zip(candidates[b], damages[b], strict=True):
            alone = compare(model, {"alone": {b: small}}, validation, progress=False)["alone"]
            assert damage == pytest.approx(alone.mean_kl, rel=1e-4)
        assert damages[b][0] > damages[b][1]


def test_the_measured_windows_decide(captured, monkeypatch):
    """With windows, the damages are the measured ones and not those of the reports."""
    model, blocks, stats = captured
    planted = {b: [100.0 if b == blocks[0] else 1.0] for b in blocks}
    monkeypatch.setattr(import_module("mlpreplace.allocate"), "measured_damage", lambda *args, **options: planted)
    candidates = fit_all(blocks, stats, [NarrowMLP(12)], progress=False)
    plan = allocate(model, stats, 0.2, "milp", candidates=candidates, windows=random_windows())
    assert blocks[0] not in plan


def test_local_damage_is_that_of_the_reports(captured):
    _, blocks, stats = captured
    candidates = fit_all(blocks, stats, [NarrowMLP(12), NarrowMLP(36)], progress=False)
    for b, (narrow, wide) in local_damage(candidates).items():
        assert [narrow, wide] == [r.report.validation.damage for r in candidates[b]]
        assert narrow > wide


def test_widths_are_below_the_block(captured):
    _, blocks, _ = captured
    widths = [family.width for family in narrow_widths(blocks[0])]
    assert widths == list(range(3, INTERMEDIATE, 3))


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
        ({"strategy": "uniform", "family": Linear}, "takes NarrowMLP or LowRank, got Linear"),
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
