"""Closed-form fits against planted answers, a NumPy reference and the errors of simpler choices."""

import numpy as np
import pytest
import torch
from conftest import (
    HIDDEN,
    INTERMEDIATE,
    READS_TOKENS,
    activations,
    build,
    capture_quietly,
    random_windows,
    statistics_of,
)
from torch.testing import assert_close

from mlpreplace import BlockStatistics, Linear, LowRank, Mean, NarrowMLP, find_blocks, fit, fit_all

FAMILIES = [Mean(), Linear(), LowRank(4), NarrowMLP(24)]
TINY = 1e-10  # a ridge that only keeps the solver defined


@pytest.fixture
def block(llama):
    return find_blocks(llama)[1]


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_the_kept_neurons_are_those_of_largest_output_energy(llama):
    """Output columns from 0.1 to 10 times as large: neither the input nor the weight alone gives the order."""
    windows, block = random_windows(), find_blocks(llama)[0]
    block.weights().down.mul_(torch.logspace(-1, 1, INTERMEDIATE))
    _, stats = capture_quietly(llama, windows)
    h, own = activations(llama, block, windows[:6])["h"], block.weights()
    energy = h.square().sum(0) * own.down.double().square().sum(0)
    best = energy.argsort(descending=True)[:10].sort().values
    assert torch.equal(fit(block, stats, NarrowMLP(10)).body.up.weight, own.up[best])


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
    blocks, stats = capture_quietly(build("gpt2"), random_windows(), sample_windows=6)
    for b in blocks:
        sample = stats[b].train
        small = fit(b, stats, family)
        assert_close(small(sample.x).mean((0, 1)), sample.y.mean((0, 1)), rtol=1e-3, atol=1e-4)


def test_every_family_beats_the_mean():
    blocks, stats = capture_quietly(build("gpt2"), random_windows(48, 24))
    for b in blocks:
        mean, *others = (pooled(small) for small in fit_all([b], stats, FAMILIES, progress=False)[b])
        assert max(others) < 0.95 * mean < 1.05


# hard cases


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fewer_tokens_than_dimensions(name, family):
    blocks, stats = capture_quietly(build(name), random_windows(3, 8))
    for b in blocks:
        assert stats[b].tokens == 8 < family.n_params(b) / HIDDEN or family == Mean()
        small = fit(b, stats, family)
        assert all(torch.isfinite(p).all() for p in small.parameters())
        assert np.isfinite(pooled(small))


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_one_token_is_too_few(family, block):
    x, y, h = noise(1, HIDDEN), noise(1, HIDDEN), noise(1, INTERMEDIATE)
    with pytest.raises(ValueError, match="at least 2 tokens, the statistics hold 1"):
        fit(block, {block: statistics_of(x, y, h)}, family)


def test_no_token_has_no_mean(block):
    with pytest.raises(ValueError, match="hold no token"):
        fit(block, {block: BlockStatistics()}, Mean())


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_activations_that_are_all_zero(family, block):
    zeros = torch.zeros(20, HIDDEN, dtype=torch.float64)
    h = torch.zeros(20, INTERMEDIATE, dtype=torch.float64)
    with pytest.raises(ValueError, match="all zero"):
        fit(block, {block: statistics_of(zeros, zeros, h)}, family)


@pytest.mark.parametrize(
    ("captured_moment", "family", "missing"),
    [("input", NarrowMLP(24), "hidden"), ("hidden", Linear(), "input"), ("hidden", LowRank(4), "input")],
)
def test_a_missing_moment_is_named(captured_moment, family, missing, llama, windows):
    blocks, stats = capture_quietly(llama, windows, moments=(captured_moment,))
    with pytest.raises(ValueError, match=f"'{missing}' moment was not captured"):
        fit(blocks[0], stats, family)


def test_a_mixture_of_experts_can_be_replaced_but_not_narrowed():
    blocks, stats = capture_quietly(build("mixtral"), random_windows(32, 24))
    with pytest.raises(ValueError, match="no up/down MLP"):
        fit(blocks[0], stats, NarrowMLP(24))
    assert pooled(fit(blocks[0], stats, Linear())) < pooled(fit(blocks[0], stats, Mean()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_replacement_has_the_precision_of_its_block(family, dtype):
    blocks, stats = capture_quietly(build("llama").to(dtype), random_windows(16))
    small, exact = fit(blocks[1], stats, family), fit_in_float32(family)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert stats[blocks[1]].train.x.dtype == dtype
    assert pooled(small) == pytest.approx(pooled(exact), rel=0.1)


def fit_in_float32(family):
    blocks, stats = capture_quietly(build("llama"), random_windows(16))
    return fit(blocks[1], stats, family)
