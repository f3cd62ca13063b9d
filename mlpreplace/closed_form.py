"""Closed-form fits: statistics in, parameters out. Also what every training starts from.

Every solver minimises the squared output error over the calibration tokens with a relative ridge λ·mean(diag), in
float64. Ridge means: NarrowMLP is pulled towards the block's own output weights (so full width returns the block
exactly), Linear and LowRank towards the mean output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from .blocks import Block
from .capture import BlockStatistics
from .replacements import Family, Linear, LowRank, Mean, NarrowMLP
from .selection import SELECTIONS, select

RIDGE = 1e-2


@dataclass(frozen=True)
class ClosedForm:
    """The choices of a closed-form fit. Raises ValueError for a selection that is not known and a negative ridge."""

    ridge: float = RIDGE  # λ, relative to the mean of the Gram matrix's diagonal
    selection: str = "energy"  # which neurons a NarrowMLP keeps, see :func:`~mlpreplace.selection.select`
    seed: int = 0  # of random features and of random selection

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"Unknown selection {self.selection!r}; expected one of {', '.join(SELECTIONS)}.")
        if not self.ridge >= 0:
            raise ValueError(f"Expected ridge ≥ 0, got {self.ridge}.")


def _ridged(c: Tensor, ridge: float) -> Tensor:
    """C + λ·mean(diag C)·I, positive definite for λ > 0 however few the tokens. Raises ValueError for C = 0."""
    scale = c.diagonal().mean()
    if scale <= 0:
        raise ValueError("The activations are all zero: there is nothing to fit.")
    return c + ridge * scale * torch.eye(len(c), dtype=c.dtype, device=c.device)


def _centred(second: Tensor, left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """AᵀB − n·āᵀb̄ from the uncentred moment and the sums."""
    return second - torch.outer(left, right) / tokens


def _linear_map(block: Block, s: BlockStatistics, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression on centred moments: A [hidden_in, hidden_out], b [hidden], and C = XᵀX + λI."""
    s.require(block, "input")
    c = _ridged(_centred(s.xx, s.sum_x, s.sum_x, s.tokens), ridge)
    a = torch.cholesky_solve(_centred(s.xy, s.sum_x, s.sum_y, s.tokens), torch.linalg.cholesky(c))
    return a, (s.sum_y - s.sum_x @ a) / s.tokens, c


@singledispatch
def solve(family: Family, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """The closed-form parameters of a family: a state dict for the module that ``family.build(block)`` makes."""
    raise ValueError(f"{family} has no closed form.")


@solve.register
def _(family: Mean, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    if s.tokens < 1:
        raise ValueError(f"The statistics of {block.name} hold no token.")
    return {"bias": s.sum_y / s.tokens}


@solve.register
def _(family: Linear, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    a, b, _ = _linear_map(block, s, how.ridge)
    return {"weight": a.T, "bias": b}


@solve.register
def _(family: LowRank, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Reduced-rank regression (Izenman 1975): the best rank r in output error projects the ridge solution A on the
    leading eigenvectors of AᵀCA, which are the right singular vectors of C^{1/2}A; an SVD of A alone would not see C.
    """
    a, _, c = _linear_map(block, s, how.ridge)
    _, vectors = torch.linalg.eigh(a.T @ c @ a)  # ascending
    leading = vectors[:, -family.rank :]  # [hidden, rank]
    down = a @ leading  # [hidden, rank]
    bias = (s.sum_y - s.sum_x @ down @ leading.T) / s.tokens
    return {"0.weight": down.T, "1.weight": leading, "1.bias": bias}


@solve.register
def _(family: NarrowMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Keep the neurons P that ``how.selection`` chooses, then give the kept ones the work of the dropped ones Q:
    W' = W_P + (C_PP + λI)⁻¹ C_PQ W_Q with C = HᵀH, centred where the block has an output bias to take up the mean.
    """
    weights = block.weights()
    kept = select(block, s, family.width, how.selection, how.ridge, how.seed)
    dropped = torch.ones(block.intermediate_size, dtype=torch.bool, device=kept.device)
    dropped[kept] = False

    down = weights.down.to(s.hh).T  # [intermediate, hidden]
    mean = s.sum_h / s.tokens
    c = s.hh if weights.down_bias is None else _centred(s.hh, s.sum_h, s.sum_h, s.tokens)
    solved = down[kept].clone()
    if dropped.any():
        c_pp, c_pq = c[kept][:, kept], c[kept][:, dropped]
        solved += torch.cholesky_solve(c_pq @ down[dropped], torch.linalg.cholesky(_ridged(c_pp, how.ridge)))

    state = {"up.weight": weights.up[kept], "down.weight": solved.T}
    if weights.gate is not None:
        state["gate.weight"] = weights.gate[kept]
    if weights.up_bias is not None:
        state["up.bias"] = weights.up_bias[kept]
    if weights.gate_bias is not None:
        state["gate.bias"] = weights.gate_bias[kept]
    if weights.down_bias is not None:
        state["down.bias"] = weights.down_bias.to(mean) + mean @ down - mean[kept] @ solved
    return state
