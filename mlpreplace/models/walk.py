"""Batches that go through a model some layers at a time, so that what is known of a layer need not be held for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from torch import Tensor, nn

from .architectures import layer_lists
from .blocks import Block
from .forward import State, copied_state, handing_on, hidden_states, place_of, recording, run_layers, watching
from .inputs import Batch, input_device, on_device


@dataclass
class Seen:
    """A block, or its replacement, in a run of its layer."""

    x: Tensor | None = None  # what enters it, in the shape that the layer gives it
    y: Tensor | None = None  # what leaves it
    after: nn.Module | None = None  # the norm between y and the residual stream (Gemma 2)

    def added(self, y: Tensor) -> Tensor:
        """What a block with the output ``y`` adds to the residual stream, in the shape of ``y``."""
        return y if self.after is None else self.after(y)


class Walk:
    """Batches that go through a model some layers at a time. Between these, their hidden states are on the CPU.

    A run calls the model itself, with all other layers returning hidden states that are known. So a layer gets the masks,
    positions and other inputs that the model makes. Embeddings and the last norm are computed again in each run.

    Args:
        batches: token ids [windows, seq_len], or keyword arguments of the model.

    Raises ValueError for an encoder-decoder, whose layers are two sequences.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor | Batch]):
        stacks = layer_lists(model)
        if len(stacks) > 1:
            raise ValueError(f"{type(model).__name__} has {len(stacks)} stacks of layers: expected a model with a single one.")
        self.model, self.layers = model, stacks[0][2]
        self.batches = [{"input_ids": batch} if isinstance(batch, Tensor) else batch for batch in batches]
        self.device = input_device(model)
        self.at = [0] * len(batches)  # the next layer of each batch
        self.states: list[State | None] = [None] * len(batches)  # before layer 0 None: the model embeds the tokens

    def branch(self) -> Walk:
        """Another walk, from where the batches stand now."""
        other = Walk(self.model, self.batches)
        other.at, other.states = list(self.at), list(self.states)
        return other

    def run(self, batch: int, stop: int, then: int | None = None) -> State:
        """Run a batch through the layers from the next one up to ``stop`` − 1, with the model as it is now.

        Args:
            then: the next layer afterwards, if not ``stop``: layers from there on will run again.

        Returns:
            What the last of these layers returns, the model's own tensor.
        """
        start, then = self.at[batch], stop if then is None else then
        seen, kept = [], {}
        state = None if self.states[batch] is None else copied_state(self.states[batch], self.device)
        with ExitStack() as stack:
            stack.enter_context(watching(self.layers[stop - 1], leave=seen.append))
            stack.enter_context(handing_on(self.layers[:start], lambda: state))
            stack.enter_context(handing_on(self.layers[stop:], lambda: seen[-1]))
            if start < then < stop:
                stack.enter_context(recording(self.layers, [then], kept))
            run_layers(self.model, on_device(self.batches[batch], self.model))
        if then == stop:
            kept[then] = seen[-1]
        if then != start:
            self.at[batch], self.states[batch] = then, copied_state(kept[then], "cpu")
        return seen[-1]

    def logits(self, batch: int) -> Tensor:
        """What the model makes of a batch that has gone through all layers, [windows, seq_len, vocab]."""
        state = copied_state(self.states[batch], self.device)
        with handing_on(self.layers, lambda: state):
            return self.model(**on_device(self.batches[batch], self.model), use_cache=False).logits

    def step(self, batch: int, *blocks: Block, stay: bool = False) -> tuple[State, list[Seen]]:
        """Run the next layer on one batch: what it returns, the model's own tensor, and what ``blocks`` of it did.

        Args:
            stay: whether the batch stays in front of the layer, which will run again.
        """
        seen = [Seen() for _ in blocks]
        with ExitStack() as stack:
            for block, of_block in zip(blocks, seen, strict=True):
                stack.enter_context(_seeing(self.model, block, of_block))
            at = self.at[batch]
            return self.run(batch, at + 1, at if stay else None), seen


def _seeing(model: nn.Module, block: Block, seen: Seen) -> AbstractContextManager:
    """Fill ``seen`` with copies, since a layer may write into its tensors."""
    first, last, host = place_of(model, block)
    return watching(
        first,
        last,
        enter=lambda x, beside: setattr(seen, "x", x.clone()),
        leave=lambda output: setattr(seen, "y", hidden_states(output).clone()),
        follow=lambda module: setattr(seen, "after", module),
        within=host,
    )
