"""Statistics that are captured some layers at a time are those of one pass over all layers, bit for bit."""

from itertools import pairwise

import pytest
import torch
from tiny_models import MODELS, VISION_ONLY, batches_for, build, random_windows

from mlpreplace import LowRank, NarrowMLP, capture, find_blocks, fit
from mlpreplace.fitting import fit_all
from mlpreplace.replacements import spliced
from mlpreplace.statistics.groups import InGroups, by_group, only, release
from mlpreplace.statistics.moments import FIT_COPIES
from mlpreplace.statistics.records import SUMS

WINDOWS = random_windows(10)
OPTIONS = dict(moments=("input", "hidden", "cross"), validation_windows=2, sample_windows=3, progress=False)
SMALL = 312_500  # bytes: two blocks of most tiny models, and what their fits take


def blocks_of(model):
    kinds = ("mlp",) if getattr(model.config, "is_encoder_decoder", False) else ("mlp", "attention")
    return [block for kind in kinds for block in find_blocks(model, kind)]


def same(a, b) -> bool:
    """Whether two statistics of a block hold the same bits."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in SUMS]
    pairs += [(getattr(p, n), getattr(q, n)) for p, q in ((a.train, b.train), (a.validation, b.validation)) for n in vars(p)]
    return a.tokens == b.tokens and all(y is None if x is None else torch.equal(x, y) for x, y in pairs)


def size(s) -> int:
    """Bytes of the matrices and pairs of a block."""
    tensors = [s.xx, s.xy, s.hh, s.hx, *(t for sample in (s.train, s.validation) for t in (sample.x, sample.y, sample.h))]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_changes_no_bit(name):
    model = build(name)
    blocks, (whole,) = blocks_of(model), batches_for(name, 10, 10)
    at_once = capture(model, blocks, whole, **OPTIONS)
    assert isinstance(at_once, dict)
    for budget in (0, (FIT_COPIES + 2) * max(map(size, at_once.values()))):  # two of the largest, and what a fit takes
        groups = capture(model, blocks, whole, **OPTIONS, memory_budget=budget)
        assert isinstance(groups, InGroups) and set(groups) == set(blocks)
        assert budget == 0 or name in VISION_ONLY or 1 < len(groups.groups) < len(blocks)
        for block, s in groups.items():
            assert same(s, at_once[block])


@pytest.mark.parametrize("together", [2, 3])
def test_blocks_in_order_cost_one_pass(together, llama):
    """Each layer runs once, but for one that two groups share."""
    blocks, batches = blocks_of(llama), 3  # of those sampled, of the others, of validation
    sizes = sorted(map(size, capture(llama, blocks, WINDOWS, **OPTIONS).values()))
    budget = FIT_COPIES * sizes[-1] + sum(sizes[-together:])
    groups = capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=budget, batch_size=5)
    ran = [0] * 3
    for at, layer in enumerate(llama.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, at=at: ran.__setitem__(at, ran[at] + 1))
    for block in groups:
        assert groups[block].tokens
    shared = {g[-1].layer for g, after in pairwise(groups.groups) if g[-1].layer == after[0].layer}
    assert len(groups.groups) > 1 and bool(shared) == (together == 3)
    assert ran == [batches * (1 + (layer in shared)) for layer in range(3)]


def test_layers_between_groups_need_no_block(llama):
    first, _, last = find_blocks(llama)
    at_once = capture(llama, [first, last], WINDOWS, **OPTIONS)
    groups = capture(llama, [first, last], WINDOWS, **OPTIONS, memory_budget=0)
    assert all(same(groups[block], at_once[block]) for block in (first, last))


def test_any_order_gives_the_same(llama):
    blocks = blocks_of(llama)
    at_once = capture(llama, blocks, WINDOWS, **OPTIONS)
    groups = capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=0)
    for block in (blocks[2], blocks[0], blocks[-1], blocks[1], blocks[1]):
        assert same(groups[block], at_once[block])


def test_one_group_is_in_memory(llama):
    groups = capture(llama, blocks_of(llama), WINDOWS, **OPTIONS, memory_budget=SMALL)
    for block in groups:
        groups[block]
        assert set(groups.held) == set(groups.groups[groups.group_of[block]])


def test_a_group_is_dropped_before_the_next_is_captured(llama):
    groups = capture(llama, blocks_of(llama), WINDOWS, **OPTIONS, memory_budget=0)
    collector, held = groups.collector, []
    groups.collector = lambda group: held.append(len(groups.held)) or collector(group)
    for block in groups:
        groups[block]
    assert held == [0] * len(groups.groups)


@pytest.mark.parametrize("budget", [0, SMALL])
def test_fits_to_groups_are_those_to_all_at_once(llama, budget):
    blocks, families = blocks_of(llama), [NarrowMLP(24), LowRank(4)]
    mlps = [block for block in blocks if block.kind == "mlp"]
    at_once = fit_all(mlps, capture(llama, blocks, WINDOWS, **OPTIONS), families, progress=False)
    groups = fit_all(mlps, capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=budget), families, progress=False)
    assert list(groups) == list(at_once)
    for block in mlps:
        for one, other in zip(at_once[block], groups[block], strict=True):
            assert one.report.validation == other.report.validation
            assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_asking_which_blocks_there_are_captures_nothing(llama, gpt2):
    blocks = blocks_of(llama)
    groups = capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=0)
    assert all(block in groups for block in blocks) and find_blocks(gpt2)[0] not in groups
    assert len(groups) == len(blocks) and not groups.held


def test_some_blocks_alone(llama):
    blocks = blocks_of(llama)
    at_once, groups = (capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=budget) for budget in ("1GB", 0))
    some = blocks[1:3]
    for found in (only(at_once, some), only(groups, some)):
        assert list(found) == some and all(same(found[block], at_once[block]) for block in some)


def test_what_is_not_needed_later_is_released(llama):
    blocks = blocks_of(llama)
    largest = max(map(size, capture(llama, blocks, WINDOWS, **OPTIONS).values()))
    groups = capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=(FIT_COPIES + 2) * largest)
    first, *others = groups.groups[0]
    at_first = groups[first]
    release(groups, blocks)
    assert set(groups.held) == {first, *others} and others
    release(groups, others)
    assert set(groups.held) == set(others)
    assert same(groups[first], at_first)
    release(groups, [])
    assert not groups.held
    release({}, blocks), release(None, blocks)


def test_groups_are_told_in_order(llama):
    blocks = blocks_of(llama)
    groups = capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=0)
    some = [blocks[2], blocks[0]]
    assert by_group(groups, some) == [[blocks[0]], [blocks[2]]]
    assert by_group({}, some) == by_group(None, some) == [some]
    assert by_group(only(groups, blocks[:1]), some) == [[blocks[0]], [blocks[2]]], "without statistics, and last"


def test_a_model_that_was_changed_since_is_refused(llama):
    blocks = find_blocks(llama)
    groups = capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=0)
    plan = {blocks[0]: fit(blocks[0], groups, NarrowMLP(24))}
    with spliced(llama, plan):
        assert groups[blocks[0]].tokens  # still in memory
        groups.held.clear()
        with pytest.raises(ValueError, match="is a plan in place"):
            groups[blocks[0]]
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="were written since"):
        groups[blocks[1]]


def test_a_group_without_room_starts_again_with_half_the_batch_which_stays(llama):
    blocks = find_blocks(llama)
    expected = capture(llama, blocks, WINDOWS, **OPTIONS, batch_size=2)

    def full(module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError

    groups = capture(llama, blocks, WINDOWS, **OPTIONS, memory_budget=0, batch_size=4)
    assert groups[blocks[0]].tokens
    llama.model.layers[1].mlp.register_forward_pre_hook(full)
    with pytest.warns(UserWarning, match="going on with 2 windows") as said:
        assert all(same(groups[block], expected[block]) for block in blocks[1:])
    assert len(said) == 1
