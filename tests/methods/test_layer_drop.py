"""ShortGPT and UIDL: which layers go, and what their bypass is fitted to."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from layer_blocks import LAYERS, calibrated, deep, streams
from tiny_models import CAUSAL, HIDDEN, SINGLE, random_windows

from mlpreplace import Linear, LowRank, compare, spliced
from mlpreplace.methods import METHODS
from mlpreplace.methods.calibration import Calibration
from mlpreplace.methods.layer_drop import RIDGES, drop, least_sets, nearest_ends, runs
from mlpreplace.methods.shortgpt import shortgpt, shortgpt_spans
from mlpreplace.methods.uidl import uidl, uidl_spans
from mlpreplace.models.layers import layer_parameters
from mlpreplace.replacements.splice import sparsity_of
from mlpreplace.replacements.whole_layers import Removed
from mlpreplace.statistics.residual_stream import Span, StreamStatistics, capture_spans, capture_stream


def stream_of(distance: torch.Tensor) -> StreamStatistics:
    return StreamStatistics(1, distance, distance / 2, {}, {})


def influences(*values: float) -> StreamStatistics:
    """A stream whose layers have these Block Influences."""
    distance = torch.ones(len(values) + 1, len(values) + 1)
    distance.diagonal(1).copy_(torch.tensor(values))
    return stream_of(distance)


def test_runs_of_adjacent_layers():
    assert runs([6, 3, 5]) == [Span(3, 4), Span(5, 7)]
    assert runs(range(4)) == [Span(0, 4)] and runs([]) == []


def test_shortgpt_drops_the_layers_of_least_influence():
    model, stream = deep("llama"), influences(0.9, 0.1, 0.5, 0.2, 0.3, 0.8)
    dropped = [sorted(b.layer for b in shortgpt(model, Calibration(stream), n / LAYERS) if b.kind == "layer") for n in (1, 2, 3)]
    assert dropped == [[1], [1, 3], [1, 3, 4]]
    assert shortgpt_spans(model, stream, 0.5)[0] == [Span(1, 2), Span(3, 5)]


def test_uidl_drops_the_span_between_the_nearest_ends():
    distance = torch.ones(LAYERS + 1, LAYERS + 1)
    distance[2, 4], distance[1, 4], distance[3, 6] = 0.3, 0.2, 0.4
    model, calibration = deep("llama"), Calibration(stream_of(distance))
    assert sorted({b.layer for b in uidl(model, calibration, 2 / LAYERS)}) == [2, 3]
    assert sorted({b.layer for b in uidl(model, calibration, 3 / LAYERS)}) == [1, 2, 3]
    assert nearest_ends(distance, 3) == [Span(1, 4), Span(3, 6), Span(0, 3)]
    assert nearest_ends(distance, 3, first=2) == [Span(3, 6), Span(2, 5)]
    with pytest.raises(ValueError, match="no span of 6 layers from layer 1 on in a model of 6"):
        nearest_ends(distance, 6, first=1)


@pytest.mark.parametrize("n", range(1, 8))
def test_the_sets_of_least_total_are_those_of_all(n):
    values = torch.rand(8, generator=torch.Generator().manual_seed(n))
    every = sorted(combinations(range(8), n), key=lambda layers: values[list(layers)].sum())
    assert [tuple(sorted(layers)) for layers in least_sets(values, n)] == every[:3]


@pytest.mark.parametrize(("method", "spans"), [(shortgpt, shortgpt_spans), (uidl, uidl_spans)])
@pytest.mark.parametrize("bypass", [None, Linear()])
def test_the_validation_windows_choose_layers_and_ridge(method, spans, bypass):
    name = f"{method.__name__}_linear" if bypass else method.__name__
    model = deep("llama")
    known = calibrated(model, (0.5,), [name])
    tried = product(spans(model, known.stream, 0.5, bypass=bypass), RIDGES if bypass else RIDGES[:1])
    plans = [drop(model, known, chosen, bypass, ridge=ridge) for chosen, ridge in tried]
    divergences = [m.mean_kl for m in compare(model, dict(enumerate(plans)), known.validation).values()]
    found = compare(model, {0: method(model, known, 0.5, bypass=bypass)}, known.validation)[0].mean_kl
    assert found == min(divergences) < max(divergences)
    first = drop(model, known, spans(model, known.stream, 0.5, bypass=bypass)[0], bypass)
    blind = method(model, replace(known, validation=None), 0.5, bypass=bypass)
    assert {b.name for b in blind} == {b.name for b in first}


def test_a_ridge_that_the_moments_are_too_poor_for_is_left_out():
    """Rounding leaves moments of few tokens short of positive definite; the ridges above it are still tried."""
    model, name = deep("llama"), "shortgpt_linear"
    known = calibrated(model, (0.5,), [name])
    for s in known.spans.values():
        c = s.stream.xx - torch.outer(s.stream.sum_x, s.stream.sum_x) / s.stream.tokens
        below = torch.linalg.eigvalsh(c)[0] + 1e-5 * c.diagonal().mean()
        s.stream.xx = s.stream.xx - below * torch.eye(HIDDEN)
    spans = shortgpt_spans(model, known.stream, 0.5, bypass=Linear())
    plans = [drop(model, known, chosen, Linear(), ridge=r) for chosen, r in product(spans, RIDGES) if r > 1e-5]
    divergences = [m.mean_kl for m in compare(model, dict(enumerate(plans)), known.validation).values()]
    found = compare(model, {0: METHODS[name](model, known, 0.5)}, known.validation)[0].mean_kl
    assert found == min(divergences)
    with pytest.raises(ValueError, match="moments are singular"):
        drop(model, known, spans[0], Linear(), ridge=1e-6)
    for s in known.spans.values():
        s.stream.xx = s.stream.xx - 0.5 * s.stream.xx.diagonal().mean() * torch.eye(HIDDEN)
    with pytest.raises(ValueError, match="moments are singular"):
        METHODS[name](model, known, 0.5)


@pytest.mark.parametrize("target", [0.05, 0.2, 0.3, 0.45, 0.7, 0.9])
def test_the_number_of_layers_is_the_nearest(target):
    model, stream = deep("llama"), influences(0.9, 0.1, 0.5, 0.2, 0.3, 0.8)
    for method in (shortgpt, uidl):
        achieved = sparsity_of(model, method(model, Calibration(stream), target))
        possible = [n / LAYERS for n in range(1, LAYERS)]
        assert achieved == pytest.approx(min(possible, key=lambda s: abs(s - target)))


@pytest.mark.parametrize("bypass", [Linear(), LowRank(3)])
@pytest.mark.parametrize("method, spans", [(shortgpt, shortgpt_spans), (uidl, uidl_spans)])
def test_bypasses_count(method, spans, bypass):
    """Each run has one, in its first layer."""
    model, windows = deep("llama"), random_windows(10, 16)
    stream, weights = capture_stream(model, windows, progress=False), layer_parameters(model)
    for target in (0.3, 0.5, 0.7):
        removed = spans(model, stream, target, bypass=bypass)[0]
        of_spans = capture_spans(model, removed, windows, progress=False)
        plan = method(model, Calibration(stream, of_spans), target, bypass=bypass)
        standing = {b: r for b, r in plan.items() if r.family == bypass}
        assert sorted(b.layer for b in standing) == [span.start for span in removed]
        assert {r.family for b, r in plan.items() if b not in standing} == {Removed()}
        saved = sum(weights[i] for span in removed for i in span.layers) - sum(bypass.n_params(b) for b in standing)
        assert sparsity_of(model, plan) == pytest.approx(saved / sum(weights))
        assert abs(sparsity_of(model, plan) - target) < 0.6 / LAYERS


@pytest.mark.parametrize("name", CAUSAL)
def test_a_bypass_brings_the_stream_nearer(name):
    """On the calibration's own tokens least squares beats the stream left as it is, and with few tokens it is exact."""
    model, span, ridge = deep(name), Span(2, 5), 1e-5 if name in SINGLE else 1e-9
    for n, seq_len, most in ((20, 16, 0.95), (4, 8, 1e-2)):
        windows = random_windows(n, seq_len, seed=2)
        calibration = Calibration(spans=capture_spans(model, [span], windows, validation_windows=1, progress=False))
        dense, errors = streams(model, windows[:-1])[span.stop], []
        for bypass in (None, Linear()):
            with spliced(model, drop(model, calibration, [span], bypass, ridge=ridge)):
                errors.append((streams(model, windows[:-1])[span.stop] - dense).norm())
        assert errors[1] < most * errors[0]


def test_a_planted_linear_span_is_recovered():
    """Layers that are linear maps of the stream: the bypass is the product of the maps."""
    model = deep("llama")
    g = torch.Generator().manual_seed(0)
    maps = [torch.eye(HIDDEN).double() + 0.3 * torch.randn(HIDDEN, HIDDEN, generator=g).double() for _ in range(2)]
    for layer, a in zip((2, 3), maps, strict=True):
        model.model.layers[layer].register_forward_hook(lambda m, args, output, a=a: args[0] @ a)
    span, windows = Span(2, 4), random_windows(14, 16)
    calibration = Calibration(spans=capture_spans(model, [span], windows, validation_windows=2, progress=False))
    plan = drop(model, calibration, [span], Linear(), ridge=1e-12)
    stand_in = next(r for r in plan.values() if r.family == Linear())
    torch.testing.assert_close(stand_in.body.weight.T + torch.eye(HIDDEN), maps[0] @ maps[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(stand_in.body.bias, torch.zeros(HIDDEN).double(), rtol=0, atol=1e-5)


def test_errors():
    model, stream = deep("llama"), influences(*[0.5] * LAYERS)
    for method in (shortgpt, uidl):
        for wrong in (0, 1, -0.1, 25):
            with pytest.raises(ValueError, match=f"0 < sparsity < 1, got {wrong}"):
                method(model, Calibration(stream), wrong)
        with pytest.raises(ValueError, match="sparsity=0.95 cannot be reached: without all layers but one it would be 0.833"):
            method(model, Calibration(stream), 0.95)
        with pytest.raises(ValueError, match="stream was not captured"):
            method(model, Calibration(), 0.3)
        with pytest.raises(ValueError, match="of another model: it passes 6 layers, LlamaForCausalLM has 3"):
            method(deep("llama", layers=3), Calibration(stream), 0.3)
        with pytest.raises(ValueError, match="were not captured as a span"):
            method(model, Calibration(stream), 0.3, bypass=Linear())
        with pytest.raises(ValueError, match="one layer has none to remove"):
            method(deep("llama", layers=1), Calibration(influences(0.5)), 0.3)
