"""Merging feed-forward sublayers: what is planted is found, what is merged is one, on disk and in every count."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import save_locally
from merging_blocks import KINDS, as_doubles, planted, units_of
from tiny_models import CAUSAL, batches_for, build, outputs, random_windows
from torch.testing import assert_close

from mlpreplace import compare, find_blocks, load, load_model, save, splice, spliced
from mlpreplace.evaluation.int8 import quantized
from mlpreplace.evaluation.speed import Latency, bytes_read, flops, size_bytes, speed_rows
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.methods.sliding import drop_mlps, neighbours
from mlpreplace.models.loading import Source
from mlpreplace.models.parameters import block_parameters, count_parameters
from mlpreplace.replacements.splice import bodies, replacements_of, sparsity_of
from mlpreplace.replacements.whole_layers import Merged
from mlpreplace.reporting.tables import result_rows
from mlpreplace.statistics.unit_similarity import capture_units


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
    assert sparsity_of(model, matched) == sparsity_of(model, unmatched) == saved / block_parameters(model)


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
    assert sparsity_of(model, plan) == saved / block_parameters(model)
    assert size_bytes(model) - size_bytes(merged) == 4 * saved
    assert sparsity_of(model, {b: plan[b] for b in first[1:]}) == (len(first) - 2) * first[0].n_params / block_parameters(model)
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
    assert row["blocks_replaced"] == 3 and row["sparsity_achieved"] == sparsity_of(model, plan) and row["kl"] > 0
    timed = {"dense": model, "merged": merged}
    (_, speed) = speed_rows(timed, dict.fromkeys(timed, Latency(torch.ones(2).numpy(), torch.ones(2).numpy(), 1, 1, 4, 5.0)))
    assert speed["prefill_ideal"] == 1 and speed["sparsity_achieved"] == pytest.approx(sparsity_of(model, plan))


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
    sides = neighbours(find_blocks(model), 2).values()
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


def test_errors():
    model = build("llama")
    blocks = find_blocks(model)
    for few in (blocks[:1], [], [blocks[0], blocks[0]]):
        with pytest.raises(ValueError, match="two or more different blocks"):
            merge_mlps(few)
    wider = find_blocks(build("llama", intermediate_size=64))
    with pytest.raises(ValueError, match=r"equal form.*\(48, 32\).*\(64, 32\)"):
        merge_mlps([blocks[0], wider[1]])
    with pytest.raises(ValueError, match="not among the captured"):
        merge_mlps(blocks, capture_units(model, blocks[:2], batches_for("llama"), progress=False))
    mixtral = build("mixtral")
    with pytest.raises(ValueError, match="neurons"):
        merge_mlps(find_blocks(mixtral))
