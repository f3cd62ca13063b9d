"""The families of small modules that can stand in for a block, each with its formula and its size.

A family is a small frozen record ("NarrowMLP of width 1024"): it can be compared, printed and stored, and it builds its
module for any block it fits. Notation: block input x ∈ R^d, MLP f(x) = W_down (act(W_gate x) ⊙ W_up x) with m neurons.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .blocks import Block
from .past import Past
from .reports import FitReport

FAMILIES: dict[str, type[Family]] = {}  # every family by name, those of a user too


@dataclass(frozen=True)
class Family:
    """A kind of replacement at a size. A subclass is known by its name from then on, to ``ladder`` and to ``load``.

    The first field of a subclass is its size; other fields need a default.
    """

    looks_back: ClassVar[bool] = False  # whether an output depends on the inputs of earlier tokens

    def __init_subclass__(cls) -> None:
        FAMILIES[cls.__name__] = cls

    def n_params(self, block: Block) -> int:
        """Parameters this replacement of ``block`` would have; raises ValueError where it cannot take the block."""
        raise NotImplementedError

    def n_active_params(self, block: Block) -> int:
        """Parameters that one token passes; fewer than all of them for a mixture of experts."""
        return self.n_params(block)

    def build(self, block: Block) -> nn.Module:
        """A module for ``block`` whose parameters are yet to be set, [..., hidden] → [..., hidden].

        Where the family looks back: [batch, seq_len, hidden], with ``forward(x, past)`` (see :mod:`~mlpreplace.past`).
        """
        raise NotImplementedError

    @classmethod
    def most(cls, block: Block) -> int:
        """The largest size that makes sense for ``block``."""
        return max(1, block.n_params // block.hidden_size)  # one more of any size costs at least a vector

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """The size whose number of parameters is nearest to ``n_params``; a family without a size as it is."""
        if not fields(cls):
            return cls()
        sizes = range(1, cls.most(block) + 1)
        above = bisect_left(sizes, n_params, key=lambda size: cls(size).n_params(block))
        around = sizes[max(0, above - 1) : above + 1]
        return cls(min(around, key=lambda size: abs(cls(size).n_params(block) - n_params)))

    def as_dict(self) -> dict:
        return {"family": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(record: dict) -> Family:
        """The inverse of :meth:`as_dict`; raises ValueError for a family that is not known."""
        options = dict(record)
        name = options.pop("family", None)
        if name not in FAMILIES:
            raise ValueError(f"Unknown family {name!r}; known are {', '.join(FAMILIES)}.")
        return FAMILIES[name](**options)

    def __str__(self) -> str:
        sizes = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{type(self).__name__}({sizes})"


class _Constant(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))  # [hidden]

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand_as(x).clone()  # a layer may add into it


@dataclass(frozen=True)
class Mean(Family):
    """g(x) = b: the mean output. d parameters; what a block is worth when its input is ignored."""

    def n_params(self, block: Block) -> int:
        return block.hidden_size

    def build(self, block: Block) -> nn.Module:
        return _Constant(block.hidden_size)


@dataclass(frozen=True)
class Linear(Family):
    """g(x) = A x + b. d² + d parameters."""

    def n_params(self, block: Block) -> int:
        return block.hidden_size**2 + block.hidden_size

    def build(self, block: Block) -> nn.Module:
        return nn.Linear(block.hidden_size, block.hidden_size)


@dataclass(frozen=True)
class LowRank(Family):
    """g(x) = U V x + b with V: d → r. 2dr + d parameters; above r = d/2 a Linear is smaller and better."""

    rank: int

    @classmethod
    def most(cls, block: Block) -> int:
        return block.hidden_size // 2

    def n_params(self, block: Block) -> int:
        _check_size("rank", self.rank, block.hidden_size, block)
        return 2 * block.hidden_size * self.rank + block.hidden_size

    def build(self, block: Block) -> nn.Module:
        _check_size("rank", self.rank, block.hidden_size, block)
        down = nn.Linear(block.hidden_size, self.rank, bias=False)
        return nn.Sequential(down, nn.Linear(self.rank, block.hidden_size))


def _linear_like(layer: nn.Linear | Conv1D, n_in: int, n_out: int) -> nn.Linear:
    """A layer that computes as ``layer`` does to the last bit, so that it can become a narrow ``layer`` of the architecture."""
    if not isinstance(layer, Conv1D):
        return type(layer)(n_in, n_out, bias=layer.bias is not None)  # Falcon's adds its bias apart
    made = nn.Linear(n_in, n_out)
    made.weight = nn.Parameter(made.weight.detach().T.contiguous().T)  # a Conv1D keeps [in, out] in memory
    return made


class GatedMLP(nn.Module):
    """down(act(gate x) ⊙ up x), or down(act(up x)) where there is no gate: an MLP of the block's form with ``width`` neurons."""

    def __init__(self, block: Block, width: int):
        super().__init__()
        self.gate = None if block.gate is None else _linear_like(block.gate, block.hidden_size, width)
        self.up = _linear_like(block.up, block.hidden_size, width)
        self.down = _linear_like(block.down, width, block.hidden_size)
        self.activation = block.activation

    def neurons(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., width]: what enters the output projection."""
        if self.gate is None:
            return self.activation(self.up(x))
        return self.activation(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.neurons(x))


@dataclass(frozen=True)
class NarrowMLP(Family):
    """Like the block itself, with k < m of its neurons and an output projection solved anew.

    3dk parameters where the block is gated, 2dk where it is not, and the biases the block has.
    """

    width: int

    @classmethod
    def most(cls, block: Block) -> int:
        return block.intermediate_size

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """A block of experts has no neurons of its own to keep: there it is the TwoLayerMLP of that size."""
        return TwoLayerMLP.nearest(block, n_params) if block.holds_experts else super().nearest(block, n_params)

    def n_params(self, block: Block) -> int:
        weights = self._weights(block)
        matrices = 2 if weights.gate is None else 3
        biases = sum(self.width for b in (weights.up_bias, weights.gate_bias) if b is not None)
        biases += block.hidden_size if weights.down_bias is not None else 0
        return matrices * block.hidden_size * self.width + biases

    def build(self, block: Block) -> nn.Module:
        self._weights(block)  # raises where the block has none, or is smaller
        return GatedMLP(block, self.width)

    def _weights(self, block: Block):
        weights = block.weights()
        _check_size("width", self.width, block.intermediate_size, block)
        return weights


class ShallowMLP(nn.Module):
    """W₂ act(W₁ x + b₁) + b₂."""

    def __init__(self, hidden: int, width: int, activation: nn.Module):
        super().__init__()
        self.up = nn.Linear(hidden, width)
        self.down = nn.Linear(width, hidden)
        self.activation = activation

    def neurons(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., width]"""
        return self.activation(self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.neurons(x))


@dataclass(frozen=True)
class TwoLayerMLP(Family):
    """g(x) = W₂ act(W₁x + b₁) + b₂, the shallow MLP: no gate, any block. 2dk + k + d parameters.

    The activation is the block's; SiLU where the block has none of its own (a mixture of experts). Any width, but no more
    than that of a block which is ungated itself.
    """

    width: int

    @classmethod
    def most(cls, block: Block) -> int:
        return block.intermediate_size if block.has_neurons and block.gate is None else super().most(block)

    def n_params(self, block: Block) -> int:
        self._check(block)
        return 2 * block.hidden_size * self.width + self.width + block.hidden_size

    def build(self, block: Block) -> nn.Module:
        self._check(block)
        return ShallowMLP(block.hidden_size, self.width, block.activation or nn.SiLU())

    def _check(self, block: Block) -> None:
        own = block.intermediate_size if block.has_neurons and block.gate is None else None
        _check_size("width", self.width, own, block)


class Sum(nn.Module):
    """The sum of two modules of the same input."""

    def __init__(self, mlp: nn.Module, linear: nn.Module):
        super().__init__()
        self.mlp, self.linear = mlp, linear

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.linear(x)


@dataclass(frozen=True)
class NarrowPlusLinear(Family):
    """A NarrowMLP(k) and a LowRank(r) side by side, solved together. 3dk + 2dr + d parameters (gated)."""

    width: int
    rank: int

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """Rank d/6 in a small module and less in a larger one, where more neurons are worth more; at most half of it.

        Within 3 % of the best split's validation error at 6, 12.5, 25 and 50 % of MLPs of a 135M-parameter Llama. Of experts
        a NarrowMLP's stand-in alone.
        """
        if block.holds_experts:
            return NarrowMLP.nearest(block, n_params)
        rank = block.hidden_size / 6 * (1 - n_params / block.n_params)
        linear = LowRank.nearest(block, min(2 * block.hidden_size * rank, n_params / 2))
        return cls(NarrowMLP.nearest(block, n_params - linear.n_params(block)).width, linear.rank)

    def n_params(self, block: Block) -> int:
        return NarrowMLP(self.width).n_params(block) + LowRank(self.rank).n_params(block)

    def build(self, block: Block) -> nn.Module:
        return Sum(NarrowMLP(self.width).build(block), LowRank(self.rank).build(block))


def ladder(block: Block, shares: Iterable[float], families: Iterable[type[Family]] | None = None) -> list[Family]:
    """Every family (or ``families``) at the sizes nearest to ``shares`` of the block's parameters, each size once.

    A family goes no further than makes sense for it: LowRank to rank d/2, where a Linear is as large.
    """
    shares, found = list(shares), {}
    for family in families or FAMILIES.values():
        sizes = {family.nearest(block, share * block.n_params): None for share in shares}
        found |= {member: None for member in sorted(sizes, key=lambda member: member.n_params(block))}
    return list(found)


def _check_size(name: str, value: int, limit: int | None, block: Block) -> None:
    if value < 1 or (limit is not None and value > limit):
        most = "" if limit is None else f" ≤ {limit}"
        raise ValueError(f"{name}={value} does not fit {block.name}: expected 1 ≤ {name}{most}.")


class Replacement(nn.Module):
    """A module that takes a block's place: its family, its fitted body, and the report of the fit."""

    def __init__(self, family: Family, block: Block):
        super().__init__()
        if family.looks_back and block.kind == "attention":
            raise ValueError(
                f"{family} looks at earlier tokens and cannot replace attention ({block.name}): "
                "use a family that maps each token by itself, such as Linear, LowRank or Mean."
            )
        self.family = family
        self.block_name = block.name
        self.report: FitReport | None = None
        self.past: Past | None = None  # of the sequences being generated, where the family looks back
        self.body = family.build(block).to(device=block.device, dtype=block.dtype).eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.n_active_params = family.n_active_params(block)

    def cache_key(self) -> tuple:
        """What its tensors do not say."""
        return self.family, type(self.family), self.block_name

    @property
    def n_params(self) -> int:
        """Of this replacement alone, also where its body stands in other places, too."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.family.looks_back:
            return self.body(hidden_states, self.past)
        return self.body(hidden_states)

    def extra_repr(self) -> str:
        return f"{self.family} for {self.block_name}, {self.n_params:,} parameters"
