"""Least squares from moments: centring, ridge, factorisation and reduced rank, with errors that name the block."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from ..models.blocks import Block
from ..statistics.moments import BlockStatistics

RIDGE = 1e-2  # λ of fits to a block's output, relative to the mean of the Gram matrix's diagonal
LARGE = 1024  # rows of a matrix of which only some eigenvectors are computed
STREAM_RIDGE = 1e-4  # of maps of the residual stream, whose massive activations raise that mean


def centred(second: Tensor, left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """AᵀB − n·āᵀb̄ from the uncentred moment AᵀB and the sums of A and B."""
    return second - torch.outer(left, right) / tokens


def add_ridge(block: Block, c: Tensor, ridge: float) -> Tensor:
    """C + λ·mean(diag C)·I in the place of C, positive definite for λ > 0 however few the tokens. Raises ValueError for C = 0."""
    scale = c.diagonal().mean()
    if not scale > 0:
        raise ValueError(f"{block.name}: the activations are all zero or all the same: there is nothing to fit.")
    c.diagonal().add_(ridge * scale)
    return c


def factor(block: Block, c: Tensor) -> Tensor:
    """The lower Cholesky factor of C, in its place. Raises ValueError where C is singular.

    Without ridge it is singular for fewer tokens than dimensions, and for inputs that are linearly dependent, such as centred
    inputs behind a LayerNorm.
    """
    # a squared pivot is what earlier directions leave of this one; rounding leaves up to ``rounding`` of a dependent direction
    rounding = len(c) * torch.finfo(c.dtype).eps * c.diagonal()
    c = c.mT  # the same numbers in the order of LAPACK, which would make a copy of the other
    lower, failed = torch.linalg.cholesky_ex(c, out=(c, torch.empty((), dtype=torch.int32, device=c.device)))
    if failed or (lower.diagonal().square() <= rounding).any():
        raise ValueError(f"{block.name}: the moments are singular (few tokens, or a LayerNorm before the block): raise ridge.")
    return lower


def least_squares(block: Block, c: Tensor, target: Tensor, ridge: float) -> Tensor:
    """(C + λI)⁻¹ T: the weights of a ridge regression from its moments, [in, out]. Writes into C."""
    return solved(factor(block, add_ridge(block, c, ridge)), target)


def solved(lower: Tensor, target: Tensor) -> Tensor:
    """(LLᵀ)⁻¹ T. In two steps: torch.cholesky_solve makes a copy of L."""
    half = torch.linalg.solve_triangular(lower, target, upper=False)
    return torch.linalg.solve_triangular(lower.T, half, upper=True)


def linear_map(block: Block, s: BlockStatistics, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression on centred moments: A [hidden_in, hidden_out] and the centred XᵀY it was solved for."""
    s.require(block, "input")
    xy = centred(s.xy, s.sum_x, s.sum_y, s.tokens)
    return least_squares(block, centred(s.xx, s.sum_x, s.sum_x, s.tokens), xy, ridge), xy


def reduced_rank(a: Tensor, xy: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best map of a rank in output error, as its factors [in, rank] and [rank, out] (Izenman 1975).

    It projects the ridge solution A = C⁻¹XᵀY on the leading eigenvectors of AᵀCA = AᵀXᵀY, which are the right singular
    vectors of C^{1/2}A; an SVD of A alone would not see C.
    """
    leading = leading_eigenvectors(a.T @ xy, rank)  # [out, rank]
    return a @ leading, leading.T


def leading_eigenvectors(c: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the ``rank`` largest eigenvalues of a symmetric matrix as columns, the largest last.

    On a CPU, of a large matrix only these are computed, by scipy: a fifth of the time at 256 of 2,048.
    """
    if c.device.type == "cpu" and len(c) >= LARGE:
        _, vectors = scipy.linalg.eigh(c.numpy(), subset_by_index=[len(c) - rank, len(c) - 1])
        return torch.from_numpy(vectors)
    return torch.linalg.eigh(c)[1][:, -rank:]  # ascending
