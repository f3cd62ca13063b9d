"""LLM-Streamline: which layers the stand-in replaces, what it is trained to, what it is worth."""

import pytest
import torch
from attention_blocks import assert_alike
from decoding import decoded, logits
from layer_blocks import LAYERS, calibrated, deep, streams
from tiny_models import CAUSAL, random_windows

from mlpreplace import Training, TwoLayerMLP, splice, spliced
from mlpreplace.methods.calibration import Calibration
from mlpreplace.methods.streamline import _Layer, streamline, streamline_spans, trained_layer
from mlpreplace.models.layers import find_layers, find_parts
from mlpreplace.replacements.splice import sparsity_of
from mlpreplace.replacements.whole_layers import Removed, Tuned
from mlpreplace.statistics.residual_stream import Span, capture_spans

QUICK = Training(epochs=20, learning_rate=3e-3, batch_tokens=64, check_tokens=1024)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_copy_of_a_layer_is_the_layer(name):
    """Called with the masks and positions of one window it serves any number of them."""
    model, ids = deep(name), random_windows(3, 10)
    block = find_layers(model)[2]
    r = streams(model, ids).to(next(model.parameters()).dtype).unflatten(1, (3, 10))
    with torch.no_grad():
        added = _Layer(model, block, 10)(r[2])
    assert_alike(name, added, r[3] - r[2])
    assert not block.host._forward_pre_hooks


@pytest.mark.parametrize("name", CAUSAL)
def test_training_brings_the_stream_nearer(name):
    model, span = deep(name), Span(2, 4)
    windows = random_windows(14, 12, seed=2)
    s = capture_spans(model, [span], windows, validation_windows=4, sample_windows=None, progress=False)[span].stream
    plan = trained_layer(model, 2, s, QUICK, progress=False)
    report = next(r.report.training for r in plan.values() if r.report)
    assert report.improved and report.validation_curve[report.best_check] < report.validation_curve[0]
    assert sparsity_of(model, plan) == 0 and {r.family for r in plan.values()} == {Tuned()}
    (whole,), dense = ([b for b in find_layers(model) if b.layer == 2], streams(model, windows[10:]))
    with spliced(model, plan):
        present = streams(model, windows[10:])
    error = (present[3] - dense[4]).square().sum(-1).mean()
    relative = (error / s.train.y.double().square().sum(-1).mean()).item()  # to what it is over the fitted tokens
    assert relative == pytest.approx(report.validation_curve[report.best_check], rel=1e-3)
    assert all(module.training is False for module in whole.host.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "opt", "gemma2"])
@pytest.mark.parametrize("stand_in", ["layer", "mlp"])
def test_a_stand_in_decodes_with_the_cache(name, stand_in):
    model, ids = deep(name), random_windows(2, 12)
    calibration = calibrated(model, (0.3,), ["streamline_layer", "streamline_mlp"])
    plan = streamline(model, calibration, 0.3, stand_in=stand_in, training=QUICK)
    compressed = splice(model, plan)
    full = logits(compressed, ids)
    assert_alike(name, decoded(compressed, ids, 5), full)
    with torch.no_grad():
        cache = compressed(ids, use_cache=True).past_key_values
    empty = [i for i, layer in enumerate(cache.layers[:LAYERS]) if layer.keys.numel() == 0]
    assert empty == sorted(b.layer for b, r in plan.items() if b.kind == "attention")


def test_a_layer_replaces_one_more_than_it_removes():
    model = deep("llama")
    calibration = calibrated(model, (0.3, 0.5), ["streamline_layer"])
    for target, n in ((0.3, 2), (0.5, 3)):
        plan = streamline(model, calibration, target, training=QUICK)
        spans = [span for (span,) in streamline_spans(model, calibration.stream, target)]
        (span,) = [span for span in spans if {b.layer for b in plan} == set(span.layers)]
        assert len(span.layers) == n + 1 and sparsity_of(model, plan) == pytest.approx(n / LAYERS)
        assert {b.layer for b, r in plan.items() if r.family == Tuned()} == {span.start}
        assert {b.layer for b, r in plan.items() if r.family == Removed()} == set(span.layers[1:])
        assert {b for b, r in plan.items() if r.family == Tuned()} == set(find_parts(model, span.start))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.45, 0.6])
def test_an_mlp_takes_what_is_left(name, target):
    model = deep(name)
    calibration = calibrated(model, (target,), ["streamline_mlp"])
    plan = streamline(model, calibration, target, stand_in="mlp", training=QUICK)
    assert sparsity_of(model, plan) == pytest.approx(target, abs=0.004)
    (standing,) = (r for r in plan.values() if isinstance(r.family, TwoLayerMLP))
    assert standing.report.training is not None


def test_errors():
    model = deep("llama")
    calibration = calibrated(model, (0.3,), ["streamline_layer"])
    with pytest.raises(ValueError, match="Unknown stand-in 'conv'; expected one of layer, mlp"):
        streamline(model, calibration, 0.3, stand_in="conv")
    with pytest.raises(ValueError, match="were not captured as a span"):
        streamline(model, Calibration(calibration.stream), 0.3)
    for stand_in in ("layer", "mlp"):
        with pytest.raises(ValueError, match="sparsity=0.99 cannot be reached"):
            streamline(model, calibration, 0.99, stand_in=stand_in)
    span, windows = Span(1, 3), random_windows(6, 8)
    unsampled = capture_spans(model, [span], windows, validation_windows=0, progress=False)[span].stream
    with pytest.raises(ValueError, match="layers.1: training needs samples"):
        trained_layer(model, 1, unsampled)
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[0, :2] = False
    padded = capture_spans(model, [span], windows, mask, validation_windows=2, progress=False)[span].stream
    with pytest.raises(ValueError, match="layers.1: attention would read padding"):
        trained_layer(model, 1, padded)
