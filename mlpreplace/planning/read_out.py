"""The output weights of a replacement, which are solved again for the inputs that it has in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from ..fitting.ridge import centred, factor, solved
from ..models.blocks import Block
from ..replacements.families import Family, Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP
from ..replacements.narrow_attention import NarrowAttention
from ..statistics.accumulator import add_to, gram

QUIET = 1e-4  # of the mean deviation: features below it are as good as silent


@dataclass(frozen=True)
class ReadOut:
    """A module as a linear map of features: g(x) = Σᵢ Wᵢ fᵢ(x) + b, and what else it may add to every token."""

    features: Callable[[Tensor], Tensor] | None  # [..., hidden] → [..., width], all fᵢ side by side; None: what ``layer`` reads
    weights: tuple[nn.Parameter, ...]  # [hidden, width of fᵢ] each
    bias: nn.Parameter | None  # [hidden]
    layer: nn.Module | None = None
    constant: nn.Parameter | None = None  # [hidden], which stays as it is

    def output(self, features: Tensor) -> Tensor:
        """g(x) of features of x, [..., hidden]."""
        if not self.weights:
            return self.bias.expand(*features.shape[:-1], -1)
        y = nn.functional.linear(features, torch.cat(self.weights, 1), self.bias)
        return y if self.constant is None else y + self.constant


@singledispatch
def read_out(family: Family, body: nn.Module) -> ReadOut | None:
    """The output weights of a family's module; None where the family has none or is not registered."""
    return None


@read_out.register
def _(family: Mean, body: nn.Module) -> ReadOut:
    return ReadOut(lambda x: x[..., :0], (), body.bias)


@read_out.register
def _(family: Linear, body: nn.Module) -> ReadOut:
    return ReadOut(lambda x: x, (body.weight,), body.bias)


@read_out.register
def _(family: LowRank, body: nn.Module) -> ReadOut:
    return ReadOut(body[0], (body[1].weight,), body[1].bias)


@read_out.register(NarrowMLP)
@read_out.register(TwoLayerMLP)
def _(family: Family, body: nn.Module) -> ReadOut:
    return ReadOut(body.neurons, (body.down.weight,), body.down.bias)


@read_out.register
def _(family: NarrowAttention, body: nn.Module) -> ReadOut:
    return ReadOut(None, (body.output.weight,), body.output.bias, body.output)


@read_out.register
def _(family: NarrowPlusLinear, body: nn.Module) -> ReadOut:
    inward, outward = body.linear
    weights = body.mlp.down.weight, outward.weight
    own = body.mlp.down.bias
    return ReadOut(lambda x: torch.cat([body.mlp.neurons(x), inward(x)], -1), weights, outward.bias, constant=own)


def _penalty(ff: Tensor) -> Tensor:
    """The diagonal of D, see :meth:`Regression.solve`, [width]. As D, the identity and FᵀF's own diagonal cost more in KL."""
    deviation = ff.diagonal().clamp_min(0).sqrt()
    return deviation.mean() * deviation.clamp_min(QUIET * deviation.mean())


class Regression:
    """Ridge regression of errors on features from moments, summed in float64 over batches of weighted tokens.

    Tokens that are unseen by the regression choose among ridges.
    """

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.unseen: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, f: Tensor, error: Tensor, weight: Tensor, *, unseen: bool = False) -> None:
        """Features [tokens, width], errors [tokens, hidden], weights [tokens, 1]."""
        if unseen:
            self.unseen.append((f, error, weight))
            return
        wf, we, root = weight * f, weight * error, weight.sqrt()
        of_batch = weight.sum(), wf.sum(0), we.sum(0), gram(root * f), wf.T @ error, (we * error).sum()
        self.sums = self.sums or [torch.zeros_like(s, dtype=torch.float64) for s in of_batch]
        for total, s in zip(self.sums, of_batch, strict=True):
            add_to(total, s)

    def solve(self, block: Block, out: ReadOut, ridges: Sequence[float]) -> dict[str, float | None]:
        """Add (FᵀF + λD)⁻¹FᵀE to the weights; a bias takes up the mean, without ridge.

        D is mean(σ)·diag(σ), σ² the diagonal of FᵀF: halfway between one ridge for all features and one for features of one
        scale. With unseen tokens λ is that of ``ridges`` whose error there is least; the weights stay where that is no less than
        theirs.

        Returns a token's squared error, what is left of it, and λ, which is None where the weights stay.
        """
        n, sum_f, sum_e, ff, fe, ee = self.sums
        self.sums = []  # so that what is centred takes their place
        error = ee / n
        if out.bias is not None:
            ff, fe = centred(ff, sum_f, sum_f, n), centred(fe, sum_f, sum_e, n)
        penalty, least, best = _penalty(ff), self._error_of_unseen(None), None
        for ridge in ridges if out.weights else ridges[:1]:
            c = ff if ridge == ridges[-1] else ff.clone()  # which is written into
            c.diagonal().add_(ridge * penalty)
            delta = solved(factor(block, c), fe) if out.weights else fe  # [width, hidden]
            bias = None if out.bias is None else (sum_e - sum_f @ delta) / n  # [hidden]
            unseen = self._error_of_unseen(delta, bias)
            if not self.unseen or unseen < least:
                least, best = unseen, (ridge, delta, bias)
            del c, delta  # before the next copy
        if best is None:
            return {"error": error.item(), "error_left": error.item(), "ridge": None}
        ridge, delta, bias = best
        for weight, part in zip(out.weights, delta.split([w.shape[1] for w in out.weights]), strict=True):
            weight.copy_(weight + part.T)
        left = error
        if out.bias is not None:
            out.bias.copy_(out.bias + bias)
            left = left - sum_e.square().sum() / n**2
        if out.weights:  # δᵀFᵀFδ = δᵀFᵀE − λδᵀDδ, since δ solves (FᵀF + λD)δ = FᵀE
            left = left - ((delta * fe).sum() + ridge * (penalty @ delta.square()).sum()) / n
        return {"error": error.item(), "error_left": left.item(), "ridge": ridge}

    def _error_of_unseen(self, delta: Tensor | None, bias: Tensor | None = None) -> float:
        """Σ w‖e − fδ − b‖² over unseen tokens."""
        total = 0.0
        for f, error, weight in self.unseen:
            left = error if delta is None else error - f @ delta.to(f)
            left = left if bias is None else left - bias.to(left)
            total += (weight * left.square()).sum().item()
        return total
