"""ReplaceMe: the map, its place in the output projection, and what is refused."""

import pytest
import torch
from conftest import noise
from decoding import logits
from layer_blocks import LAYERS, calibrated, deep, streams
from tiny_models import CAUSAL, HIDDEN, SINGLE, random_windows

from mlpreplace import NarrowMLP, Training, find_blocks, spliced
from mlpreplace.methods.calibration import Calibration
from mlpreplace.methods.replaceme import cosine_map, fused, least_squares_map, replaceme, replaceme_spans
from mlpreplace.replacements.splice import sparsity_of
from mlpreplace.replacements.whole_layers import without_layers
from mlpreplace.statistics.residual_stream import Span, capture_spans

FUSIBLE = [name for name in CAUSAL if name not in ("gemma2", "mixtral")]


def spans_of(model, span, windows, **options):
    options = dict(validation_windows=2, sample_windows=None, progress=False) | options
    return capture_spans(model, [span], windows, **options)[span]


@pytest.mark.parametrize("name", FUSIBLE)
def test_fused_equals_unfused(name):
    """In float64: T after the MLP, or inside of its output projection."""
    model, ids, span = deep(name), random_windows(2, 12), Span(2, 4)
    block = find_blocks(model)[1]
    t = torch.eye(HIDDEN).double() + noise(HIDDEN, HIDDEN) / 4
    removed = without_layers(model, span.layers)
    with spliced(model, {block: fused(block, t)} | removed):
        inside = logits(model, ids)
    handle = block.modules[-1].register_forward_hook(lambda module, args, output: output @ t)
    with spliced(model, removed):
        behind = logits(model, ids)
    handle.remove()
    torch.testing.assert_close(inside, behind, rtol=0, atol=1e-9)
    with spliced(model, removed):
        assert (logits(model, ids) - inside).abs().max() > 0.01


@pytest.mark.parametrize("name", FUSIBLE)
def test_a_planted_linear_layer_is_recovered(name):
    """Layer 2 adds M·A, with M what the MLP of layer 1 gave: the map is I + A, and the model without the layer is the model."""
    model, windows = deep(name), random_windows(14, 16)
    a, seen, block = 0.5 * noise(HIDDEN, HIDDEN, seed=1), {}, find_blocks(model)[1]

    def planted(module, args, kwargs, output):
        entering = args[0] if args else kwargs["hidden_states"]
        leaving = entering + seen["m"].reshape(entering.shape) @ a
        return (leaving, *output[1:]) if isinstance(output, tuple) else leaving

    # copied: a parallel layer adds its attention into it
    handles = [block.modules[-1].register_forward_hook(lambda module, args, output: seen.update(m=output.clone()))]
    handles.append(find_blocks(model)[2].host.register_forward_hook(planted, with_kwargs=True))
    s, ids = spans_of(model, Span(2, 3), windows), random_windows(2, 10, seed=3)
    exact = logits(model, ids)
    for handle in handles:
        handle.remove()
    t = least_squares_map(block, s.mlp, ridge=1e-13)
    torch.testing.assert_close(t, torch.eye(HIDDEN).double() + a, rtol=0, atol=1e-6)
    with spliced(model, {block: fused(block, t)} | without_layers(model, [2])):
        torch.testing.assert_close(logits(model, ids), exact, rtol=0, atol=1e-5)


def test_least_squares_is_that_of_the_stored_rows():
    model, windows, span = deep("llama"), random_windows(8, 12), Span(3, 5)
    s, block = spans_of(model, span, windows), find_blocks(model)[2]
    r, outputs = streams(model, windows[:6]), []
    handle = block.modules[-1].register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    logits(model, windows[:6])
    handle.remove()
    m = outputs[0].reshape(-1, HIDDEN)
    y = r[span.start] - m  # the stream before the MLP adds to it
    alpha = 0.01 * (m.T @ m).diagonal().mean()
    expected = torch.linalg.solve(m.T @ m + alpha * torch.eye(HIDDEN), m.T @ (r[span.stop] - y))
    torch.testing.assert_close(least_squares_map(block, s.mlp, 0.01), expected)


def test_each_objective_is_made_smaller():
    model, span = deep("llama"), Span(2, 4)
    s, block = spans_of(model, span, random_windows(22, 24)), find_blocks(model)[1]
    training = Training(loss="cosine", epochs=60, learning_rate=1e-2, check_tokens=4096)
    maps = {"identity": torch.eye(HIDDEN).double(), "least_squares": least_squares_map(block, s.mlp, 1e-9)}
    maps["cosine"], report = cosine_map(block, s, training, progress=False)
    m, y, target = s.mlp.train.x, s.stream.train.x - s.mlp.train.x, s.stream.train.x + s.stream.train.y
    squared = {name: (m @ t + y - target).square().sum().item() for name, t in maps.items()}
    cosine = {name: (1 - torch.cosine_similarity(m @ t + y, target, dim=-1)).mean().item() for name, t in maps.items()}
    assert min(squared, key=squared.get) == "least_squares" and max(squared, key=squared.get) == "identity"
    assert report.improved and cosine["cosine"] < 0.9 * cosine["identity"]


@pytest.mark.parametrize("objective", ["least_squares", "cosine"])
def test_a_plan_adds_no_parameter(objective):
    model = deep("llama")
    calibration = calibrated(model, (0.3,), ["replaceme"])
    plan = replaceme(model, calibration, 0.3, objective=objective)
    spans = [span for (span,) in replaceme_spans(model, calibration.stream, 0.3)]
    (span,) = [span for span in spans if {b.layer for b in plan if b.kind != "mlp"} == set(span.layers)]
    assert sparsity_of(model, plan) == pytest.approx(2 / LAYERS)
    (mlp,) = (b for b in plan if b.kind == "mlp")
    assert mlp.layer == span.start - 1 and plan[mlp].family == NarrowMLP(mlp.intermediate_size)
    assert (plan[mlp].report.training is not None) == (objective == "cosine")


def test_a_map_beats_none():
    model, ids = deep("llama"), random_windows(12, 16, seed=1)
    calibration = calibrated(model, (0.3,), ["replaceme"], random_windows(14, 16, seed=1))
    fused_plan = replaceme(model, calibration, 0.3)
    gone = sorted({b.layer for b in fused_plan if b.kind != "mlp"})
    span = Span(gone[0], gone[-1] + 1)
    dense, errors = streams(model, ids)[span.stop], []
    for plan in (fused_plan, without_layers(model, span.layers)):
        with spliced(model, plan):
            errors.append((streams(model, ids)[span.stop] - dense).norm())
    assert errors[0] < 0.9 * errors[1]


def test_errors():
    model = deep("llama")
    calibration = calibrated(model, (0.3,), ["replaceme"])
    with pytest.raises(ValueError, match="Unknown objective 'l1'; expected one of least_squares, cosine"):
        replaceme(model, calibration, 0.3, objective="l1")
    with pytest.raises(ValueError, match="loss='cosine', got 'mse'"):
        replaceme(model, calibration, 0.3, objective="cosine", training=Training())
    with pytest.raises(ValueError, match="were not captured as a span"):
        replaceme(model, Calibration(calibration.stream), 0.3)
    with pytest.raises(ValueError, match="cannot be reached"):
        replaceme(model, calibration, 0.97)
    few = calibrated(model, (0.3,), ["replaceme"], validation_windows=0, sample_windows=4, blocks={})
    with pytest.raises(ValueError, match=r"mlp: the cosine map is trained on sampled tokens"):
        replaceme(model, few, 0.3, objective="cosine")


@pytest.mark.parametrize("name, reason", [("gemma2", "a norm stands between"), ("mixtral", "no up/down MLP")])
def test_an_mlp_that_no_map_can_be_fused_into(name, reason):
    assert name in SINGLE
    model = deep(name)
    calibration = calibrated(model, (0.3,), ["replaceme"])
    with pytest.raises(ValueError, match=rf"model\.layers\.\d\.mlp.*{reason}"):
        replaceme(model, calibration, 0.3)
