"""Closed-form fits: statistics in, parameters out. Every family's closed form is registered here; training starts from it.

Each one minimises the squared output error over the calibration tokens, in float64, with a ridge relative to the mean of the Gram
matrix's diagonal. The ridge pulls kept neurons towards the block's own output weights, so that full width returns the block
exactly, and everything else towards the mean output.

A hybrid starts from the closed form that it contains. The parts that look at other tokens have zero output weights at first,
placed so that their gradient is not zero; so the start is as good as that closed form. Only the experts of a mixture differ from
the beginning.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.attention import attention_weights
from ..models.blocks import Block
from ..replacements.factored import FactoredAttention, FactoredMLP, mlp_shapes
from ..replacements.families import Family, Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP
from ..replacements.hybrids import AttentionMLP, ConvMLP, MixtureOfExperts, TransformerBlock, inner_mlp
from ..replacements.narrow_attention import NarrowAttention
from ..replacements.nested import NestedMLP
from ..replacements.whole_layers import Removed, Tuned
from ..statistics.moments import BlockStatistics
from .features import cluster_statistics, feature_statistics, shallow_features, spherical_kmeans
from .heads import HeadFits
from .neurons import ClosedForm, hidden_moment, importance, select
from .ridge import add_ridge, centred, factor, least_squares, linear_map, reduced_rank, shared_projection, whitened

QUERY_SCALE = 0.5  # of queries and keys: attention starts nearly even; heads that start sharp (2 and more) learn slowly or never


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
    a, _ = linear_map(block, s, how.ridge)
    return {"weight": a.T, "bias": (s.sum_y - s.sum_x @ a) / s.tokens}


@solve.register
def _(family: LowRank, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Reduced-rank regression."""
    down, up = reduced_rank(*linear_map(block, s, how.ridge), family.rank)
    return {"0.weight": down.T, "1.weight": up.T, "1.bias": (s.sum_y - s.sum_x @ down @ up) / s.tokens}


def _keep(block: Block, s: BlockStatistics, width: int, how: ClosedForm) -> tuple[Tensor, Tensor]:
    """Indices of the neurons to keep and of the others, ascending."""
    kept = select(block, s, width, how)
    dropped = torch.ones(len(s.hh), dtype=torch.bool, device=kept.device)
    dropped[kept] = False
    return kept, dropped.nonzero().squeeze(1)


@solve.register
def _(family: NarrowMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """W' = W_P + (C_PP + λI)⁻¹ C_PQ W_Q for the kept neurons P and the dropped ones Q.

    C = HᵀH, centred where there is an output bias to take up the mean.
    """
    kept, dropped = _keep(block, s, family.width, how)
    weights, has_bias = block.weights(), family.has_bias(block)
    down = weights.down.to(s.hh).T  # [intermediate, hidden]
    solved = down[kept]
    if len(dropped):
        target = hidden_moment(block, s, kept, dropped, has_bias=has_bias) @ down[dropped]
        solved = solved + least_squares(block, hidden_moment(block, s, kept, has_bias=has_bias), target, how.ridge)
    state = weights.of(kept).state() | {"down.weight": solved.T}
    if has_bias:
        mean = s.sum_h / s.tokens
        bias = mean @ down - mean[kept] @ solved
        state["down.bias"] = bias if weights.down_bias is None else bias + weights.down_bias.to(mean)
    return state


@solve.register
def _(family: NarrowAttention, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """See :meth:`~mlpreplace.fitting.heads.HeadFits.narrowed`. Norms of heads are the block's own."""
    norms = {name: tensor for name, tensor in family.build(block).state_dict().items() if "_norm." in name}
    return HeadFits(block, s, how).narrowed(family).state() | norms


@solve.register
def _(family: FactoredMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    s.require(block, "input", "hidden")
    weights = block.weights()
    read = {"gate": s.xx, "up": s.xx, "down": s.hh}
    state = {}
    for part in mlp_shapes(block):
        state |= _product(block, part, getattr(weights, part), getattr(weights, f"{part}_bias"), read[part], family.rank)
    return state


@solve.register
def _(family: FactoredAttention, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Norms of heads are the block's own."""
    s.require(block, "input", "hidden")
    body, weights = family.build(block), attention_weights(block)
    own = weights.state()
    state = {name: tensor for name, tensor in body.state_dict().items() if "_norm." in name}
    for part, rank in family.ranks().items():
        c = s.hh if part == "output" else s.xx
        state |= _product(block, part, own[f"{part}.weight"], own.get(f"{part}.bias"), c, rank)
    return state | {"_extra_state": weights.group_of}


def _product(block: Block, part: str, weight: Tensor, bias: Tensor | None, c: Tensor, rank: int) -> dict[str, Tensor]:
    """State of a :func:`~mlpreplace.replacements.factored.factored` layer for a projection."""
    down, up = whitened(block, weight, c, rank)
    state = {f"{part}.0.weight": down, f"{part}.1.weight": up}
    return state if bias is None else state | {f"{part}.1.bias": bias}


@solve.register
def _(family: NarrowPlusLinear, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Joint least squares on [h_P; x]: W' = W_P + D for the kept neurons P and a map B of rank r for the input.

    T = H_Q W_Q is the output of the dropped neurons Q. For any B the best D is (C_PP + λI)⁻¹(C_PT − C_Px B). So B is the
    reduced-rank regression of T on X with H_P regressed out of both: the Schur complements of C_PP. All moments are centred,
    since there is a bias.
    """
    s.require(block, "input", "hidden", "cross")
    kept, dropped = _keep(block, s, family.width, how)
    down, n = block.weights().down.to(s.hh).T, s.tokens
    hx = centred(s.hx, s.sum_h, s.sum_x, n)
    pt = hidden_moment(block, s, kept, dropped, has_bias=True) @ down[dropped]  # [width, hidden] H_PᵀT
    px = hx[kept]  # [width, hidden] H_PᵀX
    by_neurons = least_squares(block, hidden_moment(block, s, kept, has_bias=True), torch.cat([pt, px], 1), how.ridge)
    t_by_neurons, x_by_neurons = by_neurons.tensor_split(2, 1)
    xx = add_ridge(block, centred(s.xx, s.sum_x, s.sum_x, n), how.ridge) - px.T @ x_by_neurons
    xt = hx[dropped].T @ down[dropped] - px.T @ t_by_neurons
    linear_in, linear_out = reduced_rank(torch.cholesky_solve(xt, factor(block, xx)), xt, family.rank)

    solved = down[kept] + t_by_neurons - x_by_neurons @ linear_in @ linear_out
    state = _inside("mlp", block.weights().of(kept).state() | {"down.weight": solved.T})
    bias = (s.sum_h @ down - s.sum_h[kept] @ solved - s.sum_x @ linear_in @ linear_out) / n
    return state | {"linear.0.weight": linear_in.T, "linear.1.weight": linear_out.T, "linear.1.bias": bias}


@solve.register
def _(family: TwoLayerMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Fixed features act(W₁x + b₁), see :func:`shallow_features`, then W₂ and b₂ by ridge on the sampled pairs.

    The neurons of an ungated block are such features already, so its answer is a NarrowMLP and needs no pairs.
    """
    if block.has_neurons and block.gate is None:
        state = solve(NarrowMLP(family.width), block, s, how)
        zeros = {"up.bias": s.sum_h.new_zeros(family.width), "down.bias": s.sum_h.new_zeros(block.hidden_size)}
        return zeros | state
    if s.train is None:
        raise ValueError(f"{family} of {block.name} is solved on sampled tokens: capture(..., sample_windows=None).")
    body = family.build(block).to(device=s.sum_x.device, dtype=torch.promote_types(block.dtype, torch.float32))
    rows, bias = (tensor.to(body.up.weight) for tensor in shallow_features(block, s, family.width, how))
    features = {"up.weight": rows, "up.bias": bias}
    body.load_state_dict(features, strict=False)
    of_features = feature_statistics(body.neurons, s.train, rows.device)
    w, _ = linear_map(block, of_features, how.ridge)
    return features | {"down.weight": w.T, "down.bias": (of_features.sum_y - of_features.sum_x @ w) / of_features.tokens}


@solve.register
def _(family: NestedMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Neurons in order of importance, then one W for all levels, see :func:`shared_projection`."""
    order = importance(block, s, family.widths[-1], how).argsort(descending=True, stable=True)
    widest, weights = family.widths[0], block.weights()
    narrower = sorted({width for width in family.widths if width < block.intermediate_size})
    state = {name: tensor for name, tensor in vars(weights.of(order[:widest])).items() if tensor is not None}
    w = weights.down.to(s.hh).T[order]  # [intermediate, hidden]
    down = w[:0]
    if narrower:
        down = shared_projection(block, hidden_moment(block, s, order), w, narrower, how.ridge)
    state |= {"down": down.T, "_extra_state": torch.tensor(family.index(family.active))}
    if widest == block.intermediate_size:
        state |= {"own_down": weights.down, "place": order.argsort()}
    if (bias := weights.down_bias) is not None:
        mean = (s.sum_h / s.tokens)[order]
        full = torch.stack([mean @ w if k == len(w) else mean[:k] @ down[:k] for k in family.widths])  # [levels, hidden]
        state["down_bias"] = bias.to(mean) + (mean @ w - full)
    return state


@solve.register
def _(family: Removed, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    return {}


@solve.register
def _(family: Tuned, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    return family.build(block).state_dict()


def _inside(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a module that holds another, with state dict ``state``, as ``name``."""
    return {f"{name}.{key}": tensor for key, tensor in state.items()}


def _gaussian(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Random rows of expected squared length 1, [rows, columns]; drawn on the CPU, so that every device has the same."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(like) / columns**0.5


def _attention(inner: int, size: Tensor, seed: int) -> dict[str, Tensor]:
    """Random query, key and value weights for inputs with channels of ``size`` [hidden], and zero output weights."""
    q, k, v = (_gaussian(3 * inner, len(size), seed, size) / size).chunk(3)  # [inner, hidden]
    weights = {"q": QUERY_SCALE * q, "k": QUERY_SCALE * k, "v": v, "o": torch.zeros(len(size), inner)}
    return {f"attention.{name}.weight": weight for name, weight in weights.items()}


@solve.register
def _(family: ConvMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """The narrow MLP's closed form; the weights of earlier tokens are zero."""
    mlp = _inside("mlp", solve(inner_mlp(block, family.width), block, s, how))
    return {"taps": torch.zeros(block.hidden_size, family.kernel), **mlp}


@solve.register
def _(family: AttentionMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """The narrow MLP's closed form beside a random head with W_o = 0.

    Each input channel is divided by its size; otherwise few channels with massive activations would decide the attention.
    """
    mlp = _inside("mlp", solve(inner_mlp(block, family.width), block, s, how))
    s.require(block, "input")
    square = s.xx.diagonal() / s.tokens  # [hidden]
    size = torch.where(square > 1e-12 * square.max(), square, 1.0).sqrt()  # a channel of zeros stays zero
    return {**_attention(family.head_dim, size, how.seed), **mlp}


@solve.register
def _(family: TransformerBlock, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Reduced-rank regression around a transformer layer that adds zero, its inner channels scaled to unit variance."""
    k = family.width
    low = solve(LowRank(k), block, s, how)
    down, up = low["0.weight"], low["1.weight"]  # [k, hidden], [hidden, k]
    size = ((down @ s.xx) * down).sum(1).div(s.tokens).clamp_min(0).sqrt()  # [k]; rounding may leave less than zero
    size = size.clamp_min(1e-6 * size.max())  # the floor is for directions that never occur
    state = {
        **_attention(k, torch.ones_like(size), how.seed),
        "down.weight": down / size[:, None],
        "up.weight": up * size,
        "up.bias": low["1.bias"],
        "mlp.0.weight": _gaussian(4 * k, k, how.seed + 1, down),
        "mlp.0.bias": torch.zeros(4 * k),
        "mlp.2.weight": torch.zeros(k, 4 * k),
        "mlp.2.bias": torch.zeros(k),
    }
    for norm in ("attention_norm", "mlp_norm"):
        state |= {f"{norm}.weight": torch.ones(k), f"{norm}.bias": torch.zeros(k)}
    return state


@solve.register
def _(family: MixtureOfExperts, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Spherical k-means over centred sampled inputs; each expert is the closed form of its cluster, the router scores clusters.

    The moments of all tokens are added to those of a cluster, with the weight of ``hidden_size`` tokens. So the expert of a
    cluster with few tokens is close to the fit of all tokens.
    """
    if s.train is None:
        raise ValueError(f"{family} clusters sampled inputs of {block.name}: capture(..., sample_windows=1 or more).")
    s.require(block, "input")
    x, mean = s.train.x[s.train.mask], s.sum_x / s.tokens
    mean = mean.to(torch.promote_types(x.dtype, torch.float32))
    directions = F.normalize(x.to(mean) - mean, dim=-1)  # [tokens, hidden]
    centres = spherical_kmeans(directions, family.experts, how.seed)  # [experts, hidden]
    chosen = (directions @ centres.T).argmax(-1)  # [tokens]
    state = {"router.weight": centres, "router.bias": -centres @ mean}
    for e in range(family.experts):
        cluster = cluster_statistics(block, s, chosen == e)
        state |= _inside(f"experts.{e}", solve(inner_mlp(block, family.width), block, cluster, how))
    return state
