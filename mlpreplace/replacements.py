"""The families of small modules that can stand in for a block, each with its formula and its size.

A family is a small frozen record ("NarrowMLP of width 1024"): it can be compared, printed and stored, and it builds its
module for any block it fits. Notation: block input x ∈ R^d, MLP f(x) = W_down (act(W_gate x) ⊙ W_up x) with m neurons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from .blocks import Block


@dataclass(frozen=True)
class Family:
    """A kind of replacement at a size."""

    def n_params(self, block: Block) -> int:
        """Parameters this replacement of ``block`` would have; raises ValueError where it cannot take the block."""
        raise NotImplementedError

    def build(self, block: Block) -> nn.Module:
        """An unfitted module for ``block``, [..., hidden] → [..., hidden]."""
        raise NotImplementedError

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

    def n_params(self, block: Block) -> int:
        _check_size("rank", self.rank, block.hidden_size, block)
        return 2 * block.hidden_size * self.rank + block.hidden_size

    def build(self, block: Block) -> nn.Module:
        _check_size("rank", self.rank, block.hidden_size, block)
        down = nn.Linear(block.hidden_size, self.rank, bias=False)
        return nn.Sequential(down, nn.Linear(self.rank, block.hidden_size))


class GatedMLP(nn.Module):
    """down(act(gate x) ⊙ up x), or down(act(up x)) where there is no gate."""

    def __init__(self, hidden: int, width: int, activation: nn.Module, gate: bool, up_bias: bool, down_bias: bool):
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=up_bias) if gate else None
        self.up = nn.Linear(hidden, width, bias=up_bias)
        self.down = nn.Linear(width, hidden, bias=down_bias)
        self.activation = activation

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

    def n_params(self, block: Block) -> int:
        weights = self._weights(block)
        matrices = 2 if weights.gate is None else 3
        biases = sum(self.width for b in (weights.up_bias, weights.gate_bias) if b is not None)
        biases += block.hidden_size if weights.down_bias is not None else 0
        return matrices * block.hidden_size * self.width + biases

    def build(self, block: Block) -> nn.Module:
        weights = self._weights(block)
        has_bias = weights.up_bias is not None, weights.down_bias is not None
        return GatedMLP(block.hidden_size, self.width, block.activation, weights.gate is not None, *has_bias)

    def _weights(self, block: Block):
        weights = block.weights()
        _check_size("width", self.width, block.intermediate_size, block)
        return weights


def ladder(block: Block, shares: Iterable[float], families: Iterable[type[Family]] | None = None) -> list[Family]:
    """Every family at the sizes that keep ``shares`` of the block's parameters, as far as it takes them.

    LowRank goes no further than rank d/2, where a Linear is as large; families without a size appear once.
    """
    shares, found = list(shares), []
    for family in families or FAMILIES.values():
        if family is NarrowMLP:
            per_size, fixed, limit = _slope(NarrowMLP, block), 0, block.intermediate_size
        elif family is LowRank:
            per_size, fixed, limit = _slope(LowRank, block), block.hidden_size, block.hidden_size // 2
        else:
            found.append(family())
            continue
        sizes = {min(limit, max(1, round((share * block.n_params - fixed) / per_size))) for share in shares}
        found += [family(size) for size in sorted(sizes)]
    return found


def _slope(family: type[Family], block: Block) -> int:
    """Parameters of one more neuron or rank."""
    return family(2).n_params(block) - family(1).n_params(block)


def _check_size(name: str, value: int, limit: int, block: Block) -> None:
    if not 1 <= value <= limit:
        raise ValueError(f"{name}={value} does not fit {block.name}: expected 1 ≤ {name} ≤ {limit}.")


FAMILIES: dict[str, type[Family]] = {f.__name__: f for f in (Mean, Linear, LowRank, NarrowMLP)}


@dataclass(frozen=True)
class Errors:
    """Output errors of a replacement on a sample, per token first and then summarised, so that the few tokens with massive
    activations cannot hide all others. All are ratios of squared norms.
    """

    mean: float  # of ‖g(x) − y‖² / ‖y‖² over tokens
    median: float
    q25: float
    q75: float
    pooled: float  # Σ‖g(x) − y‖² / Σ‖y‖², that is 1 − (uncentred) R²: massive activations decide it
    damage: float  # mean of ‖g(x) − y‖² / ‖r‖², r the residual stream that leaves the layer


@dataclass(frozen=True)
class FitReport:
    """How a fit went. ``train`` is on sampled tokens that are in the moments, ``heldout`` on tokens no fit saw."""

    tokens: int  # in the moments
    seconds: float
    train: Errors | None
    heldout: Errors | None

    @staticmethod
    def from_dict(record: dict) -> FitReport:
        """The inverse of dataclasses.asdict."""
        errors = {part: Errors(**record[part]) if record[part] else None for part in ("train", "heldout")}
        return FitReport(record["tokens"], record["seconds"], **errors)


class Replacement(nn.Module):
    """A module that takes a block's place: its family, its fitted body, and the report of the fit."""

    def __init__(self, family: Family, block: Block):
        super().__init__()
        self.family = family
        self.block_name = block.name
        self.report: FitReport | None = None
        self.body = family.build(block).to(device=block.device, dtype=block.dtype).eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.body(hidden_states)

    def extra_repr(self) -> str:
        return f"{self.family} for {self.block_name}, {self.n_params:,} parameters"
