"""Families of small modules that can replace a block, each with its formula and its size.

A family is a frozen record such as ``NarrowMLP(width=1024)``. It can be compared, printed and stored, and it builds its module
for any block it fits. Notation: block input x ∈ R^d, MLP f(x) = W_down (act(W_gate x) ⊙ W_up x) with m neurons.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..models.blocks import Block
from ..models.weights import Inserted
from .kv_cache import Past
from .modules import MLP, Constant, Sum, mlp_like
from .records import FitReport

FAMILIES: dict[str, type[Family]] = {}  # all families by name, also those that a user defines


def check_sizes(block: Block, **sizes: tuple[int, int, int | None]) -> None:
    """Raise ValueError unless low ≤ value ≤ high for every name=(value, low, high); a high of None is no limit."""
    for name, (value, low, high) in sizes.items():
        if value < low or (high is not None and value > high):
            most = "" if high is None else f" ≤ {high}"
            raise ValueError(f"{name}={value} does not fit {block.name}: expected {low} ≤ {name}{most}.")


@dataclass(frozen=True)
class Family:
    """A kind of replacement at a size. ``ladder`` and ``load`` find every subclass by its name.

    The first field of a subclass is its size. Other fields need a default.
    """

    looks_back: ClassVar[bool] = False  # whether an output depends on the inputs of earlier tokens
    attends: ClassVar[bool] = False  # whether it is attention, which reads the positions, mask and cache of its layer
    keeps_precision: ClassVar[bool] = False  # whether ``build`` gives each parameter its precision; else it is the block's

    def __init_subclass__(cls) -> None:
        FAMILIES[cls.__name__] = cls

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int | None" and value is None:
                continue
            if field.type in ("int", "int | None") and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ValueError(f"Expected {type(self).__name__}({field.name}=) as a whole number, got {value!r}.")

    def n_params(self, block: Block) -> int:
        """Parameters of this replacement for ``block``; raises ValueError where it cannot replace the block."""
        raise NotImplementedError

    def n_active_params(self, block: Block) -> int:
        """Parameters that one token uses; fewer than all of them for a mixture of experts."""
        return self.n_params(block)

    def build(self, block: Block) -> nn.Module:
        """A module for ``block`` with parameters that are not fitted, [..., hidden] → [..., hidden].

        Where the family looks back, ``forward(x, past)`` of [batch, seq_len, hidden]; see :class:`~.kv_cache.Past`.
        """
        raise NotImplementedError

    @classmethod
    def most(cls, block: Block) -> int:
        """The largest size that makes sense for ``block``."""
        return max(1, block.n_params // block.hidden_size)  # every unit of size costs at least a vector of the hidden size

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """The size whose number of parameters is nearest to ``n_params``. A family without a size is returned as it is."""
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
        """The inverse of :meth:`as_dict`; raises ValueError for an unknown family."""
        options = dict(record)
        name = options.pop("family", None)
        if name not in FAMILIES:
            raise ValueError(f"Unknown family {name!r}; known are {', '.join(FAMILIES)}.")
        return FAMILIES[name](**options)

    def __str__(self) -> str:
        sizes = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{type(self).__name__}({sizes})"


@dataclass(frozen=True)
class Mean(Family):
    """g(x) = b, the mean output. d parameters. The best replacement that ignores the input."""

    def n_params(self, block: Block) -> int:
        return block.hidden_size

    def build(self, block: Block) -> nn.Module:
        return Constant(block.hidden_size)


@dataclass(frozen=True)
class Linear(Family):
    """g(x) = A x + b. d² + d parameters."""

    def n_params(self, block: Block) -> int:
        return block.hidden_size**2 + block.hidden_size

    def build(self, block: Block) -> nn.Module:
        return nn.Linear(block.hidden_size, block.hidden_size)


@dataclass(frozen=True)
class LowRank(Family):
    """g(x) = U V x + b with V: d → r. 2dr + d parameters. Above r = d/2 a Linear is smaller and better."""

    rank: int

    @classmethod
    def most(cls, block: Block) -> int:
        return block.hidden_size // 2

    def n_params(self, block: Block) -> int:
        check_sizes(block, rank=(self.rank, 1, block.hidden_size))
        return 2 * block.hidden_size * self.rank + block.hidden_size

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the size does not fit
        down = nn.Linear(block.hidden_size, self.rank, bias=False)
        return nn.Sequential(down, nn.Linear(self.rank, block.hidden_size))


@dataclass(frozen=True)
class NarrowMLP(Family):
    """An MLP of the block's form with k < m of its neurons and a new output projection.

    3dk parameters where the block is gated, 2dk where it is not, and those of its biases.
    """

    width: int

    @classmethod
    def most(cls, block: Block) -> int:
        return block.intermediate_size

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """The TwoLayerMLP of that size where the block has no neurons of its own to keep: a mixture of experts."""
        return TwoLayerMLP.nearest(block, n_params) if block.opaque else super().nearest(block, n_params)

    def has_bias(self, block: Block) -> bool:
        """Whether the output projection has a bias."""
        return block.weights().down_bias is not None

    def n_params(self, block: Block) -> int:
        weights = block.weights()  # raises where the block has none
        check_sizes(block, width=(self.width, 1, block.intermediate_size))
        matrices = 2 if weights.gate is None else 3
        biases = sum(self.width for b in (weights.up_bias, weights.gate_bias) if b is not None)
        biases += block.hidden_size if self.has_bias(block) else 0
        return matrices * block.hidden_size * self.width + biases

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the size does not fit
        return mlp_like(block, self.width)


@dataclass(frozen=True)
class TwoLayerMLP(Family):
    """g(x) = W₂ act(W₁x + b₁) + b₂ for any block. 2dk + k + d parameters.

    The activation is the block's; SiLU where the block has none of its own (a mixture of experts). The width has no limit,
    except that of the block where it is an MLP without a gate itself.
    """

    width: int

    @classmethod
    def most(cls, block: Block) -> int:
        return block.intermediate_size if block.has_neurons and block.gate is None else super().most(block)

    def n_params(self, block: Block) -> int:
        own = block.intermediate_size if block.has_neurons and block.gate is None else None
        check_sizes(block, width=(self.width, 1, own))
        return 2 * block.hidden_size * self.width + self.width + block.hidden_size

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the size does not fit
        d, k = block.hidden_size, self.width
        return MLP(None, nn.Linear(d, k), nn.Linear(k, d), block.activation or nn.SiLU())


@dataclass(frozen=True)
class NarrowPlusLinear(Family):
    """The sum of a NarrowMLP(k) and a LowRank(r), solved together. 3dk + 2dr + d parameters (gated)."""

    width: int
    rank: int

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """The map has rank d/6 in a small module, less in a larger one, and at most half of the parameters.

        Within 3 % of the best split's validation error at 6, 12.5, 25 and 50 % of MLPs of a 135M-parameter Llama. For a mixture
        of experts, what ``NarrowMLP.nearest`` gives.
        """
        if block.opaque:
            return NarrowMLP.nearest(block, n_params)
        rank = block.hidden_size / 6 * (1 - n_params / block.n_params)
        linear = LowRank.nearest(block, min(2 * block.hidden_size * rank, n_params / 2))
        return cls(NarrowMLP.nearest(block, n_params - linear.n_params(block)).width, linear.rank)

    def n_params(self, block: Block) -> int:
        return NarrowMLP(self.width).n_params(block) + LowRank(self.rank).n_params(block)

    def build(self, block: Block) -> nn.Module:
        return Sum(NarrowMLP(self.width).build(block), LowRank(self.rank).build(block))


def ladder(block: Block, shares: Iterable[float], families: Iterable[type[Family]] | None = None) -> list[Family]:
    """Every family for its kind (or ``families``) at the sizes nearest to ``shares`` of the block's parameters, each size once.

    Sizes stay below the family's ``most``: LowRank ends at rank d/2, where a Linear is as large.
    """
    shares, found = list(shares), {}
    for family in families or [family for family in FAMILIES.values() if block.heads is not None or not family.attends]:
        sizes = {family.nearest(block, share * block.n_params): None for share in shares}
        found |= {member: None for member in sorted(sizes, key=lambda member: member.n_params(block))}
    return list(found)


class Replacement(Inserted):
    """A module that takes a block's place: its family, its fitted body, and the report of the fit.

    It is in the widest precision of the block's parameters, reads any other, and gives what the block gave: the precision it
    read, or its own where the block has an output projection in a higher one (T5).

    Raises ValueError for attention and a family that looks at earlier tokens.
    """

    def __init__(self, family: Family, block: Block):
        super().__init__()
        if family.attends and block.kind != "attention":
            raise ValueError(f"{family} is attention and cannot replace {block.name}, which is of kind {block.kind!r}.")
        if family.looks_back and block.kind == "attention":
            instead = "use a family that maps each token by itself, such as Linear, LowRank or Mean"
            raise ValueError(f"{family} looks at earlier tokens and cannot replace attention ({block.name}): {instead}.")
        self.family = family
        self.block_name = block.name
        self.report: FitReport | None = None
        self.past: Past | None = None  # of the running call, where the family looks back
        self.widens = block.widens
        with block.device:  # whatever the default device is
            body = family.build(block)
        self.body = (body if family.keeps_precision else body.to(block.dtype)).eval()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.n_active_params = family.n_active_params(block)

    def cache_key(self) -> tuple:
        """What its results depend on beside its tensors."""
        return self.family, type(self.family), self.block_name

    @property
    def n_params(self) -> int:
        """All of its parameters, also where other replacements share its body."""
        return sum(p.numel() for p in self.parameters())

    @property
    def precision(self) -> torch.dtype | None:
        """Of what its body reads; None where the body reads any."""
        floating = (p.dtype for p in self.body.parameters() if p.is_floating_point())
        return None if self.family.keeps_precision else next(floating, None)

    def forward(self, hidden_states: Tensor, **call) -> Tensor:
        """``call`` is what attention reads beside the hidden states, where the family attends."""
        given, own = hidden_states.dtype, self.precision
        if own is None or own == given:
            return self._map(hidden_states, call)
        y = self._map(hidden_states.to(own), call)
        return y if self.widens else y.to(given)

    def _map(self, x: Tensor, call: dict) -> Tensor:
        return self.body(x, self.past) if self.family.looks_back else self.body(x, **call)

    def extra_repr(self) -> str:
        return f"{self.family} for {self.block_name}, {self.n_params:,} parameters"
