"""Attention replaced by a map of each token: captured, fitted, spliced, saved; and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from attention_blocks import SETS, attention_plan, both_kinds, precise
from conftest import capture_quietly, captured_whole, statistics_of
from decoding import logits
from tiny_models import CAUSAL, HIDDEN, SINGLE, build, random_windows
from torch import nn
from transformers.pytorch_utils import Conv1D

from mlpreplace import (
    AttentionMLP,
    ConvMLP,
    Linear,
    LowRank,
    Mean,
    NarrowMLP,
    TransformerBlock,
    capture,
    compare,
    find_blocks,
    fit,
    register_architecture,
    splice,
    spliced,
)
from mlpreplace.evaluation.perplexity import measure
from mlpreplace.replacements.splice import replacements_of, sparsity_of


def zeroed(replacement):
    for parameter in replacement.parameters():
        parameter.zero_()
    return replacement


def output_projection(attention: nn.Module) -> nn.Module:
    return [m for m in attention.modules() if isinstance(m, nn.Linear | Conv1D)][-1]


# capture and fit


def test_both_kinds_in_one_pass(llama, windows):
    both = [*find_blocks(llama), *find_blocks(llama, "attention")]
    together = capture(llama, both, windows, moments=("input",), validation_windows=2, progress=False)
    for kind in ("mlp", "attention"):
        blocks, apart = capture_quietly(llama, windows, kind, moments=("input",), sample_windows=4)
        for block in blocks:
            for name in ("sum_x", "sum_y", "xx", "xy"):
                assert torch.equal(getattr(together[block], name), getattr(apart[block], name))
            for part in ("train", "validation"):
                for name in ("x", "y", "residual_energy", "mask"):
                    assert torch.equal(getattr(getattr(together[block], part), name), getattr(getattr(apart[block], part), name))


@pytest.mark.parametrize("name", CAUSAL)
def test_more_parameters_fit_attention_better(name):
    blocks, stats = captured_whole(build(name), random_windows(10, 24), kind="attention", moments=("input",))
    for block in blocks:
        families = [Mean(), LowRank(2), LowRank(8), Linear()]
        errors = [fit(block, stats, family, ridge=1e-6).report.train.pooled for family in families]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", CAUSAL)
def test_attention_to_a_single_token_is_linear(name):
    """Softmax over one key is 1, so that y = W_o W_v x + b: the fit finds it, and the model is the dense one on such windows."""
    model, ids = precise(name), torch.randperm(101, generator=torch.Generator().manual_seed(0))[:, None]
    blocks, stats = capture_quietly(model, ids, "attention", moments=("input",), sample_windows=1)
    plan = {block: fit(block, stats, Linear(), ridge=1e-9) for block in blocks}
    dense, longer = logits(model, ids), random_windows(2, 6)
    attended = logits(model, longer)
    with spliced(model, plan):
        torch.testing.assert_close(logits(model, ids), dense, rtol=0, atol=1e-2 if name in SINGLE else 1e-4)
        assert (logits(model, longer) - attended).abs().max() > 0.1


def test_sizes_of_families_for_attention():
    block = find_blocks(build("qwen2"), "attention")[0]  # two key-value heads of eight channels, biases of q, k and v
    d = HIDDEN
    assert block.n_params == 2 * d * d + 2 * d * 16 + d + 2 * 16
    assert (Mean().n_params(block), Linear().n_params(block)) == (d, d * d + d)
    assert LowRank.most(block) == d // 2
    assert LowRank(4).n_params(block) == 2 * d * 4 + d
    assert LowRank.nearest(block, 2 * d * 5.4 + d) == LowRank(5)
    with pytest.raises(ValueError, match=r"rank=33 does not fit model\.layers\.0\.self_attn"):
        LowRank(33).n_params(block)


# splicing


@pytest.mark.parametrize("name", CAUSAL)
def test_a_zero_map_is_attention_whose_output_projection_is_zero(name, windows):
    model = build(name)
    dense, silent = logits(model, windows), copy.deepcopy(model)
    for block in find_blocks(silent, "attention"):
        for parameter in output_projection(block.modules[0]).parameters():
            parameter.data.zero_()
    with spliced(model, {b: zeroed(r) for b, r in attention_plan(model).items()}):
        assert torch.equal(logits(model, windows), logits(silent, windows))
    assert (logits(silent, windows) - dense).abs().max() > 0.1


def test_a_zero_map_in_an_image_model():
    """Neither causal nor cached."""
    model = build("vit")
    pixels, silent = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), copy.deepcopy(model)
    for block in find_blocks(silent, "attention"):
        output_projection(block.modules[0]).requires_grad_(False).weight.zero_()
        output_projection(block.modules[0]).bias.zero_()
    x = torch.randn(4, 5, HIDDEN)
    blocks = find_blocks(model, "attention")
    stats = {b: statistics_of(x.flatten(0, 1).double(), x.flatten(0, 1).double()) for b in blocks}
    with torch.no_grad(), spliced(model, {b: zeroed(fit(b, stats, Mean())) for b in blocks}):
        assert torch.equal(model(pixels).logits, silent(pixels).logits)


def test_contexts_nest(llama, windows):
    outer, inner = attention_plan(llama), attention_plan(llama, Mean(), layers=(1,))
    with spliced(llama, outer):
        alone = logits(llama, windows)
        with spliced(llama, inner):
            changed = logits(llama, windows)
        assert torch.equal(logits(llama, windows), alone)
    with spliced(llama, {**outer, **inner}):
        assert torch.equal(logits(llama, windows), changed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_spliced_copy_has_what_is_left_and_what_was_put_in(name, windows):
    model = build(name)
    plan, dense = both_kinds(model), logits(model, windows)
    compressed = splice(model, plan)
    with spliced(model, plan):
        assert torch.equal(logits(compressed, windows), logits(model, windows))
    assert torch.equal(logits(model, windows), dense)
    removed = sum(b.n_params - r.n_params for b, r in plan.items())
    norms = sum(p.numel() for b in plan for n, p in b.modules[0].named_parameters() if "norm" in n)
    assert sum(p.numel() for p in compressed.parameters()) == sum(p.numel() for p in model.parameters()) - removed - norms


def test_sparsity_counts_both_kinds(llama):
    """3 layers: MLP 3·32·48, attention 4·32²; one attention is a Linear, one MLP and another attention are their means."""
    plan = attention_plan(llama, Mean(), layers=(1,)) | attention_plan(llama, Linear(), layers=(2,))
    blocks, stats = capture_quietly(llama, random_windows())
    plan[blocks[1]] = fit(blocks[1], stats, Mean())
    removed = (4 * 32**2 - 32) + (4 * 32**2 - 32**2 - 32) + (3 * 32 * 48 - 32)
    assert sparsity_of(llama, plan) == pytest.approx(removed / (3 * (3 * 32 * 48 + 4 * 32**2)))


def test_a_compressed_model_can_be_captured_and_replaced_again(llama, windows):
    """Later blocks are fitted to what they see once earlier ones are replaced."""
    compressed = splice(llama, attention_plan(llama, layers=(0,)))
    blocks, stats = capture_quietly(compressed, windows, "attention", moments=("input",))
    again = splice(compressed, {b: fit(b, stats, Mean()) for b in blocks[:2]})
    assert {n: r.family for n, r in replacements_of(again).items()} == {b.name: Mean() for b in blocks[:2]}
    assert torch.isfinite(logits(again, windows)).all()


def test_prefix_sharing_gives_what_a_direct_pass_gives(llama):
    ids = random_windows(4, 12, seed=10)
    plans = {layers: attention_plan(llama, layers=layers) for layers in SETS}
    shared = compare(llama, plans, ids, progress=False)
    for layers, plan in plans.items():
        with spliced(llama, plan):
            assert shared[layers].nll == pytest.approx(measure(llama, ids, progress=False).nll, rel=1e-6)


# what is refused


@pytest.mark.parametrize(
    "name, path, reason",
    [
        ("bert", r"bert\.encoder\.layer\.0\.attention", "holds more than attention"),
        ("t5", r"encoder\.block\.0\.layer\.0\.SelfAttention", "encoder-decoder"),
        ("marian", r"model\.encoder\.layers\.0\.self_attn", "encoder-decoder"),
    ],
)
def test_attention_that_cannot_be_replaced(name, path, reason, registry):
    (bert,) = registry["bert"]
    register_architecture("bert", replace(bert, attention=("attention",)))  # with residual and norm
    model = build(name)
    block, x = find_blocks(model, "attention")[0], torch.randn(40, HIDDEN, dtype=torch.float64)
    plan, before = {block: fit(block, {block: statistics_of(x, x)}, Mean())}, dict(model.named_modules())
    with pytest.raises(ValueError, match=f"{path}.*{reason}"):
        splice(model, plan)
    assert all(module is before[path] for path, module in model.named_modules())


@pytest.mark.parametrize("family", [ConvMLP(8), AttentionMLP(8, head_dim=4), TransformerBlock(2)])
def test_what_looks_back_cannot_replace_attention(family, llama, windows):
    blocks, stats = captured_whole(llama, windows, kind="attention", moments=("input",))
    with pytest.raises(ValueError, match=r"cannot replace attention \(model\.layers\.0\.self_attn\)"):
        fit(blocks[0], stats, family)


def test_neurons_cannot_replace_attention(llama, windows):
    blocks, stats = capture_quietly(llama, windows, "attention", moments=("input",))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn \(attention\) is no up/down MLP"):
        fit(blocks[0], stats, NarrowMLP(8))
