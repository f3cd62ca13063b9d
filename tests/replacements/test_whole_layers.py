"""Whole layers removed: the stream passes them unchanged, nothing of them is cached, what stands in is counted."""

import copy

import pytest
import torch
from attention_blocks import assert_alike
from decoding import decoded, logits
from layer_blocks import LAYERS, calibrated, deep, deleted
from tiny_models import CAUSAL, ENCODERS, HIDDEN, build, random_windows

from mlpreplace import Linear, find_blocks, splice, spliced
from mlpreplace.evaluation.speed import cache_bytes, flops, latency, speed_rows
from mlpreplace.fitting.fit import fit
from mlpreplace.models.architectures import layer_lists
from mlpreplace.models.layers import find_layers, find_parts, layer_parameters
from mlpreplace.models.parameters import block_parameters, count_parameters
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.splice import sparsity_of
from mlpreplace.replacements.whole_layers import Removed, Tuned, without_layers

SETS = [(0,), (2, 3), (0, 2, 5), (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_removed_layer_is_one_that_is_deleted(name):
    model, ids = deep(name), random_windows(2, 10)
    for removed in SETS:
        reference = logits(deleted(model, removed), ids)
        with spliced(model, without_layers(model, removed)):
            assert_alike(name, logits(model, ids), reference)
            for prefill in (1, 6):
                assert_alike(name, decoded(model, ids, prefill), reference)
    assert (reference - logits(model, ids)).abs().max() > 0.1


@pytest.mark.parametrize("name", CAUSAL)
def test_a_stand_in_reads_the_stream_and_adds_to_it(name):
    """With weights that double it, the stream that leaves a layer is three times the one that enters."""
    model, ids = deep(name), random_windows(2, 8)
    block = find_layers(model)[2]
    double = Replacement(Linear(), block)
    double.body.load_state_dict({"weight": 2 * torch.eye(HIDDEN), "bias": torch.zeros(HIDDEN)})
    seen = []
    with spliced(model, without_layers(model, [2], {2: double})):
        hooks = [
            block.host.register_forward_pre_hook(lambda m, a, k: seen.append((a or k["hidden_states"],)[0]), with_kwargs=True),
            block.host.register_forward_hook(lambda m, a, output: seen.append(output)),
        ]
        logits(model, ids)
        for hook in hooks:
            hook.remove()
    entering, leaving = (value[0] if isinstance(value, tuple) else value for value in seen)
    torch.testing.assert_close(leaving, 3 * entering)


@pytest.mark.parametrize("name", CAUSAL)
def test_removed_layers_cache_nothing_and_cost_nothing(name):
    model, ids = deep(name), random_windows(2, 9)
    weights = layer_parameters(model)
    assert len(weights) == LAYERS and sum(weights) == block_parameters(model)
    plan = without_layers(model, (1, 4))
    assert sparsity_of(model, plan) == pytest.approx((weights[1] + weights[4]) / sum(weights))
    compressed = splice(model, plan)
    with torch.no_grad():
        dense, cache = (m(ids, use_cache=True).past_key_values for m in (model, compressed))
    stored = [layer.keys.numel() + layer.values.numel() for layer in cache.layers[:LAYERS]]
    assert [i for i, n in enumerate(stored) if n == 0] == [1, 4]
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [9] * LAYERS
    assert cache_bytes(cache) * LAYERS == cache_bytes(dense) * (LAYERS - 2)
    assert flops(compressed, 9) == pytest.approx(flops(deleted(model, (1, 4)), 9))
    assert (
        count_parameters(compressed)["mlp"] + count_parameters(compressed)["attention"] == sum(weights) - weights[1] - weights[4]
    )


def test_norms_of_a_removed_layer_are_gone_and_return(llama):
    before = dict(llama.named_modules())
    n_norms = sum("RMSNorm" in type(m).__name__ for m in llama.modules())
    with spliced(llama, without_layers(llama, [0, 2])):
        assert sum("RMSNorm" in type(m).__name__ for m in llama.modules()) == n_norms - 4
    after = dict(llama.named_modules())
    assert before.keys() == after.keys() and all(after[path] is module for path, module in before.items())


@pytest.mark.parametrize("name", CAUSAL)
def test_parts_with_the_weights_they_had_change_nothing(name):
    model, ids = deep(name, layers=3), random_windows(2, 8)
    dense, parts = logits(model, ids), find_parts(model, 1)
    inside = {id(p) for part in parts for module in part.modules for p in module.parameters()}
    assert inside == {id(p) for p in find_layers(model)[1].host.parameters()}
    plan = {part: Replacement(Tuned(), part) for part in parts}
    assert sparsity_of(model, plan) == 0
    compressed = splice(model, plan)
    assert_alike(name, logits(compressed, ids), dense)
    changed = [p for m in compressed.modules() if isinstance(m, Replacement) for p in m.parameters()]
    assert sum(p.numel() for p in changed) == sum(part.n_params for part in parts)
    changed[0].data += 1
    assert (logits(compressed, ids) - dense).abs().max() > 1e-3


def test_the_size_of_a_model_with_stand_ins(llama):
    """speed_rows and sparsity agree on it."""
    calibration = calibrated(llama, (0.5,), ["uidl_linear"])
    span = next(iter(calibration.spans))
    block = find_layers(llama)[span.start]
    stand_in = fit(block, {block: calibration.spans[span].stream}, Linear())
    plan = without_layers(llama, span.layers, {span.start: stand_in})
    removed = sum(layer_parameters(llama)[i] for i in span.layers) - stand_in.n_params
    assert sparsity_of(llama, plan) == pytest.approx(removed / block_parameters(llama))
    models = {"dense": llama, "spliced": splice(llama, plan)}
    rows = speed_rows(models, latency(models, random_windows(1, 8), decode_tokens=1, rounds=1))
    assert rows[1]["sparsity_achieved"] == pytest.approx(sparsity_of(llama, plan))
    assert rows[1]["kv_cache_fraction"] == pytest.approx(1 - len(span.layers) / 3)


@pytest.mark.parametrize("family", [Removed(), Tuned()])
def test_both_families_have_a_closed_form(captured, family):
    model, blocks, stats = captured
    ids = random_windows(2, 8)
    block, dense, silent = blocks[1], logits(model, ids), copy.deepcopy(model)
    find_blocks(silent)[1].down.weight.data.zero_()
    replacement = fit(block, stats, family)
    assert replacement.n_params == family.n_params(block) == (block.n_params if family == Tuned() else 0)
    with spliced(model, {block: replacement}):
        assert torch.equal(logits(model, ids), dense if family == Tuned() else logits(silent, ids))


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_layers_of_two_stacks_are_refused(name):
    with pytest.raises(ValueError, match="2 stacks of layers"):
        find_layers(build(name))


@pytest.mark.parametrize("name", ENCODERS)
def test_norms_behind_the_sum_go_with_their_layer(name):
    model, ids = build(name).double(), random_windows(3, 10)
    expected = logits(deleted(model, {1}), ids)
    with spliced(model, without_layers(model, [1])):
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-9)
    parts = [part for layer in range(3) for part in find_parts(model, layer)]
    assert sum(part.n_params for part in parts) == sum(p.numel() for p in layer_lists(model)[0][2].parameters())


def test_what_cannot_be_removed(llama):
    stand_in = Replacement(Linear(), find_layers(llama)[1])
    with pytest.raises(ValueError, match="has 3 layers and none of number 3"):
        without_layers(llama, [1, 3])
    with pytest.raises(ValueError, match="none of number -1"):
        without_layers(llama, [-1])
    with pytest.raises(ValueError, match="stand-in for layer 1, which is not removed"):
        without_layers(llama, [0], {1: stand_in})
    llama.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layers.0 holds 'extra' beside attention"):
        find_layers(llama)
