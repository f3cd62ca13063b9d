"""Choices against brute force on small random cases: least damage, and never a parameter too few."""

from itertools import product

import numpy as np
import pytest

from mlpreplace.planning.knapsack import greedy, knapsack

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


def brute_force(savings, damages, target, exactly_one: bool = False) -> float:
    """Least damage of all choices that save enough."""
    best = np.inf
    for choice in product(*([*range(len(s))] + [None] * (not exactly_one) for s in savings.values())):
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


@pytest.mark.parametrize("exactly_one", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_knapsack_is_optimal_where_choices_mend(seed, exactly_one):
    """Prices at a plan may be negative, and a saving too, where a candidate is larger than its block."""
    savings, damages, _ = random_case(seed)
    rng = np.random.default_rng([seed, 1])
    damages = {block: list(rng.normal(size=len(of_block))) for block, of_block in damages.items()}
    savings = {block: [0, *(s - 30 for s in of_block[1:])] for block, of_block in savings.items()}
    target = int(rng.uniform(-0.2, 0.95) * sum(max(s) for s in savings.values()))
    choice = knapsack(savings, damages, target, exactly_one=exactly_one)
    assert total(savings, choice) >= target
    assert total(damages, choice) == pytest.approx(brute_force(savings, damages, target, exactly_one))
    if exactly_one:
        assert list(choice) == list(savings)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6])
@pytest.mark.parametrize("seed", SEEDS[:6])
def test_the_knapsack_is_optimal_for_damages_of_any_scale(seed, scale):
    savings, damages, target = random_case(seed)
    damages = {block: [d * scale for d in of_block] for block, of_block in damages.items()}
    best = brute_force(savings, damages, target)
    assert total(damages, knapsack(savings, damages, target)) == pytest.approx(best, rel=1e-6, abs=0)


@pytest.mark.parametrize("exactly_one", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_the_knapsack_counts_single_parameters_of_a_large_model(seed, exactly_one):
    """A solver's tolerance is a share of the target: a saving just below it must not count as enough, nor one that is just
    enough as too little. The target is what one of the choices saves, or one parameter more.
    """
    rng = np.random.default_rng(seed)
    unit = 10 ** int(rng.integers(5, 11))
    savings = {block: [unit * k + int(rng.integers(20)) for k in (1, 2, 3)] for block in "abcd"}
    damages = {block: list(rng.gamma(1, 1, 3) * (1, 2, 3)) for block in savings}
    target = sum(int(rng.choice(of_block)) for of_block in savings.values()) + seed % 2
    best = brute_force(savings, damages, target, exactly_one)
    if best == np.inf:
        with pytest.raises(ValueError, match="No plan saves"):
            knapsack(savings, damages, target, exactly_one=exactly_one)
        return
    choice = knapsack(savings, damages, target, exactly_one=exactly_one)
    assert total(savings, choice) >= target
    assert total(damages, choice) == pytest.approx(best, rel=1e-6)


def test_one_monstrous_damage_does_not_hide_the_others():
    savings = {block: [10, 20, 30] for block in "abcdef"}
    damages = {block: [i * 1e-3, i * 2e-3, 1e3] for i, block in enumerate(savings, 1)}
    choice = knapsack(savings, damages, 60)
    assert total(damages, choice) == pytest.approx(brute_force(savings, damages, 60), rel=1e-3)


def test_a_target_beyond_all_savings():
    with pytest.raises(ValueError, match="No plan saves 31 parameters"):
        knapsack({"a": [10, 20], "b": [10]}, {"a": [1, 2], "b": [1]}, 31)


@pytest.mark.parametrize("choose", [knapsack, greedy])
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
def test_damages_that_are_no_numbers_are_refused_by_name(damage, choose):
    with pytest.raises(ValueError, match="not finite for broken:"):
        choose({"whole": [10], "broken": [10, 20]}, {"whole": [1.0], "broken": [damage, 2.0]}, 10)


def test_without_candidates_there_is_no_choice():
    with pytest.raises(ValueError, match="no candidates"):
        knapsack({"a": []}, {"a": []}, 0)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(20))
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
