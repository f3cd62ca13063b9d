"""Attention with fewer heads and narrower values is attention still: with any mask, cache and implementation of its layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from saved_models import saved_and_loaded
from tiny_models import DECODERS, SEQ2SEQ, VISION_ONLY, batches_for, build, outputs, random_windows
from torch.testing import assert_close
from transformers import StaticCache

from mlpreplace import capture, find_blocks, fit, heal, splice, spliced
from mlpreplace.fitting.heads import HeadFits
from mlpreplace.fitting.neurons import ClosedForm
from mlpreplace.models import NotApplicable
from mlpreplace.models.attention import attention_weights, key_units, query_columns
from mlpreplace.models.weights import weight_bias
from mlpreplace.planning import Healing
from mlpreplace.replacements import NarrowAttention
from mlpreplace.replacements.splice import replacements_of

NAMES = [*DECODERS, "bert", "roberta", "distilbert", *VISION_ONLY]
OTHER_ORDER = ("opt", "falcon")  # of products: OPT scales queries before, Falcon repeats keys after
GENERATE = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


def captured(name: str):
    """(model, attention blocks, statistics)"""
    model = build(name)
    blocks, (batch,) = find_blocks(model, "attention"), batches_for(name, 12, 12)
    return model, blocks, capture(model, blocks, batch, validation_windows=2, progress=False)


def whole(block) -> NarrowAttention:
    weights = attention_weights(block)
    return NarrowAttention(len(weights.query), *weights.value.shape[:2])


def half(block) -> NarrowAttention:
    """Half of the heads where groups have several, half of the values, of queries and of keys where these can be narrowed."""
    size = whole(block)
    key_dim = None if key_units(block) is None else size.value_dim // 2
    return NarrowAttention(max(size.groups, size.heads * 3 // 4), size.groups, size.value_dim // 2, key_dim)


@contextmanager
def rows_without_effect(layer, rows: torch.Tensor) -> Iterator[None]:
    """``layer`` with some of its outputs zero."""
    with layer.register_forward_hook(lambda module, args, y: y.index_fill(-1, rows, 0)):
        yield


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_all_heads_are_the_block_itself(name, implementation):
    if name == "gemma2" and implementation == "sdpa":
        pytest.skip("has no sdpa: its scores are limited")
    model, blocks, stats = captured(name)
    model.set_attn_implementation(implementation)
    plan = {block: fit(block, stats, whole(block)) for block in blocks}
    dense = outputs(model, name)
    with spliced(model, plan):
        narrow = outputs(model, name)
    assert torch.equal(narrow, dense) or name in OTHER_ORDER
    assert_close(narrow, dense, rtol=1e-4, atol=1e-5)


NARROWED_KEYS = [name for name in NAMES if name not in ("qwen3", "gemma3_text", "qwen3_moe", "glm", "glm4")]


def test_keys_are_narrowed_unless_norms_or_positions_need_all_of_them():
    assert [name for name in NAMES if key_units(find_blocks(build(name), "attention")[0]) is not None] == NARROWED_KEYS


@pytest.mark.parametrize("name", NARROWED_KEYS)
def test_narrower_keys_are_those_whose_other_dimensions_are_zero(name):
    """Dimensions that queries do not have are missing from the scores, and nothing else changes."""
    model, blocks, stats = captured(name)
    block, units, weights = blocks[1], key_units(blocks[1]), attention_weights(blocks[1])
    for n in {1, len(units) // 2, len(units) - 1}:
        narrow = fit(block, stats, replace(whole(block), key_dim=n * units.shape[1]))
        kept = torch.tensor(narrow.body.kept)  # [groups, key_dim]
        for of_group in kept:  # whole units, their first dimensions before the second
            assert all(pair in units.tolist() for pair in of_group.view(units.shape[1], -1).T.tolist())
        with spliced(model, {block: narrow}):
            found = outputs(model, name)
        lost = torch.ones(len(kept), weights.key.shape[1], dtype=torch.bool).scatter_(1, kept, False)[weights.group_of]
        rows = query_columns(block)[lost.flatten()]
        with rows_without_effect(block.host.get_submodule(block.heads.query), rows):
            assert_close(found, outputs(model, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_that_numel_counts(name):
    _, blocks, stats = captured(name)
    for size in (*NarrowAttention.sizes(blocks[1]), whole(blocks[1])):
        assert fit(blocks[1], stats, size).n_params == size.n_params(blocks[1])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gpt_neox"])
def test_heads_and_dimensions_that_nothing_needs_are_left_out_without_loss(name):
    """Heads whose output projection is zero, and values that lie in a part of their dimensions."""
    model = build(name)
    blocks = find_blocks(model, "attention")
    size, dropped = whole(blocks[1]), slice(0, whole(blocks[1]).heads // whole(blocks[1]).groups)  # the heads of the first group
    planted = attention_weights(blocks[1])
    planted.output[dropped] = 0
    planted.output[:, size.value_dim // 2 :] = 0
    unneeded = query_columns(blocks[1]).view(size.heads, -1)[:, key_units(blocks[1])[1::2].flatten()]
    for tensor in filter(torch.is_tensor, weight_bias(blocks[1].host.get_submodule(blocks[1].heads.query))):
        tensor[unneeded] = 0
    assert not attention_weights(blocks[1]).output[dropped].any(), "a view of the model's weights"
    (batch,) = batches_for(name, 12, 12)
    stats = capture(model, blocks, batch, validation_windows=2, progress=False)
    each = size.heads // size.groups
    narrow = NarrowAttention(size.heads - each, size.groups - 1, size.value_dim // 2, size.value_dim // 2)
    replacement = fit(blocks[1], stats, narrow, ridge=1e-9)
    dense = outputs(model, name)
    with spliced(model, {blocks[1]: replacement}):
        assert_close(outputs(model, name), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_module_in_place_computes_what_the_moments_say(name):
    """The regression is solved from HᵀH of the dense heads; the module projects, rotates and attends anew."""
    model, blocks, stats = captured(name)
    block, seen = blocks[1], {}

    def keep_output(module, args, output) -> None:
        seen["y"] = output[0] if isinstance(output, tuple) else output

    with block.output_projection.register_forward_hook(lambda m, args, y: seen.__setitem__("h", args[0])):
        outputs(model, name)
    for size in NarrowAttention.sizes(block, key_shares=()):
        with spliced(model, {block: fit(block, stats, size)}):
            with model.get_submodule(block.paths[0]).register_forward_hook(keep_output):
                outputs(model, name)
        found = HeadFits(block, stats[block], ClosedForm()).narrowed(size)
        h = seen["h"].double().unflatten(-1, attention_weights(block).output.shape[:2])
        expected = found.features(h) @ found.output
        expected = expected if found.bias is None else expected + found.bias
        assert_close(seen["y"].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_ridge_draws_the_output_projection_to_the_blocks_own(name):
    """Where it is all that counts, the projection is the block's, without the heads that were left out."""
    _, blocks, stats = captured(name)
    block = blocks[1]
    size = next(size for size in NarrowAttention.sizes(block) if size.heads < whole(block).heads)
    found = HeadFits(block, stats[block], ClosedForm(ridge=1e12)).narrowed(size)
    own = attention_weights(block).output[found.heads].flatten(0, 1)
    assert_close(found.output.to(own), own, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_the_same_with_any_cache_and_the_cache_is_smaller(name):
    model, blocks, stats = captured(name)
    compressed = splice(model, {block: fit(block, stats, half(block)) for block in blocks[:2]})
    ids = random_windows(2, 8, seed=4)
    full = compressed.generate(ids, use_cache=False, **GENERATE)
    assert torch.equal(compressed.generate(ids, **GENERATE), full)
    beams = [compressed.generate(ids, num_beams=2, use_cache=use, **GENERATE) for use in (True, False)]
    assert torch.equal(*beams)
    padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], 1)
    mask = (torch.arange(11) >= 3).long().expand(2, -1)
    left = compressed.generate(padded, attention_mask=mask, **GENERATE)
    assert torch.equal(left[:, 3:], full)
    cache = compressed(ids, use_cache=True).past_key_values
    narrow, own = cache.layers[0], cache.layers[2]
    assert narrow.values.shape[-1] < own.values.shape[-1]
    assert (narrow.keys.shape[-1] < own.keys.shape[-1]) == (name in NARROWED_KEYS)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_a_static_cache_gives_the_same_logits(name):
    model, blocks, stats = captured(name)
    compressed, ids = splice(model, {blocks[1]: fit(blocks[1], stats, half(blocks[1]))}), random_windows(2, 8, seed=4)
    static = StaticCache(compressed.config, max_cache_len=16)
    with torch.no_grad():
        assert_close(compressed(ids, past_key_values=static, use_cache=True).logits, compressed(ids).logits)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model, blocks, stats = captured(name)
    plan = {block: fit(block, stats, half(block)) for block in blocks}
    again = saved_and_loaded(name, plan, tmp_path)
    assert torch.equal(outputs(again, name), outputs(splice(model, plan), name))
    assert [r.family for r in replacements_of(again).values()] == [half(block) for block in blocks]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_it_is_healed_in_float32_in_a_model_in_half_precision(implementation):
    model = build("llama").to(torch.bfloat16)
    model.set_attn_implementation(implementation)
    blocks, windows = find_blocks(model, "attention"), random_windows(12)
    stats = capture(model, blocks, windows, validation_windows=2, progress=False)
    plan = {block: fit(block, stats, half(block)) for block in blocks}
    how = Healing(steps=20, batch_windows=4, learning_rate=1e-2)
    healed, report = heal(model, plan, windows, random_windows(4, seed=3), how, progress=False)
    assert report.improved and healed[blocks[0]].body.query.weight.dtype == torch.bfloat16
    assert not torch.equal(healed[blocks[0]].body.query.weight, plan[blocks[0]].body.query.weight)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_heads_that_are_not_known_are_not_narrowed(name):
    block = find_blocks(build(name), "attention")[0]
    with pytest.raises(NotApplicable, match="heads are not known"):
        NarrowAttention(1, 1, 1).n_params(block)


def test_sizes_that_do_not_fit_are_refused():
    block = find_blocks(build("mistral"), "attention")[0]  # 4 heads of 2 groups, 8 dimensions
    for wrong, message in (((5, 2, 8), "heads=5"), ((1, 2, 8), "heads=1"), ((2, 3, 8), "groups=3"), ((4, 2, 9), "value_dim=9")):
        with pytest.raises(ValueError, match=message):
            NarrowAttention(*wrong).n_params(block)
    for wrong in (8, 3, 0):  # all, half a pair, none
        with pytest.raises(ValueError, match="key_dim"):
            NarrowAttention(4, 2, 8, wrong).n_params(block)
    with pytest.raises(ValueError, match="norms of heads"):
        NarrowAttention(4, 2, 8, 4).n_params(find_blocks(build("qwen3"), "attention")[0])
