"""Candidates of an allocation: families and sizes, block by block."""

import pytest
import torch
from tiny_models import INTERMEDIATE, build

from mlpreplace import LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP, allocate, find_blocks, fit
from mlpreplace.fitting.fit import fit_all
from mlpreplace.planning.candidates import (
    ATTENTION_SIZES,
    LINEAR_SIZES,
    WIDTH_STEPS,
    candidate_families,
    fitted_to,
    narrow_widths,
    savings_of,
)
from mlpreplace.replacements import NarrowAttention
from mlpreplace.replacements.families import ladder


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
    families = {b: narrow_widths(b, WIDTH_STEPS) + ladder(b, LINEAR_SIZES, [NarrowPlusLinear]) for b in mlps}
    families |= {b: [Mean(), *ladder(b, ATTENTION_SIZES, [LowRank]), *NarrowAttention.sizes(b)] for b in attentions}
    assert candidate_families([*mlps, *attentions]) == families
    few = candidate_families(mlps, width_steps=4, linear_sizes=())
    assert few == {b: narrow_widths(b, 4) for b in mlps}


def test_savings_are_those_of_the_fits(captured):
    model, blocks, stats = captured
    candidates = {b: [NarrowMLP(12), fit(b, stats, LowRank(4))] for b in blocks}
    for block, savings in savings_of(candidates).items():
        sizes = [sum(p.numel() for p in fit(block, stats, family).parameters()) for family in (NarrowMLP(12), LowRank(4))]
        assert savings == [block.n_params - size for size in sizes]


def test_what_was_fitted_stays_the_same_object_and_the_rest_is_fitted(captured):
    _, blocks, stats = captured
    own = fit(blocks[1], stats, LowRank(4))
    found = fitted_to(stats, {(blocks[1], "own"): own, (blocks[0], 0): NarrowMLP(12)}, selection="random", seed=1)
    assert list(found) == [(blocks[1], "own"), (blocks[0], 0)] and found[blocks[1], "own"] is own
    assert same([found[blocks[0], 0]], [fit(blocks[0], stats, NarrowMLP(12), selection="random", seed=1)])
    assert fitted_to(None, {(blocks[1], 0): own}) == {(blocks[1], 0): own}
    with pytest.raises(ValueError, match=r"Not in the statistics: model\.layers\.0\.mlp"):
        fitted_to(None, {(blocks[0], 0): NarrowMLP(12)})


def test_by_default_an_allocation_chooses_among_fifteen_widths(captured):
    model, blocks, stats = captured
    by_hand = {b: fit_all([b], stats, narrow_widths(b), samples=["validation"], progress=False)[b] for b in blocks}
    plans = [allocate(model, stats, 0.3, "milp", candidates=c, progress=False) for c in (None, by_hand)]
    chosen, expected = ({b: r.family for b, r in plan.items()} for plan in plans)
    assert chosen == expected
