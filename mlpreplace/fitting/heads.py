"""Which heads of self-attention are kept, in which basis their values are narrowed, and the output projection for them.

H are the outputs of all heads side by side, which enter the output projection W: [tokens, heads · value_dim]. Leaving heads out
and narrowing values leave the scores of the kept heads as they are, so H' = HS for a fixed S, and W' solves a ridge regression of
the block's output on H' from C = HᵀH alone. Narrower queries and keys change the scores, which no moment tells: W' is that of the
whole ones, until it is refitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..models.attention import AttentionWeights, attention_weights, key_units
from ..models.blocks import Block
from ..replacements.narrow_attention import NarrowAttention
from ..replacements.records import Errors
from ..statistics.records import BlockStatistics, Sample
from .errors import errors_of
from .neurons import ASK, ClosedForm, fluctuation
from .ridge import add_ridge, factor, solved

HEAD_SELECTIONS = ("auto", "energy", "fluctuation", "fisher", "fisher_energy", "random")


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
    """What a :class:`~mlpreplace.replacements.NarrowAttention` keeps, and the regression on it."""

    weights: AttentionWeights  # of the kept heads, whole
    heads: Tensor  # [heads] which they are
    bases: Tensor  # [groups, value_dim of the block, value_dim]
    output: Tensor  # [heads · value_dim, hidden] W'
    bias: Tensor | None  # [hidden]
    keys: Tensor | None  # [groups, key_dim] dimensions of queries and keys of each group; None for all

    def features(self, h: Tensor) -> Tensor:
        """H' = HS of outputs of all heads [..., heads of the block, value_dim of the block], [..., heads · value_dim]."""
        kept = h[..., self.heads, :]
        if self.bases.shape[1] == self.bases.shape[2]:  # the identity
            return kept.flatten(-2)
        basis = self.bases[self.weights.group_of.to(self.bases.device)].to(h)
        return torch.einsum("...hd,hdr->...hr", kept, basis).flatten(-2)

    def state(self) -> dict[str, Tensor]:
        """State dict of a :class:`~mlpreplace.replacements.narrow_attention.HeadAttention`, without the norms of heads."""
        w = self.weights if self.keys is None else self.weights.with_keys(self.keys.to(self.weights.query.device))
        narrow = {"value": self.bases.mT @ w.value.to(self.bases)}
        if w.value_bias is not None:
            narrow["value_bias"] = (self.bases.mT @ w.value_bias.to(self.bases)[..., None]).squeeze(-1)
        output = self.output.unflatten(0, (len(w.query), -1))
        kept = w.group_of if self.keys is None else torch.cat([w.group_of.cpu(), self.keys.flatten().cpu()])
        return replace(w, **narrow, output=output, output_bias=self.bias).state() | {"_extra_state": kept}


@dataclass(frozen=True)
class HeadFits:
    """All fits of :class:`~mlpreplace.replacements.NarrowAttention` to one block: what they share is computed once.

    Raises ValueError where there is no "hidden" moment, for a rule that ranks neurons only, and for effects that were not
    measured.
    """

    block: Block
    s: BlockStatistics  # on the block's device
    how: ClosedForm
    biased: bool = False  # whether there is an output bias even where the block has none

    def __post_init__(self) -> None:
        self.s.require(self.block, "hidden")
        if self.how.selection not in HEAD_SELECTIONS:
            raise ValueError(f"Heads are kept by one of {', '.join(HEAD_SELECTIONS)}, got selection={self.how.selection!r}.")
        if self.s.effect is None and self.how.selection in ("fisher", "fisher_energy"):
            raise ValueError(f"{self.block.name}: no effects of heads. {ASK}")

    @cached_property
    def weights(self) -> AttentionWeights:
        return attention_weights(self.block)

    @cached_property
    def output(self) -> Tensor:
        """[heads, value_dim, hidden], in float64."""
        return self.weights.output.to(self.s.hh)

    @cached_property
    def moment(self) -> Tensor:
        """C = HᵀH, [heads, value_dim, heads, value_dim]; centred where there is an output bias to take up the mean."""
        s, shape = self.s, (*self.output.shape[:2], *self.output.shape[:2])
        centred = self.biased or self.weights.output_bias is not None
        return (s.hh.addr(s.sum_h, s.sum_h, alpha=-1 / s.tokens) if centred else s.hh).view(shape)

    @cached_property
    def own(self) -> Tensor:
        """The moment of each head alone, [heads, value_dim, value_dim]."""
        return self.moment.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    @cached_property
    def target(self) -> Tensor:
        """CW, [heads, value_dim, hidden]."""
        return (self.moment.flatten(2).flatten(0, 1) @ self.output.flatten(0, 1)).view_as(self.output)

    @cached_property
    def importance(self) -> tuple[Tensor, Tensor]:
        """Scores of each query head [heads] and of each group [groups], by the rule that neurons are chosen by.

        A head's energy is that of what it alone adds to the output, a group's the sum over its heads. A group's effect is that
        of leaving out all its heads at once, its fluctuation that of its best head: heads are kept without regard to groups.
        """
        c, rule = self.own, self.how.selection
        members = torch.nn.functional.one_hot(self.weights.group_of.to(c.device)).to(c).T  # [groups, heads]
        if rule == "random":
            of_heads = torch.rand(len(c), generator=torch.Generator().manual_seed(self.how.seed)).to(c)
            return of_heads, members @ of_heads
        if rule == "fluctuation":
            of_heads = fluctuation(self.s, self.output.flatten(0, 1).T).view(self.output.shape[:2]).sum(1)
            return of_heads, (members * of_heads).amax(1)
        energy = ((c @ self.output) * self.output).sum((1, 2))
        if rule == "energy" or self.s.effect is None:
            return energy, members @ energy
        effect = self.s.effect.to(c)[: len(c), : len(c)]  # [heads, heads]
        of_heads, of_groups = effect.diagonal(), ((members @ effect) * members).sum(1)
        if rule == "fisher":
            return of_heads, of_groups
        return (of_heads * energy).sqrt(), (of_groups * (members @ energy)).sqrt()

    @cached_property
    def units(self) -> Tensor:
        return key_units(self.block).to(self.s.sum_h.device)

    @cached_property
    def unit_importance(self) -> Tensor:
        """Scores of the units of queries and keys, [groups, units], by the same rule.

        The energy is Σ_i ‖q_i‖²·‖k‖² over the queries i that read a key (MoDeGPT, arXiv 2408.09632, has the square root of one
        such product). Raises ValueError where it is asked for and there is no "input" moment.
        """
        w, s, rule, effect = self.weights, self.s, self.how.selection, None
        if rule == "random":
            return torch.rand(len(w.key), len(self.units), generator=torch.Generator().manual_seed(self.how.seed)).to(s.sum_h)
        if s.effect is not None and rule in ("auto", "fisher", "fisher_energy"):
            effect = s.effect.diagonal()[len(w.query) :].view(len(w.key), -1).to(s.sum_h)
        if rule == "fisher":
            return effect
        s.require(self.block, "input")
        of_parts = (w.query, w.query_bias), (w.key, w.key_bias)
        queries, keys = (_projected_energy(s, *of_part)[:, self.units].sum(-1) for of_part in of_parts)
        energy = keys * torch.zeros_like(keys).index_add_(0, w.group_of.to(keys.device), queries)
        return energy if effect is None else (effect * energy).sqrt()

    def kept(self, family: NarrowAttention) -> Tensor:
        """The query heads to keep, [heads], ascending."""
        return kept_heads(self.weights.group_of, *self.importance, family)

    def kept_units(self, family: NarrowAttention) -> Tensor:
        """True for the units of queries and keys that are kept, [groups of the block, units]."""
        best = self.unit_importance.topk(family.key_dim // self.units.shape[1], dim=1).indices
        return torch.zeros_like(self.unit_importance, dtype=torch.bool).scatter_(1, best, True)

    def units_left_out(self, family: NarrowAttention) -> Tensor:
        """True for the units that are left out of groups that are kept, [groups of the block, units]."""
        stays = torch.zeros(len(self.unit_importance), 1, dtype=torch.bool, device=self.units.device)
        stays[self.weights.group_of.to(self.units.device)[self.kept(family)]] = True
        return stays & ~self.kept_units(family)

    def narrowed(self, family: NarrowAttention) -> NarrowedHeads:
        """W' = (SᵀCS + λI)⁻¹ (SᵀCW + λSᵀW): ridge regression of the block's output on H', towards the block's own weights.

        With an output bias moments are centred, and the bias takes up the mean.
        """
        if family.biased != self.biased:
            return replace(self, biased=family.biased).narrowed(family)
        heads, dim = self.kept(family), self.output.shape[1]
        weights, w = self.weights.of(heads), self.output[heads]
        of_group = weights.group_of.to(heads.device)
        members = [heads[of_group == group] for group in range(family.groups)]
        bases = torch.stack([value_basis(self.own[of].sum(0), self.output[of], family.value_dim) for of in members])
        keys = None
        if family.key_dim is not None:  # the first of all units before the second, as ``turned`` pairs them
            groups = self.weights.group_of.to(heads.device)[heads].unique()
            keys = torch.stack([self.units[of].T.flatten() for of in self.kept_units(family)[groups]])
        found = NarrowedHeads(weights, heads, bases, w.flatten(0, 1), self.weights.output_bias, keys)
        if len(heads) == len(self.output) and family.value_dim == dim and not self.biased:
            return found  # the block itself
        basis = bases[of_group]  # [heads, value_dim of the block, value_dim]
        fitted = self._output(heads, basis)
        bias = self.weights.output_bias
        if self.biased or bias is not None:
            mean = (self.s.sum_h / self.s.tokens).view(len(self.output), 1, dim)
            of_all, of_kept = mean.flatten() @ self.output.flatten(0, 1), (mean[heads] @ basis).flatten() @ fitted
            bias = of_all - of_kept if bias is None else bias.to(mean) + of_all - of_kept
        return replace(found, output=fitted, bias=bias)

    def _output(self, heads: Tensor, basis: Tensor) -> Tensor:
        """W' for values of kept ``heads`` in a ``basis`` each, [heads, value_dim of the block, value_dim]."""
        w = self.output[heads]
        if math.isinf(self.how.ridge):
            return (basis.mT @ w).flatten(0, 1)
        within = torch.einsum("hdke,ker->hdkr", self.moment[heads][:, :, heads], basis)
        gram = (basis.mT @ within.flatten(2)).flatten(0, 1)
        ridge = self.how.ridge * gram.diagonal().mean()
        target = (basis.mT @ (self.target[heads] + ridge * w)).flatten(0, 1)
        return solved(factor(self.block, add_ridge(self.block, gram, self.how.ridge)), target)

    @torch.inference_mode()
    def errors_on(self, families: Mapping[int, NarrowAttention], h: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(key, what the fitted module gives less what the block gives, [..., hidden]) from outputs h of its heads [..., inner].

        Where scores of kept heads stay as they are, the output is linear in h. What narrower queries and keys change is not in
        it.
        """
        h = h.to(self.block.device, torch.promote_types(h.dtype, torch.float32))
        own, by_head = h @ self.output.flatten(0, 1).to(h), h.unflatten(-1, self.output.shape[:2])
        bias = self.weights.output_bias
        for key, family in families.items():
            found = self.narrowed(family)
            error = found.features(by_head) @ found.output.to(h) - own
            if found.bias is not None:
                error = error + (found.bias if bias is None else found.bias - bias.to(found.bias)).to(h)
            yield key, error

    def errors(self, family: NarrowAttention, sample: Sample) -> Errors | None:
        """On the real tokens of a sample; None where it holds no outputs of heads, and for narrower queries and keys."""
        if sample.h is None or family.key_dim is not None:
            return None
        sample = sample.to(self.block.device)
        ((_, error),) = self.errors_on({0: family}, sample.h)
        return errors_of(sample.y + error, sample)


def _projected_energy(s: BlockStatistics, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean square of each output of a projection of the block's input, [heads, dim], from the moments of the input."""
    weight = weight.to(s.xx)
    energy = ((weight @ s.xx) * weight).sum(-1) / s.tokens
    if bias is None:
        return energy
    return energy + 2 * bias.to(energy) * (weight @ (s.sum_x / s.tokens)) + bias.to(energy).square()
