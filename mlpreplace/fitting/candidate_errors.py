"""Errors of a block's candidates on some tokens, without a fit for each where a family's sizes share one factorisation.

NarrowMLP. Let C = LLᵀ be the ridged moment of all neurons, most important first. z = L⁻¹h is h with the earlier neurons regressed
out of each, and U = LᵀW is what one unit of z adds to the output. Keeping the first k neurons, output weights solved again, errs
by −Σ_{j>k} z_j U_j. So the errors of all widths are running sums over the neurons. The fit of one width takes its ridge from the
kept neurons alone, so its errors differ a little.

LowRank. The map of rank r is the ridge solution projected on r leading directions: its outputs are running sums over these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..models.blocks import Block, block_neurons
from ..replacements.families import Family, LowRank, NarrowMLP, Replacement
from ..replacements.narrow_attention import NarrowAttention
from ..statistics.moments import BlockStatistics
from .fit import fit
from .heads import HeadFits
from .neurons import ClosedForm, hidden_moment, importance
from .ridge import add_ridge, factor, linear_map, reduced_rank

Candidate = Family | Replacement  # a family at a size, fitted when it is needed; or what was fitted already
NESTED = (
    "auto",
    "energy",
    "fluctuation",
    "leverage",
    "fisher",
    "fisher_energy",
    "random",
)  # selections of which narrow ones are part of wide ones


def candidate_errors(
    block: Block,
    candidates: Sequence[Candidate],
    s: BlockStatistics | None,
    x: Tensor,
    y: Tensor,
    how: ClosedForm = ClosedForm(),  # noqa: B008, it is frozen
    *,
    h: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(position of a candidate, its output less the block's, [windows, seq_len, hidden] in at least float32), in any order.

    Args:
        s: statistics of the block, on its device, that families are fitted to.
        x, y: inputs and outputs of the block, [windows, seq_len, hidden], on its device.
        h: outputs of heads, [windows, seq_len, inner], which the errors of narrower attention are computed from.

    Raises ValueError for a family without statistics, narrower attention without h or fitted before, and what
    :func:`~mlpreplace.fitting.fit` raises.
    """
    if s is None and (unfitted := [c for c in candidates if isinstance(c, Family)]):
        raise ValueError(f"{block.name}: {unfitted[0]} is to be fitted, and there are no statistics: stats=capture(...).")
    narrow = {i: c.width for i, c in enumerate(candidates) if type(c) is NarrowMLP and how.selection in NESTED}
    low = {i: c.rank for i, c in enumerate(candidates) if type(c) is LowRank}
    attending = {i: c for i, c in enumerate(candidates) if isinstance(c, NarrowAttention)}
    if h is None and attending or any(isinstance(c, Replacement) and c.family.attends for c in candidates):
        raise ValueError(
            f"{block.name}: what enters the block does not tell the error of narrower attention. Price the family, before it is "
            "fitted, by second_order_damage(model, candidates, windows, stats), or by measured_damage."
        )
    if attending:
        yield from HeadFits(block, s, how).errors_on(attending, h)
    if narrow:
        yield from _narrow_errors(block, narrow, s, x, how)
    if low:
        yield from _low_rank_errors(block, low, s, x, y, how)
    for i, candidate in enumerate(candidates):
        if i not in narrow and i not in low and i not in attending:
            if isinstance(candidate, Family):
                fitted = dict(ridge=how.ridge, selection=how.selection, seed=how.seed, samples=())
                candidate = fit(block, {block: s}, candidate, **fitted)
            g = candidate(x)
            yield i, g.to(torch.promote_types(g.dtype, torch.float32)) - y


def _narrow_errors(
    block: Block, widths: dict[int, int], s: BlockStatistics, x: Tensor, how: ClosedForm
) -> Iterator[tuple[int, Tensor]]:
    for width in widths.values():
        NarrowMLP(width).n_params(block)  # raises where it does not fit
    order = importance(block, s, max(widths.values()), how).argsort(descending=True, stable=True)
    lower = factor(block, add_ridge(block, hidden_moment(block, s, order), how.ridge))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weights = block.weights()
    h = block_neurons(block, x.flatten(0, 1))  # [tokens, intermediate]
    if weights.down_bias is not None:
        h = h - (s.sum_h / s.tokens).to(h)
    u = (lower.T @ weights.down.to(lower).T[order]).to(h)  # [intermediate, hidden]
    lower = lower.to(h)
    z = torch.linalg.solve_triangular(lower, h[:, order].T, upper=False)  # [intermediate, tokens]
    error, kept = x.new_zeros(len(h), u.shape[1]), len(order)
    for i, width in sorted(widths.items(), key=lambda item: -item[1]):
        error = error - z[width:kept].T @ u[width:kept]
        kept = width
        yield i, error.view_as(x)


def _low_rank_errors(
    block: Block, ranks: dict[int, int], s: BlockStatistics, x: Tensor, y: Tensor, how: ClosedForm
) -> Iterator[tuple[int, Tensor]]:
    for rank in ranks.values():
        LowRank(rank).n_params(block)  # raises where it does not fit
    x, y = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
    down, up = (t.to(x) for t in reduced_rank(*linear_map(block, s, how.ridge), max(ranks.values())))  # leading ones last
    down, up = down.flip(1), up.flip(0)  # [hidden, rank], [rank, hidden]
    inner = (x - (s.sum_x / s.tokens).to(x)) @ down  # [windows, seq_len, rank]
    error, added = (s.sum_y / s.tokens).to(y) - y, 0
    for i, rank in sorted(ranks.items(), key=lambda item: item[1]):
        error = error + inner[..., added:rank] @ up[added:rank]
        added = rank
        yield i, error
