"""Least squares from moments: centring, ridge and factorisation, with errors that name the block."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Block


def centred(second: Tensor, left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """AᵀB − n·āᵀb̄ from the uncentred moment AᵀB and the sums of A and B."""
    return second - torch.outer(left, right) / tokens


def ridged(block: Block, c: Tensor, ridge: float) -> Tensor:
    """C + λ·mean(diag C)·I, positive definite for λ > 0 however few the tokens. Raises ValueError for C = 0."""
    scale = c.diagonal().mean()
    if not scale > 0:
        raise ValueError(f"{block.name}: the activations are all zero or all the same: there is nothing to fit.")
    return c + ridge * scale * torch.eye(len(c), dtype=c.dtype, device=c.device)


def factor(block: Block, c: Tensor) -> Tensor:
    """The lower Cholesky factor of C. Raises ValueError where C is singular: without ridge, least squares has no unique
    answer on fewer tokens than dimensions, nor on inputs that depend on each other (centred ones after a LayerNorm do).
    """
    lower, failed = torch.linalg.cholesky_ex(c)
    # a pivot is the part of a direction that those before it do not explain; rounding alone leaves that much of nothing
    rounding = len(c) * torch.finfo(c.dtype).eps * c.diagonal()
    if failed or (lower.diagonal().square() <= rounding).any():
        raise ValueError(f"{block.name}: the moments are singular (few tokens, or a LayerNorm before the block): raise ridge.")
    return lower


def least_squares(block: Block, c: Tensor, target: Tensor, ridge: float) -> Tensor:
    """(C + λI)⁻¹ T: the weights of a ridge regression from its moments, [in, out]."""
    return torch.cholesky_solve(target, factor(block, ridged(block, c, ridge)))
