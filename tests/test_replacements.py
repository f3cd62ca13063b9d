"""The families: their sizes, the limits of these, and what survives being written down."""

import pytest
from conftest import HIDDEN, INTERMEDIATE, build, capture_quietly, random_windows

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, find_blocks, fit, ladder

FAMILIES = [Mean(), Linear(), LowRank(4), NarrowMLP(24)]


@pytest.mark.parametrize("family", [LowRank(0), LowRank(-1), LowRank(HIDDEN + 1), NarrowMLP(0), NarrowMLP(INTERMEDIATE + 1)])
def test_a_size_the_block_cannot_have(family, captured):
    _, blocks, stats = captured
    for act in (lambda: fit(blocks[0], stats, family), lambda: family.n_params(blocks[0])):
        with pytest.raises(ValueError, match=r"does not fit model\.layers\.0\.mlp: expected 1 ≤"):
            act()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_announced_size_is_the_size(name, family):
    blocks, stats = capture_quietly(build(name), random_windows())
    small = fit(blocks[0], stats, family)
    assert small.n_params == family.n_params(blocks[0]) == sum(p.numel() for p in small.parameters())
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_a_ladder_keeps_the_shares_asked_for(name, share):
    """To the nearest neuron or rank."""
    block = find_blocks(build(name))[0]
    mean, linear, low, narrow = ladder(block, [share])
    assert (mean, linear) == (Mean(), Linear())
    for family, larger in ((low, LowRank(low.rank + 1)), (narrow, NarrowMLP(narrow.width + 1))):
        one_more = larger.n_params(block) - family.n_params(block)
        assert abs(family.n_params(block) - share * block.n_params) <= one_more * (0.5 if family is low else 1)


def test_a_ladder_stays_within_what_the_block_takes(llama):
    block = find_blocks(llama)[0]
    steps = ladder(block, [1e-6, 1, 2])
    assert steps == [Mean(), Linear(), LowRank(1), LowRank(HIDDEN // 2), NarrowMLP(1), NarrowMLP(INTERMEDIATE)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_survives_json(family):
    assert type(family).from_dict(family.as_dict()) == family
    assert type(family).__name__ in str(family)


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="'Cubic'.*NarrowMLP"):
        Linear.from_dict({"family": "Cubic"})
