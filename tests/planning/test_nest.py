"""Nested plans: a level is the NarrowMLP of its prefix, and switching is exact."""

import pytest
import torch
from conftest import capture_quietly, save_locally
from tiny_models import HIDDEN, INTERMEDIATE, build, random_windows
from torch.utils.flop_counter import FlopCounterMode

from mlpreplace import LowRank, NarrowMLP, allocate, find_blocks, fit, load, load_model, save, splice, spliced
from mlpreplace.evaluation.speed import flops
from mlpreplace.fitting.fit import fit_all
from mlpreplace.planning.candidates import narrow_widths
from mlpreplace.planning.nest import narrowed, nest, set_sparsity
from mlpreplace.replacements.families import Family, ladder
from mlpreplace.replacements.nested import NestedMLP
from mlpreplace.replacements.splice import sparsity_of
from mlpreplace.runtime.cache import fingerprint

LEVELS = ((0.1, 40), (0.2, 24), (0.4, 12))
WITH_DENSE = ((0, INTERMEDIATE), *LEVELS)
NAMES = ["llama", "gpt2", "opt", "gemma2", "bert"]  # gated or not, with biases or without, one module or three


def logits(model, windows) -> torch.Tensor:
    with torch.no_grad():
        return model(windows).logits


def plans_for(model, levels=WITH_DENSE):
    """(blocks, statistics, {sparsity: the plan of one width everywhere})."""
    blocks, stats = capture_quietly(model, random_windows(16))
    widths = {s: {b: fit(b, stats, NarrowMLP(k), samples=()) for b in blocks} if k < INTERMEDIATE else {} for s, k in levels}
    return blocks, stats, widths


@pytest.fixture
def nested(llama):
    """(model, nested plan) of a tiny Llama, dense at its first level."""
    _, stats, plans = plans_for(llama)
    return llama, nest(stats, plans, progress=False)


# a level


@pytest.mark.parametrize("name", NAMES)
def test_a_level_is_the_narrow_mlp_of_its_prefix_bit_for_bit(name, windows):
    model = build(name)
    _, stats, plans = plans_for(model)
    plan = nest(stats, plans, progress=False)
    nested = splice(model, plan)
    dense = logits(model, windows)
    for s, k in LEVELS:
        set_sparsity(nested, s)
        alone = narrowed(plan, s)
        assert {r.family for r in alone.values()} == {NarrowMLP(k)}
        with spliced(model, alone):
            assert torch.equal(logits(model, windows), logits(nested, windows))
            assert not torch.equal(logits(nested, windows), dense)


@pytest.mark.parametrize("name", NAMES)
def test_at_full_width_it_is_the_dense_model_bit_for_bit(name, windows):
    model = build(name)
    _, stats, plans = plans_for(model)
    plan = nest(stats, plans, progress=False)
    nested = splice(model, plan)
    assert torch.equal(logits(nested, windows), logits(model, windows))
    set_sparsity(nested, 0.2)
    assert not torch.equal(logits(nested, windows), logits(model, windows))
    set_sparsity(nested, 0)
    assert torch.equal(logits(nested, windows), logits(model, windows))
    assert narrowed(plan, 0) == {}


def test_switching_back_and_forth_is_exact(nested, windows):
    model, plan = nested
    served = splice(model, plan)
    seen: dict[float, torch.Tensor] = {}
    for s in (0, 0.4, 0.1, 0.2, 0.4, 0, 0.2, 0.1):
        set_sparsity(served, s)
        assert torch.equal(logits(served, windows), seen.setdefault(s, logits(served, windows)))
    assert len({float(v.sum()) for v in seen.values()}) == 4
    assert all(r.family.active == 0 for r in plan.values())  # the copy was switched, not the plan


def test_only_the_prefix_is_multiplied(nested):
    model, plan = nested
    block, r = next(iter(plan.items()))
    x = torch.randn(7, HIDDEN)
    for s, k in WITH_DENSE:
        with spliced(model, {block: r}):
            set_sparsity(model, s)
        with FlopCounterMode(display=False) as counted:
            r(x)
        assert counted.get_total_flops() == 2 * len(x) * 3 * HIDDEN * k


def test_speed_is_that_of_the_level(nested):
    """What a forward pass is said to cost is what it costs with the NarrowMLPs of the level."""
    model, plan = nested
    served = splice(model, plan)
    for s, _ in WITH_DENSE:
        set_sparsity(served, s)
        with spliced(model, narrowed(plan, s)):
            assert flops(served, 16) == pytest.approx(flops(model, 16), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted(name):
    """Stored: the widest level, the shared projection beside the block's own, a bias a level. Active: the level's NarrowMLP."""
    model = build(name)
    for levels in (LEVELS, WITH_DENSE, LEVELS[:1]):
        blocks, stats, plans = plans_for(model, levels)
        served = splice(model, nest(stats, plans, progress=False))
        for s, k in levels:
            set_sparsity(served, s)
            for b in blocks:
                r, has_bias = served.get_submodule(b.name), b.weights().down_bias is not None
                assert r.n_active_params == r.family.n_active_params(b) == r.body.n_active_params == NarrowMLP(k).n_params(b)
                assert r.n_params == r.family.n_params(b)
                beside = (40 * HIDDEN if levels is WITH_DENSE else 0) + (len(levels) - 1) * HIDDEN * has_bias
                assert r.n_params == NarrowMLP(levels[0][1]).n_params(b) + beside


# plans


def test_widths_never_grow_with_sparsity(captured):
    _, blocks, stats = captured
    a, b, c = blocks
    widths = {0.1: {a: 30, b: 20}, 0.2: {a: 40, c: 10}, 0.4: {a: 12, b: 24}}
    plans = {s: {x: fit(x, stats, NarrowMLP(k), samples=()) for x, k in of.items()} for s, of in widths.items()}
    plan = nest(stats, dict(reversed(plans.items())), progress=False)
    assert {x: r.family.widths for x, r in plan.items()} == {a: (30, 30, 12), b: (20, 20, 20), c: (INTERMEDIATE, 10, 10)}


def test_greedy_allocations_nest_as_they_are(captured):
    """What a level removes is what its own allocation removes."""
    model, blocks, stats = captured
    candidates = {b: fit_all([b], stats, narrow_widths(b), progress=False)[b] for b in blocks}
    plans = {s: allocate(model, stats, s, candidates=candidates) for s in (0.1, 0.2, 0.4)}
    plan = nest(stats, plans, progress=False)
    for s, own in plans.items():
        assert sparsity_of(model, narrowed(plan, s)) == sparsity_of(model, own) >= s


def test_a_block_dense_in_every_plan_is_left_alone(captured):
    _, blocks, stats = captured
    one = {blocks[1]: fit(blocks[1], stats, NarrowMLP(24))}
    assert set(nest(stats, {0: {}, 0.1: one}, progress=False)) == {blocks[1]}


def test_what_is_not_nested_stays_as_it_is(captured):
    _, blocks, stats = captured
    plan = nest(stats, {0.1: {blocks[0]: fit(blocks[0], stats, NarrowMLP(24))}}, progress=False)
    other = fit(blocks[1], stats, LowRank(4))
    assert narrowed(plan | {blocks[1]: other}, 0.1)[blocks[1]] is other


# kept and told apart


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("levels", [LEVELS, WITH_DENSE], ids=["narrow", "with dense"])
def test_it_is_saved_at_its_level_with_all_levels(name, levels, tmp_path, windows):
    model, _ = load_model(save_locally(build(name), tmp_path / "base"), device="cpu")
    _, stats, plans = plans_for(model, levels)
    served = splice(model, nest(stats, plans, progress=False))
    set_sparsity(served, 0.2)
    again = load(save(served, tmp_path / "out"), device="cpu")
    assert torch.equal(logits(again, windows), logits(served, windows))
    for name, r in served.named_modules():
        if hasattr(r, "n_active_params"):
            assert again.get_submodule(name).n_active_params == r.n_active_params
    for s, _ in levels:
        set_sparsity(served, s)
        set_sparsity(again, s)
        assert torch.equal(logits(again, windows), logits(served, windows))


def test_a_family_is_its_record():
    family = NestedMLP(LEVELS, active=0.2)
    again = Family.from_dict(family.as_dict() | {"levels": [list(level) for level in LEVELS]})  # as json has it
    assert again == family
    assert again.width == 24 and NestedMLP(LEVELS).width == 40


def test_results_of_one_level_are_no_results_of_another(nested):
    model, plan = nested
    seen = set()
    with spliced(model, plan):
        for s, _ in WITH_DENSE:
            set_sparsity(model, s)
            seen.add(fingerprint(plan))
    assert len(seen) == len(WITH_DENSE)


def test_a_ladder_holds_each_narrow_mlp_once(llama):
    block = find_blocks(llama)[0]
    assert ladder(block, [0.5], [NarrowMLP, NestedMLP]) == ladder(block, [0.5], [NarrowMLP])


# errors


def test_a_sparsity_that_was_not_planned_names_those_that_were(nested):
    model, plan = nested
    served = splice(model, plan)
    set_sparsity(served, 0.2)
    with pytest.raises(ValueError, match=r"0\.3.*0, 0\.1, 0\.2, 0\.4"):
        set_sparsity(served, 0.3)
    assert {m.family.active for m in served.modules() if hasattr(m, "family")} == {0.2}
    with pytest.raises(ValueError, match=r"0\.3.*0, 0\.1, 0\.2, 0\.4"):
        narrowed(plan, 0.3)


def test_a_model_without_nested_replacements_says_so(captured):
    model, blocks, stats = captured
    with pytest.raises(ValueError, match="nest"):
        set_sparsity(splice(model, {blocks[0]: fit(blocks[0], stats, NarrowMLP(24))}), 0.1)


def test_plans_that_cannot_be_nested(captured):
    _, blocks, stats = captured
    with pytest.raises(ValueError, match=r"LowRank\(rank=4\)"):
        nest(stats, {0.1: {blocks[0]: fit(blocks[0], stats, LowRank(4))}})
    for wrong in ({}, {1.0: {}}, {-0.1: {}}):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            nest(stats, wrong)


@pytest.mark.parametrize("levels", [(), ((0.2, 24), (0.1, 40)), ((0.1, 24), (0.2, 40)), ((0.1, 24), (0.1, 12))])
def test_levels_out_of_order(levels):
    with pytest.raises(ValueError, match="rising"):
        NestedMLP(levels)


def test_a_width_beyond_the_block(llama):
    with pytest.raises(ValueError, match=f"{INTERMEDIATE + 1} does not fit"):
        NestedMLP(((0.1, INTERMEDIATE + 1),)).build(find_blocks(llama)[0])
