"""Closed-form starts of the hybrids: what each is before its first gradient, a function of statistics and seed.

A start is never worse than the fit it is made of: what looks at other tokens, and what a closed form cannot know,
begins with zero weight in the output, placed so that its gradient is not zero. Only the experts of a mixture begin
apart from each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import Block
from .capture import BlockStatistics, Sample
from .closed_form import ClosedForm, solve
from .hybrids import AttentionMLP, ConvMLP, MixtureOfExperts, TransformerBlock, inner_mlp
from .replacements import LowRank

CLUSTERING_STEPS = 20  # of k-means; what moves later is a token here and there
SUMS = ("sum_x", "sum_y", "sum_h", "xx", "xy", "hh")  # the moments that an expert's fit may read
CHUNK = 4096  # tokens whose neurons are in memory at once
QUERY_SCALE = 0.5  # of queries and keys: attention starts nearly even; heads that start sharp (2 and more) learn slowly or never


def _inside(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a module as that of one which holds it under ``name``."""
    return {f"{name}.{key}": tensor for key, tensor in state.items()}


def _gaussian(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """[rows, columns] with rows of unit length in the mean, drawn on the CPU: the same on every device."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(like) / columns**0.5


def _attention(inner: int, size: Tensor, seed: int) -> dict[str, Tensor]:
    """Random queries, keys and values of inputs whose channels have ``size`` [hidden], and an output projection of zero."""
    q, k, v = (_gaussian(3 * inner, len(size), seed, size) / size).chunk(3)  # [inner, hidden]
    weights = {"q": QUERY_SCALE * q, "k": QUERY_SCALE * k, "v": v, "o": torch.zeros(len(size), inner)}
    return {f"attention.{name}.weight": weight for name, weight in weights.items()}


@solve.register
def _(family: ConvMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """The narrow MLP's closed form; no earlier token counts yet."""
    mlp = _inside("mlp", solve(inner_mlp(block, family.width), block, s, how))
    return {"taps": torch.zeros(block.hidden_size, family.kernel), **mlp}


@solve.register
def _(family: AttentionMLP, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """The narrow MLP's closed form beside a random head with W_o = 0.

    Each input channel is scaled by its size, or the few channels with massive activations would decide who attends to whom.
    """
    mlp = _inside("mlp", solve(inner_mlp(block, family.width), block, s, how))
    s.require(block, "input")
    square = s.xx.diagonal() / s.tokens  # [hidden]
    size = torch.where(square > 1e-12 * square.max(), square, 1.0).sqrt()  # a silent channel stays silent
    return {**_attention(family.head_dim, size, how.seed), **mlp}


@solve.register
def _(family: TransformerBlock, block: Block, s: BlockStatistics, how: ClosedForm) -> dict[str, Tensor]:
    """Reduced-rank regression around a layer that adds nothing yet, its inner channels scaled to unit variance."""
    k = family.width
    low = solve(LowRank(k), block, s, how)
    down, up = low["0.weight"], low["1.weight"]  # [k, hidden], [hidden, k]
    size = ((down @ s.xx) * down).sum(1).div(s.tokens).sqrt()  # [k]
    size = size.clamp_min(1e-6 * size.max())  # of a direction that was never seen
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
    """Experts are closed forms of the clusters of a spherical k-means over sampled inputs; the router knows the clusters.

    Inputs are centred before they are clustered: what they have in common tells no two apart. To the moments of each
    cluster come those of all tokens, with the weight of ``hidden_size`` tokens: where a cluster has few of its own, its
    expert is close to the fit of all.
    """
    if s.train is None:
        raise ValueError(f"{family} clusters sampled inputs of {block.name}: capture(..., sample_windows=1 or more).")
    s.require(block, "input")
    x, mean = s.train.x[s.train.mask], s.sum_x / s.tokens
    mean = mean.to(torch.promote_types(x.dtype, torch.float32))
    directions = F.normalize(x.to(mean) - mean, dim=-1)  # [tokens, hidden]
    centres = _spherical_kmeans(directions, family.experts, how.seed)  # [experts, hidden]
    chosen = (directions @ centres.T).argmax(-1)  # [tokens]
    state = {"router.weight": centres, "router.bias": -centres @ mean}
    for e in range(family.experts):
        cluster = _cluster(block, s, chosen == e)
        state |= _inside(f"experts.{e}", solve(inner_mlp(block, family.width), block, cluster, how))
    return state


def _cluster(block: Block, s: BlockStatistics, own: Tensor) -> BlockStatistics:
    """Statistics of the sampled tokens that ``own`` marks, and of all with the weight of ``hidden_size`` tokens."""
    x, y = s.train.x[s.train.mask], s.train.y[s.train.mask]  # [tokens, hidden]
    x, y = (t.to(own.device, torch.promote_types(t.dtype, torch.float32)) for t in (x, y))
    few = torch.linspace(0, len(x) - 1, block.hidden_size, device=x.device).long()
    both = torch.cat([own.nonzero().squeeze(1), few])
    ones = torch.ones(1, len(both), device=x.device)
    sample = Sample(x[both][None], y[both][None], ones, ones.bool())

    sums = {name: getattr(s, name) * (block.hidden_size / s.tokens) for name in SUMS if getattr(s, name) is not None}
    for chunk in own.nonzero().squeeze(1).split(CHUNK):
        cx, cy = x[chunk], y[chunk]
        new = {"sum_x": cx.sum(0), "sum_y": cy.sum(0), "xx": cx.T @ cx, "xy": cx.T @ cy}
        if "hh" in sums:
            h = neurons(block, cx)
            new |= {"sum_h": h.sum(0), "hh": h.T @ h}
        sums |= {name: sums[name] + value for name, value in new.items() if name in sums}
    return BlockStatistics(int(own.sum()) + block.hidden_size, **sums, train=sample)


def neurons(block: Block, x: Tensor) -> Tensor:
    """What enters the block's output projection, [tokens, intermediate], in the precision of ``x``."""
    w = block.weights()

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x), None if bias is None else bias.to(x))

    up = project(w.up, w.up_bias)
    return block.activation(up) if w.gate is None else block.activation(project(w.gate, w.gate_bias)) * up


def _spherical_kmeans(directions: Tensor, clusters: int, seed: int) -> Tensor:
    """Unit centres [clusters, hidden] of unit vectors [tokens, hidden] (Dhillon & Modha 2001), started as k-means++.

    A cluster that runs empty starts again at the vector that is farthest from its centre.
    """
    generator = torch.Generator().manual_seed(seed)
    distance = torch.ones(len(directions), dtype=directions.dtype, device=directions.device)
    centres = directions[:0]
    while len(centres) < clusters:
        # the small constant is for inputs that are all the same
        drawn = torch.multinomial(distance.cpu() + 1e-9, 1, generator=generator).to(directions.device)
        centres = torch.cat([centres, directions[drawn]])
        distance = (1 - (directions @ centres.T).amax(-1)).clamp_min(0)
    for _ in range(CLUSTERING_STEPS):
        cosine, chosen = (directions @ centres.T).max(-1)
        sums = torch.zeros_like(centres).index_add_(0, chosen, directions)
        sums[chosen.bincount(minlength=clusters) == 0] = directions[cosine.argmin()]
        centres = F.normalize(sums, dim=-1)
    return centres
