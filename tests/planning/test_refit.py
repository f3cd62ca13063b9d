"""Refitting: against the optimality of what it solves, and the model left as it was."""

import pytest
import torch
from conftest import captured_whole
from hybrid_blocks import HYBRIDS, shaken
from refitted import MIXED, fitted_plan, left, same, slopes, stream_error
from tiny_models import CAUSAL, random_windows

from mlpreplace import (
    ConvMLP,
    Mean,
    NarrowMLP,
    NarrowPlusLinear,
    find_blocks,
    fit,
)
from mlpreplace.planning.read_out import ReadOut, Regression
from mlpreplace.planning.refit import RIDGES, refit
from mlpreplace.planning.refit_layer import TARGETS
from mlpreplace.replacements.families import Replacement


@MIXED
@pytest.mark.parametrize("name, towards", [(n, t) for n in CAUSAL for t in TARGETS if (n, t) != ("gemma2", "stream")])
def test_after_it_no_other_output_weights_are_better(name, towards, families):
    """In no block, with those before it refitted. (Gemma 2 has a norm before the stream: a first-order answer.)"""
    windows = random_windows()
    model, plan = fitted_plan(name, *families)
    new = refit(model, plan, windows, towards=towards, ridge=1e-10, batch_size=3, progress=False).plan
    before, after = slopes(model, plan, windows, towards), slopes(model, new, windows, towards)
    tolerance = 1e-2 if name == "mixtral" else 1e-5  # in float32
    assert all(a < tolerance * b for a, b in zip(after, before, strict=True))


@MIXED
@pytest.mark.parametrize("name", CAUSAL)
def test_towards_the_stream_its_error_is_lowest_on_fitted_tokens(name, families):
    windows = random_windows()
    model, plan = fitted_plan(name, *families)
    refitted = {t: refit(model, plan, windows, towards=t, progress=False).plan for t in TARGETS}
    error = {label: stream_error(model, p, windows) for label, p in {"before": plan, **refitted}.items()}
    assert error["stream"] < min(error["before"], error["output"]), error


@pytest.mark.parametrize("towards", TARGETS)
@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "mixtral"])
def test_exact_replicas_stay_as_they_are(name, towards):
    model, plan = fitted_plan(name, NarrowMLP(48))
    new = refit(model, plan, random_windows(seed=3), towards=towards, progress=False).plan
    for block, r in plan.items():
        for a, b in zip(r.parameters(), new[block].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("towards", TARGETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_the_records_hold_the_error_before_and_after(name, towards):
    """Mean squared error of a token in the target, in front of which all earlier blocks are refitted."""
    windows = random_windows()
    model, plan = fitted_plan(name, NarrowMLP(12), NarrowPlusLinear(8, 4), Mean())
    new, records = refit(model, plan, windows, towards=towards, batch_size=3, progress=False)
    assert [(record["block"], record["layer"]) for record in records] == [(block.name, block.layer) for block in plan]
    present = dict(plan)
    for record, block in zip(records, plan, strict=True):
        (dense,) = left(model, {}, [block], windows, towards)
        for key in ("error", "error_left"):
            (got,) = left(model, present, [block], windows, towards)
            assert record[key] == pytest.approx((got - dense).square().sum(-1).mean().item(), rel=1e-6)
            present[block] = new[block]
        assert record["error_left"] < record["error"]


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_regression_is_least_squares_with_a_ridge_that_grows_with_the_root_of_a_features_moment(has_bias):
    """A dead feature does not matter. The reference solves for all weights and the bias at once, without moments."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(50, 6, generator=g, dtype=torch.float64) * torch.tensor([1e-3, 0.1, 1, 10, 30, 0]) + 0.5 * has_bias
    f[:, -1] = 0
    e = torch.randn(50, 4, generator=g, dtype=torch.float64)
    weight = torch.rand(50, 1, generator=g, dtype=torch.float64)
    before = torch.randn(4, 6, generator=g, dtype=torch.float64)
    weights, bias = torch.nn.Parameter(before.clone()), torch.nn.Parameter(torch.zeros(4).double()) if has_bias else None
    regression = Regression()
    for rows in torch.arange(50).split(20):
        regression.add(f[rows], e[rows], weight[rows])
    with torch.no_grad():
        regression.solve(None, ReadOut(None, (weights,), bias), [0.3])
    mean = (weight * f).sum(0) / weight.sum() if has_bias else torch.zeros(6)
    deviation = (weight * (f - mean).square()).sum(0).sqrt()
    root = weight.sqrt()
    columns = torch.cat([root * f, root], 1)[:, : 6 + has_bias]
    ridge = torch.zeros(6, columns.shape[1], dtype=torch.float64)
    ridge[:, :6] = (0.3 * deviation.mean() * deviation).sqrt().diag()
    rows, goal = torch.cat([columns, ridge]), torch.cat([root * e, torch.zeros(6, 4)])
    expected = torch.linalg.pinv(rows) @ goal
    assert torch.allclose(weights - before, expected[:6].T, atol=1e-10)
    assert bias is None or torch.allclose(bias, expected[6], atol=1e-10)


def test_a_later_block_corrects_an_earlier_one():
    """Block 0 is a replica that adds a constant to what it should give, and no family that is refitted. Layer 1 gives
    nothing in the dense model: a fit by itself, or towards the block's output, sees nothing to do there.
    """
    windows = random_windows()
    model, _ = fitted_plan("gpt2", Mean())
    for module in (model.transformer.h[1].attn.c_proj, model.transformer.h[1].mlp.c_proj):
        module.weight.data.zero_()
        module.bias.data.zero_()
    blocks, stats = captured_whole(model, windows)
    plan = {blocks[0]: fit(blocks[0], stats, ConvMLP(48)), blocks[1]: fit(blocks[1], stats, Mean())}
    assert stream_error(model, plan, windows) < 1e-20
    plan[blocks[0]].body.mlp.down.bias += 1
    refitted = {towards: refit(model, plan, windows, towards=towards, progress=False).plan for towards in TARGETS}
    error = {towards: stream_error(model, new, windows) for towards, new in refitted.items()}
    assert stream_error(model, plan, windows) > 1e-2
    assert error["output"] > 1e-2
    assert error["stream"] < 1e-20


@pytest.mark.parametrize("family", HYBRIDS, ids=lambda family: type(family).__name__)
def test_hybrids_are_left_and_what_follows_is_fitted_to_them(family):
    windows = random_windows()
    model, plan = fitted_plan("llama", family, NarrowMLP(12))
    first = next(iter(plan))
    shaken(plan[first])
    new = refit(model, plan, windows, ridge=1e-10, progress=False).plan
    assert same({first: plan[first]}, new)
    assert all(a < 1e-5 * b for a, b in zip(slopes(model, new, windows), slopes(model, plan, windows), strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon"])
def test_attention_is_left_and_corrected_for(name):
    windows = random_windows()
    model, plan = fitted_plan(name, NarrowMLP(12))
    without = {b: Replacement(Mean(), b) for b in find_blocks(model, "attention")[:2]}
    new = refit(model, without | plan, windows, ridge=1e-10, progress=False).plan
    assert same(without, new)
    before, after = slopes(model, without | plan, windows), slopes(model, new, windows)
    assert all(a < 1e-5 * b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_the_batch_size_does_not_matter(name):
    model, plan = fitted_plan(name, NarrowPlusLinear(8, 4))
    one, other = (refit(model, plan, random_windows(7), batch_size=n, progress=False).plan for n in (3, 7))
    for block in plan:
        for a, b in zip(one[block].parameters(), other[block].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-8)


def test_more_ridge_stays_nearer_to_the_first_fit():
    model, plan = fitted_plan("llama", NarrowMLP(12))

    def moved(ridge):
        new = refit(model, plan, random_windows(), ridge=ridge, progress=False).plan
        return [(new[b].body.down.weight - r.body.down.weight).norm().item() for b, r in plan.items()]

    little, more, most = moved(1e-2), moved(1.0), moved(1e12)
    assert all(a > b for a, b in zip(little, more, strict=True))
    assert max(most) < 1e-9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_validation_windows_choose_the_ridge_of_least_error_there(name):
    model, plan = fitted_plan(name, NarrowMLP(12))
    block, windows, unseen = next(iter(plan)), random_windows(4, 10, seed=5), random_windows(8, 10, seed=6)
    alone = {block: plan[block]}

    @torch.no_grad()
    def error(of) -> float:
        (dense,), (got,) = left(model, {}, [block], unseen), left(model, of, [block], unseen)
        return (got - dense).square().sum().item()

    errors = {None: error(alone)}
    errors |= {ridge: error(refit(model, alone, windows, ridge=ridge, progress=False).plan) for ridge in RIDGES}
    chosen, (record,) = refit(model, alone, windows, validation=unseen, progress=False)
    assert record["ridge"] == min(errors, key=errors.__getitem__)
    assert error(chosen) == pytest.approx(min(errors.values()), rel=1e-6)


def test_what_validation_windows_do_not_want_stays():
    """Windows of a single token, fitted nearly without ridge, say nothing about others."""
    model, plan = fitted_plan("llama", NarrowMLP(12))
    again, records = refit(
        model, plan, random_windows(1, 2), validation=random_windows(8, 10, seed=6), ridge=1e-3, progress=False
    )
    stayed = [b for b, record in zip(plan, records, strict=True) if record["ridge"] is None]
    assert stayed and same({b: plan[b] for b in stayed}, again)
    assert all(record["error_left"] == record["error"] for record in records if record["ridge"] is None)


def test_half_precision_is_kept():
    windows = random_windows()
    model, plan = fitted_plan("llama", NarrowMLP(12))
    model.bfloat16()
    plan = {b: r.bfloat16() for b, r in plan.items()}
    new = refit(model, plan, windows, progress=False).plan
    assert {p.dtype for r in new.values() for p in r.parameters()} == {torch.bfloat16}
    assert stream_error(model, new, windows) < stream_error(model, plan, windows)
