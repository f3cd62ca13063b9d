"""Which heads of self-attention are kept, in which basis their values are narrowed, and the output projection for them.

H are the outputs of all heads side by side, which enter the output projection W: [tokens, heads · value_dim]. Leaving heads out
and narrowing values leave the scores of the kept heads as they are, so H' = HS for a fixed S, and W' solves a ridge regression of
the block's output on H' from C = HᵀH alone. Narrower queries and keys change the scores, which no moment tells: W' is that of the
whole ones, until it is refitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.attention import AttentionWeights, attention_weights, key_units
from ..models.blocks import Block
from ..replacements.narrow_attention import NarrowAttention
from ..replacements.records import Errors
from ..statistics.records import BlockStatistics, Sample
from .errors import errors_of
from .neurons import ASK, ClosedForm
from .ridge import add_ridge, factor, solved

HEAD_SELECTIONS = ("auto", "energy", "fisher", "fisher_energy", "random")


def head_moment(block: Block, s: BlockStatistics, weights: AttentionWeights) -> Tensor:
    """C = HᵀH, a copy, [heads · value_dim, the same]; centred where the block has an output bias to take up the mean."""
    s.require(block, "hidden")
    return s.hh.addr(s.sum_h, s.sum_h, alpha=-1 / s.tokens) if weights.output_bias is not None else s.hh.clone()


def head_importance(block: Block, s: BlockStatistics, c: Tensor, how: ClosedForm) -> tuple[Tensor, Tensor]:
    """Scores of each query head [heads] and of each group [groups], by the rule that neurons are chosen by.

    A head's energy is that of what it alone adds to the output, a group's the sum over its heads. A group's effect is that of
    leaving out all its heads at once.

    Raises ValueError for a rule that ranks neurons only, and for effects that were not measured.
    """
    if how.selection not in HEAD_SELECTIONS:
        raise ValueError(f"Heads are kept by one of {', '.join(HEAD_SELECTIONS)}, got selection={how.selection!r}.")
    weights = attention_weights(block)
    members = torch.nn.functional.one_hot(weights.group_of.to(c.device)).to(c).T  # [groups, heads]
    if how.selection == "random":
        of_heads = torch.rand(len(weights.query), generator=torch.Generator().manual_seed(how.seed)).to(c)
        return of_heads, members @ of_heads
    output = weights.output.to(c)  # [heads, value_dim, hidden]
    energy = ((_own(c, output) @ output) * output).sum((1, 2))
    if how.selection == "energy" or how.selection == "auto" and s.effect is None:
        return energy, members @ energy
    if s.effect is None:
        raise ValueError(f"{block.name}: no effects of heads. {ASK}")
    effect = s.effect.to(c)[: len(energy), : len(energy)]  # [heads, heads]
    of_heads, of_groups = effect.diagonal(), ((members @ effect) * members).sum(1)
    if how.selection == "fisher":
        return of_heads, of_groups
    return (of_heads * energy).sqrt(), (of_groups * (members @ energy)).sqrt()


def _own(c: Tensor, output: Tensor) -> Tensor:
    """The moment of each head alone, [heads, value_dim, value_dim]."""
    heads, dim, _ = output.shape
    return c.view(heads, dim, heads, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def unit_importance(block: Block, s: BlockStatistics, how: ClosedForm, units: Tensor) -> Tensor:
    """Scores of the units of queries and keys, [groups, units], by the rule that heads are chosen by.

    The energy is Σ_i ‖q_i‖²·‖k‖² over the queries i that read a key (MoDeGPT, arXiv 2408.09632, has the square root of one
    such product). Raises ValueError where it is asked for and there is no "input" moment.
    """
    weights = attention_weights(block)
    if how.selection == "random":
        return torch.rand(len(weights.key), len(units), generator=torch.Generator().manual_seed(how.seed)).to(s.sum_h)
    effect = None
    if s.effect is not None and how.selection != "energy":
        effect = s.effect.diagonal()[len(weights.query) :].view(len(weights.key), -1).to(s.sum_h)
    if how.selection == "fisher":
        return effect
    s.require(block, "input")
    of_parts = (weights.query, weights.query_bias), (weights.key, weights.key_bias)
    queries, keys = (_projected_energy(s, *of_part)[:, units].sum(-1) for of_part in of_parts)  # [heads or groups, units]
    read = torch.zeros_like(keys).index_add_(0, weights.group_of.to(keys.device), queries)
    return read * keys if effect is None else (effect * read * keys).sqrt()


def _projected_energy(s: BlockStatistics, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean square of each output of a projection of the block's input, [heads, dim], from the moments of the input."""
    weight = weight.to(s.xx)
    energy = ((weight @ s.xx) * weight).sum(-1) / s.tokens
    if bias is None:
        return energy
    return energy + 2 * bias.to(energy) * (weight @ (s.sum_x / s.tokens)) + bias.to(energy).square()


def _kept_units(scores: Tensor, n: int) -> Tensor:
    """True for the best ``n`` units of each group, [groups, units]."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(n, dim=1).indices, True)


def units_left_out(families: Sequence[NarrowAttention], block: Block, s: BlockStatistics, how: ClosedForm) -> Iterator[Tensor]:
    """For each of ``families``, which narrow queries and keys: True for the units that it leaves out of the groups that it keeps,
    [groups of the block, units].
    """
    weights, units = attention_weights(block), key_units(block).to(s.sum_h.device)
    of_units = unit_importance(block, s, how, units)
    of_heads = head_importance(block, s, head_moment(block, s, weights), how)
    for family in families:
        heads = kept_heads(weights.group_of, *of_heads, family)
        stays = torch.zeros(len(of_units), 1, dtype=torch.bool, device=of_units.device)
        stays[weights.group_of.to(of_units.device)[heads]] = True
        yield stays & ~_kept_units(of_units, family.key_dim // units.shape[1])


def kept_heads(group_of: Tensor, of_heads: Tensor, of_groups: Tensor, family: NarrowAttention) -> Tensor:
    """The query heads to keep, [heads], ascending: those of the best groups, of each one its best and then the best of all."""
    group_of = group_of.to(of_heads.device)
    chosen = of_groups.topk(family.groups).indices
    best = of_heads.masked_fill(~torch.isin(group_of, chosen), -torch.inf)
    for group in chosen:  # each keeps a head, or its keys and values would have no reader
        first = best.masked_fill(group_of != group, -torch.inf).argmax()
        best[first] = torch.inf
    return best.topk(family.heads).indices.sort().values


def value_basis(c: Tensor, output: Tensor, dim: int) -> Tensor:
    """Orthonormal directions of a value that the output projection needs most, [value_dim, dim].

    c [value_dim, value_dim] is the summed moment of all heads that read the value, ``output`` [heads, value_dim, hidden] their
    part of the projection. With C = LLᵀ and G = Σ W_h W_hᵀ these are L⁻ᵀU for the leading eigenvectors U of LᵀGL: for a single
    head the reduced-rank regression of its output on its values (Izenman 1975).
    """
    if dim == len(c):
        return torch.eye(dim, dtype=c.dtype, device=c.device)
    ridge = 1e-9 * c.diagonal().mean().clamp_min(torch.finfo(c.dtype).tiny)
    lower = torch.linalg.cholesky(c + ridge * torch.eye(len(c), dtype=c.dtype, device=c.device))
    half = lower.T @ output.transpose(0, 1).flatten(1)  # [value_dim, heads · hidden]
    leading = torch.linalg.eigh(half @ half.T)[1][:, -dim:]
    return torch.linalg.qr(torch.linalg.solve_triangular(lower.T, leading, upper=True))[0]


@dataclass(frozen=True)
class NarrowedHeads:
    """What a :class:`~mlpreplace.replacements.NarrowAttention` keeps, and the regression on it. S maps H to what is kept."""

    weights: AttentionWeights  # of the kept heads, whole
    rows: Tensor  # [kept] columns of H that belong to them
    bases: Tensor  # [groups, value_dim of the block, value_dim]
    output: Tensor  # [heads · value_dim, hidden] W'
    bias: Tensor | None  # [hidden]
    keys: Tensor | None  # [groups, key_dim] dimensions of queries and keys of each group; None for all

    @property
    def basis(self) -> Tensor:
        """From the kept columns of H to H' = HS, [kept, heads · value_dim]."""
        return torch.block_diag(*self.bases[self.weights.group_of.to(self.bases.device)])

    def state(self) -> dict[str, Tensor]:
        """State dict of a :class:`~mlpreplace.replacements.narrow_attention.HeadAttention`, without the norms of heads."""
        w = self.weights if self.keys is None else self.weights.with_keys(self.keys.to(self.weights.query.device))
        narrow = {"value": self.bases.mT @ w.value.to(self.bases)}
        if w.value_bias is not None:
            narrow["value_bias"] = (self.bases.mT @ w.value_bias.to(self.bases)[..., None]).squeeze(-1)
        output = self.output.unflatten(0, (len(w.query), -1))
        kept = w.group_of if self.keys is None else torch.cat([w.group_of.cpu(), self.keys.flatten().cpu()])
        return replace(w, **narrow, output=output, output_bias=self.bias).state() | {"_extra_state": kept}


def narrowed(family: NarrowAttention, block: Block, s: BlockStatistics, how: ClosedForm) -> NarrowedHeads:
    """W' = SᵀW + (SᵀCS + λI)⁻¹ SᵀC(W − SSᵀW): ridge regression of the block's output on H', towards the block's own weights.

    A block with an output bias has centred moments, and the bias takes up the mean.
    """
    whole = attention_weights(block)
    output, c = whole.output.to(s.hh), head_moment(block, s, whole)
    heads = kept_heads(whole.group_of, *head_importance(block, s, c, how), family)
    kept, dim = whole.of(heads), output.shape[1]
    own, groups = _own(c, output), range(family.groups)
    members = [heads[kept.group_of.to(heads.device) == group] for group in groups]
    bases = torch.stack([value_basis(own[of].sum(0), output[of], family.value_dim) for of in members])
    rows = (heads[:, None] * dim + torch.arange(dim, device=heads.device)).flatten()
    keys = _kept_dimensions(family, block, s, how, whole.group_of.to(heads.device)[heads].unique())
    found = NarrowedHeads(kept, rows, bases, output.flatten(0, 1)[rows], whole.output_bias, keys)
    if len(rows) == len(c) and family.value_dim == dim:
        return found  # the block itself
    basis, w = found.basis, output.flatten(0, 1)
    start, gram = basis.T @ w[rows], basis.T @ c[rows][:, rows] @ basis
    target = basis.T @ (c[rows] @ w) - gram @ start
    fitted = start + solved(factor(block, add_ridge(block, gram, how.ridge)), target)
    bias = whole.output_bias
    if bias is not None:
        mean = s.sum_h / s.tokens
        bias = bias.to(mean) + mean @ w - (mean[rows] @ basis) @ fitted
    return replace(found, output=fitted, bias=bias)


def _kept_dimensions(family: NarrowAttention, block: Block, s: BlockStatistics, how: ClosedForm, groups: Tensor) -> Tensor | None:
    """[groups, key_dim], the first of all units before the second, as :func:`~mlpreplace.models.attention.turned` pairs them."""
    if family.key_dim is None:
        return None
    units = key_units(block).to(s.sum_h.device)
    kept = _kept_units(unit_importance(block, s, how, units), family.key_dim // units.shape[1])
    return torch.stack([units[of].T.flatten() for of in kept[groups]])


@torch.inference_mode()
def narrowed_error(family: NarrowAttention, block: Block, s: BlockStatistics, how: ClosedForm, h: Tensor) -> Tensor:
    """What the fitted module gives less what the block gives, [..., hidden], from outputs h of the block's heads [..., inner].

    Where scores of kept heads stay as they are, the output is linear in h. What narrower queries and keys change is not in it.
    """
    found, whole = narrowed(family, block, s.to(block.device), how), attention_weights(block)
    change = -whole.output.to(found.output).flatten(0, 1)  # [inner, hidden]
    change[found.rows] += found.basis @ found.output
    h = h.to(block.device, torch.promote_types(h.dtype, torch.float32))
    error = h @ change.to(h)
    return error if found.bias is None else error + (found.bias.to(found.output) - whole.output_bias.to(found.output)).to(h)


def narrowed_errors(family: NarrowAttention, block: Block, s: BlockStatistics, how: ClosedForm, sample: Sample) -> Errors | None:
    """Errors on the real tokens of a sample; None where it holds no outputs of heads, and for narrower queries and keys."""
    if sample.h is None or family.key_dim is not None:
        return None
    sample = sample.to(block.device)
    return errors_of(sample.y + narrowed_error(family, block, s, how, sample.h), sample)
