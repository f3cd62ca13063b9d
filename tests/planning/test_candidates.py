"""Candidates of an allocation: families and sizes, block by block."""

import pytest
import torch
from conftest import captured_whole
from tiny_models import INTERMEDIATE, build, random_windows

from mlpreplace import LowRank, Mean, NarrowPlusLinear, TwoLayerMLP, allocate, capture, find_blocks
from mlpreplace.fitting.fit import fit_all
from mlpreplace.planning.candidates import ATTENTION_SIZES, LINEAR_SIZES, WIDTH_STEPS, fit_candidates, narrow_widths
from mlpreplace.replacements.families import ladder
from mlpreplace.statistics.moments import MOMENTS


def same(a, b) -> bool:
    """Whether two lists of replacements are of the same families, with the same weights and reports of errors."""
    return all(
        x.family == y.family
        and (x.report.train, x.report.validation) == (y.report.train, y.report.validation)
        and all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters(), strict=True))
        for x, y in zip(a, b, strict=True)
    )


def test_widths_are_below_the_block(captured):
    _, blocks, _ = captured
    widths = [family.width for family in narrow_widths(blocks[0])]
    assert widths == list(range(3, INTERMEDIATE, 3))


def test_sizes_of_experts_are_shares_of_their_parameters():
    block = find_blocks(build("mixtral"))[0]
    sizes = narrow_widths(block, steps=4)
    assert [type(s) for s in sizes] == [TwoLayerMLP] * 3
    assert [s.n_params(block) / block.n_params for s in sizes] == pytest.approx([0.25, 0.5, 0.75], abs=0.01)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_candidates_are_those_of_lists_written_by_hand(name):
    model = build(name)
    mlps, attentions = find_blocks(model), find_blocks(model, "attention")
    options = dict(moments=MOMENTS, validation_windows=2, sample_windows=None, progress=False)
    stats = capture(model, [*attentions, *mlps], random_windows(), **options)
    given = fit_candidates(stats, progress=False)
    families = {b: narrow_widths(b, WIDTH_STEPS) + ladder(b, LINEAR_SIZES, [NarrowPlusLinear]) for b in mlps}
    families |= {b: [Mean(), *ladder(b, ATTENTION_SIZES, [LowRank])] for b in attentions}
    assert list(given) == list(families), "MLP blocks first"
    for block, of_block in families.items():
        by_hand = fit_all([block], stats, of_block, samples=["validation"], progress=False)[block]
        assert [r.family for r in given[block]] == of_block and same(given[block], by_hand)


def test_families_may_be_left_out_and_options_are_those_of_fit():
    blocks, stats = captured_whole(build("llama"), random_windows())
    given = fit_candidates(stats, width_steps=4, linear_sizes=(), samples=(), seed=1, selection="random", progress=False)
    for block in blocks:
        by_hand = fit_all([block], stats, narrow_widths(block, 4), samples=(), seed=1, selection="random", progress=False)
        assert same(given[block], by_hand[block])
        assert all(r.report.validation is None for r in given[block])


def test_by_default_an_allocation_chooses_among_fifteen_widths(captured):
    model, blocks, stats = captured
    by_hand = {b: fit_all([b], stats, narrow_widths(b), samples=["validation"], progress=False)[b] for b in blocks}
    plans = [allocate(model, stats, 0.3, "milp", candidates=c, progress=False) for c in (None, by_hand)]
    assert list(plans[0]) == list(plans[1]) and same(plans[0].values(), plans[1].values())
