"""Blocks of the same form whose every weight is a product of two thin matrices: W ≈ BA, A [rank, in] and B [out, rank].

No neuron and no head goes, and keys, values and their cache stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..models.attention import PARTS, attention_weights
from ..models.blocks import Block
from .families import Family, NarrowMLP, check_sizes
from .modules import MLP
from .narrow_attention import NarrowAttention

Shapes = dict[str, tuple[int, int]]  # {projection: (out, in)}


def factored(out: int, into: int, rank: int, bias: bool) -> nn.Sequential:
    """Two linear layers of a rank in the place of one."""
    return nn.Sequential(nn.Linear(into, rank, bias=False), nn.Linear(rank, out, bias=bias))


def whole_rank(out: int, into: int, share: float = 1.0) -> int:
    """The rank, at least 1, at which a product has at most ``share`` of the parameters of the matrix."""
    return max(1, int(share * out * into / (out + into)))


def _changed(whole: int, shapes: Shapes, ranks: dict[str, int]) -> int:
    """``whole`` parameters of a block less its projections, plus their products."""
    return whole + sum(ranks[part] * (out + into) - out * into for part, (out, into) in shapes.items())


@dataclass(frozen=True)
class FactoredMLP(Family):
    """An MLP of the block's form and width m, each weight of rank r. 3r(d + m) parameters (gated) and those of the biases."""

    rank: int

    @classmethod
    def most(cls, block: Block) -> int:
        return whole_rank(block.hidden_size, block.intermediate_size)

    def n_params(self, block: Block) -> int:
        shapes = mlp_shapes(block)  # raises where the block has none
        check_sizes(block, rank=(self.rank, 1, min(shapes["up"])))
        return _changed(NarrowMLP(block.intermediate_size).n_params(block), shapes, dict.fromkeys(shapes, self.rank))

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the size does not fit
        weights = block.weights()
        parts = {
            part: factored(*shape, self.rank, getattr(weights, f"{part}_bias") is not None)
            for part, shape in mlp_shapes(block).items()
        }
        return MLP(parts.get("gate"), parts["up"], parts["down"], block.activation)


@dataclass(frozen=True)
class FactoredAttention(Family):
    """Self-attention of all heads with projections of low rank.

    With n the width of all heads side by side and k that of all groups: 2·rank·(d + n) + 2·key_rank·(d + k) parameters, those of
    biases, and those of the norms of heads.
    """

    rank: int  # of the projections to queries and of the output projection
    key_rank: int  # of the projections to keys and values

    attends: ClassVar[bool] = True

    def ranks(self) -> dict[str, int]:
        """{projection: its rank}"""
        return {"query": self.rank, "key": self.key_rank, "value": self.key_rank, "output": self.rank}

    def n_params(self, block: Block) -> int:
        shapes = attention_shapes(block)  # raises where the heads are not known
        check_sizes(block, rank=(self.rank, 1, min(shapes["query"])), key_rank=(self.key_rank, 1, min(shapes["key"])))
        return _changed(_all_heads(block).n_params(block), shapes, self.ranks())

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where a size does not fit
        body, shapes = _all_heads(block).build(block), attention_shapes(block)
        for part, rank in self.ranks().items():
            setattr(body, part, factored(*shapes[part], rank, getattr(body, part).bias is not None))
        return body

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """All projections keep the same share of their parameters."""
        shapes = attention_shapes(block)
        fixed = _all_heads(block).n_params(block) - (size := sum(out * into for out, into in shapes.values()))
        share = (n_params - fixed) / size
        return cls(*(min(*shapes[part], whole_rank(*shapes[part], share)) for part in ("query", "key")))


def mlp_shapes(block: Block) -> Shapes:
    """Of an MLP's projections: gate, where there is one, up and down. Raises NotApplicable where the block has no neurons."""
    weights = block.weights()
    return {part: tuple(w.shape) for part in ("gate", "up", "down") if (w := getattr(weights, part)) is not None}


def attention_shapes(block: Block) -> Shapes:
    """Of the projections of self-attention. Raises NotApplicable where its heads are not known."""
    weights = attention_weights(block)
    shapes = {part: tuple(getattr(weights, part).flatten(0, 1).shape) for part in PARTS}
    return shapes | {"output": shapes["output"][::-1]}


def _all_heads(block: Block) -> NarrowAttention:
    weights = attention_weights(block)
    return NarrowAttention(len(weights.query), len(weights.key), weights.value.shape[1])
