"""Closed-form fits: statistics in, parameters out. Also what every training starts from.

Every solver minimises the squared output error over the calibration tokens with a relative ridge λ·mean(diag), in
float64. Ridge means: kept neurons are pulled towards the block's own output weights (so full width returns the block
exactly), all else towards the mean output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from .algebra import centred, factor, least_squares, ridged
from .blocks import Block
from .capture import BlockStatistics, Sample
from .replacements import Family, Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP
from .selection import SELECTIONS, hidden_moment, select

RIDGE = 1e-2
CHUNK = 4096  # tokens whose features are made at a time


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


def _linear_map(block: Block, s: BlockStatistics, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression on centred moments: A [hidden_in, hidden_out] and the centred XᵀY it was solved for."""
    s.require(block, "input")
    xy = centred(s.xy, s.sum_x, s.sum_y, s.tokens)
    return least_squares(block, centred(s.xx, s.sum_x, s.sum_x, s.tokens), xy, ridge), xy


def _reduced_rank(a: Tensor, xy: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best map of a rank in output error, as its factors [in, rank] and [rank, out] (Izenman 1975).

    It projects the ridge solution A = C⁻¹XᵀY on the leading eigenvectors of AᵀCA = AᵀXᵀY, which are the right singular
    vectors of C^{1/2}A; an SVD of A alone would not see C.
    """
    _, vectors = torch.linalg.eigh(a.T @ xy)  # ascending
    leading = vectors[:, -rank:]  # [out, rank]
    return a @ leading, leading.T


@singledispatch
def solve(family: Family, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """The closed-form parameters of a family: a state dict for the module that ``family.build(block)`` makes."""
    raise ValueError(f"{family} has no closed form.")


@solve.register
def _(family: Mean, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    s.require(block)
    return {"bias": s.sum_y / s.tokens}


@solve.register
def _(family: Linear, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    a, _ = _linear_map(block, s, how.ridge)
    return {"weight": a.T, "bias": (s.sum_y - s.sum_x @ a) / s.tokens}


@solve.register
def _(family: LowRank, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Reduced-rank regression."""
    down, up = _reduced_rank(*_linear_map(block, s, how.ridge), family.rank)
    return {"0.weight": down.T, "1.weight": up.T, "1.bias": (s.sum_y - s.sum_x @ down @ up) / s.tokens}


def _sliced(block: Block, kept: Tensor) -> dict[str, Tensor]:
    """The input side of the kept neurons, in the names of a NarrowMLP's state dict."""
    weights = block.weights()
    named = {"up.weight": weights.up, "gate.weight": weights.gate, "up.bias": weights.up_bias, "gate.bias": weights.gate_bias}
    return {name: tensor[kept] for name, tensor in named.items() if tensor is not None}


def _keep(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> tuple[Tensor, Tensor]:
    """Indices of the neurons to keep and of the others, ascending."""
    kept = select(block, s, width, how.selection, how.ridge, how.seed)
    dropped = torch.ones(len(s.hh), dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    return kept, dropped.nonzero().squeeze(1)


@solve.register
def _(family: NarrowMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Keep the neurons P that ``how.selection`` chooses, then give the kept ones the work of the dropped ones Q:
    W' = W_P + (C_PP + λI)⁻¹ C_PQ W_Q with C = HᵀH, centred where the block has an output bias to take up the mean.
    """
    kept, dropped = _keep(block, s, family.width, how)
    down = block.weights().down.to(s.hh).T  # [intermediate, hidden]
    solved = down[kept]
    if len(dropped):
        c = hidden_moment(block, s)
        solved = solved + least_squares(block, c[kept][:, kept], c[kept][:, dropped] @ down[dropped], how.ridge)
    state = {**_sliced(block, kept), "down.weight": solved.T}
    if (bias := block.weights().down_bias) is not None:
        mean = s.sum_h / s.tokens
        state["down.bias"] = bias.to(mean) + mean @ down - mean[kept] @ solved
    return state


@solve.register
def _(family: NarrowPlusLinear, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Joint least squares on [h_P; x]: W' = W_P + D for the kept neurons P and a map B of rank r for the input.

    The neurons are profiled out. For any B the best D is (C_PP + λI)⁻¹(C_PT − C_Px B), with T = H_Q W_Q the output of
    the dropped neurons Q; what B then has to explain is the part of T that H_P does not, from the part of X that H_P
    does not: a reduced-rank regression on the Schur complements of C_PP. All moments are centred, as there is a bias.
    """
    s.require(block, "input", "hidden", "cross")
    kept, dropped = _keep(block, s, family.width, how)
    down, n = block.weights().down.to(s.hh).T, s.tokens
    hh, hx = centred(s.hh, s.sum_h, s.sum_h, n), centred(s.hx, s.sum_h, s.sum_x, n)
    pt, px = hh[kept][:, dropped] @ down[dropped], hx[kept]  # [width, hidden] each: H_PᵀT, H_PᵀX
    by_neurons = least_squares(block, hh[kept][:, kept], torch.cat([pt, px], 1), how.ridge)
    t_by_neurons, x_by_neurons = by_neurons.tensor_split(2, 1)
    xx = ridged(block, centred(s.xx, s.sum_x, s.sum_x, n), how.ridge) - px.T @ x_by_neurons
    xt = hx[dropped].T @ down[dropped] - px.T @ t_by_neurons
    linear_in, linear_out = _reduced_rank(torch.cholesky_solve(xt, factor(block, xx)), xt, family.rank)

    solved = down[kept] + t_by_neurons - x_by_neurons @ linear_in @ linear_out
    state = {f"mlp.{name}": tensor for name, tensor in _sliced(block, kept).items()}
    state |= {"mlp.down.weight": solved.T, "linear.0.weight": linear_in.T, "linear.1.weight": linear_out.T}
    state["linear.1.bias"] = (s.sum_h @ down - s.sum_h[kept] @ solved - s.sum_x @ linear_in @ linear_out) / n
    if (bias := block.weights().down_bias) is not None:
        state["mlp.down.bias"] = bias
    return state


@solve.register
def _(family: TwoLayerMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Features act(W₁x + b₁) made from what the block is, then W₂ and b₂ by ridge on the sampled pairs.

    The neurons of an ungated block are such features: its NarrowMLP is the answer, without pairs.
    """
    if block.has_neurons and block.gate is None:
        state = solve(NarrowMLP(family.width), block, s, how)
        zeros = {"up.bias": s.sum_h.new_zeros(family.width), "down.bias": s.sum_h.new_zeros(block.hidden_size)}
        return zeros | state
    if s.train is None:
        raise ValueError(f"{family} of {block.name} is solved on sampled tokens: capture(..., sample_windows=None).")
    body = family.build(block).to(device=s.sum_x.device, dtype=torch.promote_types(block.dtype, torch.float32))
    rows, bias = (tensor.to(body.up.weight) for tensor in _features(block, s, family.width, how))
    features = {"up.weight": rows, "up.bias": bias}
    body.load_state_dict(features, strict=False)
    of_features = _statistics(body.neurons, s.train, rows.device)
    w, _ = _linear_map(block, of_features, how.ridge)
    return features | {"down.weight": w.T, "down.bias": (of_features.sum_y - of_features.sum_x @ w) / of_features.tokens}


def _features(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> tuple[Tensor, Tensor]:
    """W₁ [width, hidden] and b₁ [width] of a shallow MLP for a block that is gated or has no neurons.

    Three kinds of rows. First act(v·x + 4), v the leading directions of a LowRank at unit variance: as good as linear for
    SiLU, GELU and ReLU, so that up to d/2 of them do what a LowRank does. Then, of a gated block, gate + up/2 and
    gate − up/2 of the neurons to keep, as act(g + u/2) − act(g − u/2) ≈ act'(g)·u; of another, v·x again, which bends. The
    rest, where the module is wider than that, is random.

    On three blocks of a 135M-parameter Llama, at 12.5, 25 and 50 % of their parameters, the held-out error was lower than
    with gate rows, up rows or Gaussian rows (whitened or not), both as it is and after two epochs. The linear rows lower
    it most in a small module; in a late block at half size they cost 3 %.
    """
    hidden, mean = block.hidden_size, s.sum_x / s.tokens
    xx = centred(s.xx, s.sum_x, s.sum_x, s.tokens) / s.tokens
    directions = _reduced_rank(*_linear_map(block, s, how.ridge), hidden)[0].flip(1)  # [hidden, hidden], leading first
    size = (directions * (xx @ directions)).sum(0).clamp_min(0).sqrt()
    v = (directions / size.clamp_min(1e-6 * size.max())).T  # of a direction that was never seen: not too long
    v_bias = -v @ mean

    n_linear = min(width // 2, hidden // 6) if block.has_neurons else min(width, hidden // 2)
    if block.has_neurons:
        own, own_bias = _gated_features(block, s, width - n_linear, how)
    else:
        own, own_bias = v, v_bias
    noise = torch.randn(width, hidden, generator=torch.Generator().manual_seed(how.seed), dtype=v.dtype).to(v)
    noise /= 2 * xx.trace().sqrt()  # variance 1/4
    rows = torch.cat([v[:n_linear], own, noise])[:width]
    return rows, torch.cat([v_bias[:n_linear] + 4, own_bias, -noise @ mean])[:width]


def _gated_features(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> tuple[Tensor, Tensor]:
    """Rows gate ± up/2 of the neurons to keep, and their biases; at most two for every neuron."""
    weights = block.weights()
    kept = select(block, s, min((width + 1) // 2, block.intermediate_size), how.selection, how.ridge, how.seed)

    def pairs(gate: Tensor, up: Tensor) -> Tensor:
        gate, half = gate[kept].to(s.xx), up[kept].to(s.xx) / 2
        return torch.cat([gate + half, gate - half])[:width]

    rows = pairs(weights.gate, weights.up)
    return rows, rows.new_zeros(len(rows)) if weights.up_bias is None else pairs(weights.gate_bias, weights.up_bias)


@torch.no_grad()
def _statistics(features: Callable[[Tensor], Tensor], sample: Sample, device: torch.device) -> BlockStatistics:
    """Input moments of ``features`` (in the place of x) and outputs over the tokens of a sample, made on ``device``."""
    totals: list[Tensor] = []
    tokens = sample.x[sample.mask].split(CHUNK), sample.y[sample.mask].split(CHUNK)
    for x, y in zip(*tokens, strict=True):
        f = features(x.to(device, torch.promote_types(x.dtype, torch.float32)))  # [tokens, width]
        sums = [t.double() for t in (f.sum(0), y.to(f).sum(0), f.T @ f, f.T @ y.to(f))]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    sum_x, sum_y, xx, xy = totals or [None] * 4
    return BlockStatistics(sample.tokens, sum_x, sum_y, xx=xx, xy=xy)
