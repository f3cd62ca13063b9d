"""TwoLayerMLP, the shallow MLP, solved from neurons of its block or from random ones."""

import pytest
import torch
from conftest import captured_whole, noise, statistics_of, train_error
from tiny_models import HIDDEN, INTERMEDIATE, build, random_windows
from torch.testing import assert_close

from mlpreplace import LowRank, NarrowMLP, TwoLayerMLP, fit

TINY = 1e-10  # a ridge that only keeps the solver defined


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon"])
def test_an_ungated_block_is_its_own_shallow_mlp(name):
    """With or without biases: what a NarrowMLP computes; all of it at full width."""
    blocks, stats = captured_whole(build(name), random_windows())
    for b in blocks:
        x = stats[b].validation.x
        assert_close(fit(b, stats, TwoLayerMLP(20))(x), fit(b, stats, NarrowMLP(20))(x))
        assert fit(b, stats, TwoLayerMLP(INTERMEDIATE)).report.validation.pooled < 1e-10
        with pytest.raises(ValueError, match=f"expected 1 ≤ width ≤ {INTERMEDIATE}"):
            fit(b, stats, TwoLayerMLP(INTERMEDIATE + 1))


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("name", ["llama", "gemma", "mixtral"])
def test_the_output_of_a_shallow_mlp_is_a_least_squares_solution(name, kind):
    """The error that is left has neither a mean nor a correlation with a feature."""
    blocks, stats = captured_whole(build(name), random_windows(24), kind=kind)
    for b in blocks:
        body, sample = fit(b, stats, TwoLayerMLP(16), ridge=TINY).body, stats[b].train
        x, y = sample.x.flatten(0, 1), sample.y.flatten(0, 1)
        features, left = body.neurons(x), body(x) - y
        assert left.mean(0).abs().max() < 1e-4 * y.abs().mean(0).max()
        assert (features.T @ left).abs().max() < 1e-3 * (features.T @ y).abs().max()


def residual(features: torch.Tensor, y: torch.Tensor) -> float:
    """Squared error of the least squares of y on features and a constant."""
    features = torch.cat([features, torch.ones(len(y), 1)], 1).double()
    return float((features @ torch.linalg.lstsq(features, y.double()).solution - y).square().sum())


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_features_of_a_gated_block_beat_random_ones(name):
    blocks, stats = captured_whole(build(name), random_windows(48, 24))
    for b in blocks:
        body, sample = fit(b, stats, TwoLayerMLP(24)).body, stats[b].train
        x, y = sample.x.flatten(0, 1), sample.y.flatten(0, 1)
        rows = noise(24, HIDDEN, seed=1).float()
        rows *= body.up.weight.norm() / rows.norm()
        own, random = (residual(f, y) for f in (body.neurons(x), body.activation(x @ rows.T)))
        assert own < 0.95 * random


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("rank", [2, 8])
def test_without_neurons_a_shallow_mlp_can_do_what_a_low_rank_map_can(rank, kind):
    """Its features are almost linear up to rank d/2, and bend from there."""
    blocks, stats = captured_whole(build("mixtral"), random_windows(24), kind=kind)
    for b in blocks:
        assert train_error(b, stats, TwoLayerMLP(rank)) < 1.05 * train_error(b, stats, LowRank(rank))
        assert train_error(b, stats, TwoLayerMLP(HIDDEN)) < 0.98 * train_error(b, stats, LowRank(HIDDEN // 2))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_some_features_of_a_gated_block_are_almost_linear(name):
    """Outputs that are a linear map of rank 4 need no more than these."""
    blocks, stats = captured_whole(build(name), random_windows(24))
    b = blocks[0]
    x = stats[b].train.x.flatten(0, 1).double()
    linear = statistics_of(x, x @ noise(HIDDEN, 4, seed=4) @ noise(4, HIDDEN, seed=5))
    linear.sum_h, linear.hh = stats[b].sum_h, stats[b].hh
    assert train_error(b, {b: linear}, TwoLayerMLP(10)) < 0.02 < train_error(b, {b: linear}, LowRank(3))


def test_a_shallow_mlp_may_be_wider_than_the_block_has_directions():
    """The rest of the features is random, the same for the same seed."""
    blocks, stats = captured_whole(build("mixtral"), random_windows(32, 24))
    b = blocks[0]
    directions = HIDDEN * 3 // 2
    assert train_error(b, stats, TwoLayerMLP(directions + 30)) < train_error(b, stats, TwoLayerMLP(directions))
    first, second, third = (fit(b, stats, TwoLayerMLP(directions + 30), seed=seed).body.up.weight for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert torch.equal(first[:directions], third[:directions])
    assert not torch.equal(first, third)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_shallow_mlp_needs_pairs(name):
    blocks, stats = captured_whole(build(name), random_windows(), sample_windows=0)
    with pytest.raises(ValueError, match=r"TwoLayerMLP\(width=8\) of model\.layers\.0\.mlp .* sampled tokens"):
        fit(blocks[0], stats, TwoLayerMLP(8))


def test_padding_is_in_no_feature():
    blocks, stats = captured_whole(build("llama"), random_windows())
    b, s = blocks[0], stats[blocks[0]]
    clean = fit(b, stats, TwoLayerMLP(8)).body.down.weight
    s.train.x, s.train.y = (torch.cat([t, torch.full_like(t, 1e3)], 1) for t in (s.train.x, s.train.y))
    s.train.mask = torch.cat([s.train.mask, torch.zeros_like(s.train.mask)], 1)
    assert torch.equal(fit(b, stats, TwoLayerMLP(8), samples=()).body.down.weight, clean)
