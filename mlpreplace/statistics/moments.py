"""One forward pass over calibration text that collects the moments and samples of any number of blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from ..models.blocks import Block, listed
from ..models.forward import watching
from ..models.inputs import Batch, as_batch, check_batch_size, items
from ..runtime.cache import cached
from ..runtime.memory import memory_budget as memory_budget_of
from ..runtime.memory import windows_at_once
from .accumulator import Accumulator
from .collect import Collector, in_parts
from .groups import InGroups, grouped
from .records import MOMENTS, BlockStatistics, Sample, Statistics
from .weight_check import WeightCheck

FIT_COPIES = 3  # of a block's statistics that fits to them, and their capture, take at a time, at most
PATCHES = 1024  # of an image, at most, where memory is estimated


class _Moments(Collector):
    """The collector of :func:`capture`."""

    def __init__(self, blocks: Collection[Block], moments: Collection[str]):
        super().__init__(block.stack for block in blocks)
        self.of = {block: self._accumulator(block, set(moments)) for block in blocks}
        self.of_neurons = not {"hidden", "cross"}.isdisjoint(moments)
        self.ran: set[Block] = set()  # in the running batch

    def _accumulator(self, block: Block, moments: set[str]) -> Accumulator:
        of_heads = block.heads is not None and "hidden" in moments
        moments = moments - {"cross"} if block.kind == "attention" else moments  # which only neurons are fitted with
        return Accumulator(self, block.stack, moments, block.dtype, of_heads=of_heads)

    def watch(self, hooks: ExitStack) -> None:
        for block, a in self.of.items():
            enter = partial(self._enter, block)
            hooks.enter_context(watching(block.modules[0], block.modules[-1], enter=enter, leave=a.leave))
            hooks.enter_context(watching(block.host, leave=a.stream))
            if self.of_neurons and block.output_projection is not None:
                hooks.enter_context(watching(block.output_projection, enter=a.hidden))
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
    hidden, inner = block.hidden_size, block.inner_size
    sizes = {"input": 2 * hidden**2, "hidden": inner**2, "cross": inner * hidden if block.kind == "mlp" else 0}
    pairs = 2 * hidden + (inner if block.heads is not None and "hidden" in moments else 0)
    return 8 * sum(sizes[moment] for moment in moments) + sampled * pairs * block.dtype.itemsize


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
