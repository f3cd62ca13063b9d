"""One forward pass over calibration text that collects the moments and samples of any number of blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..models.blocks import Block, listed
from ..models.forward import State, hidden_states, watching
from ..models.inputs import Batch, as_batch, check_batch_size
from ..replacements.records import SAMPLES
from ..runtime.cache import cached
from ..runtime.memory import free_bytes, halving, windows_at_once
from .collect import Collector, collect, in_parts
from .records import MOMENTS, SUMS, BlockStatistics, Sample, Statistics
from .weight_check import WeightCheck

PATCHES = 1024  # of an image, at most, where memory is estimated


class Accumulator:
    """Statistics in the making: the sums over one module's inputs and outputs, and the windows that are sampled.

    ``enter``, ``hidden``, ``leave`` and ``stream`` are called in this order for each batch. The products of a batch are made
    where its activations are, in their precision (float32 for half precision). They are added up in float64 on ``home``.
    """

    def __init__(
        self,
        collector: Collector,
        stack: str,
        moments: Collection[str],
        home: torch.device | None = None,
        precision: torch.dtype | None = None,
    ):
        self.collector, self.stack, self.moments, self.home = collector, stack, set(moments), home
        self.precision = precision  # of sampled inputs, where it is not that of the input
        self.sums = BlockStatistics()
        self.samples: dict[tuple[str, str], list[Tensor]] = {}  # {(part, field): batches}
        self.x: Tensor | None = None  # of the running batch

    def enter(self, x: Tensor, *_) -> None:
        """What enters the module, [batch, seq_len, hidden]."""
        self.x = self.collector.windows(self.stack, x)
        if self._fitted and "input" in self.moments:
            rows = self._rows(self.x)
            self._add(sum_x=rows.sum(0), xx=rows.T @ rows)

    def hidden(self, h: Tensor, *_) -> None:
        """What enters the output projection, [batch, seq_len, intermediate]."""
        if not self._fitted:
            return
        rows = self._rows(h)
        self._add(sum_h=rows.sum(0))
        if "hidden" in self.moments:
            self._add(hh=rows.T @ rows)
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
                setattr(self.sums, name, value.to(self.home or value.device, torch.float64))
            else:
                total.add_(value.to(total.device))

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

    def __init__(self, blocks: Collection[Block], moments: Collection[str], home: Mapping[Block, torch.device]):
        super().__init__(block.stack for block in blocks)
        self.of = {block: Accumulator(self, block.stack, moments, home[block], block.dtype) for block in blocks}
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


@cached("capture")
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
    progress: bool = True,
) -> Statistics:
    """Run ``windows`` through ``model`` once and collect what the fits of ``blocks`` need.

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
        cached: keep the result on disk, and take it from there when model, windows, options and code are the same.

    Returns:
        {block: BlockStatistics}. Memory grows with the sampled windows, not with all windows. Sums are on the device of their
        block, or on the CPU where they would take more than half of the free memory. Samples are on the CPU.

    Raises:
        ValueError: unknown moment, no window left to fit on, windows longer than the model's context, a mask beside a batch, an
            activation that is not finite (with the name of the block), blocks of another model, a block that runs several times
            in one pass, a block whose weights are not what it computes.
    """
    blocks, whole = listed(blocks), as_batch(windows, model, mask)
    check_batch_size(batch_size)
    if unknown := set(moments) - set(MOMENTS):
        raise ValueError(f"Unknown moments {sorted(unknown)}; expected some of {tuple(MOMENTS)}.")
    parts, home = dict(validation_windows=validation_windows, sample_windows=sample_windows), homes(blocks, moments)

    def run(batch_size: int) -> _Moments:
        batches = in_parts(whole, batch_size, **parts)
        return collect(model, batches, _Moments(blocks, moments, home), name="capture", progress=progress)

    collector = halving(run, batch_size or windows_at_once({b.device for b in blocks}, _window_bytes(blocks, whole)))
    return {block: accumulator.result(block.name) for block, accumulator in collector.of.items()}


def _window_bytes(blocks: Collection[Block], whole: Batch) -> int:
    """A generous estimate of the memory that one layer needs for a window."""
    seq_len = max((t.shape[1] for name, t in whole.items() if name.endswith("input_ids")), default=PATCHES)
    of_token = max((4 * (10 * b.hidden_size + 2 * b.n_active_params // b.hidden_size) for b in blocks), default=0)
    return of_token * seq_len


def homes(blocks: Collection[Block], moments: Collection[str]) -> dict[Block, torch.device]:
    """Where the float64 sums of each block are kept: on its device, or on the CPU where all sums of that device would take more
    than half of its free memory.
    """
    needed: dict[torch.device, int] = {}  # bytes
    for block in blocks:
        hidden, inner = block.hidden_size, block.intermediate_size if block.has_neurons else 0
        sizes = {"input": 2 * hidden**2, "hidden": inner**2, "cross": inner * hidden}
        needed[block.device] = needed.get(block.device, 0) + 8 * sum(sizes[moment] for moment in moments)
    free = {device: free_bytes(device) for device in needed}
    crowded = {device for device, bytes_needed in needed.items() if free[device] is not None and bytes_needed > free[device] / 2}
    return {block: torch.device("cpu") if block.device in crowded else block.device for block in blocks}


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
