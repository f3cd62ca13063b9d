"""Go through a model one layer at a time, on all windows at once: what a layer does is seen before the next one runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Block
from .capture import _backbone, _tensor
from .models import input_device
from .structure import layer_lists

State = Tensor | tuple  # what a layer hands on: hidden states, or a tuple that starts with them (Falcon)


@dataclass
class Pass:
    """One run of one layer on one batch, and of a block in it (or of what stands in its place)."""

    state: State = ()  # what the layer hands on
    x: Tensor | None = None  # what enters the block, in the shape that the layer gives it
    y: Tensor | None = None  # what leaves it
    after: nn.Module | None = None  # what y passes before it is added to the residual stream (Gemma 2: a norm)

    @property
    def stream(self) -> Tensor:
        """The residual stream that leaves the layer, [batch, seq_len, hidden]."""
        return _tensor(self.state)

    def with_stream(self, stream: Tensor) -> State:
        """What the layer would hand on, had ``stream`` left it."""
        stream = stream.reshape(self.stream.shape).to(self.stream)
        return (stream, *self.state[1:]) if isinstance(self.state, tuple) else stream

    def added(self, y: Tensor) -> Tensor:
        """What a block that gives ``y`` adds to the residual stream, in the shape of ``y``."""
        return y if self.after is None else self.after(y)


class Walk:
    """Batches of windows on their way through a model's layers. The hidden states between two layers are held on the CPU.

    The model itself is called, with every layer but one handing on what is there already: masks, positions and whatever
    else a layer is given are the model's own, and only embeddings and the last norm are computed again for each layer.

    Raises ValueError for an encoder-decoder, whose layers are no single sequence.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]):
        stacks = layer_lists(model)
        if len(stacks) > 1:
            raise ValueError(f"{type(model).__name__} has {len(stacks)} stacks of layers: expected a model with a single one.")
        self.model, self.layers, self.batches = model, stacks[0][2], batches
        self.device = input_device(model)
        self.states: list[State | None] = [None] * len(batches)  # before layer 0: the model's own embeddings

    def step(self, layer: int, batch: int, block: Block | None = None) -> Pass:
        """Run one layer on one batch, as the model stands now, and hold what it hands on. ``block`` of it is watched."""
        seen, state = Pass(), self.states[batch]
        with ExitStack() as stack:
            stack.enter_context(_alone(self.layers, layer, None if state is None else moved(state, self.device), seen))
            if block is not None:
                _watch(self.model, block, seen, stack)
            _backbone(self.model)(self.batches[batch].to(self.device), None)
        self.states[batch] = moved(seen.state, "cpu")
        return seen


def moved(state: State, device: torch.device | str) -> State:
    """A copy on ``device``; a copy in any case, since layers may write into what they are given."""
    hidden = _tensor(state).to(device, copy=True)
    return (hidden, *state[1:]) if isinstance(state, tuple) else hidden


@contextmanager
def _alone(layers: nn.ModuleList, index: int, state: State | None, seen: Pass) -> Iterator[None]:
    """Let the layers before ``index`` hand on ``state``, and those behind it what it gave."""
    others = [layer for i, layer in enumerate(layers) if i != index]
    own = [vars(layer).get("forward") for layer in others]  # where a device-placement library has set one
    handle = layers[index].register_forward_hook(lambda module, args, output: setattr(seen, "state", output))
    for i, layer in enumerate(layers):
        if i != index:
            layer.forward = (lambda *args, **kwargs: state) if i < index else (lambda *args, **kwargs: seen.state)
    try:
        yield
    finally:
        handle.remove()
        for layer, forward in zip(others, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _watch(model: nn.Module, block: Block, seen: Pass, hooks: ExitStack) -> None:
    first, last = model.get_submodule(block.paths[0]), model.get_submodule(block.paths[-1])
    host = model.get_submodule(f"{block.stack}.{block.layer}")
    leaving: list[Tensor] = []

    def enter(module, args, kwargs) -> None:
        seen.x = (args[0] if args else kwargs["hidden_states"]).clone()

    def leave(module, args, output) -> None:
        leaving.append(_tensor(output))
        seen.y = leaving[-1].clone()  # the layer may add into it (Falcon)

    def follow(module, args) -> None:
        if seen.after is None and leaving and args and args[0] is leaving[-1]:
            seen.after = module

    hooks.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
    hooks.callback(last.register_forward_hook(leave).remove)
    inside = {host, *first.modules(), *last.modules()}
    for module in host.modules():
        if module not in inside:
            hooks.callback(module.register_forward_pre_hook(follow).remove)
