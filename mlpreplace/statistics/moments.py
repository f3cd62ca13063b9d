"""One forward pass over calibration text that collects the moments and samples of any number of blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..models.blocks import Block, listed
from ..models.forward import State, hidden_states, watching
from ..models.inputs import Batch, as_batch, check_batch_size, items
from ..replacements.records import SAMPLES
from ..runtime.cache import cached
from ..runtime.memory import memory_budget as memory_budget_of
from ..runtime.memory import windows_at_once
from .collect import Collector, in_parts
from .groups import InGroups, grouped
from .records import MOMENTS, SUMS, BlockStatistics, Sample, Statistics
from .weight_check import WeightCheck

FIT_COPIES = 3  # of a block's statistics that fits to them, and their capture, take at a time, at most
PATCHES = 1024  # of an image, at most, where memory is estimated
GRAM_PARTS = 4  # of the columns; 5/8 of all products are made, with 8 parts it would be 9/16


def gram(rows: Tensor) -> Tensor:
    """RᵀR of rows [tokens, n]. It is symmetric: products are made of blocks on and below its diagonal, and copied above."""
    n = rows.shape[1]
    total, size = rows.new_empty(n, n), -(-n // GRAM_PARTS)
    for start in range(0, n, size):
        stop = min(start + size, n)
        total[start:, start:stop] = rows[:, start:].T @ rows[:, start:stop]
        total[start:stop, stop:] = total[stop:, start:stop].T
    return total


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
    ):
        self.collector, self.stack, self.moments = collector, stack, set(moments)
        self.precision = precision  # of sampled inputs, where it is not that of the input
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
                total.add_(value)

    def _sample(self, **values: Tensor) -> None:
        for name, value in values.items():
            # copied: the layers after this one are free to write into the tensor
            self.samples.setdefault((self.collector.part, name), []).append(value.detach().to("cpu", copy=True))

    def result(self, name: str) -> BlockStatistics:
        """The statistics of what is called ``name``. Raises ValueError where it was not run, or gave what is not finite."""
        if not self.sums.tokens and not self.samples:
            raise ValueError(f"{name} was not run: the blocks are of another model.")
        parts = [part for part in SAMPLES if (part, "x") in self.samples]
        samples = {part: Sample(*(torch.cat(self.samples.pop((part, f.name))) for f in fields(Sample))) for part in parts}
        tensors = [getattr(self.sums, name) for name in SUMS]
        tensors += [t[pairs.mask] for pairs in samples.values() for t in (pairs.x, pairs.y)]  # validation is in no moment
        if not all(torch.isfinite(t).all() for t in tensors if t is not None):
            raise ValueError(f"Activations of {name} are not finite: check the model (a half-precision overflow?) and the text.")
        return replace(self.sums, **samples)


class _Moments(Collector):
    """The collector of :func:`capture`."""

    def __init__(self, blocks: Collection[Block], moments: Collection[str]):
        super().__init__(block.stack for block in blocks)
        self.of = {block: Accumulator(self, block.stack, moments, block.dtype) for block in blocks}
        self.of_neurons = not {"hidden", "cross"}.isdisjoint(moments)
        self.ran: set[Block] = set()  # in the running batch

    def watch(self, hooks: ExitStack) -> None:
        for block, a in self.of.items():
            enter = partial(self._enter, block)
            hooks.enter_context(watching(block.modules[0], block.modules[-1], enter=enter, leave=a.leave))
            hooks.enter_context(watching(block.host, leave=a.stream))
            if self.of_neurons and block.has_neurons:
                hooks.enter_context(watching(block.down, enter=a.hidden))
            WeightCheck(self, block).watch(hooks)

    def start(self, *args) -> None:
        super().start(*args)
        self.ran.clear()

    def _enter(self, block: Block, x: Tensor, _) -> None:
        if block in self.ran:
            raise ValueError(
                f"{block.name} runs several times in one pass, on other inputs each time: which of them to fit is not defined. "
                "Give each pass layers of its own, with copy.deepcopy."
            )
        self.ran.add(block)
        self.of[block].enter(x)

    def result(self, block: Block) -> BlockStatistics:
        return self.of.pop(block).result(block.name)


def capture(
    model: nn.Module,
    blocks: Iterable[Block],
    windows: Tensor | Batch,
    mask: Tensor | None = None,
    *,
    moments: Collection[str] = ("input", "hidden"),
    validation_windows: int = 4,
    sample_windows: int | None = 4,
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    cached: bool = False,
    progress: bool = True,
) -> Statistics:
    """Run ``windows`` through ``model`` once and collect what the fits of ``blocks`` need.

    Where the statistics of all blocks fit into the memory budget, they are collected at once. Where they do not, what is
    returned captures them when they are asked for, some layers at a time (see :mod:`~mlpreplace.statistics.groups`): asking for
    blocks in the order of layers costs one pass, and the numbers are the same, bit for bit.

    Args:
        model: the dense model; it is left as it was.
        blocks: from :func:`~mlpreplace.models.find_blocks`, of one kind or both.
        windows: token ids [windows, seq_len]; or one large batch of any model's inputs, {"pixel_values": …} or {"input_ids": …,
            "attention_mask": …, "labels": …}, whose items are called windows here.
        mask: True (or 1) where a token is real, [windows, seq_len]. Padding enters no moment and no error. A batch has its own
            masks, see :func:`~mlpreplace.models.inputs.real_tokens`.
        moments: "input" (XᵀX, XᵀY: Linear, LowRank), "hidden" (HᵀH: NarrowMLP, the expensive one) and "cross" (HᵀX:
            NarrowPlusLinear, with the other two). A block without neurons has an input moment only.
        validation_windows: number of last windows that enter no moment and measure the error of fits on unseen tokens.
        sample_windows: number of first windows kept as input/output pairs; None keeps every window that is fitted on.
        batch_size: windows in one forward pass. None is 4 on a CPU, and on a GPU as many as its free memory has room for.
            Where memory runs out, the pass starts again with half as many.
        memory_budget: bytes, or "500MB", that statistics may take at a time; a single block may take more. By default
            ``MLPREPLACE_MEMORY_BUDGET``, or half of what is free, and at most 3 GiB on a CPU.
        cached: keep the result on disk, and take it from there when model, windows, options and code are the same. Only where
            it fits into the budget; what does not is captured anew.

    Returns:
        {block: BlockStatistics}. Memory grows with the sampled windows, not with all windows. Sums are on the device of their
        block, samples on the CPU.

    Raises:
        ValueError: unknown moment, no window left to fit on, windows longer than the model's context, a mask beside a batch, an
            activation that is not finite (with the name of the block), blocks of another model, a block that runs several times
            in one pass, a block whose weights are not what it computes, a budget that is no size.
    """
    blocks, whole = listed(blocks), as_batch(windows, model, mask)
    check_batch_size(batch_size)
    if unknown := set(moments) - set(MOMENTS):
        raise ValueError(f"Unknown moments {sorted(unknown)}; expected some of {tuple(MOMENTS)}.")
    parts = dict(validation_windows=validation_windows, sample_windows=sample_windows)
    options = dict(moments=sorted(set(moments)), batch_size=batch_size, parts=parts, progress=progress)
    budget = memory_budget_of(memory_budget, {block.device for block in blocks})
    sampled = sum(items(batch) for part, batch in in_parts(whole, items(whole), **parts) if part)
    sizes = {block: _bytes(block, moments, sampled * _seq_len(whole)) for block in blocks}
    groups = grouped(blocks, sizes, budget - FIT_COPIES * max(sizes.values(), default=0))
    if len(groups) > 1:
        return _in_groups(model, groups, whole, **options)
    return _at_once(model, blocks, whole, **options, cached=cached)


@cached("capture")
def _at_once(
    model: nn.Module,
    blocks: list[Block],
    whole: Batch,
    *,
    moments: list[str],
    batch_size: int | None,
    parts: dict[str, int | None],
    progress: bool,
) -> dict[Block, BlockStatistics]:
    return dict(_in_groups(model, [blocks], whole, moments, batch_size, parts, progress)) if blocks else {}


def _in_groups(
    model: nn.Module,
    groups: list[list[Block]],
    whole: Batch,
    moments: list[str],
    batch_size: int | None,
    parts: dict[str, int | None],
    progress: bool,
) -> InGroups:
    devices, of_window = {block.device for group in groups for block in group}, max(_window_bytes(g, whole) for g in groups)
    return InGroups(
        model,
        groups,
        lambda windows: in_parts(whole, windows, **parts),
        lambda group: _Moments(group, moments),
        windows=batch_size or windows_at_once(devices, of_window),
        key=(whole, moments, parts, batch_size),
        progress=progress,
    )


def _bytes(block: Block, moments: Collection[str], sampled: int) -> int:
    """Of a block's statistics: sums in float64, and ``sampled`` pairs in the block's precision."""
    hidden, inner = block.hidden_size, block.intermediate_size if block.has_neurons else 0
    sizes = {"input": 2 * hidden**2, "hidden": inner**2, "cross": inner * hidden}
    return 8 * sum(sizes[moment] for moment in moments) + 2 * sampled * hidden * block.dtype.itemsize


def _seq_len(whole: Batch) -> int:
    """Tokens of an item, or what is taken for that where only the model can tell."""
    return max((t.shape[1] for name, t in whole.items() if name.endswith("input_ids")), default=PATCHES)


def _window_bytes(blocks: Collection[Block], whole: Batch) -> int:
    """A generous estimate of the memory that one layer needs for a window."""
    of_token = max((4 * (10 * b.hidden_size + 2 * b.n_active_params // b.hidden_size) for b in blocks), default=0)
    return of_token * _seq_len(whole)


def sample(
    model: nn.Module,
    blocks: Iterable[Block],
    windows: Tensor,
    mask: Tensor | None = None,
    *,
    batch_size: int | None = None,
    cached: bool = False,
    progress: bool = True,
) -> dict[Block, Sample]:
    """Input/output pairs of ``blocks`` on all of ``windows``, without any moment: to train on, or to measure errors on.

    Arguments and errors are those of :func:`capture`. Memory: 2 · tokens · hidden numbers a block.
    """
    options = dict(batch_size=batch_size, cached=cached, progress=progress)
    statistics = capture(model, blocks, windows, mask, moments=(), validation_windows=0, sample_windows=None, **options)
    return {block: s.train for block, s in statistics.items()}
