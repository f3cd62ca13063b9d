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

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from ..models.blocks import Block, listed
from ..models.forward import watching
from ..models.inputs import Batch, check_batches
from ..runtime.cache import cached
from ..runtime.memory import free_bytes
from .collect import Collector, collect
from .weight_check import WeightCheck

MOST_TOKENS = 2**16  # kept of a block
COLUMNS = 64  # centred at a time
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
        """Cov(x_a, x_b), [hidden, hidden] in float64, where ``a`` is; raises ValueError for blocks of different stacks.

        Memory: 16 · tokens · hidden bytes more while it runs.
        """
        if a.stack != b.stack:
            raise ValueError(f"{a.name} and {b.name} are of different stacks: they do not see the same tokens.")
        x, y = (self.of(block).to(a.device, torch.float64) for block in (a, b))
        return x.T @ y / self.tokens(a)

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


class Rows:
    """At most ``most`` rows of all that are added, in memory of their own on ``home``.

    Every row gets a number from a fixed random stream and is kept where that is below a share. The share is 1 until there are
    too many, and is then halved. So the choice is the same for all blocks of a stack and for any size of a batch, and even. It
    has no period that could meet that of windows, whose first tokens are unlike the others.
    """

    def __init__(self, most: int, home: torch.device):
        self.most, self.home, self.share, self.random = most, home, 1.0, np.random.default_rng(0)
        self.parts: list[tuple[Tensor, Tensor]] = []  # (numbers [tokens], rows [tokens, hidden])

    def add(self, rows: Tensor) -> None:
        numbers, chosen = self._below(torch.from_numpy(self.random.random(len(rows))), rows)
        self.parts.append((numbers, chosen.to(self.home)))
        while sum(len(numbers) for numbers, _ in self.parts) > self.most:
            self.share /= 2
            self.parts = [self._below(*part) for part in self.parts]

    def _below(self, numbers: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of those whose number is below the share."""
        kept = (numbers < self.share).nonzero().squeeze(1)
        return numbers[kept], rows[kept.to(rows.device)]


class _Inputs(Collector):
    """The collector of :func:`capture_units`: what enters each block."""

    def __init__(self, blocks: list[Block], most: int):
        super().__init__(block.stack for block in blocks)
        self.of = {block: Rows(most, home) for block, home in _homes(blocks, most).items()}

    def watch(self, hooks: ExitStack) -> None:
        for block in self.of:
            hooks.enter_context(watching(block.modules[0], enter=partial(self._keep, block)))
            WeightCheck(self, block).watch(hooks)

    def _keep(self, block: Block, x: Tensor, _) -> None:
        real = self.real[block.stack]
        if real is not None and (real.dim() != 2 or real.numel() != x[..., 0].numel()):
            tokens, mask = x[..., 0].numel(), tuple(real.shape)
            raise ValueError(f"{block.name} is given {tokens} tokens, the mask of its side is {mask}: expected [batch, seq_len].")
        self.of[block].add(self.rows(block.stack, x))  # copied: a layer is free to write into what it was given


def _homes(blocks: list[Block], most: int) -> dict[Block, torch.device]:
    """Where the inputs of each block are kept: on its device, or on the CPU where all of that device might take more than half
    of its free memory.
    """
    needed: dict[torch.device, int] = {}  # bytes
    for block in blocks:
        of_token = block.hidden_size * torch.promote_types(block.dtype, torch.float32).itemsize
        needed[block.device] = needed.get(block.device, 0) + most * of_token
    free = {device: free_bytes(device) for device in needed}
    crowded = {device for device, n in needed.items() if free[device] is not None and n > free[device] / 2}
    return {block: torch.device("cpu") if block.device in crowded else block.device for block in blocks}


@cached("units")
def capture_units(
    model: nn.Module,
    blocks: Iterable[Block],
    batches: Iterable[Batch],
    *,
    most_tokens: int = MOST_TOKENS,
    progress: bool = True,
) -> Units:
    """Run ``batches`` through the dense ``model`` once and keep what enters each of ``blocks``. Some 10,000 tokens are enough.

    Args:
        blocks: MLP blocks with neurons, of one stack or several.
        batches: keyword arguments of the model, {"pixel_values": …} or {"input_ids": …, "attention_mask": …}; see
            :func:`~mlpreplace.models.token_batches` for token windows. Padding is left out by the masks of the batch, see
            :func:`~mlpreplace.models.inputs.real_tokens`.
        most_tokens: real tokens that are kept, of all batches. Of more, about a half to all of this number are kept, drawn
            evenly from all: the same ones for every block of a stack, for any size of a batch and in every run.
        cached: keep the result on disk, as large as in memory, and take it from there.

    Returns:
        Units on the devices of their blocks; on the CPU where ``most_tokens`` of all blocks of a device would take more than
        half of its free memory. Memory: 4 · min(tokens, most_tokens) · hidden bytes per block, those of a block twice while
        they are centred, and the inputs of one batch. With the default 268 MB per block of hidden size 1,024.

    Raises:
        ValueError: most_tokens below 2, a block without neurons, no batch, a mask of another shape than the tokens, fewer than
            two real tokens, activations that are not finite, blocks of another model, a block whose weights are not what it
            computes.
    """
    blocks, batches = listed(blocks), list(batches)
    for block in blocks:
        block.weights()  # raises where there are no neurons
    check_batches(batches)
    if most_tokens < 2:
        raise ValueError(f"Correlations need at least 2 tokens, asked for most_tokens={most_tokens}.")
    collector = _Inputs(blocks, most_tokens)
    inputs = collect(model, [(None, batch) for batch in batches], collector, name="units", progress=progress)
    return Units({block: _centred(block, inputs.of.pop(block)) for block in blocks})


def _centred(block: Block, kept: Rows) -> Tensor:
    if not kept.parts:
        raise ValueError(f"{block.name} was not run: the blocks are of another model.")
    x = torch.cat([rows for _, rows in kept.parts])
    if len(x) < 2:
        raise ValueError(f"{block.name}: correlations need at least 2 real tokens, the batches hold {len(x)}.")
    for columns in x.split(COLUMNS, 1):  # in float64, of which a copy of all would be twice as large
        if not torch.isfinite(columns).all():
            raise ValueError(
                f"Activations of {block.name} are not finite: check the model (a half-precision overflow?) and the data."
            )
        columns.sub_(columns.mean(0, dtype=torch.float64))
    return x


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
