"""A model that runs some layers at a time computes what it computes whole."""

import pytest
import torch
from tiny_models import READS_TOKENS, build, random_windows

from mlpreplace import find_blocks
from mlpreplace.models.forward import hidden_states, place_of, run_layers, watching
from mlpreplace.models.walk import Walk


def seen_in_a_pass(model, block, ids) -> dict[str, torch.Tensor]:
    """Input and output of a block and the residual stream after its layer, in a pass through the whole model."""
    first, last, host = place_of(model, block)
    seen = {}
    with (
        watching(
            first, last, enter=lambda x, _: seen.update(x=x.clone()), leave=lambda y: seen.update(y=hidden_states(y).clone())
        ),
        watching(host, leave=lambda output: seen.update(stream=hidden_states(output).clone())),
    ):
        run_layers(model, {"input_ids": ids})
    return seen


@pytest.mark.parametrize("name", READS_TOKENS)
@torch.no_grad()
def test_a_walk_is_the_model_layer_by_layer(name):
    model, batches = build(name), [random_windows(2), random_windows(3, seed=1)]
    walk = Walk(model, batches)
    for block in find_blocks(model):
        for n, ids in enumerate(batches):
            at, seen = walk.at[n], seen_in_a_pass(model, block, ids)
            for stay in (True, False):
                state, (step,) = walk.step(n, block, stay=stay)
                assert walk.at[n] == at + (not stay)
                assert torch.equal(step.x, seen["x"]) and torch.equal(step.y, seen["y"])
                assert torch.equal(hidden_states(state), seen["stream"])
                assert (step.after is not None) == (name == "gemma2")
                assert torch.equal(step.added(step.y), step.y if step.after is None else step.after(step.y))
            assert torch.equal(hidden_states(walk.states[n]), seen["stream"])
    for n, ids in enumerate(batches):
        assert torch.equal(walk.logits(n), model(ids).logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(layer) for layer in walk.layers)


@pytest.mark.parametrize("name", READS_TOKENS)
@torch.no_grad()
def test_a_walk_of_several_layers_stands_where_it_is_told(name):
    """At any layer of those that ran: the next run gives the bits of a pass, and a branch goes its own way."""
    model, ids = build(name), random_windows(2)
    layers = len(find_blocks(model))
    for stop in range(1, layers + 1):
        for then in range(stop + 1):
            walk = Walk(model, [ids])
            walk.run(0, stop, then)
            branch = walk.branch()
            assert walk.at == branch.at == [then]
            if then < layers:
                walk.run(0, layers)
            assert torch.equal(walk.logits(0), model(ids).logits) and branch.at == [then]


def test_a_walk_needs_a_single_stack():
    with pytest.raises(ValueError, match="2 stacks of layers"):
        Walk(build("t5"), [random_windows(2)])
