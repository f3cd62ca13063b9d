"""Hybrids: their starts, causality, cached decoding in every architecture, and blocks that each of them alone recovers."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as t
from conftest import CAUSAL, build, capture_quietly, random_windows, save_locally
from torch.nn import functional as F

from mlpreplace import (
    AttentionMLP,
    BlockStatistics,
    ConvMLP,
    LowRank,
    MixtureOfExperts,
    NarrowMLP,
    Sample,
    Training,
    TransformerBlock,
    TwoLayerMLP,
    compare,
    find_blocks,
    fit,
    load,
    load_model,
    save,
    splice,
    spliced,
)
from mlpreplace.evaluate import measure
from mlpreplace.past import _first_is_padding
from mlpreplace.starts import neurons

LOOKING_BACK = [ConvMLP(12, kernel=3), AttentionMLP(12, head_dim=4), TransformerBlock(2)]
MIXTURE = MixtureOfExperts(6, experts=3)
HYBRIDS = [*LOOKING_BACK, MIXTURE]


def pairs(x, y) -> Sample:
    """[windows, seq_len, hidden] pairs as a sample, residual energy 1."""
    ones = torch.ones(x.shape[:2])
    return Sample(x, y, ones, ones.bool())


def planted(block, x, y, held_out: int, validation: int):
    """({block: statistics}, held-out sample) of float64 pairs [windows, seq_len, hidden] that stand for the block's."""
    inputs, outputs = x.to(block.dtype), y.to(block.dtype)
    n = len(x) - held_out - validation
    flat_x, flat_y = x[:n].flatten(0, 1), y[:n].flatten(0, 1)
    moments = dict(sum_x=flat_x.sum(0), sum_y=flat_y.sum(0), xx=flat_x.T @ flat_x, xy=flat_x.T @ flat_y)
    if block.has_neurons:
        h = neurons(block, flat_x)
        moments |= dict(sum_h=h.sum(0), hh=h.T @ h)
    train, unseen, held = (
        pairs(inputs[part], outputs[part]) for part in (slice(n), slice(n, n + validation), slice(n + validation, None))
    )
    return {block: BlockStatistics(len(flat_x), **moments, train=train, validation=unseen)}, held


def shaken(replacement, seed: int = 0):
    """A start whose every parameter matters: taps, attention and experts are no longer zero or alike."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in replacement.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return replacement


def fitted(name: str, *families, **changes):
    """(model, plan) of a tiny model: block i replaced by families[i], None leaves it. float64 but for Mixtral's experts."""
    model = build(name, **changes).to(torch.float32 if name == "mixtral" else torch.float64)
    blocks, stats = capture_quietly(model, random_windows(8, 24), sample_windows=6)
    return model, {b: shaken(fit(b, stats, f), i) for i, (b, f) in enumerate(zip(blocks, families, strict=False)) if f}


@pytest.fixture(scope="module")
def hybrid_llama():
    """A tiny Llama with a convolution, attention and a mixture: what looks back stands before what does not."""
    return fitted("llama", ConvMLP(12), AttentionMLP(12, head_dim=4), NarrowMLP(12))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def decoded(model, ids, prefill: int, cache=None):
    """Logits of a prefill and then of one token at a time."""
    with torch.no_grad():
        out = model(ids[:, :prefill], use_cache=True, past_key_values=cache)
        parts, cache = [out.logits], out.past_key_values
        for i in range(prefill, ids.shape[1]):
            parts.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


# starts and sizes


@pytest.mark.parametrize("family", HYBRIDS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_sizes_are_as_announced(name, family):
    blocks, stats = capture_quietly(build(name), random_windows())
    small = fit(blocks[0], stats, family)
    assert small.n_params == family.n_params(blocks[0]) == sum(p.numel() for p in small.parameters())
    assert small.n_active_params == family.n_active_params(blocks[0])
    if family is not MIXTURE:
        assert small.n_active_params == small.n_params


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_one_token_passes_the_router_and_one_expert(name):
    blocks, stats = capture_quietly(build(name), random_windows())
    body = fit(blocks[0], stats, MIXTURE).body
    active = [*body.router.parameters(), *body.experts[0].parameters()]
    assert MIXTURE.n_active_params(blocks[0]) == sum(p.numel() for p in active) < MIXTURE.n_params(blocks[0])


@pytest.mark.parametrize("family", [type(f) for f in HYBRIDS])
@pytest.mark.parametrize("share", [0.7, 0.9])
def test_nearest_is_near(family, share, llama):
    block = find_blocks(llama)[0]
    found = family.nearest(block, share * block.n_params)
    assert abs(found.n_params(block) / block.n_params - share) < 0.15


@pytest.mark.parametrize(
    "family",
    [
        ConvMLP(0),
        ConvMLP(49),
        ConvMLP(8, kernel=1),
        AttentionMLP(8, head_dim=0),
        MixtureOfExperts(8, experts=1),
        MixtureOfExperts(49),
        TransformerBlock(9),
        TransformerBlock(0),
        TransformerBlock(1, heads=33),
    ],
    ids=str,
)
def test_a_size_the_block_cannot_have(family, captured):
    _, blocks, stats = captured
    for act in (lambda: fit(blocks[0], stats, family), lambda: family.n_params(blocks[0])):
        with pytest.raises(ValueError, match=r"does not fit model\.layers\.0\.mlp: expected"):
            act()


@pytest.mark.parametrize("family", [ConvMLP(12), AttentionMLP(12, head_dim=4)], ids=str)
def test_the_start_is_the_closed_form_of_the_narrow_mlp(family, captured):
    _, blocks, stats = captured
    x = stats[blocks[1]].train.x
    start, narrow = fit(blocks[1], stats, family), fit(blocks[1], stats, NarrowMLP(12))
    torch.testing.assert_close(start(x), narrow(x))


def test_a_transformer_block_starts_as_a_low_rank_map(captured):
    _, blocks, stats = captured
    x = stats[blocks[1]].train.x
    torch.testing.assert_close(fit(blocks[1], stats, TransformerBlock(2))(x), fit(blocks[1], stats, LowRank(8))(x))


@pytest.mark.parametrize("family", HYBRIDS, ids=str)
def test_every_part_that_is_trained_gets_a_gradient(family, captured):
    """A zero in the wrong place would stay zero: after one step of descent nothing but a router is where it was."""
    _, blocks, stats = captured
    small = fit(blocks[1], stats, family)
    body = small.body.requires_grad_(True)
    x, y = stats[blocks[1]].train.x, stats[blocks[1]].train.y
    moved = {name: torch.zeros(()) for name, _ in body.named_parameters() if not name.startswith("router")}
    for _ in range(2):  # what feeds a zero output projection moves in the second step
        loss = (body(x) - y).square().mean()
        grads = torch.autograd.grad(loss, [dict(body.named_parameters())[name] for name in moved])
        for (name, total), grad in zip(moved.items(), grads, strict=True):
            moved[name] = total + grad.abs().max()
            dict(body.named_parameters())[name].data -= 0.1 * grad
    assert all(total > 0 for total in moved.values()), moved


@pytest.mark.parametrize("family", HYBRIDS, ids=str)
def test_a_start_depends_on_the_seed_alone(family, captured):
    _, blocks, stats = captured
    states = []
    for noise, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(noise)
        states.append(fit(blocks[1], stats, family, seed=seed).state_dict())
    same = [all(torch.equal(states[0][k], state[k]) for k in states[0]) for state in states[1:]]
    assert same == [True, isinstance(family, ConvMLP)]


def test_a_mixture_needs_a_sample(captured):
    _, blocks, stats = captured
    without = BlockStatistics(**{k: v for k, v in vars(stats[blocks[0]]).items() if k not in ("train", "_parts")})
    with pytest.raises(ValueError, match="sample_windows"):
        fit(blocks[0], {blocks[0]: without}, MIXTURE)


def test_experts_of_full_width_are_the_block(captured):
    """Whatever the clusters, and however few tokens they have."""
    model, blocks, stats = captured
    small = fit(blocks[1], stats, MixtureOfExperts(48, experts=8))
    x = stats[blocks[1]].validation.x
    torch.testing.assert_close(small(x), blocks[1].modules[0](x), rtol=1e-4, atol=1e-4)


def test_a_token_passes_the_expert_that_the_router_chose(captured):
    _, blocks, stats = captured
    small = shaken(fit(blocks[1], stats, MIXTURE))
    x = stats[blocks[1]].validation.x
    body, chosen = small.body, small.body.router(x).argmax(-1)
    assert len(chosen.unique()) == MIXTURE.experts
    every = torch.stack([expert(x) for expert in body.experts])  # [experts, windows, seq_len, hidden]
    torch.testing.assert_close(small(x), every.gather(0, chosen[None, ..., None].expand(1, *x.shape))[0])


def test_the_router_finds_clusters_of_inputs():
    model = build("llama")
    block = find_blocks(model)[0]
    centres = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    label = torch.randint(3, (4, 50), generator=torch.Generator().manual_seed(2))
    x = centres[label] * 3 + 0.5 * torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(3)) + 10  # a common offset
    stats, _ = planted(block, x.double(), x.double(), held_out=0, validation=1)
    chosen = fit(block, stats, MIXTURE).body.router(x).argmax(-1)
    assert len({(a, b) for a, b in zip(label.flatten().tolist(), chosen.flatten().tolist(), strict=True)}) == 3


# causality


@pytest.mark.parametrize("family", HYBRIDS, ids=str)
def test_no_output_depends_on_a_later_token(family):
    _, plan = fitted("llama", None, family)
    (small,) = plan.values()
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = small(x)
    for token in range(9):
        changed = x.clone()
        changed[:, token] += 1
        differs = ((small(changed) - y).abs() > 1e-9).any(-1).any(0)  # [seq_len]
        assert differs[token] and not differs[:token].any()
        reach = {ConvMLP: 3, MixtureOfExperts: 1}.get(type(family), 9)  # and of earlier tokens on as many as it should
        assert differs[token : token + reach].all() and not differs[token + reach :].any()


@pytest.mark.parametrize("family", LOOKING_BACK, ids=str)
def test_what_looks_back_must_know_where_sequences_begin(family):
    _, plan = fitted("llama", family)
    (small,) = plan.values()
    with pytest.raises(ValueError, match=r"expected \[batch, seq_len, hidden\]"):
        small(torch.zeros(6, 32, dtype=torch.float64))


# in a model, with and without its cache


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
                torch.testing.assert_close(decoded(model, ids, prefill), full, rtol=0, atol=1e-4 if name == "mixtral" else 1e-9)
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
    x = torch.randn(6, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
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
        torch.testing.assert_close(right[1:, :5], logits(model, ids[1:, :5]))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_padding_in_a_mask_of_tokens(dtype):
    """Flash attention leaves the mask [batch, tokens]."""
    assert _first_is_padding(torch.tensor([[1, 1, 1], [0, 0, 1]], dtype=dtype))
    assert not _first_is_padding(torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=dtype))


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


# planted blocks: what the matching family recovers and a narrow MLP of the same size does not


def r_squared(small, held) -> float:
    """Of the tokens of windows that no fit saw."""
    y = held.y.flatten(0, 1).double()
    residual = y - small(held.x).flatten(0, 1).double()
    return 1 - (residual.square().sum() / (y - y.mean(0)).square().sum()).item()


def normal(*shape, seed: int):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted_convolution(block):
    """A narrow MLP of a convolution of independent inputs."""
    x, taps = normal(120, 24, 32, seed=1), 0.5 * normal(4, 32, seed=2)
    mixed = x + sum(taps[j] * F.pad(x, (0, 0, j, 0))[:, :24] for j in range(4))
    return x, neurons(block, mixed) @ block.weights().down.double().T


def planted_attention(block):
    """A narrow MLP and an attention head that outweighs it."""
    x = normal(120, 24, 32, seed=1)
    q, k, v = (normal(32, 4, seed=seed) * scale / 32**0.5 for seed, scale in ((3, 2), (4, 2), (5, 1)))
    head = F.scaled_dot_product_attention(x @ q, x @ k, x @ v, is_causal=True) @ normal(4, 32, seed=6)
    y = neurons(block, x) @ block.weights().down.double().T
    return x, y + 2 * head * (y.square().mean() / head.square().mean()).sqrt()


def planted_mixture(block):
    """Inputs in eight clusters, the same neurons in all of them, and output weights that differ from one to the next."""
    expert = torch.randint(8, (160, 24), generator=torch.Generator().manual_seed(7))
    centres = 0.8 * 32**0.5 * F.normalize(normal(8, 32, seed=8), dim=-1)
    x = centres[expert] + normal(160, 24, 32, seed=1)
    return x, torch.einsum("bsk,bskd->bsd", neurons(block, x)[..., :5], normal(8, 5, 32, seed=9)[expert])


@pytest.mark.parametrize(
    ("plant", "family", "training"),
    [
        (planted_convolution, ConvMLP(12, kernel=4), Training(epochs=20, learning_rate=3e-2)),
        (planted_attention, AttentionMLP(12, head_dim=4), Training(epochs=30, learning_rate=3e-2)),
        (planted_mixture, MixtureOfExperts(5, experts=8), Training(epochs=60, learning_rate=2e-2)),
    ],
    ids=["convolution", "attention", "mixture"],
)
def test_the_matching_family_recovers_a_planted_block(plant, family, training, llama):
    block = find_blocks(llama)[0]
    block.down.weight.data[:, family.width :] = 0  # as many neurons as the family has: they are not what is asked
    x, y = plant(block)
    stats, held = planted(block, x, y, held_out=24, validation=16)
    size = family.n_params(block)
    equal = [NarrowMLP.nearest(block, size), TwoLayerMLP.nearest(block, size)]
    assert all(abs(other.n_params(block) / size - 1) < 0.1 for other in equal)
    assert r_squared(fit(block, stats, family, training=training), held) > 0.95
    for other in equal:
        assert r_squared(fit(block, stats, other, training=training), held) < 0.8, other
