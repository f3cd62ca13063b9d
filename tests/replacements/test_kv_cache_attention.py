"""Models whose attention was replaced, decoding with a cache: it counts tokens where it has nothing to keep of them."""

import copy

import pytest
import torch
import transformers as t
from attention_blocks import SETS, assert_alike, attention_plan, precise
from conftest import capture_quietly
from decoding import decoded, logits
from hybrid_blocks import shaken
from tiny_models import CAUSAL, random_windows

from mlpreplace import AttentionMLP, ConvMLP, LowRank, MixtureOfExperts, capture, find_blocks, fit, spliced
from mlpreplace.replacements.kv_cache import TokenCount

GENERATE = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_with_the_cache_gives_the_same_logits(name):
    model, ids = precise(name), random_windows(2, 14, seed=3)
    plan = attention_plan(model)
    for layers in SETS:
        with spliced(model, {b: r for b, r in plan.items() if b.layer in layers}):
            full = logits(model, ids)
            for prefill in (1, 7):
                for cache in (None, t.DynamicCache()):  # one that knows its layers, one that grows
                    assert_alike(name, decoded(model, ids, prefill, cache), full)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3, num_return_sequences=2)], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generation_does_not_depend_on_the_cache(name, options):
    """In a batch that is padded on the left, with all attention replaced and with that of layer 0 alone."""
    model, ids = precise(name), random_windows(2, 8, seed=5)
    plan, mask = attention_plan(model), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    for layers in ((0,), (0, 1, 2)):
        with spliced(model, {b: r for b, r in plan.items() if b.layer in layers}):
            cached, full = (model.generate(ids, attention_mask=mask, use_cache=u, **GENERATE, **options) for u in (True, False))
            alone = model.generate(ids[1:, 3:], **GENERATE, **options)
        assert torch.equal(cached, full)
        assert torch.equal(cached[len(cached) // 2 :, 8:], alone[:, 5:])


@pytest.mark.parametrize("layers", SETS)
def test_replaced_attention_stores_no_bytes(llama, layers):
    ids = random_windows(2, 9)
    with torch.no_grad():
        dense = [layer.keys.numel() + layer.values.numel() for layer in llama(ids).past_key_values.layers]
        with spliced(llama, attention_plan(llama, layers=layers)):
            cache = llama(ids, use_cache=True).past_key_values
    stored = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    assert stored == [0 if i in layers else n for i, n in enumerate(dense)] and all(dense)
    assert [cache.get_seq_length(i) for i in range(3)] == [9] * 3


@pytest.mark.parametrize("layers", SETS)
def test_what_transformers_does_to_a_cache(layers):
    model, ids = precise("llama"), random_windows(2, 12, seed=7)
    with spliced(model, attention_plan(model, layers=layers)), torch.no_grad():
        full = logits(model, ids)
        cache = model(ids[:, :8], use_cache=True).past_key_values
        branch = copy.deepcopy(cache)
        branch.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(model(ids.flip(0)[:, 8:], past_key_values=branch).logits, full.flip(0)[:, 8:])
        cache.crop(-3)
        assert [layer.get_seq_length() for layer in cache.layers] == [5] * 3
        torch.testing.assert_close(model(ids[:, 5:7], past_key_values=cache).logits, full[:, 5:7])
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(model(ids[1:, 7:], past_key_values=cache).logits, full[1:, 7:])
        cache.batch_repeat_interleave(2)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, full)


@pytest.mark.parametrize("layers", SETS)
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_sliding_windows(name, layers):
    """Gemma 2 has them in every other layer, from layer 0 on."""
    model, ids = precise(name, sliding_window=4), random_windows(1, 16, seed=8)
    with spliced(model, attention_plan(model, layers=layers)):
        full = logits(model, ids)
        static = t.StaticCache(config=model.config, max_cache_len=16)
        for cache in (None, t.DynamicCache(), static):
            assert_alike(name, decoded(model, ids, 6, cache), full)
        guessed = model.generate(ids.repeat(1, 2), prompt_lookup_num_tokens=3, **GENERATE)  # which crops what was wrong
        assert torch.equal(guessed, model.generate(ids.repeat(1, 2), use_cache=False, **GENERATE))
    assert all(static.layers[i].keys.numel() == 0 for i in layers)


@pytest.mark.parametrize("layers", [(0, 1, 2), (0,), (1, 2)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "falcon"])
def test_beside_replacements_that_look_back(name, layers):
    """They keep their own layers in the same cache and ask the model's for the number of tokens."""
    model, ids = precise(name), random_windows(2, 14, seed=9)
    mlps, stats = capture_quietly(model, random_windows(8, 24), sample_windows=6)
    families = [ConvMLP(8), AttentionMLP(8, head_dim=4), MixtureOfExperts(6, experts=2)]
    plan = {b: shaken(fit(b, stats, f), i) for i, (b, f) in enumerate(zip(mlps, families, strict=True))}
    plan |= attention_plan(model, layers=layers)
    with spliced(model, plan):
        full = logits(model, ids)
        for cache in (None, t.DynamicCache()):
            torch.testing.assert_close(decoded(model, ids, 5, cache), full)
        cached, uncached = (model.generate(ids, use_cache=use, num_beams=2, **GENERATE) for use in (True, False))
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", ["quantized", "offloaded", "dense"])
def test_a_cache_that_cannot_serve_is_refused(llama, kind):
    ids, cache, message = random_windows(2, 8), t.DynamicCache(), "use a DynamicCache, a StaticCache, or use_cache=False"
    if kind == "quantized":
        cache = t.DynamicCache(config=llama.config)
        cache.layers[0] = type("QuantizedLayer", (t.cache_utils.DynamicLayer,), {})()  # needs a package of its own
    elif kind == "offloaded":
        cache.offloading = True
    else:
        message = "holds keys and values of layer 0, whose attention was replaced"
        with torch.no_grad():
            llama(ids[:, :4], past_key_values=cache)
    with torch.no_grad(), spliced(llama, attention_plan(llama)), pytest.raises(ValueError, match=message):
        llama(ids[:, 4:], past_key_values=cache)


@pytest.mark.bundled
def test_the_real_model_generates_alike_with_and_without_cache(bundled):
    model, tokenizer = bundled
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt").input_ids
    blocks = find_blocks(model, "attention")
    stats = capture(model, [blocks[0], blocks[-1]], ids.repeat(3, 1), moments=("input",), validation_windows=1, progress=False)
    plan = {block: fit(block, stats, LowRank(8)) for block in stats}
    with spliced(model, plan):
        out = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        full = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(out.sequences, full)
    counting = [i for i, layer in enumerate(out.past_key_values.layers) if isinstance(layer, TokenCount)]
    assert counting == [0, len(blocks) - 1]
