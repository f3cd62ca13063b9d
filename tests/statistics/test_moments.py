"""Moments and samples against a float64 reference over stored activations."""

from contextlib import ExitStack

import pytest
import torch
from conftest import activations, capture_quietly
from merging_blocks import real_tokens
from reference_moments import assert_moments, reference
from tiny_models import HIDDEN, INTERMEDIATE, READS_TOKENS, batches_for, build, random_windows
from torch.testing import assert_close

from mlpreplace import NarrowMLP, capture, find_blocks, fit
from mlpreplace.runtime import memory
from mlpreplace.statistics.accumulator import add_to
from mlpreplace.statistics.moments import sample
from mlpreplace.statistics.records import MOMENTS, SUMS


def bytes_of(statistics) -> int:
    flat = []
    for s in statistics.values():
        flat += [getattr(s, name) for name in SUMS]
        flat += [t for part in (s.train, s.validation) for t in vars(part).values()]
    return sum(t.nbytes for t in flat if t is not None)


@pytest.mark.parametrize("name", READS_TOKENS)
def test_moments_are_those_of_the_stored_activations(name):
    """Also where a block is several modules (OPT, BERT) and where it has no neurons (Mixtral)."""
    model, windows = build(name), random_windows()
    blocks, statistics = capture_quietly(model, windows, moments=MOMENTS)
    for block in blocks:
        assert statistics[block].tokens == windows[:6].numel()
        assert_moments(statistics[block], reference(model, block, windows[:6]))


@pytest.mark.parametrize("name", READS_TOKENS)
def test_samples_are_whole_windows(name):
    model, windows = build(name), random_windows()
    blocks, statistics = capture_quietly(model, windows)
    for block in blocks:
        for pairs, part in ((statistics[block].train, windows[:2]), (statistics[block].validation, windows[6:])):
            a = activations(model, block, part)
            assert pairs.x.shape == pairs.y.shape == (*part.shape, HIDDEN)
            assert_close(pairs.x.double().flatten(0, 1), a["x"], rtol=1e-4, atol=1e-4)
            assert_close(pairs.y.double().flatten(0, 1), a["y"], rtol=1e-4, atol=1e-4)
            assert pairs.tokens == part.numel()


def test_attention_blocks_are_captured_from_their_keyword_arguments(llama, windows):
    blocks, statistics = capture_quietly(llama, windows, kind="attention", moments=("input",))
    for block in blocks:
        assert_moments(statistics[block], reference_of_attention(llama, block, windows[:6]))


def reference_of_attention(model, block, windows):
    seen = {}
    hook = block.modules[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.update(x=kwargs["hidden_states"], y=output[0]), with_kwargs=True
    )
    with torch.no_grad():
        model(windows)
    hook.remove()
    x, y = (seen[name].double().flatten(0, 1) for name in "xy")
    return {"sum_x": x.sum(0), "sum_y": y.sum(0), "xx": x.T @ x, "xy": x.T @ y}


def test_the_residual_energy_is_that_of_the_layer_output(llama, windows):
    blocks, statistics = capture_quietly(llama, windows)
    with torch.no_grad():
        hidden = llama(windows[:2], output_hidden_states=True).hidden_states
    for block in blocks[:-1]:  # the last hidden state comes after the final norm
        energy = hidden[block.layer + 1].square().sum(-1)
        assert_close(statistics[block].train.residual_energy, energy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_batch_size_changes_nothing(name, batch_size):
    model, windows = build(name), random_windows()
    blocks, statistics = capture_quietly(model, windows, moments=MOMENTS, batch_size=batch_size)
    for block in blocks:
        assert_moments(statistics[block], reference(model, block, windows[:6]))
        assert len(statistics[block].train.x) == len(statistics[block].validation.x) == 2


def test_validation_windows_are_in_no_moment(llama, windows):
    blocks, statistics = capture_quietly(llama, windows, moments=MOMENTS)
    changed = windows.clone()
    changed[6:] = random_windows(2, seed=1)
    _, again = capture_quietly(llama, changed, moments=MOMENTS)
    for block in blocks:
        assert all(torch.equal(getattr(statistics[block], name), getattr(again[block], name)) for name in SUMS)
        assert not torch.equal(statistics[block].validation.x, again[block].validation.x)


@pytest.mark.parametrize("name", ["vit", "marian", "t5", "llama"])
def test_batches_of_any_inputs_are_captured(name):
    """Images, and both sides of a translation, which differ in length and padding; the last items are in no moment."""
    (batch,) = batches_for(name, n=6, batch_size=6)
    if name == "marian":
        batch |= {"attention_mask": real_tokens(6, 9), "decoder_attention_mask": real_tokens(6, 7)}
    model = build(name)
    blocks, statistics = capture_quietly(model, batch, moments=MOMENTS, batch_size=3)
    for block in blocks:
        mask = {"model.encoder.layers": "attention_mask", "model.decoder.layers": "decoder_attention_mask"}.get(block.stack)
        real = batch.get(mask, torch.ones(6, len(statistics[block].train.x[0])).bool())
        first = {k: t[:4] for k, t in batch.items()}
        assert_moments(statistics[block], stored(model, block, first, real[:4]))
        assert torch.equal(statistics[block].train.mask, real[:2]) and torch.equal(statistics[block].validation.mask, real[4:])


def stored(model, block, batch, real) -> dict[str, torch.Tensor]:
    """Reference moments of a batch that the model itself reads."""
    seen = {}
    with ExitStack() as stack, torch.no_grad():
        hooks = [
            block.modules[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0])),
            block.modules[-1].register_forward_hook(lambda module, args, output: seen.update(y=output)),
            block.down.register_forward_pre_hook(lambda module, args: seen.update(h=args[0])),
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        model(**batch)
    x, y, h = (seen[name].double()[real] for name in "xyh")
    return {"sum_x": x.sum(0), "sum_y": y.sum(0), "sum_h": h.sum(0), "xx": x.T @ x, "xy": x.T @ y, "hh": h.T @ h, "hx": h.T @ x}


def test_a_batch_has_its_own_masks(llama, windows):
    with pytest.raises(ValueError, match="A batch has masks of its own"):
        capture(llama, find_blocks(llama), {"input_ids": windows}, torch.ones_like(windows))


def test_images_are_fitted_like_text():
    """A whole NarrowMLP is the block itself, up to the ridge."""
    (batch,) = batches_for("vit", n=6, batch_size=6)
    blocks, statistics = capture_quietly(build("vit"), batch)
    small = fit(blocks[0], statistics, NarrowMLP(width=INTERMEDIATE))
    assert small.report.validation.pooled < 1e-4


def right_padded(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of different lengths, and the mask of their real tokens."""
    lengths = torch.tensor([windows.shape[1] - i % 5 for i in range(len(windows))])
    mask = torch.arange(windows.shape[1]) < lengths[:, None]
    return windows.masked_fill(~mask, 0), mask


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_padding_is_in_no_moment(name):
    model = build(name)
    padded, mask = right_padded(random_windows())
    blocks, statistics = capture_quietly(model, padded, mask=mask, moments=MOMENTS, batch_size=3)
    for block in blocks:
        assert statistics[block].tokens == int(mask[:6].sum()) < padded[:6].numel()
        assert_moments(statistics[block], reference(model, block, padded[:6], mask[:6]))
        assert torch.equal(statistics[block].train.mask, mask[:2])
        assert statistics[block].validation.tokens == int(mask[6:].sum())


def test_what_stands_in_the_padding_does_not_matter(llama, windows):
    padded, mask = right_padded(windows)
    statistics = capture_quietly(llama, padded, mask=mask, moments=MOMENTS)[1]
    again = capture_quietly(llama, padded.masked_fill(~mask, 7), mask=mask, moments=MOMENTS)[1]
    for block, s in statistics.items():
        for name in SUMS:
            assert_close(getattr(s, name), getattr(again[block], name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("moments", "missing"),
    [
        (("input",), {"sum_h", "hh", "hx"}),
        (("hidden",), {"sum_x", "xx", "xy", "hx"}),
        (("cross",), {"sum_x", "xx", "xy", "hh"}),
        (("input", "hidden"), {"hx"}),
        ((), {"sum_x", "xx", "xy", "sum_h", "hh", "hx"}),
    ],
)
def test_only_the_moments_asked_for_are_kept(moments, missing, llama, windows):
    _, statistics = capture_quietly(llama, windows, moments=moments)
    for s in statistics.values():
        assert {name for name in SUMS if getattr(s, name) is None} == missing


def test_memory_does_not_grow_with_the_text(llama):
    few, many = (bytes_of(capture_quietly(llama, random_windows(n))[1]) for n in (8, 40))
    assert few == many
    moments = 8 * (2 * HIDDEN**2 + INTERMEDIATE**2 + 2 * HIDDEN + INTERMEDIATE)
    assert few >= 3 * moments


@pytest.mark.parametrize("room, expected", [(None, 4), (0, 1), (1, 1), (5, 5), (1000, 16)])
def test_batches_follow_the_free_memory(room, expected, llama, monkeypatch):
    """On a GPU that has room for twice so many windows."""
    asked, blocks = [], find_blocks(llama)
    of_token = 4 * (10 * HIDDEN + 2 * blocks[0].n_params // HIDDEN)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None if room is None else 2 * room * 12 * of_token)
    llama.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    dict(capture(llama, blocks, random_windows(40), validation_windows=0, sample_windows=0, progress=False))
    assert max(asked) == expected and sum(asked) == 40


@pytest.mark.parametrize("n", [1, 3, 8])
def test_every_fitting_window_can_be_sampled(n, llama):
    """Those the moments are of, in order, and no validation window."""
    windows = random_windows(n + 2)
    blocks, statistics = capture_quietly(llama, windows, sample_windows=None, batch_size=2)
    for block in blocks:
        s = statistics[block]
        assert_close(s.train.x.double().flatten(0, 1), activations(llama, block, windows[:n])["x"], rtol=1e-4, atol=1e-4)
        x = s.train.x.flatten(0, 1).double()
        assert_close(x.T @ x, s.xx, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert", "mixtral"])
def test_a_sample_is_every_window_and_nothing_else(name):
    model = build(name)
    padded, mask = right_padded(random_windows())
    blocks = find_blocks(model)
    pairs = sample(model, blocks, padded, mask, batch_size=3, progress=False)
    _, statistics = capture_quietly(model, padded, mask=mask, sample_windows=8, validation_windows=0)
    assert list(pairs) == blocks
    for block, pair in pairs.items():
        assert torch.equal(pair.mask, mask)
        for field in ("x", "y", "residual_energy"):
            expected = getattr(statistics[block].train, field)
            assert_close(getattr(pair, field)[mask], expected[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{}, {"moments": ()}, {"moments": (), "validation_windows": 0}])
def test_activations_that_are_not_finite_name_the_block(how, value, llama, windows):
    llama.model.layers[1].mlp.down_proj.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp are not finite"):
        capture_quietly(llama, windows, **how)


def test_a_validation_token_that_is_not_finite_names_the_block(llama, windows):
    """It is in no moment: the token stands in the last window alone."""
    windows[7, 3] = 2
    llama.model.embed_tokens.weight.data[2] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp are not finite"):
        capture_quietly(llama, windows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": random_windows(2)}, "leave none to fit on"),
        ({"windows": random_windows(2, 65)}, "65 tokens are longer than the model's context of 64"),
        ({"windows": random_windows().float()}, "Expected token ids"),
        ({"windows": random_windows()[0]}, "Expected token ids"),
        ({"windows": random_windows() + 100}, "outside the model's vocabulary of 101"),
        ({"mask": torch.ones(8, 11)}, r"mask is \(8, 11\), the windows are \(8, 12\)"),
        ({"moments": ("input", "third")}, "third"),
    ],
)
def test_input_that_cannot_be_right(change, message, llama):
    options = {"windows": random_windows()} | change
    with pytest.raises(ValueError, match=message):
        capture_quietly(llama, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_blocks_of_another_model_are_refused(llama, windows):
    """A forward pass of ``llama`` never runs them."""
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp"):
        capture(llama, find_blocks(build("llama")), windows, progress=False)


@pytest.mark.parametrize("shape", [(), (5,), (600, 3)])
def test_sums_of_any_number_of_rows_are_those_of_one_addition(shape):
    total, more = torch.randn(shape, dtype=torch.float64), torch.randn(shape)
    expected = total + more
    add_to(total, more)
    assert torch.equal(total, expected)
