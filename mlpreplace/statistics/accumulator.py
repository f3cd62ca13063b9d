"""Sums and samples in the making, of one module in one pass."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..models.forward import State, hidden_states
from ..replacements.records import SAMPLES
from .collect import Collector
from .records import SUMS, BlockStatistics, Sample

GRAM_PARTS = 4  # of the columns; 5/8 of all products are made, with 8 parts it would be 9/16
ADDED_ROWS = 256  # at a time


def gram(rows: Tensor) -> Tensor:
    """RᵀR of rows [tokens, n]. It is symmetric: products are made of blocks on and below its diagonal, and copied above."""
    n = rows.shape[1]
    total, size = rows.new_empty(n, n), max(1, -(-n // GRAM_PARTS))
    for start in range(0, n, size):
        stop = min(start + size, n)
        total[start:, start:stop] = rows[:, start:].T @ rows[:, start:stop]
        total[start:stop, stop:] = total[stop:, start:stop].T
    return total


def add_to(total: Tensor, more: Tensor) -> None:
    """total += more, some rows at a time: PyTorch would make a copy of all of ``more`` in the precision of ``total``."""
    for rows, of_more in zip(torch.atleast_1d(total).split(ADDED_ROWS), torch.atleast_1d(more).split(ADDED_ROWS), strict=True):
        rows.add_(of_more)


class Accumulator:
    """Statistics in the making: the sums over one module's inputs and outputs, and the windows that are sampled.

    ``enter``, ``hidden``, ``leave`` and ``stream`` are called in this order for each batch. The products of a batch are made
    where its activations are, in their precision (float32 for half precision), and added up there in float64.
    """

    def __init__(
        self,
        collector: Collector,
        stack: str,
        moments: Collection[str],
        precision: torch.dtype | None = None,
        *,
        of_heads: bool = False,
    ):
        self.collector, self.stack, self.moments = collector, stack, set(moments)
        self.precision = precision  # of sampled inputs, where it is not that of the input
        self.of_heads = of_heads  # whether outputs of heads are sampled
        self.sums = BlockStatistics()
        self.samples: dict[tuple[str, str], list[Tensor]] = {}  # {(part, field): batches}
        self.x: Tensor | None = None  # of the running batch

    def enter(self, x: Tensor, *_) -> None:
        """What enters the module, [batch, seq_len, hidden]."""
        self.x = self.collector.windows(self.stack, x)
        if self._fitted and "input" in self.moments:
            rows = self._rows(self.x)
            self._add(sum_x=rows.sum(0), xx=gram(rows))

    def hidden(self, h: Tensor, *_) -> None:
        """What enters the output projection, [batch, seq_len, intermediate]."""
        if self.of_heads and self.collector.part:
            self._sample(h=self.collector.windows(self.stack, h))
        if not self._fitted:
            return
        rows = self._rows(h)
        self._add(sum_h=rows.sum(0))
        if "hidden" in self.moments:
            self._add(hh=gram(rows))
        if "cross" in self.moments:
            self._add(hx=rows.T @ self._rows(self.x))

    def leave(self, output: State) -> None:
        """What leaves the module, [batch, seq_len, hidden]."""
        y, real = self.collector.windows(self.stack, hidden_states(output)), self.collector.real[self.stack]
        if self._fitted:
            rows = self._rows(y)
            self.sums.tokens += len(rows)
            self._add(sum_y=rows.sum(0))
            if "input" in self.moments:
                self._add(xy=self._rows(self.x).T @ rows)
        if self.collector.part:
            x = self.x if self.precision is None else self.x.to(self.precision)
            self._sample(x=x, y=y, mask=torch.ones(y.shape[:2], dtype=torch.bool, device=y.device) if real is None else real)
        self.x = None

    def stream(self, output: State) -> None:
        """The residual stream that leaves the layer, [batch, seq_len, hidden]."""
        if self.collector.part:
            self._sample(residual_energy=hidden_states(output).float().square().sum(-1))

    def _rows(self, hidden: Tensor) -> Tensor:
        return self.collector.rows(self.stack, hidden)

    @property
    def _fitted(self) -> bool:
        return self.collector.part != "validation"

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            total = getattr(self.sums, name)
            if total is None:
                setattr(self.sums, name, value.double())
            else:
                add_to(total, value)

    def _sample(self, **values: Tensor) -> None:
        for name, value in values.items():
            # copied: the layers after this one are free to write into the tensor
            self.samples.setdefault((self.collector.part, name), []).append(value.detach().to("cpu", copy=True))

    def result(self, name: str) -> BlockStatistics:
        """The statistics of what is called ``name``. Raises ValueError where it was not run, or gave what is not finite."""
        if not self.sums.tokens and not self.samples:
            raise ValueError(f"{name} was not run: the blocks are of another model.")
        parts = [part for part in SAMPLES if (part, "x") in self.samples]
        names = [f.name for f in fields(Sample) if f.name != "h" or self.of_heads]
        samples = {part: Sample(*(torch.cat(self.samples.pop((part, field))) for field in names)) for part in parts}
        tensors = [getattr(self.sums, name) for name in SUMS]
        tensors += [t[pairs.mask] for pairs in samples.values() for t in (pairs.x, pairs.y)]  # validation is in no moment
        if not all(torch.isfinite(t).all() for t in tensors if t is not None):
            raise ValueError(f"Activations of {name} are not finite: check the model (a half-precision overflow?) and the text.")
        return replace(self.sums, **samples)
