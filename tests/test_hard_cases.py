"""Statistics and blocks that make a fit hard or impossible: every family either copes or says what is wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import capture_quietly, captured_whole, joint_statistics, noise
from tiny_models import HIDDEN, INTERMEDIATE, build, random_windows

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP, find_blocks, fit

FAMILIES = [Mean(), Linear(), LowRank(4), NarrowMLP(24), NarrowPlusLinear(20, 4), TwoLayerMLP(24)]


@pytest.fixture
def block(llama):
    return find_blocks(llama)[1]


def pooled(replacement) -> float:
    return replacement.report.validation.pooled


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fewer_tokens_than_dimensions(name, family):
    blocks, stats = captured_whole(build(name), random_windows(3, 8))
    for b in blocks:
        assert stats[b].tokens == 8 < family.n_params(b) / HIDDEN or family == Mean()
        small = fit(b, stats, family)
        assert all(torch.isfinite(p).all() for p in small.parameters())
        assert np.isfinite(pooled(small))


SOLVED = FAMILIES[1:]  # all that solve for something


@pytest.mark.parametrize("family", SOLVED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_singular_moments_without_ridge(name, family):
    blocks, stats = captured_whole(build(name), random_windows(3, 8))
    with pytest.raises(ValueError, match=f"{blocks[1].name}: the moments are singular.*raise ridge"):
        fit(blocks[1], stats, family, ridge=0)


@pytest.mark.parametrize("family", SOLVED)
def test_enough_tokens_need_no_ridge(family):
    blocks, stats = captured_whole(build("llama"), random_windows(48, 24))
    assert np.isfinite(pooled(fit(blocks[1], stats, family, ridge=0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_is_too_few(family, block):
    x, h = noise(1, HIDDEN), noise(1, INTERMEDIATE)
    with pytest.raises(ValueError, match=f"{block.name}: a fit needs at least 2 tokens, the statistics hold 1"):
        fit(block, {block: joint_statistics(block, x, h)}, family)


@pytest.mark.parametrize("family", SOLVED)
def test_activations_that_are_all_zero(family, block):
    zeros = torch.zeros(20, HIDDEN, dtype=torch.float64)
    h = torch.zeros(20, INTERMEDIATE, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{block.name}: the activations are all zero"):
        fit(block, {block: joint_statistics(block, zeros, h)}, family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite(value, family):
    blocks, stats = captured_whole(build("llama"), random_windows())
    for name in ("sum_y", "hh", "xx"):
        broken = {blocks[0]: replace(stats[blocks[0]], **{name: getattr(stats[blocks[0]], name).clone()})}
        getattr(broken[blocks[0]], name).flatten()[3] = value
        with pytest.raises(ValueError, match=f"{blocks[0].name}: the statistics are not finite"):
            fit(blocks[0], broken, family)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("pair", ["x", "y"])
def test_a_sample_that_is_not_finite(pair, name):
    blocks, stats = captured_whole(build(name), random_windows())
    getattr(stats[blocks[0]].train, pair)[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=f"{blocks[0].name}: the statistics are not finite"):
        fit(blocks[0], stats, TwoLayerMLP(8))


@pytest.mark.parametrize(
    ("given", "family", "missing"),
    [
        (("input",), NarrowMLP(24), "hidden"),
        (("hidden",), Linear(), "input"),
        (("hidden",), LowRank(4), "input"),
        (("input", "hidden"), NarrowPlusLinear(20, 4), "cross"),
        (("input", "cross"), NarrowPlusLinear(20, 4), "hidden"),
        (("hidden", "cross"), NarrowPlusLinear(20, 4), "input"),
        (("input",), TwoLayerMLP(8), "hidden"),
    ],
)
def test_a_missing_moment_is_named(given, family, missing, llama, windows):
    blocks, stats = capture_quietly(llama, windows, moments=given)
    with pytest.raises(ValueError, match=f"{blocks[0].name}: the '{missing}' moment was not captured"):
        fit(blocks[0], stats, family)


@pytest.mark.parametrize("family", [NarrowMLP(24), NarrowPlusLinear(20, 4)])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_a_block_without_neurons_can_be_replaced_but_not_narrowed(kind, family):
    blocks, stats = captured_whole(build("mixtral"), random_windows(32, 24), kind=kind)
    with pytest.raises(ValueError, match=f"{blocks[0].name}.*no up/down MLP"):
        fit(blocks[0], stats, family)
    mean = pooled(fit(blocks[0], stats, Mean()))
    for other in (Linear(), LowRank(8), TwoLayerMLP(24)):
        assert pooled(fit(blocks[0], stats, other)) < mean


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_replacement_has_the_precision_of_its_block(family, dtype):
    blocks, stats = captured_whole(build("llama").to(dtype), random_windows(32, 24))
    exact_blocks, exact_stats = captured_whole(build("llama"), random_windows(32, 24))
    small, exact = fit(blocks[1], stats, family), fit(exact_blocks[1], exact_stats, family)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert stats[blocks[1]].train.x.dtype == dtype
    assert pooled(small) == pytest.approx(pooled(exact), rel=0.1)
