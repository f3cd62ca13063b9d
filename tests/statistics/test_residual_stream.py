"""Statistics of the residual stream against a direct computation; padding, streaming, samples, errors."""

import math

import pytest
import torch
from attention_blocks import precise
from layer_blocks import streams
from tiny_models import CAUSAL, HIDDEN, build, random_windows

from mlpreplace import find_blocks
from mlpreplace.statistics.residual_stream import Span, capture_spans, capture_stream

SPANS = [Span(0, 1), Span(1, 3)]


def quietly(model, windows, mask=None, **options):
    return capture_spans(model, SPANS, windows, mask, **dict(validation_windows=2, progress=False) | options)


@pytest.mark.parametrize("name", CAUSAL)
def test_distances_and_angles(name):
    model, ids = precise(name), random_windows(5, 9)
    r = streams(model, ids)  # [layers + 1, tokens, hidden]
    cosine = torch.nn.functional.cosine_similarity(r[:, None], r[None], dim=-1)  # [layers + 1, layers + 1, tokens]
    found = capture_stream(model, ids, batch_size=2, progress=False)
    assert found.tokens == 45 and found.layers == len(r) - 1
    torch.testing.assert_close(found.distance, 1 - cosine.mean(-1), rtol=0, atol=1e-6)
    last = cosine.clamp(-1, 1)[..., 8::9].arccos().mean(-1) / math.pi
    torch.testing.assert_close(found.angle, last, rtol=0, atol=1e-6)
    neighbours = [1 - cosine[i, i + 1].mean() for i in range(found.layers)]
    torch.testing.assert_close(found.influence, torch.stack(neighbours), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_magnitude_and_rotation(name):
    """What changes in the stream where a block gives nothing."""
    model, ids = precise(name), random_windows(3, 8)
    found = capture_stream(model, ids, progress=False)
    r = streams(model, ids)
    for layer, (attention, mlp) in enumerate(zip(find_blocks(model, "attention"), find_blocks(model), strict=True)):
        silent = [mlp.modules[-1].register_forward_hook(lambda m, a, output: torch.zeros_like(output))]
        middle = streams(model, ids)[layer + 1]  # r + attention
        silent.pop().remove()
        for block, before, after in ((attention, r[layer], middle), (mlp, middle, r[layer + 1])):
            a = after - before
            magnitude = (a.norm(dim=-1) / before.norm(dim=-1)).mean()
            rotation = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
            assert found.magnitude[block.name] == pytest.approx(magnitude.item(), rel=1e-4), block.name
            assert found.rotation[block.name] == pytest.approx(rotation.item(), rel=1e-4)


def test_spans_against_a_direct_computation():
    model, ids = build("llama").double(), random_windows(7, 6)
    r, mlp_outputs = streams(model, ids[:5]), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda m, a, output: mlp_outputs.append(output.detach()))
    with torch.no_grad():
        model(ids[:5])
    handle.remove()
    found = quietly(model, ids, sample_windows=3, batch_size=2)
    inputs = {Span(0, 1): [(found[Span(0, 1)].stream, r[0])]}
    inputs[Span(1, 3)] = [(found[Span(1, 3)].stream, r[1]), (found[Span(1, 3)].mlp, mlp_outputs[0].reshape(-1, HIDDEN))]
    assert found[Span(0, 1)].mlp is None
    for span, pairs in inputs.items():
        y = r[span.stop] - r[span.start]
        for s, x in pairs:
            assert s.tokens == 30
            for name, expected in {"xx": x.T @ x, "xy": x.T @ y, "sum_x": x.sum(0), "sum_y": y.sum(0)}.items():
                torch.testing.assert_close(getattr(s, name), expected)
            torch.testing.assert_close(s.train.x.reshape(-1, HIDDEN), x[:18])
            torch.testing.assert_close(s.train.y.reshape(-1, HIDDEN), y[:18])
            assert s.validation.x.shape == (2, 6, HIDDEN)
            energy = r[span.stop][:18].square().sum(-1).float().reshape(3, 6)
            torch.testing.assert_close(s.train.residual_energy, energy)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt", "falcon", "gpt2"])
def test_padding_changes_nothing(name, side):
    """Windows of different lengths, padded, give what each gives alone."""
    model = build(name).double()
    lengths, ids = [9, 5, 7, 3, 8, 6], random_windows(6, 9, seed=4)
    mask = torch.stack([torch.arange(9) < n for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    padded = quietly(model, ids, mask, batch_size=3)
    alone = [ids[i][mask[i]][None] for i in range(6)]
    padded_stream = capture_stream(model, ids, mask, batch_size=4, progress=False)
    of_each = [capture_stream(model, window, progress=False) for window in alone]
    for name in ("distance", "magnitude", "rotation"):
        values = [getattr(s, name) for s in (*of_each, padded_stream)]
        values = [v if isinstance(v, torch.Tensor) else torch.tensor(list(v.values()), dtype=torch.float64) for v in values]
        mean = sum(v * s.tokens for v, s in zip(values, of_each, strict=False)) / sum(lengths)
        torch.testing.assert_close(values[-1], mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded_stream.angle, sum(s.angle for s in of_each) / 6, rtol=1e-6, atol=1e-6)
    for span in SPANS:
        singles = [quietly(model, window, validation_windows=0)[span].stream for window in alone[:4]]
        for name in ("sum_x", "xx", "xy"):
            torch.testing.assert_close(
                getattr(padded[span].stream, name), sum(getattr(s, name) for s in singles), rtol=0, atol=1e-4
            )
        assert padded[span].stream.tokens == sum(lengths[:4])
        assert torch.equal(padded[span].stream.validation.mask, mask[4:])


def test_the_size_of_a_batch_does_not_matter(llama):
    ids = random_windows(7, 10)
    streamed = [capture_stream(llama, ids, batch_size=n, progress=False) for n in (1, 4)]
    torch.testing.assert_close(streamed[0].distance, streamed[1].distance, rtol=1e-5, atol=1e-6)
    one, four = (quietly(llama, ids, batch_size=n)[Span(1, 3)].mlp for n in (1, 4))
    torch.testing.assert_close(one.xy, four.xy, rtol=1e-4, atol=1e-4)


def test_results_are_kept(llama, results):
    ids = random_windows(6, 8)
    first, again = (capture_stream(llama, ids, cached=True, progress=False) for _ in range(2))
    assert torch.equal(first.distance, again.distance) and first.magnitude == again.magnitude
    one, two = (quietly(llama, ids, cached=True) for _ in range(2))
    assert len(list(results.iterdir())) == 2
    for span in SPANS:
        assert torch.equal(one[span].stream.xy, two[span].stream.xy)
        assert torch.equal(one[span].stream.validation.y, two[span].stream.validation.y)
        assert (one[span].mlp is None) == (two[span].mlp is None) == (span.start == 0)


def test_a_norm_behind_the_mlp_is_noticed(results):
    model, ids = build("gemma2"), random_windows(6, 8)
    for _ in range(2):
        assert all(s.mlp is None for s in quietly(model, ids, cached=True).values())


def test_errors(llama):
    ids = random_windows(4, 8)
    with pytest.raises(ValueError, match="0 ≤ start < stop, got 3, 3"):
        Span(3, 3)
    with pytest.raises(ValueError, match=r"Span\(start=2, stop=4\) goes beyond the 3 layers"):
        capture_spans(llama, [Span(2, 4)], ids, validation_windows=2, progress=False)
    with pytest.raises(ValueError, match="leave none to fit on"):
        quietly(llama, ids, validation_windows=4)
    with pytest.raises(ValueError, match="needs a real token"):
        capture_stream(llama, ids, torch.zeros(4, 8, dtype=torch.bool), progress=False)
    with pytest.raises(ValueError, match="longer than the model's context"):
        capture_stream(llama, random_windows(1, 80), progress=False)
    with pytest.raises(ValueError, match="encoder-decoder"):
        capture_stream(build("t5"), ids, progress=False)
    with pytest.raises(ValueError, match="Layer 0 of BertForMaskedLM does more than add"):
        capture_stream(build("bert"), ids, progress=False)
    assert capture_spans(llama, [], ids) == {}
    llama.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        capture_stream(llama, ids, progress=False)
    with pytest.raises(ValueError, match="not finite"):
        quietly(llama, ids)
