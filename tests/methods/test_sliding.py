"""Sliding over neighbours: what is planted is found, stacks stay apart, rivals save as many parameters."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from merging_blocks import KINDS, as_doubles, planted, units_of
from tiny_models import batches_for, build, outputs, random_windows

from mlpreplace import capture, compare, find_blocks, spliced
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.methods.sliding import drop_layers, drop_mlps, layers_worth, neighbours, rivals, slide
from mlpreplace.models.layers import find_layers
from mlpreplace.planning.distil import losses
from mlpreplace.replacements.splice import removed_parameters, sparsity_of
from mlpreplace.statistics.unit_similarity import capture_units


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_neighbours_that_were_planted_are_found(name):
    layers = {"n_layer" if name == "gpt2" else "num_hidden_layers": 6}
    model, [pair], _ = planted(name, first=3, **layers)
    blocks, windows = find_blocks(model), random_windows(4, seed=4)
    make = partial(merge_mlps, units=units_of(model, name))

    def score(plans):
        return {start: m.mean_kl for start, m in compare(model, plans, windows, progress=False).items()}

    plan, rows = slide(blocks, 2, make, score)
    assert list(plan) == pair and [row["start"] for row in rows if row["best"]] == [3]
    assert [row["start"] for row in rows] == list(range(5)) and {row["layers"] for row in rows} == {2}
    assert rows[3]["score"] < 1e-6 < 1e-4 < min(row["score"] for row in rows if row["start"] != 3)
    _, unmatched = slide(blocks, 2, merge_mlps, score)
    assert unmatched[3]["score"] > 1e-4


@pytest.mark.parametrize("name", ["marian", "vit"])
def test_they_are_found_by_a_loss_of_any_model(name):
    layers = {"encoder_layers": 3, "decoder_layers": 4} if name == "marian" else {"num_hidden_layers": 4}
    model, pairs, _ = planted(name, first=1, **layers)
    batches = as_doubles(batches_for(name, labels=True))
    dense = losses(model, {0: {}}, batches)[0]
    make = partial(merge_mlps, units=units_of(model, name))
    for pair in pairs:  # one for each stack
        side = [b for b in find_blocks(model) if b.stack == pair[0].stack]
        changed = {}

        def score(plans, changed=changed):
            changed |= {start: abs(loss - dense) for start, loss in losses(model, plans, batches).items()}
            return changed

        plan, rows = slide(side, 2, make, score)
        assert list(plan) == pair and min(changed.values()) < 1e-9 and len(rows) == len(side) - 1


def test_neighbours_never_cross_stacks():
    blocks = find_blocks(build("marian", encoder_layers=3, decoder_layers=4))
    for k, starts in ((1, 7), (2, 5), (3, 3), (4, 1)):
        found = neighbours(blocks, k)
        assert len(found) == starts
        for (stack, start), chosen in found.items():
            assert {b.stack for b in chosen} == {stack} and [b.layer for b in chosen] == list(range(start, start + k))
    with pytest.raises(ValueError, match="different stacks"):
        merge_mlps(blocks[2:4])


def test_starts_may_be_some_layers_apart(llama):
    blocks = find_blocks(llama)
    assert [start for _, start in neighbours(blocks, 2, every=2)] == [0]
    assert [start for _, start in neighbours(blocks, 1, every=2)] == [0, 2]
    with pytest.raises(ValueError, match="Expected every ≥ 1, got 0"):
        neighbours(blocks, 2, every=0)


@pytest.mark.parametrize("name", ["llama", "vit", "marian"])
def test_rivals_save_as_many_parameters(name):
    model, batches = build(name), batches_for(name, labels=True)
    blocks = [b for b in find_blocks(model) if b.stack == find_blocks(model)[0].stack]
    (whole,) = batches_for(name, batch_size=6, labels=True)
    stats = capture(model, blocks, whole, validation_windows=2, progress=False)
    score = partial(losses, model, batches=batches)
    units = capture_units(model, blocks, batches, progress=False)
    plans, records = rivals(model, blocks, 2, units, stats, score, whole_layers=name != "marian")
    saved = {method: removed_parameters(plan) for method, plan in plans.items()}
    assert list(plans) == ["merged", "unpermuted", "dropped", "replaced"]
    assert saved["merged"] == saved["unpermuted"] <= saved["replaced"] < 1.1 * saved["merged"]
    assert sum(record["best"] for record in records) == 3
    assert {record["method"] for record in records} == {"merged", "unpermuted", "dropped"}
    with pytest.raises(ValueError, match="is not in the statistics"):
        rivals(model, blocks, 2, units, {}, score)


def test_ties_go_to_the_first_and_nan_to_none():
    blocks = find_blocks(build("llama"))
    plan, rows = slide(blocks, 2, merge_mlps, lambda plans: dict.fromkeys(plans, 1.0))
    assert list(plan) == blocks[:2] and [row["best"] for row in rows] == [True, False]
    plan, _ = slide(blocks, 2, merge_mlps, lambda plans: dict(zip(plans, (float("nan"), 2.0), strict=True)))
    assert list(plan) == blocks[1:]
    with pytest.raises(ValueError, match="Every score is NaN, of all 2 starts of 2 neighbours"):
        slide(blocks, 2, merge_mlps, lambda plans: dict.fromkeys(plans, float("nan")))


@pytest.mark.parametrize("name", KINDS)
def test_dropping_saves_as_much(name):
    """k − 1 MLPs without anything in their place; their layers then add nothing but what attention adds."""
    model = build(name)
    first = [b for b in find_blocks(model) if b.stack == find_blocks(model)[0].stack]
    merged, dropped = merge_mlps(first), drop_mlps(first[1:])
    assert sparsity_of(model, merged) == sparsity_of(model, dropped) > 0
    dense = outputs(model, name)
    for plan in (merged, dropped):
        with spliced(model, plan):
            assert (outputs(model, name) - dense).abs().max() > 1e-3
    assert torch.equal(outputs(model, name), dense)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_whole_layers_of_as_many_parameters(name):
    model = build(name, num_hidden_layers=6)
    plan = merge_mlps(find_blocks(model)[:5])
    n, layers = layers_worth(model, plan), find_layers(model)
    share = sparsity_of(model, drop_layers(model, layers[:n]))
    assert all(
        abs(share - sparsity_of(model, plan))
        <= abs(sparsity_of(model, drop_layers(model, layers[:m])) - sparsity_of(model, plan))
        for m in range(1, 6)
    )
    batches = batches_for(name, labels=True)
    best, rows = slide(layers, n, partial(drop_layers, model), lambda plans: losses(model, plans, batches))
    assert len(rows) == 6 - n + 1 and sparsity_of(model, best) == share
    assert layers_worth(model, merge_mlps(find_blocks(model)[:2])) == 1
    with pytest.raises(ValueError, match="2 stacks"):
        layers_worth(build("marian"), plan)


def test_errors():
    blocks = find_blocks(build("llama"))
    with pytest.raises(ValueError, match="two or more"):
        slide(blocks, 1, merge_mlps, lambda plans: dict.fromkeys(plans, 0))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"no {k} neighbours: expected 1 ≤ k ≤ 3"):
            slide(blocks, k, merge_mlps, lambda plans: dict.fromkeys(plans, 0))
