"""The choices of a closed-form fit, and which neurons of an MLP it keeps.

Neurons are ranked by their own output, by ridge leverage, or by what their removal costs (OBS). H are the activations that enter
the output projection, W its weights, [intermediate, hidden]. All rules read C = HᵀH only, centred where the block has an output
bias that takes up the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.blocks import Block
from ..statistics.moments import BlockStatistics
from .ridge import RIDGE, add_ridge, factor

ASK = "Measure them: stats = with_effects(stats, fisher_effects(model, blocks, windows))."
BATCHES = 16  # of an OBS selection; on the blocks of a 135M-parameter Llama 8 are as good as one neuron at a time


def hidden_moment(
    block: Block, s: BlockStatistics, rows: Tensor, columns: Tensor | None = None, *, has_bias: bool | None = None
) -> Tensor:
    """Rows and columns (``rows`` too by default) of C = HᵀH, a copy; centred with an output bias, by default the block's own."""
    columns = rows if columns is None else columns
    part = s.hh[rows[:, None], columns]  # alone: of all neurons of an 8B model it is 1.6 GB
    centre = block.weights().down_bias is not None if has_bias is None else has_bias
    return part.addr_(s.sum_h[rows], s.sum_h[columns], alpha=-1 / s.tokens) if centre else part


def every(s: BlockStatistics) -> Tensor:
    """Indices of all neurons."""
    return torch.arange(len(s.hh), device=s.hh.device)


def output_energy(block: Block, s: BlockStatistics) -> Tensor:
    """‖h_j‖²·‖W_j‖² of each neuron, [intermediate]: the energy of what it alone adds to the output."""
    return s.hh.diagonal() * block.weights().down.to(s.hh).square().sum(0)


def _energy(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    return output_energy(block, s)


def fluctuation(s: BlockStatistics, output: Tensor) -> Tensor:
    """Σ_t (h_j − h̄_j)²·‖W_j‖², [inner], of what enters an output projection [hidden, inner].

    That is the energy of what a constant cannot stand in for (FLAP, arXiv 2312.11983).
    """
    about_the_mean = s.hh.diagonal() - s.sum_h.square() / s.tokens
    return about_the_mean.clamp_min(0) * output.to(s.hh).square().sum(0)


def _fluctuation(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    return fluctuation(s, block.weights().down)


def _leverage(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    """diag(C(C + λI)⁻¹), the ridge leverage (MoDeGPT, arXiv 2408.09632): how little the others explain a neuron."""
    c = hidden_moment(block, s, every(s))
    return torch.cholesky_solve(c, factor(block, add_ridge(block, c.clone(), how.ridge))).diagonal()


def _obs(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    """The step at which a neuron is removed, ∞ for those that stay: optimal brain surgeon (OSSCAR, arXiv 2403.12983).

    When neuron j is removed and the other rows of W are solved again, the squared output error grows by ‖W_j‖² / [C⁻¹]_jj. The
    cheapest neurons go, in 16 batches; after each, C⁻¹ and W are exactly those of the neurons that are left. A batch is chosen
    one neuron at a time among twice as many candidates, so that only one of two interchangeable neurons goes.
    """
    c = hidden_moment(block, s, every(s))
    # a neuron that never fires (or never changes, beside a bias) has no cost but the ridge's, and float32 moments round
    dead = c.diagonal() <= 1e-6 * s.hh.diagonal()
    c = add_ridge(block, c, how.ridge)
    removed = torch.where(dead, -1.0, torch.inf).to(c)
    left = (~dead).nonzero().squeeze(1)
    inverse = torch.cholesky_inverse(factor(block, c[left][:, left]))  # [left, left]
    w = block.weights().down.to(c).T[left]  # [left, hidden]
    size = max(1, -(-(len(left) - width) // BATCHES))
    while len(left) > width:
        costs = w.square().sum(1) / inverse.diagonal()
        n = min(size, len(left) - width)
        candidates = costs.topk(min(2 * n, len(left)), largest=False).indices
        batch = candidates[_cheapest(inverse[candidates][:, candidates], w[candidates] @ w[candidates].T, n)]
        removed[left[batch]] = len(c) - len(left)
        stay = torch.ones(len(left), dtype=torch.bool, device=c.device)
        stay[batch] = False
        # block inverse: the Schur complement in C⁻¹ is the inverse of the principal submatrix of C
        shift = torch.linalg.solve(inverse[batch][:, batch], torch.cat([inverse[batch][:, stay], w[batch]], 1))
        coupling = inverse[stay][:, batch]  # [left, batch]
        w = w[stay] - coupling @ shift[:, -w.shape[1] :]
        inverse = inverse[stay][:, stay] - coupling @ shift[:, : -w.shape[1]]
        left = left[stay]
    return removed


def _cheapest(inverse: Tensor, gram: Tensor, n: int) -> Tensor:
    """Indices of ``n`` neurons removed one at a time, [n], from their part of C⁻¹ and of WWᵀ."""
    inverse, gram, order = inverse.clone(), gram.clone(), []
    gone = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    for _ in range(n):
        j = int((gram.diagonal() / inverse.diagonal()).masked_fill(gone, torch.inf).argmin())
        order.append(j)
        gone[j] = True
        step = inverse[:, j] / inverse[j, j]  # W ← W − step W_jᵀ
        gram -= torch.outer(step, gram[j])
        gram -= torch.outer(gram[:, j], step)
        inverse -= torch.outer(step, inverse[j])
    return torch.tensor(order, device=gram.device)


def _fisher(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    """Σ_t (g_tᵀ w_j h_tj)²: the KL divergence to second order, twice, of leaving a neuron out. Raises ValueError without it."""
    if s.effect is None:
        raise ValueError(f"{block.name}: no effects of neurons. {ASK}")
    return s.effect.to(s.hh)


def _fisher_energy(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    """Their geometric mean: squared output error, weighted by what the loss feels of it."""
    return (_fisher(block, s, width, how) * output_energy(block, s)).sqrt()


def _random(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    return torch.rand(len(s.hh), generator=torch.Generator().manual_seed(how.seed)).to(s.hh.device)


def _auto(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    return (_energy if s.effect is None else _fisher_energy)(block, s, width, how)


SELECTIONS = {
    "auto": _auto,
    "energy": _energy,
    "fluctuation": _fluctuation,
    "leverage": _leverage,
    "obs": _obs,
    "fisher": _fisher,
    "fisher_energy": _fisher_energy,
    "random": _random,
}


@dataclass(frozen=True)
class ClosedForm:
    """The choices of a closed-form fit. Raises ValueError for an unknown selection and for a negative ridge.

    ``selection`` of neurons is "energy" (largest ‖h_j‖‖W_j‖), "fluctuation" (the same about the mean of h_j), "leverage" (the
    neurons that the others explain least), "obs" (the least squares error after removing the rest, greedily), "fisher" (what the
    loss feels most), "fisher_energy" (the geometric mean of that and the energy), "random" (a control), or "auto":
    "fisher_energy" where effects were measured, else "energy".
    Heads are ranked by all of these but "leverage" and "obs".
    """

    ridge: float = RIDGE  # λ, relative to the mean of the Gram matrix's diagonal; ∞ keeps the block's own output weights
    selection: str = "auto"  # which neurons and heads are kept
    seed: int = 0  # of random features and of random selection

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"Unknown selection {self.selection!r}; expected one of {', '.join(SELECTIONS)}.")
        if not self.ridge >= 0:
            raise ValueError(f"Expected ridge ≥ 0, got {self.ridge}.")


def importance(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    """A score of each neuron, [intermediate]; the ``width`` highest are kept.

    Raises ValueError where the block has no neurons or the statistics no "hidden" moment.
    """
    s.require(block, "hidden")
    return SELECTIONS[how.selection](block, s, width, how)


def select(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> Tensor:
    """Indices of the ``width`` neurons to keep, [width], ascending. Raises ValueError as :func:`importance` does."""
    return importance(block, s, width, how).topk(width).indices.sort().values
