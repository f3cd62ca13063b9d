"""Whether an MLP computes what its weights say, seen on a few tokens of a pass.

Fits read both: the neurons and outputs that a pass collects, and the weights that :meth:`~mlpreplace.models.Block.weights` gives.
A hook, an adapter or a forward that was replaced changes the one and not the other.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.blocks import Block, block_neurons
from ..models.forward import State, hidden_states, watching
from .collect import Collector

TOKENS = 8
# of ‖difference‖ / ‖what was captured‖: some ten times what rounding leaves on random models, TF32 products included
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class WeightCheck:
    """Compares, in the first batch with a real token, what a block computes with what its weights say.

    A block without neurons has nothing to compare. While hooks are in place, ValueError names the block whose weights are not
    what it computes. Activations that are not finite are left to others to refuse.
    """

    def __init__(self, collector: Collector, block: Block):
        self.collector, self.block = collector, block
        self.seen: dict[str, Tensor] = {}  # {name: [tokens, width]} of the running batch
        self.precisions: set[torch.dtype] = set()
        self.done = not block.has_neurons

    def watch(self, hooks: ExitStack) -> None:
        """Enter into ``hooks`` all that see the running batch."""
        if not self.done:
            first, last = self.block.modules[0], self.block.modules[-1]
            hooks.enter_context(watching(first, last, enter=lambda x, _: self._keep("x", x), leave=self._leave))
            hooks.enter_context(watching(self.block.down, enter=lambda h, _: self._keep("h", h)))

    def _keep(self, name: str, hidden: Tensor) -> None:
        if not self.done:
            rows = self.collector.rows(self.block.stack, hidden)
            few = rows[:: max(1, len(rows) // TOKENS)][:TOKENS]
            self.seen[name] = few.to(self.block.device, copy=True)  # a layer is free to write into what it was given
            self.precisions.add(hidden.dtype)

    def _leave(self, output: State) -> None:
        if self.done:
            return
        self._keep("y", hidden_states(output))
        if "h" not in self.seen:
            raise ValueError(
                f"{self.block.name} does not call its output projection as a module: its neurons cannot be captured."
            )
        x, h, y = (self.seen[name] for name in "xhy")
        weights = self.block.weights()
        self.done = len(x) > 0
        self.precisions |= {weights.up.dtype, weights.down.dtype}
        bias = None if weights.down_bias is None else weights.down_bias.to(h)
        self._compare("up, gate and activation", h, block_neurons(self.block, x))
        self._compare("down", y, F.linear(h, weights.down.to(h), bias))

    def _compare(self, what: str, captured: Tensor, computed: Tensor) -> None:
        error, size = (computed - captured).norm(), captured.norm()
        tolerance = max(TOLERANCE[precision] for precision in self.precisions)
        if torch.isfinite(captured).all() and not error <= tolerance * size:
            raise ValueError(
                f"{self.block.name}: its weights are not what it computes. What {what} give differs by {float(error / size):.1%} "
                "from what their weights say: a hook, an adapter, a scale, or a forward that was replaced changes it. Fits read "
                "the weights: remove it, or merge it into them."
            )
