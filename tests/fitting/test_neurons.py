"""Which neurons stay: against brute force, and against each other where one rule is known to be fooled."""

import numpy as np
import pytest
import torch
from conftest import activations, capture_quietly
from tiny_models import HIDDEN, INTERMEDIATE, build, random_windows
from torch.testing import assert_close

from mlpreplace import NarrowMLP, find_blocks, fit
from mlpreplace.fitting import neurons as selection
from mlpreplace.fitting.closed_form import solve
from mlpreplace.fitting.neurons import SELECTIONS, ClosedForm, select
from mlpreplace.statistics.groups import with_effects
from mlpreplace.statistics.moments import BlockStatistics

RIDGE = 1e-3
NAMES = ["llama", "gpt2"]  # without and with an output bias
RULES = ["energy", "leverage", "obs"]


def moments(block, s) -> tuple[np.ndarray, np.ndarray]:
    """C = HᵀH, centred where the block has an output bias, and W [intermediate, hidden]."""
    c = s.hh if block.weights().down_bias is None else s.hh - torch.outer(s.sum_h, s.sum_h) / s.tokens
    return c.numpy(), block.weights().down.double().T.numpy()


def least_squares_error(c: np.ndarray, w: np.ndarray, kept: list[int]) -> float:
    """min over W' of tr (W' − W)ᵀ C (W' − W) with W' = 0 outside ``kept``: the Schur complement of C_PP."""
    dropped = [j for j in range(len(c)) if j not in kept]
    rest = c[np.ix_(dropped, dropped)] - c[np.ix_(dropped, kept)] @ np.linalg.solve(
        c[np.ix_(kept, kept)], c[np.ix_(kept, dropped)]
    )
    return float(np.trace(w[dropped].T @ rest @ w[dropped]))


def ridged(c: np.ndarray) -> np.ndarray:
    return c + RIDGE * np.diag(c).mean() * np.eye(len(c))


def greedily(c: np.ndarray, w: np.ndarray, width: int) -> list[int]:
    """Remove the neuron without which the least squares error is smallest, again and again; everything solved anew."""
    kept = list(range(len(c)))
    while len(kept) > width:
        errors = [least_squares_error(c, w, [i for i in kept if i != j]) for j in kept]
        del kept[int(np.argmin(errors))]
    return kept


def narrow_error(block, s, rule: str, width: int, ridge: float = 1e-9) -> float:
    """Squared error over the fitting tokens of the narrow MLP that keeps what ``rule`` chooses."""
    c, w = moments(block, s)
    return least_squares_error(
        c + ridge * np.diag(c).mean() * np.eye(len(c)), w, select(block, s, width, ClosedForm(ridge, rule)).tolist()
    )


def test_the_kept_neurons_are_those_of_largest_output_energy(llama):
    """Output columns from 0.1 to 10 times as large: neither the input nor the weight alone gives the order."""
    windows, block = random_windows(), find_blocks(llama)[0]
    block.weights().down.mul_(torch.logspace(-1, 1, INTERMEDIATE))
    _, stats = capture_quietly(llama, windows)
    h, own = activations(llama, block, windows[:6])["h"], block.weights()
    energy = h.square().sum(0) * own.down.double().square().sum(0)
    best = energy.argsort(descending=True)[:10].sort().values
    assert torch.equal(fit(block, stats, NarrowMLP(10)).body.up.weight, own.up[best])


@pytest.mark.parametrize("name", NAMES)
def test_obs_one_at_a_time_is_greedy_least_squares(name, monkeypatch):
    monkeypatch.setattr(selection, "BATCHES", INTERMEDIATE)
    blocks, stats = capture_quietly(build(name), random_windows(24))
    for b in blocks[:2]:
        c, w = moments(b, stats[b])
        for width in (40, 20, 6):
            assert select(b, stats[b], width, ClosedForm(RIDGE, "obs")).tolist() == greedily(ridged(c), w, width)


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_obs_in_batches_is_nearly_as_good_as_one_at_a_time(name, batches, monkeypatch):
    monkeypatch.setattr(selection, "BATCHES", batches)
    blocks, stats = capture_quietly(build(name), random_windows(24))
    for b in blocks:
        c, w = moments(b, stats[b])
        best = least_squares_error(ridged(c), w, greedily(ridged(c), w, 24))
        got = least_squares_error(ridged(c), w, select(b, stats[b], 24, ClosedForm(RIDGE, "obs")).tolist())
        assert got < 1.05 * best


def test_the_downdate_is_exact_after_many_batches(llama, windows, monkeypatch):
    """With the last two neurons left to choose from, the cost the rule sees is that of a fresh inverse."""
    seen = []
    cheapest = selection._cheapest
    monkeypatch.setattr(selection, "_cheapest", lambda inverse, w, n: seen.append((inverse, w)) or cheapest(inverse, w, n))
    monkeypatch.setattr(selection, "BATCHES", INTERMEDIATE)
    blocks, stats = capture_quietly(llama, windows)
    b, s = blocks[1], stats[blocks[1]]
    select(b, s, 1, ClosedForm(RIDGE, "obs"))
    inverse, _ = seen[-1]
    c, w = moments(b, s)
    c = ridged(c)
    kept = greedily(c, w, 2)
    expected = np.sort(np.diag(np.linalg.inv(c[np.ix_(kept, kept)])))
    assert_close(inverse.diagonal().sort().values, torch.from_numpy(expected), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_ridge_leverage_is_that_of_the_formula(name):
    blocks, stats = capture_quietly(build(name), random_windows(24))
    for b in blocks:
        c, _ = moments(b, stats[b])
        leverage = np.diag(c @ np.linalg.inv(ridged(c)))
        best = np.sort(np.argsort(leverage)[-10:])
        assert select(b, stats[b], 10, ClosedForm(RIDGE, "leverage")).tolist() == best.tolist()


def correlated(model, seed: int = 0, rank: int = 12):
    """(block, statistics) of a block whose neurons are mixtures of a few signals and a little noise of their own."""
    block, generator = find_blocks(model)[0], torch.Generator().manual_seed(seed)
    signals, mixing, own = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((600, rank), (rank, INTERMEDIATE), (600, INTERMEDIATE))
    )
    h = signals @ mixing + 0.3 * own
    return block, BlockStatistics(len(h), sum_h=h.sum(0), hh=h.T @ h)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_rules_that_look_at_correlations_beat_chance(name, seed):
    block, s = correlated(build(name, seed), seed)
    c, w = moments(block, s)
    chance = np.mean(
        [least_squares_error(c, w, select(block, s, 16, ClosedForm(0, "random", draw)).tolist()) for draw in range(10)]
    )
    obs, leverage, energy = (narrow_error(block, s, rule, 16) for rule in ("obs", "leverage", "energy"))
    assert obs < 0.9 * chance
    assert leverage < chance
    assert obs < energy


@pytest.mark.parametrize("name", NAMES)
def test_obs_keeps_one_of_two_neurons_that_are_the_same_and_energy_both(name):
    """Half of the neurons come twice and are the loudest: half of what energy keeps says nothing new."""
    block, generator = find_blocks(build(name))[0], torch.Generator().manual_seed(0)
    h = torch.randn(400, INTERMEDIATE, generator=generator, dtype=torch.float64)
    h[:, 12:24] = h[:, :12]
    h[:, :24] *= 3
    block.weights().down[:, :24] = block.weights().down[:, :24].sign() * 0.2  # a view: all of the same length
    s = BlockStatistics(len(h), sum_h=h.sum(0), hh=h.T @ h)
    kept = {rule: set(select(block, s, 24, ClosedForm(1e-6, rule)).tolist()) for rule in ("energy", "obs")}
    assert kept["energy"] == set(range(24))
    assert all(len({j, j + 12} & kept["obs"]) == 1 for j in range(12))
    assert narrow_error(block, s, "obs", 24) < 0.7 * narrow_error(block, s, "energy", 24)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_dead_neurons_go_first(name, rule):
    """Those that never fire, however large their output weights are: their C is singular but for the ridge."""
    dead = [3, 10, 11, 40]
    block, s = correlated(build(name))
    block.weights().down[:, dead] = 100
    s.hh[dead], s.hh[:, dead], s.sum_h[dead] = 0, 0, 0
    for width in (INTERMEDIATE - len(dead), 8):
        assert not set(select(block, s, width, ClosedForm(1e-2, rule)).tolist()) & set(dead)
    alive = set(range(INTERMEDIATE)) - set(dead)
    assert set(select(block, s, INTERMEDIATE - 2, ClosedForm(1e-2, rule)).tolist()) > alive


@pytest.mark.parametrize("rule", ["leverage", "obs"])
def test_a_constant_neuron_is_worth_nothing_beside_a_bias(rule):
    block, s = correlated(build("gpt2"))
    h = torch.full((s.tokens,), 7.0, dtype=torch.float64)
    block.weights().down[:, 5] = 100
    s.hh[5] = s.hh[:, 5] = 7 * s.sum_h
    s.hh[5, 5], s.sum_h[5] = h @ h, h.sum()
    assert 5 not in select(block, s, INTERMEDIATE - 1, ClosedForm(1e-2, rule))


def felt(captured):
    """The same with effects of neurons."""
    model, blocks, stats = captured
    effects = torch.rand(len(blocks), INTERMEDIATE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, blocks, with_effects(stats, dict(zip(blocks, effects, strict=True)))


@pytest.mark.parametrize("rule", SELECTIONS)
@pytest.mark.parametrize("width", [1, 17, INTERMEDIATE])
def test_a_selection_is_so_many_neurons_in_order(rule, width, captured):
    _, blocks, stats = felt(captured)
    kept = select(blocks[0], stats[blocks[0]], width, ClosedForm(1e-2, rule))
    assert len(kept) == width
    assert kept.unique().tolist() == kept.tolist()
    assert torch.equal(kept, select(blocks[0], stats[blocks[0]], width, ClosedForm(1e-2, rule)))


def test_random_depends_on_the_seed_alone(captured):
    _, blocks, stats = captured
    first, other, again = (
        select(blocks[0], stats[blocks[0]], 16, ClosedForm(1e-2, "random", seed)).tolist() for seed in (0, 1, 0)
    )
    assert first == again != other
    assert first == select(blocks[1], stats[blocks[1]], 16, ClosedForm(1, "random")).tolist()


@pytest.mark.parametrize("rule", SELECTIONS)
def test_a_fit_keeps_the_neurons_its_rule_selects(rule, captured):
    _, blocks, stats = felt(captured)
    b = blocks[1]
    small = fit(b, stats, NarrowMLP(20), selection=rule, ridge=0.1, seed=3)
    kept = select(b, stats[b], 20, ClosedForm(0.1, rule, 3))
    assert torch.equal(small.body.up.weight, b.weights().up[kept])
    assert small.body.up.weight.shape == (20, HIDDEN)


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="'loudest'.*energy, fluctuation, leverage, obs, fisher, fisher_energy, random"):
        ClosedForm(selection="loudest")


def test_singular_moments_name_the_block(llama):
    blocks, stats = capture_quietly(llama, random_windows(3, 8))  # 8 tokens
    for rule in ("leverage", "obs"):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: .*raise ridge"):
            select(blocks[1], stats[blocks[1]], 24, ClosedForm(0, rule))
        assert len(select(blocks[1], stats[blocks[1]], 24, ClosedForm(1e-2, rule))) == 24


def test_a_block_without_neurons_is_named():
    blocks, stats = capture_quietly(build("mixtral"), random_windows())
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp"):
        solve(NarrowMLP(8), blocks[0], stats[blocks[0]], ClosedForm(selection="obs"))
