"""How alike the hidden units of MLP blocks are: correlation of units, and linear CKA between layers.

Units are what the first projection gives, before the activation: u = W x + b, of a gated block gate and up side by side. They
are linear in the block's input, so every moment of theirs follows from one of the inputs: Cov(u_a, u_b) = W_a Cov(x_a, x_b) W_bᵀ.
What is kept of a pass is therefore the inputs, a few times narrower than the units.

Source: Kornblith et al. 2019 (arXiv 1905.00414) for CKA.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Batch, check_batches, on_device, real_tokens, through_layers
from .blocks import Block
from .cache import Entry
from .models import eval_mode

CONSTANT = 1e-12  # a unit is constant whose variance is below this share of |w|² tr Cov(x): float32 inputs round to as much


@dataclass(frozen=True)
class Units:
    """The hidden units of MLP blocks on the same text, held as the blocks' inputs about their means."""

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

        Of a gated block the gate comes first, then up. A constant unit correlates with none.
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


@contextmanager
def _inputs(blocks: Iterable[Block]) -> Iterator[dict[Block, Tensor]]:
    """What the last call gave each block, [tokens, hidden]."""
    seen: dict[Block, Tensor] = {}

    def keep(block: Block):
        def enter(module, args, kwargs) -> None:
            # copied: a layer is free to write into what it was given
            seen[block] = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2).clone()

        return enter

    handles = [block.modules[0].register_forward_pre_hook(keep(block), with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def capture_units(
    model: nn.Module, blocks: Iterable[Block], batches: Iterable[Batch], *, cached: bool = False, progress: bool = True
) -> Units:
    """Run ``batches`` through the dense ``model`` once and keep what enters each of ``blocks``: some 10,000 tokens are enough.

    Args:
        blocks: MLP blocks with neurons, of one stack or several.
        batches: keyword arguments of the model, {"pixel_values": …} or {"input_ids": …, "attention_mask": …}; see
            :func:`~mlpreplace.batches.token_batches` for windows of tokens. Padding enters nothing where a mask says which
            tokens are real, [batch, seq_len]: ``decoder_attention_mask`` for a decoder beside an encoder (or ``labels``, -100
            where there is no token), else ``attention_mask``.
        cached: keep the result on disk, as large as in memory, and take it from there.

    Returns:
        Units, each block's on its device. Memory: 4 · tokens · hidden bytes a block.

    Raises:
        ValueError: a block without neurons, no batch, a mask of another shape than the tokens, fewer than two real tokens,
            activations that are not finite, blocks of another model.
    """
    blocks, batches = list(blocks), list(batches)
    for block in blocks:
        block.weights()  # raises where there are no neurons
    check_batches(batches)
    if cached:
        entry = Entry("similarity", "units", model, blocks, batches)
        if (stored := entry.load()) is not None:
            return Units({block: stored[block.name].to(block.device) for block in blocks})
    forward = through_layers(model)
    parts: dict[Block, list[Tensor]] = {block: [] for block in blocks}
    with eval_mode(model), torch.no_grad(), _inputs(blocks) as seen:
        for batch in tqdm(batches, desc="units", unit="batch", disable=not progress, leave=False):
            batch = on_device(batch, model)
            forward(batch)
            for block in blocks:
                parts[block].append(_rows(model, block, batch, seen))
            seen.clear()
    units = Units({block: _centred(block, torch.cat(parts.pop(block))) for block in blocks})
    if cached:
        entry.save({block.name: x for block, x in units.inputs.items()})
    return units


def _rows(model: nn.Module, block: Block, batch: Batch, seen: dict[Block, Tensor]) -> Tensor:
    """Real tokens [tokens, hidden] in at least float32."""
    if block not in seen:
        raise ValueError(f"{block.name} was not run: the blocks are of another model.")
    x, real = seen[block], real_tokens(model, block.stack, batch)
    if real is not None and (real.dim() != 2 or real.numel() != len(x)):
        raise ValueError(
            f"{block.name} is given {len(x)} tokens, the mask of its side is {tuple(real.shape)}: expected [batch, seq_len]."
        )
    x = x if real is None else x[real.flatten().bool().to(x.device)]
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _centred(block: Block, x: Tensor) -> Tensor:
    if len(x) < 2:
        raise ValueError(f"{block.name}: correlations need at least 2 real tokens, the batches hold {len(x)}.")
    if not torch.isfinite(x).all():
        raise ValueError(
            f"Activations of {block.name} are not finite: check the model (a half-precision overflow?) and the data."
        )
    return x.sub_(x.mean(0, dtype=torch.float64))


@dataclass(frozen=True)
class Match:
    """Which unit of one block goes with each unit of another."""

    order: Tensor  # [intermediate], a permutation
    seconds: float  # that finding it took


def match(units: Units, anchor: Block, block: Block, *, cached: bool = False) -> Match:
    """The one-to-one assignment of units of ``block`` to those of ``anchor`` with the largest sum of correlations: unit
    ``order[i]`` of ``block`` goes with unit i of ``anchor``. Of gated blocks, gate and up correlations are added up.

    Args:
        cached: keep the result on disk, and take it from there.

    Raises ValueError for blocks that were not captured or are of different stacks.
    """
    if cached:
        entry = Entry("similarity", "match", [(b, projections(b), units.of(b)) for b in (anchor, block)])
        if (stored := entry.load()) is not None:
            return Match(stored["order"], stored["seconds"].item())
    start = time.perf_counter()
    correlation = units.correlations(anchor, block).sum(0)  # [intermediate, intermediate]
    order = torch.from_numpy(linear_sum_assignment(correlation.cpu().numpy(), maximize=True)[1])
    found = Match(order, time.perf_counter() - start)
    if cached:
        entry.save({"order": order, "seconds": torch.tensor(found.seconds, dtype=torch.float64)})
    return found


def cka_map(units: Units, blocks: Sequence[Block], *, cached: bool = False, progress: bool = True) -> Tensor:
    """Linear CKA between the units of every two of ``blocks``, [blocks, blocks] in float64: 1 for the same up to rotation and
    scale, 0 for unrelated ones.

    ‖Cov(u_a, u_b)‖² / (‖Cov(u_a)‖ ‖Cov(u_b)‖) in Frobenius norms, by ‖W_a C W_bᵀ‖² = tr(G_a C G_b Cᵀ) with G = WᵀW [hidden,
    hidden]. Costs 2 · tokens · hidden² operations a pair.

    Args:
        cached: keep the result on disk, and take it from there.

    Raises:
        ValueError: blocks that were not captured or are of different stacks; units that are all constant.
    """
    if cached:
        entry = Entry("similarity", "cka", [(b, projections(b), units.of(b)) for b in blocks])
        if (stored := entry.load()) is not None:
            return stored["cka"]
    grams = [sum(w.T @ w for w in projections(block)) for block in blocks]  # [hidden, hidden]
    energy = torch.zeros(len(blocks), len(blocks), dtype=torch.float64)  # ‖Cov(u_a, u_b)‖²
    pairs = [(i, j) for i in range(len(blocks)) for j in range(i + 1)]
    for i, j in tqdm(pairs, desc="cka", unit="pair", disable=not progress, leave=False):
        between = units.input_covariance(blocks[i], blocks[j])
        energy[i, j] = energy[j, i] = ((grams[i] @ between) * (between @ grams[j].to(between))).sum().item()
    own = energy.diagonal()
    if constant := [block.name for block, e in zip(blocks, own.tolist(), strict=True) if not e > 0]:
        raise ValueError(f"All units of {constant[0]} are constant: there is nothing to compare.")
    cka = energy / (own[:, None] * own[None, :]).sqrt()
    if cached:
        entry.save({"cka": cka})
    return cka
