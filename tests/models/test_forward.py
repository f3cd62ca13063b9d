"""Hooks that see a module, layers that hand on what they are given, and a model that runs one layer at a time."""

import pytest
import torch
from tiny_models import MODELS, batches_for, build, random_windows
from torch import nn

from mlpreplace import find_blocks
from mlpreplace.models.architectures import layer_lists
from mlpreplace.models.forward import (
    copied_state,
    eval_mode,
    handing_on,
    hidden_states,
    place_of,
    recording,
    run_layers,
    token_rows,
    watching,
)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Scaled(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, hidden_states, other=None, *, scale: float = 1.0):
        return self.factor * scale * hidden_states


class Pair(nn.Module):
    """As attention: a module of a module, hidden states first in a tuple."""

    def __init__(self):
        super().__init__()
        self.first, self.last = Scaled(2.0), Scaled(3.0)

    def forward(self, x):
        return self.last(self.first(x)), "weights"


X = torch.arange(6.0).view(1, 2, 3)


# watching


def test_what_enters_and_what_leaves():
    pair, seen = Pair(), []
    with watching(pair.first, pair.last, enter=lambda x, beside: seen.append((x, beside)), leave=lambda y: seen.append(y)):
        pair(X)
    (x, beside), y = seen
    assert x is X and beside == ((), {}) and torch.equal(y, 6 * X)


@pytest.mark.parametrize(
    ("call", "beside"),
    [
        (lambda module: module(X, "other", scale=2.0), (("other",), {"scale": 2.0})),
        (lambda module: module(hidden_states=X, scale=2.0), ((), {"scale": 2.0})),
    ],
)
def test_hidden_states_enter_by_position_or_by_name(call, beside):
    module, seen = Scaled(2.0), []
    with watching(module, enter=lambda *entered: seen.append(entered)):
        call(module)
    assert seen[0][0] is X and seen[0][1] == beside


def test_what_leave_returns_takes_the_place_of_the_output():
    module = Scaled(2.0)
    with watching(module, leave=lambda output: output + 1):
        assert torch.equal(module(X), 2 * X + 1)
    with watching(module, leave=lambda output: None):
        assert torch.equal(module(X), 2 * X)
    assert torch.equal(module(X), 2 * X)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("name", MODELS)
def test_follow_finds_the_norm_after_a_block_and_nothing_elsewhere(name, kind, replaced):
    model, found = build(name), {}
    for block in find_blocks(model, kind):
        first, last, host = place_of(model, block)
        other = (lambda output: copied_state(output)) if replaced else None
        with torch.no_grad(), watching(first, last, leave=other, follow=lambda m, b=block: found.update({b: m}), within=host):
            run_layers(model, batches_for(name)[0])
    after = {"mlp": "post_feedforward_layernorm", "attention": "post_attention_layernorm"}[kind]
    if name == "glm4":
        after = {"mlp": "post_mlp_layernorm", "attention": "post_self_attn_layernorm"}[kind]
    if name.startswith(("gemma2", "gemma3")) or name == "glm4":
        assert found == {block: getattr(block.host, after) for block in find_blocks(model, kind)}
    else:
        assert not found


@pytest.mark.parametrize("where", ["enter", "leave", "follow", "within"])
def test_hooks_are_gone_after_an_exception(where):
    model = build("gemma2")
    block = find_blocks(model)[1]
    before = hooks(model)

    def raising(*_):
        raise KeyboardInterrupt

    callbacks = {"enter": lambda *_: None, "leave": lambda *_: None, "follow": lambda *_: None}
    with pytest.raises(KeyboardInterrupt):
        with watching(block.modules[0], **callbacks | ({} if where == "within" else {where: raising}), within=block.host):
            assert hooks(model) > before + 2
            model(random_windows(2))
            raising()
    assert hooks(model) == before


# handing on


def test_layers_hand_on_what_they_are_told(llama):
    layers, state = llama.model.layers, torch.zeros(2, 12, 32)
    dense = llama(random_windows(2)).logits
    with handing_on(layers, lambda: state):
        assert torch.equal(llama(random_windows(2)).logits, llama.lm_head(llama.model.norm(state)))
    assert not any("forward" in vars(layer) for layer in layers)
    assert torch.equal(llama(random_windows(2)).logits, dense)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_forward_of_the_instance_comes_back(error, llama):
    """A library that places layers on devices sets one."""
    layer = llama.model.layers[1]
    own = layer.forward = lambda *args, **kwargs: 2 * type(layer).forward(layer, *args, **kwargs)
    try:
        with handing_on(llama.model.layers[:2], lambda: X):
            assert layer.forward is not own and layer(0) is X
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert layer.forward is own
    assert "forward" not in vars(llama.model.layers[0])


# recording, and running from a layer on


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt2", "bert"])
def test_a_model_goes_on_from_what_was_recorded(name):
    model, ids = build(name), random_windows(2)
    (_, _, layers), states = layer_lists(model)[0], {}
    with torch.no_grad():
        with recording(layers, [1, 2], states):
            dense = model(ids).logits
        assert list(states) == [1, 2] and not hooks(model)
        kept = {depth: hidden_states(state).clone() for depth, state in states.items()}
        for depth, state in states.items():
            with handing_on(layers[:depth], lambda state=state: copied_state(state)):
                assert torch.equal(model(ids).logits, dense)
            with handing_on(layers[:depth], lambda state=state: copied_state(state, "cpu")):
                assert torch.equal(model(0 * ids + 5).logits, dense)  # the tokens do not matter any more
            assert torch.equal(hidden_states(state), kept[depth])


def test_a_copied_state_is_a_copy_of_the_hidden_states():
    for state in (X, (X, "cache")):
        copy = copied_state(state)
        assert type(copy) is type(state) and hidden_states(copy) is not X and torch.equal(hidden_states(copy), X)
        assert hidden_states(copy).data_ptr() != X.data_ptr()
    assert copy[1] == "cache"


# one layer at a time


@torch.no_grad()
# the rest


def test_every_module_is_in_its_mode_again(llama):
    llama.train()
    llama.model.layers[1].eval()
    before = {name: module.training for name, module in llama.named_modules()}
    with pytest.raises(KeyboardInterrupt), eval_mode(llama):
        assert not any(module.training for module in llama.modules())
        raise KeyboardInterrupt
    assert {name: module.training for name, module in llama.named_modules()} == before


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_rows_are_tokens_in_at_least_single_precision(dtype, expected):
    keep = torch.tensor([[True, False]])
    assert torch.equal(token_rows(X.to(dtype)), X[0].to(expected)) and token_rows(X.to(dtype)).dtype == expected
    assert torch.equal(token_rows(X.to(dtype), keep), X[0, :1].to(expected))


def test_a_block_of_another_model_has_no_place(llama, gpt2):
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no module model\.layers\.0\.mlp"):
        place_of(gpt2, find_blocks(llama)[0])
