"""Hybrids inside models: cached decoding is uncached decoding, in every architecture, or a clear error."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as t
from conftest import capture_quietly, save_locally
from decoding import decoded, logits
from hybrid_blocks import LOOKING_BACK, MIXTURE, fitted, normal, planted, shaken
from tiny_models import CAUSAL, SINGLE, build, random_windows

from mlpreplace import (
    AttentionMLP,
    ConvMLP,
    NarrowMLP,
    TransformerBlock,
    compare,
    find_blocks,
    fit,
    load,
    load_model,
    save,
    splice,
    spliced,
)
from mlpreplace.evaluation.perplexity import measure
from mlpreplace.replacements.kv_cache import first_is_padding


@pytest.fixture(scope="module")
def hybrid_llama():
    """A tiny Llama with a convolution, attention and a mixture: what looks back stands before what does not."""
    return fitted("llama", ConvMLP(12), AttentionMLP(12, head_dim=4), NarrowMLP(12))


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_with_the_cache_gives_the_same_logits(name):
    ids = random_windows(2, 14, seed=3)
    for families in (
        (ConvMLP(12), AttentionMLP(12, head_dim=4), NarrowMLP(12)),
        (TransformerBlock(2), MIXTURE, ConvMLP(8, kernel=9)),
    ):
        if name == "mixtral":  # experts have no neurons that a NarrowMLP could keep
            families = tuple(None if isinstance(f, NarrowMLP) else f for f in families)
        model, plan = fitted(name, *families)
        dense = logits(model, ids)
        with spliced(model, plan):
            full = logits(model, ids)
            for prefill in (1, 7):
                torch.testing.assert_close(decoded(model, ids, prefill), full, rtol=0, atol=1e-4 if name in SINGLE else 1e-9)
        assert (full - dense).abs().max() > 0.1
        torch.testing.assert_close(logits(model, ids), dense, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_sequence_alone_is_as_in_a_batch(name):
    model, plan = fitted(name, *LOOKING_BACK)
    ids = random_windows(3, 10, seed=4)
    with spliced(model, plan):
        torch.testing.assert_close(logits(model, ids)[1:2], logits(model, ids[1:2]))


def test_layers_that_flatten_their_tokens(windows):
    """OPT hands [tokens, hidden] to its MLP: a sequence must not see the one before it in the batch."""
    model, plan = fitted("opt", *LOOKING_BACK)
    with spliced(model, plan):
        torch.testing.assert_close(logits(model, windows)[5:6], logits(model, windows[5:6]))


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3, num_return_sequences=2)], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generation_does_not_depend_on_the_cache(name, options):
    model, plan = fitted(name, ConvMLP(12), AttentionMLP(12, head_dim=4), TransformerBlock(2))
    ids = random_windows(2, 6, seed=5)
    options |= dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    with spliced(model, plan):
        cached, full = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, full)


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_generation_of_an_encoder_decoder(name):
    model = build(name).double()
    blocks = find_blocks(model)
    x = normal(6, 20, 32, seed=0)
    plan = {}
    for block, family in zip(blocks, [AttentionMLP(12, head_dim=4), ConvMLP(12)] * 2, strict=True):
        stats, _ = planted(block, x, x, held_out=1, validation=1)
        plan[block] = shaken(fit(block, stats, family))
    options = dict(max_new_tokens=8, do_sample=False, num_beams=2, decoder_start_token_id=0)
    options |= dict(pad_token_id=0, eos_token_id=None, forced_eos_token_id=None)
    ids = random_windows(2, 6, seed=5)
    with spliced(model, plan):
        cached, full = (model.generate(ids, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, full)
    assert not torch.equal(full, model.generate(ids, use_cache=False, **options))


def test_image_patches():
    """No cache, no mask, no tokens: a sequence all the same."""
    model = build("vit").double()
    block, x = find_blocks(model)[0], normal(6, 5, 32, seed=0)
    small = shaken(fit(block, planted(block, x, x, held_out=1, validation=1)[0], AttentionMLP(12, head_dim=4)))
    pixels = normal(2, 3, 16, 16, seed=1)
    with torch.no_grad(), spliced(model, {block: small}):
        torch.testing.assert_close(model(pixels).logits[1], model(pixels[1:]).logits[0])


def test_prompt_lookup_decoding_takes_tokens_back(hybrid_llama):
    """It guesses several tokens at once and crops the cache where the guess was wrong."""
    model, plan = hybrid_llama
    ids = random_windows(1, 4, seed=5).repeat(1, 3)
    options = dict(max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    with spliced(model, plan):
        guessed = model.generate(ids, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(guessed, model.generate(ids, use_cache=False, **options))


def test_caches_do_not_mix(hybrid_llama):
    model, plan = hybrid_llama
    first, second = random_windows(2, 12, seed=6).split(1)
    caches = [t.DynamicCache(), t.DynamicCache(config=model.config)]  # one that grows, one that knows its layers
    parts = [[], []]
    with spliced(model, plan), torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 9), (9, 12)):
            for cache, ids, seen in zip(caches, (first, second), parts, strict=True):
                seen.append(model(ids[:, start:end], past_key_values=cache).logits)
        for ids, seen in zip((first, second), parts, strict=True):
            torch.testing.assert_close(torch.cat(seen, 1), logits(model, ids))


def test_what_transformers_does_to_a_cache_happens_to_ours(hybrid_llama):
    model, plan = hybrid_llama
    ids = random_windows(2, 12, seed=7)
    with spliced(model, plan), torch.no_grad():
        full = logits(model, ids)
        cache = model(ids[:, :8], use_cache=True).past_key_values
        branch = copy.deepcopy(cache)
        branch.reorder_cache(torch.tensor([1, 0]))
        swapped = model(ids.flip(0)[:, 8:], past_key_values=branch).logits
        torch.testing.assert_close(swapped, full.flip(0)[:, 8:])
        cache.crop(-3)
        assert [layer.get_seq_length() for layer in cache.layers] == [5] * 5  # three of the model, two of ours
        torch.testing.assert_close(model(ids[:, 5:7], past_key_values=cache).logits, full[:, 5:7])
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(model(ids[1:, 7:], past_key_values=cache).logits, full[1:, 7:])
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="too few tokens to crop"):
            cache.crop(-7)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, full)


def test_a_convolution_remembers_a_few_tokens_only(hybrid_llama):
    model, plan = hybrid_llama
    with spliced(model, plan), torch.no_grad():
        cache = model(random_windows(2, 20), use_cache=True).past_key_values
        model(random_windows(2, 1), past_key_values=cache)
    (recent,) = [layer for layer in cache.layers if getattr(layer, "owner", None) == "model.layers.0.mlp"]
    assert recent.keys.shape == (2, 1, 4, 32) and recent.values.numel() == 0  # kernel - 1 and the last call
    assert recent.get_seq_length() == 21


@pytest.mark.parametrize("window", [4, 64])
def test_a_sliding_window_of_the_model_is_not_mistaken_for_padding(window):
    model, plan = fitted("mistral", ConvMLP(12), AttentionMLP(12, head_dim=4), sliding_window=window)
    ids = random_windows(2, 14, seed=8)
    with spliced(model, plan):
        full = logits(model, ids)
        for cache in (None, t.DynamicCache()):
            torch.testing.assert_close(decoded(model, ids, 6, cache), full)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "opt"])
def test_left_padding_is_refused_and_right_padding_is_harmless(name, attention, use_cache):
    model, plan = fitted(name, ConvMLP(12), AttentionMLP(12, head_dim=4))
    model.set_attn_implementation(attention)
    ids, mask = random_windows(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    with spliced(model, plan):
        with pytest.raises(ValueError, match="pad on the right"):
            model(ids, attention_mask=mask, use_cache=use_cache)
        right = model(ids, attention_mask=mask.flip(1), use_cache=use_cache).logits
        rounding = 1e-5 if attention == "eager" else 1e-7  # the softmax of eager attention is in float32 in any case
        torch.testing.assert_close(right[1:, :5], logits(model, ids[1:, :5]), rtol=0, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_padding_in_a_mask_of_tokens(dtype):
    """Flash attention leaves the mask [batch, tokens]."""
    assert first_is_padding(torch.tensor([[1, 1, 1], [0, 0, 1]], dtype=dtype))
    assert not first_is_padding(torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=dtype))


def test_padding_in_an_encoder():
    model, plan = fitted("bert", *LOOKING_BACK)
    ids, mask = random_windows(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    with spliced(model, plan), torch.no_grad():
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[1, :5], model(ids[1:, :5]).logits[0])
        with pytest.raises(ValueError, match="pad on the right"):
            model(ids, attention_mask=mask.flip(1))


@pytest.mark.parametrize("kind", ["static", "offloaded", "other model"])
def test_a_cache_that_cannot_serve_is_refused(hybrid_llama, kind):
    model, plan = hybrid_llama
    ids, cache, message = random_windows(2, 8), t.DynamicCache(), "use a plain DynamicCache, or use_cache=False"
    with torch.no_grad():
        if kind == "static":
            cache = t.StaticCache(config=model.config, max_cache_len=16)
        elif kind == "offloaded":
            cache.offloading = True
        else:
            message = "holds 4 tokens that the replacement of .* did not see"
            model(ids[:, :4], past_key_values=cache)
        with spliced(model, plan), pytest.raises(ValueError, match=message):
            model(ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(hybrid_llama, fails, monkeypatch):
    """No hook on a layer, no cache in a replacement, also after an error inside a layer."""
    model, plan = hybrid_llama
    layers = model.model.layers
    if fails:
        monkeypatch.setattr(layers[1].self_attn, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), spliced(model, plan):
        assert all(layer._forward_pre_hooks for layer in layers[:2])
        model(random_windows(2, 8), use_cache=True)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    assert all(small.past is None for small in plan.values())


def test_a_copy_minds_its_own_replacements(hybrid_llama):
    """The hooks of a spliced copy must not speak to the replacements of the original."""
    model, plan = hybrid_llama
    ids = random_windows(2, 12, seed=9)
    copied = splice(model, plan)
    torch.testing.assert_close(decoded(copied, ids, 5), logits(copied, ids))
    with spliced(model, plan):
        torch.testing.assert_close(decoded(model, ids, 5), logits(copied, ids))
    torch.testing.assert_close(decoded(copied, ids, 5), logits(copied, ids))  # still, once the original is clean again
    again = fitted("llama", ConvMLP(6))[1]  # in the place of another: one hook more, one replacement
    twice = splice(copied, again)
    torch.testing.assert_close(decoded(twice, ids, 5), logits(twice, ids))


def test_prefix_sharing_gives_what_a_direct_pass_gives(hybrid_llama):
    model, plan = hybrid_llama
    ids = random_windows(4, 12, seed=10)
    late = {block: small for block, small in plan.items() if block.layer > 0}
    shared = compare(model, {"late": late, "all": plan}, ids, progress=False)
    for label, each in (("late", late), ("all", plan)):
        with spliced(model, each):
            assert shared[label].nll == pytest.approx(measure(model, ids, progress=False).nll, rel=1e-6)


def test_saved_and_loaded_bit_for_bit(tmp_path):
    folder = save_locally(build("llama"), tmp_path / "base")
    model, _ = load_model(folder, device="cpu")
    blocks, stats = capture_quietly(model, random_windows())
    plan = {
        b: shaken(fit(b, stats, f)) for b, f in zip(blocks, [ConvMLP(8, kernel=3), TransformerBlock(2), MIXTURE], strict=True)
    }
    compressed = splice(model, plan)
    again = load(save(compressed, tmp_path / "out"), device="cpu")
    ids = random_windows(2, 12, seed=11)
    assert torch.equal(logits(again, ids), logits(compressed, ids))
    assert torch.equal(decoded(again, ids, 5), decoded(compressed, ids, 5))
