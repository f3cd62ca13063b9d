"""Similarity of the hidden units of MLP blocks: correlation of units, and linear CKA between layers.

Units are the outputs of the first projection, before the activation: u = W x + b, for a gated block gate and up side by side.
They are linear in the block's input, so that Cov(u_a, u_b) = W_a Cov(x_a, x_b) W_bᵀ. A pass therefore keeps the inputs, which
are a few times narrower than the units.

Source: Kornblith et al. 2019 (arXiv 1905.00414) for CKA.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from ..models.blocks import Block
from ..models.forward import watching
from ..models.inputs import Batch, check_batches
from ..runtime.cache import cached
from .collect import Collector, collect
from .weight_check import WeightCheck

CONSTANT = 1e-12  # a unit with a variance below this share of |w|² tr Cov(x) is constant: float32 inputs round to as much


@dataclass(frozen=True)
class Units:
    """The hidden units of MLP blocks on the same text, kept as the centred inputs of the blocks."""

    inputs: dict[Block, Tensor]  # [tokens, hidden]; tokens are the same for all blocks of a stack

    def tokens(self, block: Block) -> int:
        return len(self.of(block))

    def of(self, block: Block) -> Tensor:
        """Inputs of ``block``; raises ValueError where it was not captured."""
        if block not in self.inputs:
            raise ValueError(f"{block.name} is not among the captured blocks: capture_units(model, blocks, batches).")
        return self.inputs[block]

    def input_covariance(self, a: Block, b: Block) -> Tensor:
        """Cov(x_a, x_b), [hidden, hidden] in float64, where ``a`` is; raises ValueError for blocks of different stacks."""
        if a.stack != b.stack:
            raise ValueError(f"{a.name} and {b.name} are of different stacks: they do not see the same tokens.")
        x = self.of(a)
        return x.double().T @ self.of(b).to(x.device, torch.float64) / self.tokens(a)

    def covariances(self, a: Block, b: Block) -> Tensor:
        """Cov(u_a, u_b) of the units of each projection, [projections, units, units] in float64."""
        between = self.input_covariance(a, b)
        return torch.stack([v @ between @ w.to(between).T for v, w in zip(projections(a), projections(b), strict=True)])

    def correlations(self, a: Block, b: Block) -> Tensor:
        """Pearson correlation of units of ``a`` with units of ``b``, [projections, units of a, units of b] in float64.

        For a gated block the gate comes first, then up. Correlations of a constant unit are 0.
        """
        inverse_a, inverse_b = self._inverse_deviations(a), self._inverse_deviations(b)
        return inverse_a[:, :, None] * self.covariances(a, b) * inverse_b.to(inverse_a)[:, None, :]

    def _inverse_deviations(self, block: Block) -> Tensor:
        """[projections, units], 0 for constant ones."""
        within, weights = self.input_covariance(block, block), torch.stack(projections(block))
        variance = ((weights @ within) * weights).sum(-1)
        constant = variance <= CONSTANT * weights.square().sum(-1) * within.trace()
        return torch.where(constant, 0, variance.clamp_min(torch.finfo(variance.dtype).tiny).rsqrt())


def projections(block: Block) -> list[Tensor]:
    """The first projections of ``block``, gate and up or up alone, [units, hidden] each in float64."""
    weights = block.weights()
    return [w.double() for w in (weights.gate, weights.up) if w is not None]


class _Inputs(Collector):
    """The collector of :func:`capture_units`: what enters each block, [tokens, hidden], batch by batch."""

    def __init__(self, blocks: list[Block]):
        super().__init__(block.stack for block in blocks)
        self.parts: dict[Block, list[Tensor]] = {block: [] for block in blocks}

    def watch(self, hooks: ExitStack) -> None:
        for block in self.parts:
            hooks.enter_context(watching(block.modules[0], enter=partial(self._keep, block)))
            WeightCheck(self, block).watch(hooks)

    def _keep(self, block: Block, x: Tensor, _) -> None:
        real = self.real[block.stack]
        if real is not None and (real.dim() != 2 or real.numel() != x[..., 0].numel()):
            tokens, mask = x[..., 0].numel(), tuple(real.shape)
            raise ValueError(f"{block.name} is given {tokens} tokens, the mask of its side is {mask}: expected [batch, seq_len].")
        self.parts[block].append(self.rows(block.stack, x).clone())  # a layer is free to write into what it was given


@cached("units")
def capture_units(model: nn.Module, blocks: Iterable[Block], batches: Iterable[Batch], *, progress: bool = True) -> Units:
    """Run ``batches`` through the dense ``model`` once and keep what enters each of ``blocks``. Some 10,000 tokens are enough.

    Args:
        blocks: MLP blocks with neurons, of one stack or several.
        batches: keyword arguments of the model, {"pixel_values": …} or {"input_ids": …, "attention_mask": …}; see
            :func:`~mlpreplace.models.token_batches` for token windows. Padding is left out by the masks of the batch, see
            :func:`~mlpreplace.models.inputs.real_tokens`.
        cached: keep the result on disk, as large as in memory, and take it from there.

    Returns:
        Units on the devices of their blocks. Memory: 4 · tokens · hidden bytes per block.

    Raises:
        ValueError: a block without neurons, no batch, a mask of another shape than the tokens, fewer than two real tokens,
            activations that are not finite, blocks of another model, a block whose weights are not what it computes.
    """
    blocks, batches = list(blocks), list(batches)
    for block in blocks:
        block.weights()  # raises where there are no neurons
    check_batches(batches)
    inputs = collect(model, [(None, batch) for batch in batches], _Inputs(blocks), name="units", progress=progress)
    return Units({block: _centred(block, inputs.parts.pop(block)) for block in blocks})


def _centred(block: Block, parts: list[Tensor]) -> Tensor:
    if not parts:
        raise ValueError(f"{block.name} was not run: the blocks are of another model.")
    x = torch.cat(parts)
    if len(x) < 2:
        raise ValueError(f"{block.name}: correlations need at least 2 real tokens, the batches hold {len(x)}.")
    if not torch.isfinite(x).all():
        raise ValueError(
            f"Activations of {block.name} are not finite: check the model (a half-precision overflow?) and the data."
        )
    return x.sub_(x.mean(0, dtype=torch.float64))


def _content(units: Units, blocks: Iterable[Block]) -> list:
    """What a comparison of ``blocks`` depends on, for the cache."""
    return [(block, projections(block), units.of(block)) for block in blocks]


@dataclass(frozen=True)
class Match:
    """Pairs of units of two blocks."""

    order: Tensor  # [intermediate], a permutation
    seconds: float  # to find it


@cached("match", key=lambda units, anchor, block: _content(units, [anchor, block]))
def match(units: Units, anchor: Block, block: Block) -> Match:
    """Match unit ``order[i]`` of ``block`` to unit i of ``anchor``, so that the sum of correlations is largest.

    For gated blocks, gate and up correlations are summed. ``cached`` keeps the result on disk and takes it from there.

    Raises ValueError for blocks that were not captured or are of different stacks.
    """
    start = time.perf_counter()
    correlation = units.correlations(anchor, block).sum(0)  # [intermediate, intermediate]
    order = torch.from_numpy(linear_sum_assignment(correlation.cpu().numpy(), maximize=True)[1])
    return Match(order, time.perf_counter() - start)


@cached("cka", key=lambda units, blocks: _content(units, blocks))
def cka_map(units: Units, blocks: Sequence[Block], *, progress: bool = True) -> Tensor:
    """Linear CKA between the units of every two of ``blocks``, [blocks, blocks] in float64.

    1 for units that are equal up to rotation and scale, 0 for uncorrelated ones. ‖Cov(u_a, u_b)‖² / (‖Cov(u_a)‖ ‖Cov(u_b)‖) in
    Frobenius norms, by ‖W_a C W_bᵀ‖² = tr(G_a C G_b Cᵀ) with G = WᵀW [hidden, hidden]. Costs 2 · tokens · hidden² operations per
    pair. ``cached`` keeps the result on disk and takes it from there.

    Raises:
        ValueError: blocks that were not captured or are of different stacks; units that are all constant.
    """
    grams = [sum(w.T @ w for w in projections(block)) for block in blocks]  # [hidden, hidden]
    energy = torch.zeros(len(blocks), len(blocks), dtype=torch.float64, device="cpu")  # ‖Cov(u_a, u_b)‖²
    pairs = [(i, j) for i in range(len(blocks)) for j in range(i + 1)]
    for i, j in tqdm(pairs, desc="cka", unit="pair", disable=not progress, leave=False):
        between = units.input_covariance(blocks[i], blocks[j])
        energy[i, j] = energy[j, i] = ((grams[i] @ between) * (between @ grams[j].to(between))).sum().item()
    own = energy.diagonal()
    if constant := [block.name for block, e in zip(blocks, own.tolist(), strict=True) if not e > 0]:
        raise ValueError(f"All units of {constant[0]} are constant: there is nothing to compare.")
    return energy / (own[:, None] * own[None, :]).sqrt()
