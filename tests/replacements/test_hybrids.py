"""Hybrids: their sizes, their starts, causality, and blocks that each of them alone recovers."""

from dataclasses import replace

import pytest
import torch
from conftest import capture_quietly, statistics_of
from hybrid_blocks import HYBRIDS, LOOKING_BACK, MIXTURE, fitted, normal, planted, shaken
from tiny_models import HIDDEN, build, random_windows
from torch.nn import functional as F

from mlpreplace import (
    AttentionMLP,
    ConvMLP,
    LowRank,
    MixtureOfExperts,
    NarrowMLP,
    Training,
    TransformerBlock,
    TwoLayerMLP,
    find_blocks,
    fit,
)
from mlpreplace.models.blocks import block_neurons


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


def test_a_transformer_block_wider_than_its_inputs_vary_is_finite(captured):
    """With fewer tokens than its width, rounded moments give the variance of some channels as slightly below zero."""
    _, blocks, _ = captured
    x = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, -x]).repeat(4, 1)  # of mean zero
    rounded = statistics_of(x, x.flip(1))
    rounded.xx -= 1e-3 * rounded.xx.diagonal().mean() * torch.eye(HIDDEN)
    small = fit(blocks[1], {blocks[1]: rounded}, TransformerBlock(7), samples=())
    assert all(p.isfinite().all() for p in small.body.parameters())


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
    with pytest.raises(ValueError, match="sample_windows"):
        fit(blocks[0], {blocks[0]: replace(stats[blocks[0]], train=None)}, MIXTURE)


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
    label = torch.randint(3, (4, 50), generator=torch.Generator().manual_seed(0))
    first, third = 3 * normal(2, 32, seed=1)
    centres = 3 * first + torch.stack([first, -first, third])  # seen from the origin, two of them lie in one direction
    x = centres[label] + 0.5 * normal(4, 50, 32, seed=2)
    stats, _ = planted(block, x, x, held_out=0, validation=1)
    chosen = fit(block, stats, MIXTURE).body.router(x.float()).argmax(-1)
    met = torch.zeros(3, 3).index_put((label.flatten(), chosen.flatten()), torch.ones(()))
    assert torch.equal(met.sum(0), torch.ones(3)) and torch.equal(met.sum(1), torch.ones(3))


@pytest.mark.parametrize("family", HYBRIDS, ids=str)
def test_no_output_depends_on_a_later_token(family):
    _, plan = fitted("llama", None, family)
    (small,) = plan.values()
    x = normal(2, 9, 32, seed=0)
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


# planted blocks: what the matching family recovers and a narrow MLP of the same size does not


def r_squared(small, held) -> float:
    """Of the tokens of windows that no fit saw."""
    y = held.y.flatten(0, 1).double()
    residual = y - small(held.x).flatten(0, 1).double()
    return 1 - (residual.square().sum() / (y - y.mean(0)).square().sum()).item()


def planted_convolution(block):
    """A narrow MLP of a convolution of independent inputs."""
    x, taps = normal(120, 24, 32, seed=1), 0.5 * normal(4, 32, seed=2)
    mixed = x + sum(taps[j] * F.pad(x, (0, 0, j, 0))[:, :24] for j in range(4))
    return x, block_neurons(block, mixed) @ block.weights().down.double().T


def planted_attention(block):
    """A narrow MLP and an attention head that outweighs it."""
    x = normal(120, 24, 32, seed=1)
    q, k, v = (normal(32, 4, seed=seed) * scale / 32**0.5 for seed, scale in ((3, 2), (4, 2), (5, 1)))
    head = F.scaled_dot_product_attention(x @ q, x @ k, x @ v, is_causal=True) @ normal(4, 32, seed=6)
    y = block_neurons(block, x) @ block.weights().down.double().T
    return x, y + 2 * head * (y.square().mean() / head.square().mean()).sqrt()


def planted_transformer(block):
    """A transformer layer on eight directions of the input, its attention larger than what passes it by."""
    x, teacher = normal(160, 24, 32, seed=1), TransformerBlock(2).build(block).double()
    for seed, (name, parameter) in enumerate(teacher.named_parameters()):
        if parameter.dim() == 2:
            scale = {"q": 1.5, "k": 1.5, "o": 2.5}.get(name.removeprefix("attention.").removesuffix(".weight"), 1)
            parameter.data = scale * normal(*parameter.shape, seed=seed) / parameter.shape[1] ** 0.5
        elif name.endswith("bias"):
            parameter.data.zero_()
    with torch.no_grad():
        return x, teacher(x)


def planted_mixture(block):
    """Inputs in eight clusters, the same neurons in all of them, and output weights that differ from one to the next."""
    expert = torch.randint(8, (160, 24), generator=torch.Generator().manual_seed(7))
    centres = 0.8 * 32**0.5 * F.normalize(normal(8, 32, seed=8), dim=-1)
    x = centres[expert] + normal(160, 24, 32, seed=1)
    return x, torch.einsum("bsk,bskd->bsd", block_neurons(block, x)[..., :5], normal(8, 5, 32, seed=9)[expert])


@pytest.mark.parametrize(
    ("plant", "family", "training"),
    [
        (planted_convolution, ConvMLP(12, kernel=4), Training(epochs=20, learning_rate=3e-2)),
        (planted_attention, AttentionMLP(12, head_dim=4), Training(epochs=30, learning_rate=3e-2)),
        (planted_transformer, TransformerBlock(2), Training(epochs=40, learning_rate=3e-2)),
        (planted_mixture, MixtureOfExperts(5, experts=8), Training(epochs=60, learning_rate=2e-2, batch_tokens=256)),
    ],
    ids=["convolution", "attention", "transformer", "mixture"],
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
