"""Nested replacements: one module for several sparsities, switched at run time without another fit.

Neurons are in order of importance. A level is a prefix of them, and one output projection serves all levels. Slimmable networks
(Yu et al. 2019, arXiv 1812.08928) train such prefixes; here they have a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.blocks import Block
from ..models.weights import MLPWeights
from .families import Family, NarrowMLP


class NestedGatedMLP(nn.Module):
    """An MLP that uses its first ``widths[level]`` neurons, by views of its weights.

    At the block's own width it is the block itself, bit for bit: neurons in their original order and the block's output weights.
    (Up to the last bits where one projection of the block is gate and up, as in Phi-3: here they are two.)
    """

    def __init__(self, block: Block, widths: tuple[int, ...], level: int):
        super().__init__()
        weights, hidden, own = block.weights(), block.hidden_size, block.intermediate_size
        widest, narrower = widths[0], [width for width in widths if width < own]

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape))

        self.gate = None if weights.gate is None else zeros(widest, hidden)
        self.up = zeros(widest, hidden)
        self.gate_bias = None if weights.gate_bias is None else zeros(widest)
        self.up_bias = None if weights.up_bias is None else zeros(widest)
        self.down = zeros(hidden, max(narrower, default=0))
        self.down_bias = None if weights.down_bias is None else zeros(len(widths), hidden)  # one for each level
        self.own_down = zeros(hidden, own) if widest == own else None
        place = torch.zeros(own, dtype=torch.long) if widest == own else None
        self.register_buffer("place", place)  # of each of the block's neurons among ours
        self.activation = block.activation
        self.widths, self.level = widths, level

    @property
    def width(self) -> int:
        """Number of neurons in use."""
        return self.widths[self.level]

    @property
    def n_active_params(self) -> int:
        of_neurons = [t[: self.width] for t in (self.gate, self.up, self.gate_bias, self.up_bias) if t is not None]
        return sum(t.numel() for t in of_neurons) + len(self.down) * (self.width + (self.down_bias is not None))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.level, device="cpu")  # in the state dict, so that cached results of two levels differ

    def set_extra_state(self, state: Tensor) -> None:
        self.level = int(state)

    def neurons(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., width]"""
        k = self.width
        up = F.linear(x, self.up[:k], None if self.up_bias is None else self.up_bias[:k])
        if self.gate is None:
            return self.activation(up)
        return self.activation(F.linear(x, self.gate[:k], None if self.gate_bias is None else self.gate_bias[:k])) * up

    def forward(self, x: Tensor) -> Tensor:
        h, bias = self.neurons(x), None if self.down_bias is None else self.down_bias[self.level]
        if self.own_down is not None and self.width == self.own_down.shape[1]:
            return F.linear(h[..., self.place], self.own_down, bias)
        return F.linear(h, self.down[:, : self.width], bias)

    def narrowed(self, level: int) -> dict[str, Tensor]:
        """State dict of the NarrowMLP that equals ``level``, a level below the block's own width."""
        bias = None if self.down_bias is None else self.down_bias[level]
        weights = MLPWeights(self.up, self.down, self.gate, self.up_bias, bias, self.gate_bias)
        return weights.of(torch.arange(self.widths[level], device=self.up.device)).state()


@dataclass(frozen=True)
class NestedMLP(Family):
    """Nested NarrowMLPs: level (sparsity, k) uses the first k neurons, and all levels share one output projection.

    The parameters are those of the widest NarrowMLP; a token uses those of the active level. To these come dk for the widest
    narrower level where a level is the block itself, since no shared projection gives the block exactly, and an output bias for
    each level where the block has one.
    """

    levels: tuple[tuple[float, int], ...]  # (sparsity of the model, width of the block), the lowest sparsity first
    active: float | None = None  # sparsity of the active level; the lowest by default

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple((float(sparsity), int(width)) for sparsity, width in self.levels))  # from json
        ordered = all(s < t and k >= j for (s, k), (t, j) in zip(self.levels, self.levels[1:], strict=False))
        if not self.levels or not ordered:
            raise ValueError(f"Expected (sparsity, width) with rising sparsities and widths that do not rise, got {self.levels}.")
        object.__setattr__(self, "active", self.levels[self.index(self.levels[0][0] if self.active is None else self.active)][0])

    def index(self, sparsity: float) -> int:
        """The level made for ``sparsity``; raises ValueError, with the known sparsities, where there is none."""
        for i, (made_for, _) in enumerate(self.levels):
            if isclose(made_for, sparsity, abs_tol=1e-9):
                return i
        raise ValueError(f"No level was made for sparsity {sparsity}; there are {', '.join(f'{s:g}' for s, _ in self.levels)}.")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width for _, width in self.levels)

    @property
    def width(self) -> int:
        """Of the active level."""
        return self.widths[self.index(self.active)]

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """A single size is a single level, which is a NarrowMLP."""
        return NarrowMLP.nearest(block, n_params)

    def n_params(self, block: Block) -> int:
        own, d = block.intermediate_size, block.hidden_size
        beside = d * max((k for k in self.widths if k < own), default=0) if self.widths[0] == own else 0
        biases = d * (len(self.levels) - 1) if block.weights().down_bias is not None else 0
        return NarrowMLP(self.widths[0]).n_params(block) + beside + biases

    def n_active_params(self, block: Block) -> int:
        return NarrowMLP(self.width).n_params(block)

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the block is smaller
        return NestedGatedMLP(block, self.widths, self.index(self.active))
