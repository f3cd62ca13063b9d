"""Modules that several families are made of. Each maps [..., hidden] to [..., hidden]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.blocks import Block


class Constant(nn.Module):
    """The same output for every token."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))  # [hidden]

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand_as(x).clone()  # a layer may add into it


class Sum(nn.Module):
    """The sum of two modules of the same input."""

    def __init__(self, mlp: nn.Module, linear: nn.Module):
        super().__init__()
        self.mlp, self.linear = mlp, linear

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.linear(x)


class MLP(nn.Module):
    """down(act(gate x) ⊙ up x), or down(act(up x)) without a gate."""

    def __init__(self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, activation: nn.Module):
        super().__init__()
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def neurons(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., width]: what enters the output projection."""
        if self.gate is None:
            return self.activation(self.up(x))
        return self.activation(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.neurons(x))


class FusedMLP(nn.Module):
    """An :class:`MLP` whose gate and up are one projection, the gate first (Phi-3). Last bits of a product depend on that.

    It reads the state dict of an :class:`MLP`, too.
    """

    def __init__(self, gate_up: nn.Linear, down: nn.Linear, activation: nn.Module):
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def neurons(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., width]: what enters the output projection."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.activation(gate) * up

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.neurons(x))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest) -> None:
        for leaf in ("weight", "bias"):
            halves = [state.pop(f"{prefix}{half}.{leaf}", None) for half in ("gate", "up")]
            if None not in halves:
                state[f"{prefix}gate_up.{leaf}"] = torch.cat(halves)
        super()._load_from_state_dict(state, prefix, *rest)


def mlp_like(block: Block, width: int) -> MLP | FusedMLP:
    """An MLP of the block's own form with ``width`` neurons."""
    d = block.hidden_size
    if block.gate is not None and block.gate is block.up:
        return FusedMLP(_linear_like(block.up, d, 2 * width), _linear_like(block.down, width, d), block.activation)
    gate = None if block.gate is None else _linear_like(block.gate, d, width)
    return MLP(gate, _linear_like(block.up, d, width), _linear_like(block.down, width, d), block.activation)


def _linear_like(layer: nn.Linear | Conv1D, n_in: int, n_out: int) -> nn.Linear:
    """A layer that computes as ``layer`` does to the last bit, so that it can become a narrow ``layer`` of the architecture."""
    if not isinstance(layer, Conv1D):
        return type(layer)(n_in, n_out, bias=layer.bias is not None)  # the type matters: Falcon's adds its bias separately
    made = nn.Linear(n_in, n_out)
    made.weight = nn.Parameter(made.weight.detach().T.contiguous().T)  # a Conv1D stores [in, out]
    return made
