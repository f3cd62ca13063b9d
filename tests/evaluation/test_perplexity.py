"""Perplexity and KL against direct float64 computations, intervals on planted data."""

from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import capture_quietly, fail_after
from tiny_models import CAUSAL, build, random_windows
from torch import nn

from mlpreplace import Mean, NarrowMLP, compare, find_blocks, fit, perplexity, spliced
from mlpreplace.evaluation.perplexity import Measurement, bootstrap, kl_divergence, perplexity_ratio


def log_probabilities(model, windows) -> torch.Tensor:
    """float64 log-probabilities of every next token, [windows, seq_len - 1, vocab]."""
    with torch.no_grad():
        return model(windows).logits[:, :-1].double().log_softmax(-1)


def direct(model, windows, dense=None) -> tuple[np.ndarray, np.ndarray]:
    """(negative log-likelihood, KL to ``dense`` log-probabilities), summed per window."""
    q = log_probabilities(model, windows)
    nll = -q.gather(-1, windows[:, 1:, None]).squeeze(-1).sum(1)
    kl = torch.zeros_like(nll) if dense is None else (dense.exp() * (dense - q)).sum((1, 2))
    return nll.numpy(), kl.numpy()


def measured(model, plans, windows, **options):
    return compare(model, plans, windows, **{"progress": False, "batch_size": 3} | options)


def forwards_of(model) -> dict[str, object]:
    """Every forward that an instance has of its own instead of its class's."""
    return {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.fixture
def heldout():
    return random_windows(7, seed=5)


@pytest.fixture
def plans(captured):
    """Each block alone, all together, and nothing."""
    _, blocks, stats = captured
    alone = {b.layer: {b: fit(b, stats, NarrowMLP(24))} for b in blocks}
    return alone | {"all": {b: r for plan in alone.values() for b, r in plan.items()}, "dense": {}}


@pytest.mark.parametrize("name", CAUSAL)
def test_perplexity_is_the_exponential_of_the_mean_cross_entropy(name, heldout):
    model = build(name)
    estimate = perplexity(model, heldout, batch_size=3, progress=False)
    nll, _ = direct(model, heldout)
    assert estimate.tokens == 7 * 11
    assert estimate.value == pytest.approx(np.exp(nll.sum() / estimate.tokens), rel=1e-4)
    assert estimate.low < estimate.value < estimate.high
    assert float(estimate) == estimate.value


def test_perplexity_is_weighted_by_tokens():
    m = Measurement(nll=np.array([10.0, 90.0]), tokens=np.array([10, 30]))
    assert m.perplexity == pytest.approx(np.exp(100 / 40))
    assert m.n_tokens == 40


def test_perplexity_of_a_spliced_model_is_that_of_the_plan(llama, plans, heldout):
    with spliced(llama, plans["all"]):
        inside = perplexity(llama, heldout, progress=False)
    assert inside.value == pytest.approx(measured(llama, plans, heldout)["all"].perplexity, rel=1e-5)


def test_an_empty_plan_is_the_dense_model(llama, plans, heldout):
    got = measured(llama, plans, heldout)
    dense = measured(llama, {"again": {}}, heldout, batch_size=7)["again"]
    nll, _ = direct(llama, heldout)
    assert np.allclose(got["dense"].nll, nll, rtol=1e-5)
    assert np.allclose(dense.nll, nll, rtol=1e-5)
    ratio = perplexity_ratio(got["dense"], got["dense"])
    assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    assert got["dense"].mean_kl == 0


def test_the_identity_has_no_divergence(captured, heldout):
    model, blocks, stats = captured
    plan = {b: fit(b, stats, NarrowMLP(b.intermediate_size)) for b in blocks}
    got = measured(model, {"same": plan, "dense": {}}, heldout)
    assert abs(got["same"].mean_kl) < 1e-5
    assert perplexity_ratio(got["same"], got["dense"]).value == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_batch_size_changes_nothing(batch_size, llama, plans, heldout):
    one, other = measured(llama, plans, heldout), measured(llama, plans, heldout, batch_size=batch_size)
    for label in plans:
        assert np.allclose(one[label].nll, other[label].nll, rtol=1e-5)
        assert np.allclose(one[label].kl, other[label].kl, rtol=1e-3, atol=1e-5)


def test_without_kl_there_is_none(llama, plans, heldout):
    got = measured(llama, plans, heldout, kl=False)[0]
    assert got.kl is None
    with pytest.raises(ValueError, match="No KL divergence"):
        _ = got.mean_kl


def test_dropout_is_off_and_the_training_mode_returns(gpt2, heldout):
    dense = perplexity(gpt2, heldout, progress=False)
    gpt2.train()
    gpt2.transformer.h[1].eval()  # someone froze it
    before = [m.training for m in gpt2.modules()]
    assert perplexity(gpt2, heldout, progress=False) == dense
    assert [m.training for m in gpt2.modules()] == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_model_is_left_as_it_was(name, heldout):
    model = build(name)
    blocks, stats = capture_quietly(model, random_windows())
    modules = dict(model.named_modules())
    measured(model, {b.layer: {b: fit(b, stats, Mean())} for b in blocks}, heldout)
    assert forwards_of(model) == {}
    assert all(module is modules[n] for n, module in model.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_a_layer_had_of_its_own_returns(llama, plans, heldout):
    """Libraries that place layers on devices give them one."""
    layer = llama.model.layers[0]
    original = layer.forward
    layer.forward = own = lambda *args, **kwargs: original(*args, **kwargs)
    measured(llama, plans, heldout)
    assert forwards_of(llama) == {"model.layers.0": own}


def test_an_exception_leaves_the_model_as_it_was(llama, plans, heldout, monkeypatch):
    modules = dict(llama.named_modules())
    llama.train()
    small = plans["all"][find_blocks(llama)[2]]
    monkeypatch.setattr(small.body, "forward", fail_after(0, None, RuntimeError("in the replacement")))
    with pytest.raises(RuntimeError, match="in the replacement"):
        measured(llama, {2: plans[2]}, heldout)
    assert forwards_of(llama) == {}
    assert all(module is modules[n] for n, module in llama.named_modules())
    assert llama.training


# intervals


def random_measurements(windows: int, seed: int = 0) -> tuple[Measurement, Measurement]:
    """(model, dense): windows differ much from each other, and little between the two models."""
    rng = np.random.default_rng(seed)
    tokens = np.full(windows, 100)
    dense = rng.normal(300, 60, windows)
    kl = rng.gamma(2, 5, windows)
    return Measurement(dense + kl + rng.normal(0, 5, windows), tokens, kl), Measurement(dense, tokens)


@pytest.mark.parametrize("estimate", [perplexity_ratio, lambda model, dense: kl_divergence(model)])
def test_the_interval_holds_the_value_and_shrinks(estimate):
    few, many = (estimate(*random_measurements(windows)) for windows in (16, 400))
    for e in (few, many):
        assert e.low < e.value < e.high
    assert many.high - many.low < (few.high - few.low) / 3


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Mean difference 0.1 nats a token by construction: about 95 % of the intervals hold it."""
    hits = 0
    for seed in range(100):
        model, dense = random_measurements(48, seed)
        estimate = perplexity_ratio(model, dense)
        hits += estimate.low <= np.exp(0.1) <= estimate.high
    assert 86 <= hits <= 100


def test_the_interval_is_paired():
    """A model that is worse by the same amount everywhere has no uncertainty, however much windows differ."""
    model, dense = random_measurements(16)
    shifted = Measurement(dense.nll + 0.2 * dense.tokens, dense.tokens)
    ratio = perplexity_ratio(shifted, dense)
    assert [ratio.low, ratio.value, ratio.high] == pytest.approx([np.exp(0.2)] * 3)


def test_the_interval_depends_on_the_seed_alone():
    model, dense = random_measurements(16)
    assert perplexity_ratio(model, dense, seed=1) == perplexity_ratio(model, dense, seed=1)
    assert perplexity_ratio(model, dense, seed=1).low != perplexity_ratio(model, dense, seed=2).low


def test_the_bootstrap_is_that_of_the_mean():
    """Of a mean the interval is known: ± 1.96 standard errors."""
    sample = np.random.default_rng(1).normal(size=200)
    low, high = bootstrap(lambda draws: sample[draws].mean(1), len(sample), seed=0)
    error = sample.std() / np.sqrt(len(sample))
    assert [low, high] == pytest.approx([sample.mean() - 1.96 * error, sample.mean() + 1.96 * error], abs=0.2 * error)


def test_one_window_has_no_interval():
    estimate = perplexity_ratio(*random_measurements(1))
    assert np.isfinite(estimate.value)
    assert np.isnan([estimate.low, estimate.high]).all()


def test_measurements_of_different_windows_are_not_compared():
    (model, _), (_, dense) = random_measurements(8), random_measurements(9)
    with pytest.raises(ValueError, match="not of the same windows"):
        perplexity_ratio(model, dense)


# input and cache


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (random_windows().float(), "Expected token ids"),
        (random_windows(2, 65), "longer than the model's context"),
        (random_windows() + 100, "outside the model's vocabulary"),
        (random_windows(2, 1), "a prediction needs a token before it"),
    ],
)
def test_windows_the_model_cannot_read(windows, message, llama):
    with pytest.raises(ValueError, match=message):
        perplexity(llama, windows)


def test_a_plan_for_another_model_is_refused(llama, heldout):
    other = build("gpt2")
    blocks, stats = capture_quietly(other, random_windows())
    with pytest.raises(ValueError, match="plan is for another model"):
        measured(llama, {"other": {blocks[0]: fit(blocks[0], stats, Mean())}}, heldout)


@pytest.mark.parametrize("kl", [True, False])
def test_a_cached_measurement_runs_no_model(kl, llama, plans, heldout, results, monkeypatch):
    plain = measured(llama, plans, heldout, kl=kl)
    first = measured(llama, plans, heldout, kl=kl, cached=True)
    assert len(list(results.iterdir())) == len(plans) * 3, "a file for each plan and batch"
    monkeypatch.setattr(nn.functional, "embedding", fail_after(0, None, AssertionError("the model ran")))
    second = measured(llama, dict(reversed(plans.items())), heldout, kl=kl, cached=True)
    assert list(second) == list(reversed(plans))
    for label in plans:
        for other in (first[label], second[label]):
            assert np.array_equal(plain[label].nll, other.nll)
            assert np.array_equal(plain[label].tokens, other.tokens)
            assert (other.kl is None) == (not kl)
            assert not kl or np.array_equal(plain[label].kl, other.kl)


def test_only_missing_plans_run(llama, plans, heldout, results, monkeypatch):
    measured(llama, {label: plans[label] for label in (0, 1)}, heldout, cached=True)
    ran = swept(monkeypatch)
    got = measured(llama, plans, heldout, cached=True)
    assert ran == [(n, len(plans) - 2) for n in (3, 3, 1)]
    assert list(got) == list(plans)


def test_an_interrupted_measurement_goes_on_at_its_next_batch(llama, plans, heldout, results, monkeypatch):
    whole = measured(llama, plans, heldout)
    embedding, steps = nn.functional.embedding, len(plans)
    monkeypatch.setattr(nn.functional, "embedding", fail_after(steps + 1, embedding, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        measured(llama, plans, heldout, cached=True)
    monkeypatch.setattr(nn.functional, "embedding", embedding)
    ran = swept(monkeypatch)
    got = measured(llama, plans, heldout, cached=True)
    assert ran == [(3, len(plans)), (1, len(plans))]
    assert all(np.array_equal(got[label].kl, whole[label].kl) for label in plans)


def swept(monkeypatch) -> list[tuple[int, int]]:
    """(windows, plans) of every batch that is swept from here on."""
    ran, module = [], import_module("mlpreplace.evaluation.perplexity")  # its room has a function of that name
    sweep = module.sweep

    def spy(model, batches, **options):
        ran.extend((len(ids), len(of_batch)) for ids, of_batch in batches)
        return sweep(model, batches, **options)

    monkeypatch.setattr(module, "sweep", spy)
    return ran


@pytest.mark.parametrize("change", ["weights", "windows", "replacement", "batch_size", "kl"])
def test_a_cached_measurement_is_not_used_for_something_else(change, llama, plans, heldout, results, monkeypatch):
    measured(llama, {1: plans[1]}, heldout, cached=True)
    options = {"batch_size": {"batch_size": 2}, "kl": {"kl": False}}.get(change, {})
    if change == "weights":
        llama.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    if change == "windows":
        heldout = random_windows(7, seed=6)
    if change == "replacement":
        next(iter(plans[1].values())).body.down.weight.data[0, 0] += 1
    monkeypatch.setattr(nn.functional, "embedding", fail_after(0, None, AssertionError("the model ran")))
    with pytest.raises(AssertionError, match="the model ran"):
        measured(llama, {1: plans[1]}, heldout, cached=True, **options)
