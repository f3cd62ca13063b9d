"""The families: their sizes, the limits of these, and what survives being written down."""

import pytest
import torch
from conftest import capture_quietly
from tiny_models import HIDDEN, INTERMEDIATE, build, random_windows

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP, find_blocks, fit
from mlpreplace.models.blocks import NotApplicable
from mlpreplace.replacements.families import FAMILIES as KNOWN
from mlpreplace.replacements.families import ladder
from mlpreplace.statistics.records import MOMENTS

FAMILIES = [Mean(), Linear(), LowRank(4), NarrowMLP(24), NarrowPlusLinear(20, 4), TwoLayerMLP(24)]
SIZED = [LowRank, NarrowMLP, NarrowPlusLinear, TwoLayerMLP]  # by number of parameters; hybrids have tests of their own


@pytest.mark.parametrize(
    "family",
    [
        LowRank(0),
        LowRank(-1),
        LowRank(HIDDEN + 1),
        NarrowMLP(0),
        NarrowMLP(INTERMEDIATE + 1),
        NarrowPlusLinear(0, 4),
        NarrowPlusLinear(4, 0),
        NarrowPlusLinear(4, HIDDEN + 1),
        TwoLayerMLP(0),
    ],
)
def test_a_size_the_block_cannot_have(family, captured):
    _, blocks, stats = captured
    for act in (lambda: fit(blocks[0], stats, family), lambda: family.n_params(blocks[0]), lambda: family.build(blocks[0])):
        with pytest.raises(ValueError, match=r"does not fit model\.layers\.0\.mlp: expected 1 ≤"):
            act()


def test_a_shallow_mlp_is_no_wider_than_a_block_of_its_kind(gpt2, llama):
    with pytest.raises(ValueError, match=rf"width={INTERMEDIATE + 1} does not fit transformer\.h\.0\.mlp"):
        TwoLayerMLP(INTERMEDIATE + 1).n_params(find_blocks(gpt2)[0])
    assert TwoLayerMLP(INTERMEDIATE + 1).n_params(find_blocks(llama)[0]) > TwoLayerMLP(INTERMEDIATE).n_params(
        find_blocks(llama)[0]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_announced_size_is_the_size(name, family):
    blocks, stats = capture_quietly(build(name), random_windows(), moments=MOMENTS)
    small = fit(blocks[0], stats, family)
    assert small.n_params == family.n_params(blocks[0]) == sum(p.numel() for p in small.parameters())
    assert small.n_active_params == family.n_active_params(blocks[0]) == small.n_params
    assert not any(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_token_is_replaced_on_its_own(name, family):
    """Nothing here looks at other tokens: any leading shape, the same outputs."""
    blocks, stats = capture_quietly(build(name), random_windows(), moments=MOMENTS)
    small, x = fit(blocks[1], stats, family), stats[blocks[1]].train.x
    together = small(x)
    assert together.shape == x.shape
    torch.testing.assert_close(small(x.flatten(0, 1)), together.flatten(0, 1))
    torch.testing.assert_close(small(x[0, 5]), together[0, 5])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_a_ladder_keeps_the_shares_asked_for(name, share):
    """To the nearest neuron or rank, where that is not the smallest there is."""
    block = find_blocks(build(name))[0]
    found = ladder(block, [share], SIZED)
    assert [type(family) for family in found] == SIZED
    for family in found:
        size, *others = vars(family).values()
        one_more = type(family)(size + 1, *others).n_params(block) - family.n_params(block)
        assert abs(family.n_params(block) - share * block.n_params) <= one_more / 2 or size == 1


@pytest.mark.parametrize("family", SIZED)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_nearest_size_grows_with_the_parameters(name, family):
    block = find_blocks(build(name))[0]
    sizes = [family.nearest(block, share * block.n_params).n_params(block) for share in (0.05, 0.1, 0.2, 0.4, 0.8)]
    assert sizes == sorted(sizes)
    smallest = family.nearest(block, 0)
    assert set(vars(smallest).values()) == {1}


@pytest.mark.parametrize("family", [Mean, Linear])
def test_a_family_without_a_size_is_itself(family, llama):
    assert ladder(find_blocks(llama)[0], [0.1, 0.5], [family]) == [family()]


def test_neurons_and_a_linear_map_share_what_there_is(llama):
    """The map takes at most half, no more than rank d/6, and less of a larger module."""
    block = find_blocks(llama)[0]
    ranks = []
    for share in (0.05, 0.125, 0.25, 0.5, 1.0):
        family = NarrowPlusLinear.nearest(block, share * block.n_params)
        ranks.append(family.rank)
        assert LowRank(family.rank).n_params(block) <= 0.5 * share * block.n_params + HIDDEN
        assert family.rank <= max(1, HIDDEN / 6)
    assert ranks[-1] == 1 < max(ranks)
    assert ranks[2:] == sorted(ranks[2:], reverse=True)


def test_a_ladder_stays_within_what_the_block_takes(llama):
    block = find_blocks(llama)[0]
    steps = ladder(block, [1e-6, 1, 2], [Mean, Linear, LowRank, NarrowMLP])
    assert steps == [Mean(), Linear(), LowRank(1), LowRank(HIDDEN // 2), NarrowMLP(1), NarrowMLP(INTERMEDIATE)]
    both = NarrowPlusLinear.nearest(block, 2 * block.n_params)
    assert both.width == INTERMEDIATE


def test_a_shallow_ladder_ends_at_the_width_of_an_ungated_block(gpt2):
    assert ladder(find_blocks(gpt2)[0], [2], [TwoLayerMLP]) == [TwoLayerMLP(INTERMEDIATE)]


def test_a_ladder_has_every_family(llama):
    others = {"NestedMLP", "Merged"}  # of several sizes, of several blocks
    others |= {name for name, family in KNOWN.items() if family.attends}
    assert {type(member).__name__ for member in ladder(find_blocks(llama)[0], [0.5])} == set(KNOWN) - others


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_survives_json(family):
    assert type(family).from_dict(family.as_dict()) == family
    assert type(family).__name__ in str(family)


def test_an_unknown_family_is_named():
    with pytest.raises(ValueError, match="'Cubic'.*NarrowMLP"):
        Linear.from_dict({"family": "Cubic"})


@pytest.mark.parametrize("family", [NarrowMLP, NarrowPlusLinear])
def test_a_small_dense_mlp_stands_in_for_what_keeps_neurons(family):
    """Of experts; once where several families ask for it."""
    block = find_blocks(build("mixtral"))[0]
    found = family.nearest(block, 0.25 * block.n_params)
    assert found == TwoLayerMLP.nearest(block, 0.25 * block.n_params)
    assert ladder(block, [0.25], [TwoLayerMLP, family]) == [found]


def test_nothing_stands_in_for_a_narrow_attention_block(llama):
    with pytest.raises(NotApplicable, match="self_attn.* no neurons"):
        ladder(find_blocks(llama, "attention")[0], [0.25], [NarrowMLP])
