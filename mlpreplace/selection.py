"""Which neurons of an MLP to keep: by their own output, by ridge leverage, or by what their removal costs (OBS).

With H the activations that enter the output projection and W its weights, [intermediate, hidden]: all rules read
C = HᵀH only, centred where the block has an output bias that takes up the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import centred, factor, ridged
from .blocks import Block
from .capture import BlockStatistics

BATCHES = 16  # of an OBS selection; on the blocks of a 135M-parameter Llama 8 are as good as one neuron at a time


def hidden_moment(block: Block, s: BlockStatistics) -> Tensor:
    """C = HᵀH, centred where the block has an output bias, [intermediate, intermediate]."""
    return s.hh if block.weights().down_bias is None else centred(s.hh, s.sum_h, s.sum_h, s.tokens)


def output_energy(block: Block, s: BlockStatistics) -> Tensor:
    """‖h_j‖²·‖W_j‖² of each neuron, [intermediate]: what it adds to the output on its own."""
    return s.hh.diagonal() * block.weights().down.to(s.hh).square().sum(0)


def _energy(block: Block, s: BlockStatistics, width: int, ridge: float, seed: int) -> Tensor:
    return output_energy(block, s)


def _leverage(block: Block, s: BlockStatistics, width: int, ridge: float, seed: int) -> Tensor:
    """diag(C(C + λI)⁻¹), the ridge leverage (MoDeGPT, arXiv 2408.09632): how little the others explain a neuron."""
    c = hidden_moment(block, s)
    return torch.cholesky_solve(c, factor(block, ridged(block, c, ridge))).diagonal()


def _obs(block: Block, s: BlockStatistics, width: int, ridge: float, seed: int) -> Tensor:
    """When a neuron is removed, ∞ for those that stay: optimal brain surgeon in the output error (OSSCAR, arXiv 2403.12983).

    Without neuron j the other rows of W solve the least squares anew and the error grows by ‖W_j‖² / [C⁻¹]_jj. The
    cheapest go in 16 batches; C⁻¹ and W are then exactly those of the neurons that are left. Inside a batch, twice its
    size of candidates are removed one at a time, so that of two neurons that stand in for each other only one goes.
    """
    hidden = hidden_moment(block, s)
    c = ridged(block, hidden, ridge)
    # of a neuron that never fires, or never changes where there is a bias, only the ridge would speak; float32 rounds
    dead = hidden.diagonal() <= 1e-6 * s.hh.diagonal()
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
        # block inverse: the Schur complement of C⁻¹ is the inverse of the principal submatrix of C
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


def _random(block: Block, s: BlockStatistics, width: int, ridge: float, seed: int) -> Tensor:
    return torch.rand(len(s.hh), generator=torch.Generator().manual_seed(seed)).to(s.hh.device)


SELECTIONS = {"energy": _energy, "leverage": _leverage, "obs": _obs, "random": _random}


def select(block: Block, s: BlockStatistics, width: int, selection: str, ridge: float, seed: int) -> Tensor:
    """Indices of the ``width`` neurons to keep, [width], ascending.

    ``selection`` is "energy" (largest ‖h_j‖‖W_j‖), "leverage" (the neurons that the others explain least), "obs"
    (the least squares error after removing the rest, greedily) or "random" (a control). Raises ValueError where the
    block has no neurons or the statistics no "hidden" moment.
    """
    s.require(block, "hidden")
    return SELECTIONS[selection](block, s, width, ridge, seed).topk(width).indices.sort().values
