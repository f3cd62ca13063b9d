"""Replacements in and out of a model: nothing changes that should not."""

import pytest
import torch
from conftest import capture_quietly
from saved_models import address
from tiny_models import build, random_windows

from mlpreplace import Linear, LowRank, Mean, NarrowMLP, fit, splice, spliced
from mlpreplace.replacements.splice import sparsity_of

FAMILIES = [Mean(), Linear(), LowRank(4), NarrowMLP(24)]


def logits(model, windows) -> torch.Tensor:
    with torch.no_grad():
        return model(windows).logits


def modules_of(model) -> dict[str, torch.nn.Module]:
    return dict(model.named_modules())


def plan_for(model, family=None, **options):
    blocks, stats = capture_quietly(model, random_windows(), **options)
    return {b: fit(b, stats, family or NarrowMLP(24)) for b in blocks}


@pytest.fixture
def plan(llama):
    return plan_for(llama)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "mixtral"])
def test_a_replacement_is_what_the_layer_runs(name, family, windows):
    """The output of the replaced block's last module is the replacement's output for the block's input."""
    if name == "mixtral" and family == NarrowMLP(24):
        family = LowRank(8)
    model = build(name)
    plan = plan_for(model, family)
    block, small = list(plan.items())[1]
    dense, seen = logits(model, windows), {}
    with spliced(model, {block: small}):
        small.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
        model.get_submodule(block.paths[-1]).register_forward_hook(lambda module, args, output: seen.update(last=output))
        changed = logits(model, windows)
    assert torch.equal(seen["last"], small.body(seen["x"]))
    assert (changed - dense).abs().max() > 1e-2
    assert torch.equal(logits(model, windows), dense)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_contexts_nest(name, windows):
    """An inner plan may replace again what an outer one replaced."""
    model = build(name)
    outer, inner = plan_for(model), plan_for(model, Linear())
    block = list(inner)[1]
    before = modules_of(model)
    with spliced(model, outer):
        alone = logits(model, windows)
        with spliced(model, {block: inner[block]}):
            assert model.get_submodule(block.name) is inner[block]
        assert model.get_submodule(block.name) is outer[block]
        assert torch.equal(logits(model, windows), alone)
    assert all(module is before[path] for path, module in modules_of(model).items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma"])
def test_splice_leaves_the_dense_model_alone(name, windows):
    model = build(name)
    plan, dense, before = plan_for(model), logits(model, windows), modules_of(model)
    compressed = splice(model, plan)
    assert all(module is before[path] for path, module in modules_of(model).items())
    assert torch.equal(logits(model, windows), dense)
    with spliced(model, plan):
        assert torch.equal(logits(compressed, windows), logits(model, windows))
    removed = sum(b.n_params - r.n_params for b, r in plan.items())
    assert sum(p.numel() for p in compressed.parameters()) == sum(p.numel() for p in model.parameters()) - removed


@pytest.mark.parametrize("tied", [True, False])
def test_splice_shares_untouched_weights(tied):
    model = build("llama", tie_word_embeddings=tied)
    plan = plan_for(model)
    del plan[list(plan)[0]]
    compressed = splice(model, plan)
    own, theirs = dict(model.named_parameters()), dict(compressed.named_parameters())
    shared = own.keys() & theirs.keys()
    assert any(".layers.0.mlp." in name for name in shared)
    assert not any(".layers.1.mlp." in name for name in shared)
    assert all(own[name] is not theirs[name] and address(own[name]) == address(theirs[name]) for name in shared)
    assert (compressed.lm_head.weight is compressed.model.embed_tokens.weight) == tied


def another_depth():
    return build("llama", num_hidden_layers=2)


def another_architecture():
    return build("gpt2")


def another_size():
    return build("llama", hidden_size=64)


@pytest.mark.parametrize("other", [another_depth, another_architecture, another_size])
def test_a_plan_for_another_model_changes_nothing(other, plan):
    model = other()
    before = modules_of(model)
    for act in (splice, lambda model, plan: spliced(model, plan).__enter__()):
        with pytest.raises(ValueError):
            act(model, plan)
        assert all(module is before[path] for path, module in modules_of(model).items())


def test_a_replacement_for_another_block_is_refused(llama, plan):
    first, second = list(plan)[:2]
    with (
        pytest.raises(ValueError, match=r"for model\.layers\.0\.mlp was fitted to model\.layers\.1\.mlp"),
        spliced(llama, {first: plan[second]}),
    ):
        pass


def test_sparsity_by_hand(llama, plan):
    """3 layers: MLP 3·32·48, attention 4·32²; two blocks narrowed to 24 neurons, one replaced by its mean."""
    dense = 3 * (3 * 32 * 48 + 4 * 32 * 32)
    blocks = list(plan)
    mixed = dict(plan) | {blocks[2]: plan_for(llama, Mean())[blocks[2]]}
    removed = 2 * (3 * 32 * 24) + (3 * 32 * 48 - 32)
    assert sparsity_of(llama, mixed) == pytest.approx(removed / dense)
    assert sparsity_of(llama, {}) == 0


def test_what_a_replacement_adds_counts_against_it():
    model = build("llama", intermediate_size=8)
    block, small = next(iter(plan_for(model, Linear()).items()))
    assert small.n_params == 32 * 32 + 32 > block.n_params == 3 * 32 * 8
    assert sparsity_of(model, {block: small}) < 0
