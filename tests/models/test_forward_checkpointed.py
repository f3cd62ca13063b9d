"""Layers whose insides are computed again in the backward pass: the same losses and gradients, in less memory."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import capture_quietly
from tiny_models import build, random_windows

from mlpreplace import AttentionMLP, ConvMLP, NarrowMLP, fit, spliced
from mlpreplace.models.architectures import layer_lists
from mlpreplace.models.forward import checkpointed, hidden_states, with_hidden_states

WINDOWS = random_windows(3)


def layers_of(model) -> list:
    return list(layer_lists(model)[0][2])


def loss_and_gradients(model, check: bool = False) -> tuple:
    """Of all parameters that require gradients."""
    model.zero_grad()
    if check:
        with checkpointed(layers_of(model)):
            loss = model(WINDOWS, labels=WINDOWS, use_cache=False).loss
    else:
        loss = model(WINDOWS, labels=WINDOWS, use_cache=False).loss
    loss.backward()  # also after the context
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(one: tuple, other: tuple) -> None:
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


def kept(model, check: bool) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if check:
            with checkpointed(layers_of(model)):
                loss = model(WINDOWS, use_cache=False).logits.sum()
        else:
            loss = model(WINDOWS, use_cache=False).logits.sum()
    del loss
    return sum(nbytes for address, nbytes in seen.items() if address not in weights)


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "gemma2", "mixtral"])
def test_losses_and_gradients_are_the_same(name):
    model = build(name)
    kinds = [type(layer) for layer in layers_of(model)]
    assert_equal(loss_and_gradients(model, check=True), loss_and_gradients(model))
    assert [type(layer) for layer in layers_of(model)] == kinds
    with torch.no_grad(), checkpointed(layers_of(model)):
        inside = model(WINDOWS).logits
    assert torch.equal(inside, model(WINDOWS).logits)


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_it_keeps_the_inputs_of_layers_alone(name):
    model = build(name)
    states = len(layers_of(model)) * WINDOWS.numel() * model.config.hidden_size * 4
    assert kept(model, check=False) > 5 * states
    assert kept(model, check=True) < 2 * states + WINDOWS.numel() * model.config.vocab_size * 4


def test_after_an_error_layers_are_as_they_were(llama):
    kinds = [type(layer) for layer in layers_of(llama)]
    with pytest.raises(KeyError), checkpointed(layers_of(llama)):
        raise KeyError
    assert [type(layer) for layer in layers_of(llama)] == kinds


@pytest.mark.parametrize(("name", "attention"), [("llama", "self_attn"), ("falcon", "self_attention")])
def test_hooks_run_in_both_passes(name, attention):
    """One that replaces the output of attention, and one that records inputs of a layer."""
    model, entered, left = build(name), [], []
    layer = layers_of(model)[1]

    def leave(module, args, output):
        left.append(None)
        return with_hidden_states(output, 2 * hidden_states(output))

    layer.register_forward_pre_hook(lambda module, args: entered.append(None))
    layer.get_submodule(attention).register_forward_hook(leave)
    expected = loss_and_gradients(model)
    assert (len(entered), len(left)) == (1, 1)
    assert_equal(loss_and_gradients(model, check=True), expected)
    assert (len(entered), len(left)) == (3, 3)


def test_forwards_on_the_instance_are_used_and_stay(llama):
    """As accelerate sets them, on a layer and inside of it."""
    expected, calls = loss_and_gradients(llama), []

    def forward(module, own, *args, **kwargs):
        calls.append(module)
        return own(*args, **kwargs)

    layer = layers_of(llama)[1]
    for module in (layer, layer.mlp):
        module.forward = functools.partial(forward, module, module.forward)
    own = layer.forward
    assert_equal(loss_and_gradients(llama, check=True), expected)
    assert calls == [layer, layer.mlp] * 2 and layer.forward is own


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("family", [ConvMLP(16), AttentionMLP(16, 8)], ids=str)
def test_replacements_that_look_back_know_their_sequences_in_both_passes(name, family):
    """Hooks of their layer tell them; OPT flattens the tokens."""
    model = build(name)
    blocks, stats = capture_quietly(model, random_windows(8), sample_windows=None)
    plan = {blocks[0]: fit(blocks[0], stats, family), blocks[1]: fit(blocks[1], stats, NarrowMLP(16))}
    for replacement in plan.values():
        replacement.requires_grad_(True)
    with spliced(model, plan):
        assert_equal(loss_and_gradients(model, check=True), loss_and_gradients(model))
