"""Merging feed-forward sublayers: what is planted is found, what is merged is one, on disk and in every count."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from conftest import save_locally
from merging_blocks import KINDS, as_doubles, planted
from tiny_models import CAUSAL, batches_for, build, outputs, random_windows
from torch.testing import assert_close

from mlpreplace import (
    Merged,
    Source,
    capture,
    capture_units,
    compare,
    count_parameters,
    drop_layers,
    drop_mlps,
    find_blocks,
    find_layers,
    flops,
    layers_worth,
    load,
    load_model,
    losses,
    merge_mlps,
    quantized,
    result_rows,
    rivals,
    save,
    size_bytes,
    slide,
    sparsity,
    speed_rows,
    splice,
    spliced,
)
from mlpreplace.baselines import windows_of
from mlpreplace.blocks import block_parameters
from mlpreplace.speed import Latency, bytes_read
from mlpreplace.splice import bodies, removed_parameters, replacements_of


def units_of(model, name, **options):
    batches = batches_for(name, 24, **options)
    wide = next(model.parameters()).dtype == torch.float64
    return capture_units(model, find_blocks(model), as_doubles(batches) if wide else batches, progress=False)


def double_outputs(model, name) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in as_doubles(batches_for(name, seed=9))])


@pytest.mark.parametrize("name", KINDS)
def test_copies_up_to_a_permutation_merge_without_any_change(name):
    """Both stacks of an encoder-decoder at once; without matching, the same layers do change."""
    model, pairs, _ = planted(name)
    units, dense = units_of(model, name), double_outputs(model, name)
    matched, unmatched = ({b: r for pair in pairs for b, r in merge_mlps(pair, u).items()} for u in (units, None))
    assert len(matched) == 2 * len(pairs)
    with spliced(model, matched):
        assert_close(double_outputs(model, name), dense, rtol=0, atol=1e-9)
    with spliced(model, unmatched):
        assert (double_outputs(model, name) - dense).abs().max() > 1e-3
    saved = sum(a.n_params for a, _ in pairs)
    assert sparsity(model, matched) == sparsity(model, unmatched) == saved / block_parameters(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_is_the_average_of_what_was_matched(name):
    model = build(name)
    blocks = find_blocks(model)
    merged = merge_mlps(blocks)[blocks[0]].body
    for field, own in (("up", merged.up.weight), ("down", merged.down.weight)):
        assert_close(own, sum(getattr(b.weights(), field).double() for b in blocks).div(3).float())
    if name == "gpt2":
        assert_close(merged.down.bias, sum(b.weights().down_bias for b in blocks) / 3)
        assert_close(merged.up.bias, sum(b.weights().up_bias for b in blocks) / 3)
    plan = merge_mlps(blocks, units_of(model, name))
    body = plan[blocks[0]].body
    assert all(r.body is body and r.family == Merged((0, 1, 2)) for r in plan.values())
    assert body.up.weight.dtype == blocks[0].dtype and plan[blocks[0]].report.seconds > 0
    assert not torch.equal(body.up.weight, merged.up.weight)
    assert_close(body.up.weight.mean(0), merged.up.weight.mean(0))  # rows in another order have the same mean


@pytest.mark.parametrize("name", KINDS)
def test_shared_parameters_count_once(name):
    model = build(name)
    first = [b for b in find_blocks(model) if b.stack == find_blocks(model)[0].stack]
    plan = merge_mlps(first)
    merged, saved = splice(model, plan), (len(first) - 1) * first[0].n_params
    before, after = count_parameters(model), count_parameters(merged)
    assert before["mlp"] - after["mlp"] == before["total"] - after["total"] == saved
    assert {k: v for k, v in before.items() if k not in ("mlp", "total")} == {
        k: v for k, v in after.items() if k not in ("mlp", "total")
    }
    assert block_parameters(model) - block_parameters(merged) == saved
    assert sparsity(model, plan) == saved / block_parameters(model)
    assert size_bytes(model) - size_bytes(merged) == 4 * saved
    assert sparsity(model, {b: plan[b] for b in first[1:]}) == (len(first) - 2) * first[0].n_params / block_parameters(model)
    for _, r in plan.items():
        assert r.n_params == r.family.n_params(first[0]) == first[0].n_params


@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "mixtral"])
def test_no_flops_are_saved(name):
    model, windows = build(name), random_windows(4)
    plan = merge_mlps(find_blocks(model))
    merged = splice(model, plan)
    assert flops(merged, 12) == flops(model, 12)
    assert bytes_read(model) - bytes_read(merged) == 4 * 2 * find_blocks(model)[0].n_params
    plans = {("dense", 0.0): {}, ("merged", 0.2): plan}
    measured = compare(model, plans, windows, progress=False)
    row = result_rows(model, plans, measured, "somewhere")[1]
    total = sum(p.numel() for p in model.parameters())
    assert row["params_removed_of_total"] == pytest.approx(1 - sum(p.numel() for p in merged.parameters()) / total)
    assert row["blocks_replaced"] == 3 and row["sparsity_achieved"] == sparsity(model, plan) and row["kl"] > 0
    timed = {"dense": model, "merged": merged}
    (_, speed) = speed_rows(timed, dict.fromkeys(timed, Latency(torch.ones(2).numpy(), torch.ones(2).numpy(), 1, 1, 4, 5.0)))
    assert speed["prefill_ideal"] == 1 and speed["sparsity_achieved"] == pytest.approx(sparsity(model, plan))


def test_copies_stay_tied():
    model = build("llama")
    merged = splice(model, merge_mlps(find_blocks(model)))
    small = quantized(merged)
    for other in (merged, copy.deepcopy(merged), copy.deepcopy(merged).to(torch.bfloat16), small):
        found = replacements_of(other)
        assert len(found) == 3 and len({id(r.body) for r in found.values()}) == 1
        assert len({r.body.down.weight.data_ptr() for r in found.values()}) == 1
    with torch.no_grad():
        assert torch.isfinite(small(random_windows(2)).logits).all()


def test_saved_once_and_tied_again(tmp_path):
    base = save_locally(build("llama"), tmp_path / "base")
    model, _ = load_model(base, device="cpu")
    blocks, windows = find_blocks(model), random_windows()
    plan = merge_mlps(blocks[:2], units_of(model, "llama")) | drop_mlps(blocks[2:])
    merged = splice(model, plan)
    again = load(folder := save(merged, tmp_path / "out"), device="cpu")
    check_tied(again, folder, plan)
    with torch.no_grad():
        assert torch.equal(again(windows).logits, merged(windows).logits)
    assert count_parameters(again) == count_parameters(merged)
    assert [r.report for r in replacements_of(again).values()] == [r.report for r in plan.values()]


@pytest.mark.parametrize("name", ["vit", "marian"])
def test_other_models_are_loaded_into_a_base_of_the_caller(name, tmp_path):
    model = build(name)
    model.source = Source.of(model, "somewhere")
    sides = windows_of(find_blocks(model), 2).values()
    plan = {b: r for side in list(sides)[:: 1 if name in ("marian", "t5") else 2] for b, r in merge_mlps(side).items()}
    merged = splice(model, plan)
    folder = save(merged, tmp_path / "out")
    fresh = build(name)
    with pytest.raises(ValueError, match="base model differs"):
        load(folder, base=build(name, seed=1))
    again = load(folder, base=fresh)
    check_tied(again, folder, plan)
    assert torch.equal(outputs(again, name), outputs(merged, name)) and not torch.equal(
        outputs(fresh, name), outputs(merged, name)
    )
    with pytest.raises(ValueError, match="is in torch.float64"):
        load(folder, base=fresh.double())


def check_tied(model, folder, plan) -> None:
    found, weights = replacements_of(model), sum(4 * p.numel() for p in bodies(plan).parameters())
    assert weights <= (folder / "replacements.safetensors").stat().st_size < weights + 4096
    merged = {name: r for name, r in found.items() if isinstance(r.family, Merged)}
    groups = {(name.rsplit(".layers", 1)[0], r.family): r for name, r in merged.items()}
    for name, r in merged.items():
        other = groups[name.rsplit(".layers", 1)[0], r.family]
        for a, b in zip(r.parameters(), other.parameters(), strict=True):
            assert a is b and a.data_ptr() == b.data_ptr()
    assert len({id(r.body) for r in found.values()}) == len(bodies(plan))


# windows


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_window_that_was_planted_is_found(name):
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
def test_the_window_is_found_by_a_loss_of_any_model(name):
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


def test_windows_never_cross_stacks():
    blocks = find_blocks(build("marian", encoder_layers=3, decoder_layers=4))
    for k, starts in ((1, 7), (2, 5), (3, 3), (4, 1)):
        found = windows_of(blocks, k)
        assert len(found) == starts
        for (stack, start), window in found.items():
            assert {b.stack for b in window} == {stack} and [b.layer for b in window] == list(range(start, start + k))
    with pytest.raises(ValueError, match="different stacks"):
        merge_mlps(blocks[2:4])


def test_starts_may_be_some_layers_apart(llama):
    blocks = find_blocks(llama)
    assert [start for _, start in windows_of(blocks, 2, every=2)] == [0]
    assert [start for _, start in windows_of(blocks, 1, every=2)] == [0, 2]
    with pytest.raises(ValueError, match="Expected every ≥ 1, got 0"):
        windows_of(blocks, 2, every=0)


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
    with pytest.raises(ValueError, match="Every score is NaN, of 2 windows of 2 layers"):
        slide(blocks, 2, merge_mlps, lambda plans: dict.fromkeys(plans, float("nan")))


@pytest.mark.parametrize("name", KINDS)
def test_dropping_saves_as_much(name):
    """k − 1 MLPs without anything in their place; their layers then add nothing but what attention adds."""
    model = build(name)
    first = [b for b in find_blocks(model) if b.stack == find_blocks(model)[0].stack]
    merged, dropped = merge_mlps(first), drop_mlps(first[1:])
    assert sparsity(model, merged) == sparsity(model, dropped) > 0
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
    share = sparsity(model, drop_layers(model, layers[:n]))
    assert all(
        abs(share - sparsity(model, plan)) <= abs(sparsity(model, drop_layers(model, layers[:m])) - sparsity(model, plan))
        for m in range(1, 6)
    )
    batches = batches_for(name, labels=True)
    best, rows = slide(layers, n, partial(drop_layers, model), lambda plans: losses(model, plans, batches))
    assert len(rows) == 6 - n + 1 and sparsity(model, best) == share
    assert layers_worth(model, merge_mlps(find_blocks(model)[:2])) == 1
    with pytest.raises(ValueError, match="2 stacks"):
        layers_worth(build("marian"), plan)


def test_errors():
    model = build("llama")
    blocks = find_blocks(model)
    for few in (blocks[:1], [], [blocks[0], blocks[0]]):
        with pytest.raises(ValueError, match="two or more different blocks"):
            merge_mlps(few)
    with pytest.raises(ValueError, match="two or more"):
        slide(blocks, 1, merge_mlps, lambda plans: dict.fromkeys(plans, 0))
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"window of {k} layers does not fit: expected 1 ≤ k ≤ 3"):
            slide(blocks, k, merge_mlps, lambda plans: dict.fromkeys(plans, 0))
    wider = find_blocks(build("llama", intermediate_size=64))
    with pytest.raises(ValueError, match=r"equal form.*\(48, 32\).*\(64, 32\)"):
        merge_mlps([blocks[0], wider[1]])
    with pytest.raises(ValueError, match="not among the captured"):
        merge_mlps(blocks, capture_units(model, blocks[:2], batches_for("llama"), progress=False))
    mixtral = build("mixtral")
    with pytest.raises(ValueError, match="neurons"):
        merge_mlps(find_blocks(mixtral))
