"""Closed-form fits against planted answers, a NumPy reference and the errors of simpler choices."""

import numpy as np
import pytest
import torch
from conftest import activations, capture_quietly, captured_whole, joint_statistics, noise, statistics_of, train_error
from tiny_models import HIDDEN, INTERMEDIATE, READS_TOKENS, build, random_windows
from torch.testing import assert_close

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP, find_blocks, fit
from mlpreplace.fitting.fit import fit_all

FAMILIES = [Mean(), Linear(), LowRank(4), NarrowMLP(24), NarrowPlusLinear(20, 4), TwoLayerMLP(24)]
TINY = 1e-10  # a ridge that only keeps the solver defined


@pytest.fixture
def block(llama):
    return find_blocks(llama)[1]


def anisotropic(tokens: int = 400) -> torch.Tensor:
    """Inputs with a spectrum over four decades in a random basis, and a mean that is not zero: [tokens, hidden]."""
    basis = torch.linalg.qr(noise(HIDDEN, HIDDEN, seed=1))[0]
    return noise(tokens, HIDDEN, seed=2) * torch.logspace(0, -2, HIDDEN, dtype=torch.float64) @ basis + noise(HIDDEN, seed=3)


def planted(rank: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, y) with y = x A + b exactly, A of the given rank."""
    x = anisotropic()
    return x, x @ noise(HIDDEN, rank, seed=4) @ noise(rank, HIDDEN, seed=5) + noise(HIDDEN, seed=6)


def pooled(replacement) -> float:
    return replacement.report.validation.pooled


def matrix(replacement) -> torch.Tensor:
    """The map of a LowRank, [hidden_in, hidden_out] in float64."""
    return (replacement.body[1].weight.double() @ replacement.body[0].weight.double()).T


# planted answers


@pytest.mark.parametrize("family", [Linear(), LowRank(HIDDEN)])
def test_a_linear_block_is_recovered(family, block):
    x, y = planted()
    small = fit(block, {block: statistics_of(x, y)}, family, ridge=TINY)
    assert pooled(small) < 1e-9
    assert pooled(fit(block, {block: statistics_of(x, y)}, Mean())) > 1e-2


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_low_rank_block_is_recovered_at_its_rank(rank, block):
    stats = {block: statistics_of(*planted(rank))}
    assert pooled(fit(block, stats, LowRank(rank), ridge=TINY)) < 1e-9
    if rank > 1:
        assert pooled(fit(block, stats, LowRank(rank - 1), ridge=TINY)) > 1e-6


def test_a_higher_rank_is_better(block):
    x, y = planted()
    y = y + 0.1 * noise(*y.shape, seed=7)
    stats = {block: statistics_of(x, y)}
    errors = [fit(block, stats, LowRank(rank), ridge=TINY).report.train.pooled for rank in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(fit(block, stats, Linear(), ridge=TINY).report.train.pooled, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_low_rank_is_reduced_rank_regression(rank, block):
    """Reference in NumPy from the data: A by least squares, projected on the right singular vectors of X A (Izenman)."""
    x, y = planted()
    y = y + noise(*y.shape, seed=7)
    small = fit(block, {block: statistics_of(x, y)}, LowRank(rank), ridge=1e-12)
    n = len(x) * 3 // 4
    xc, yc = (v[:n].numpy() - v[:n].numpy().mean(0) for v in (x, y))
    a = np.linalg.lstsq(xc, yc, rcond=None)[0]
    right = np.linalg.svd(xc @ a, full_matrices=False)[2][:rank].T
    best = a @ right @ right.T
    assert_close(torch.from_numpy(xc) @ matrix(small), torch.from_numpy(xc @ best), rtol=1e-3, atol=1e-4)

    u, s, vt = np.linalg.svd(a)
    truncated = (u[:, :rank] * s[:rank]) @ vt[:rank]  # blind to which inputs occur
    got, blind = (np.square(yc - xc @ m).sum() for m in (matrix(small).numpy(), truncated))
    assert got < 0.99 * blind


@pytest.mark.parametrize("name", [name for name in READS_TOKENS if name != "mixtral"])
def test_full_width_is_the_block(name):
    model, windows = build(name), random_windows()
    blocks, stats = capture_quietly(model, windows)
    for b in blocks:
        small, own = fit(b, stats, NarrowMLP(INTERMEDIATE)), b.weights()
        state = small.body.state_dict()
        assert torch.equal(state["up.weight"], own.up)
        assert torch.equal(state["down.weight"], own.down)
        if own.gate is not None:
            assert torch.equal(state["gate.weight"], own.gate)
        assert small.n_params == b.n_params
        assert pooled(small) < 1e-10
        a = activations(model, b, windows)
        assert_close(small(a["x"].float()).double(), a["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_dead_neurons_cost_nothing(name):
    """Neurons with a zero output column are the ones dropped, and without them the block is the same.

    On fitting tokens: a ReLU neuron that only a held-out token wakes is as dead as the planted ones.
    """
    model, dead = build(name), 16
    for b in find_blocks(model):
        b.weights().down[:, 5 : 5 + dead] = 0  # a view of the weight
    blocks, stats = capture_quietly(model, random_windows())
    for b in blocks:
        assert fit(b, stats, NarrowMLP(INTERMEDIATE - dead)).report.train.pooled < 1e-10
        assert fit(b, stats, NarrowMLP(INTERMEDIATE - dead - 8)).report.train.pooled > 1e-6


# against simpler choices


@pytest.mark.parametrize("width", [8, 24, 40])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_solving_the_output_projection_anew_beats_slicing_it(name, width):
    model, windows = build(name), random_windows(24)
    blocks, stats = capture_quietly(model, windows)
    for b in blocks:
        small, own = fit(b, stats, NarrowMLP(width)).body, b.weights()
        kept = [int((own.up == row).all(1).nonzero()) for row in small.up.weight]
        h, down = activations(model, b, windows[:22])["h"], own.down.double().T  # [tokens, intermediate]
        exact, bias = h @ down, (small.down.bias - own.down_bias).double() if own.down_bias is not None else 0
        solved = (h[:, kept] @ small.down.weight.double().T + bias - exact).square().sum()
        sliced = (h[:, kept] @ down[kept] - exact).square().sum()
        assert solved < 0.95 * sliced


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_output_projection_is_a_least_squares_solution(name):
    """The error that is left has no correlation with a kept neuron, nor a mean where the block has an output bias."""
    model, windows = build(name), random_windows(24)
    blocks, stats = capture_quietly(model, windows)
    for b in blocks:
        small, own = fit(b, stats, NarrowMLP(12), ridge=TINY).body, b.weights()
        kept = [int((own.up == row).all(1).nonzero()) for row in small.up.weight]
        a = activations(model, b, windows[:22])
        h = a["h"][:, kept]
        left = h @ small.down.weight.double().T + (0 if own.down_bias is None else small.down.bias.double()) - a["y"]
        assert (h.T @ left).abs().max() < 1e-4 * (h.T @ a["y"]).abs().max()
        if own.down_bias is not None:
            assert left.sum(0).abs().max() < 1e-4 * a["y"].abs().sum(0).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_bias_takes_up_the_mean(family):
    """Over the fitting tokens the mean output of the replacement is the block's (GPT-2 has an output bias)."""
    blocks, stats = captured_whole(build("gpt2"), random_windows())
    for b in blocks:
        sample = stats[b].train
        small = fit(b, stats, family)
        assert_close(small(sample.x).mean((0, 1)), sample.y.mean((0, 1)), rtol=1e-3, atol=1e-4)


def test_every_family_beats_the_mean():
    blocks, stats = captured_whole(build("gpt2"), random_windows(48, 24))
    for b in blocks:
        mean, *others = (pooled(small) for small in fit_all([b], stats, FAMILIES, progress=False)[b])
        assert max(others) < 0.95 * mean < 1.05


# neurons and a linear map side by side


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("width", [6, 30])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_neurons_and_a_linear_map_are_no_worse_than_either(name, width, rank):
    blocks, stats = captured_whole(build(name), random_windows(24))
    for b in blocks:
        both = train_error(b, stats, NarrowPlusLinear(width, rank))
        assert both < train_error(b, stats, NarrowMLP(width))
        assert both < train_error(b, stats, LowRank(rank))
        assert both > train_error(b, stats, NarrowPlusLinear(width, rank + 1))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_block_that_is_narrow_and_low_rank_is_recovered(name):
    """All neurons but the 30 loudest are linear in x, and together of rank 3."""
    rank, width = 3, 30
    model = build(name)
    block = find_blocks(model)[1]
    down = block.weights().down  # a view
    down[:, :width] *= 3
    down[:, width:] = 0.003 * noise(HIDDEN, rank, seed=4).float() @ noise(rank, INTERMEDIATE - width, seed=5).float()
    x = anisotropic(800)
    h = activations_of(block, x)
    h[:, width:] = x @ noise(HIDDEN, INTERMEDIATE - width, seed=6)
    stats = {block: joint_statistics(block, x, h)}
    small = fit(block, stats, NarrowPlusLinear(width, rank), ridge=TINY)
    assert max(small.report.train.pooled, pooled(small)) < 1e-9
    for other in (NarrowPlusLinear(width, rank - 1), NarrowMLP(width)):
        assert pooled(fit(block, stats, other, ridge=TINY)) > 1e-7


def activations_of(block, x: torch.Tensor) -> torch.Tensor:
    """Neurons of a block on float64 inputs, [tokens, intermediate]."""
    own = block.weights()

    def project(weight, bias):
        return torch.nn.functional.linear(x, weight.double(), None if bias is None else bias.double())

    if own.gate is None:
        return block.activation(project(own.up, own.up_bias))
    return block.activation(project(own.gate, own.gate_bias)) * project(own.up, own.up_bias)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_joint_fit_is_that_of_a_reference(name):
    """In NumPy from the data: regress neurons out of X and T, reduced-rank regression of the rests, then the neurons."""
    width, rank = 12, 5
    block = find_blocks(build(name))[1]
    x = anisotropic(600)
    h = activations_of(block, x)
    s = joint_statistics(block, x, h)
    small = fit(block, {block: s}, NarrowPlusLinear(width, rank), ridge=1e-12)
    kept = [int((block.weights().up == row).all(1).nonzero()) for row in small.body.mlp.up.weight]

    y = (h @ block.weights().down.double().T)[: s.tokens].numpy()
    xc, hc, yc = (v - v.mean(0) for v in (x[: s.tokens].numpy(), h[: s.tokens, kept].numpy(), y))
    x_rest, y_rest = (v - hc @ np.linalg.lstsq(hc, v, rcond=None)[0] for v in (xc, yc))
    a = np.linalg.lstsq(x_rest, y_rest, rcond=None)[0]
    right = np.linalg.svd(x_rest @ a, full_matrices=False)[2][:rank].T
    b = a @ right @ right.T
    expected = xc @ b + hc @ np.linalg.lstsq(hc, yc - xc @ b, rcond=None)[0]
    got = small(x[: s.tokens].float()).double()
    assert_close(got - got.mean(0), torch.from_numpy(expected), rtol=1e-3, atol=1e-3 * float(np.abs(expected).max()))


def test_at_full_width_the_linear_map_is_nothing():
    """Ridge pulls the neurons towards the block's own, the rest towards zero: nothing is left to explain."""
    blocks, stats = captured_whole(build("llama"), random_windows())
    for b in blocks:
        small = fit(b, stats, NarrowPlusLinear(INTERMEDIATE, 2), ridge=0.1)
        assert torch.equal(small.body.mlp.down.weight, b.weights().down)
        assert pooled(small) < 1e-10
