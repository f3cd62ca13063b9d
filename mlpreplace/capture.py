"""One forward pass over calibration text: streaming moments and a small sample of input/output pairs per block.

Moments are what the closed-form fits need. They are summed in float64, so that their size depends on the block and
never on the number of tokens. Whole windows are sampled, not single tokens, so that a replacement which looks at
earlier tokens can be fitted and tested on the same sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batches import Batch, is_seq2seq, items, on_device, real_tokens, through_layers
from .blocks import Block
from .cache import Entry
from .memory import halving, homes, windows_at_once
from .models import check_windows, eval_mode

MOMENTS = {"input": "xx", "hidden": "hh", "cross": "hx"}  # and the field that tells whether one was captured
DEFAULT_MOMENTS = ("input", "hidden")
PATCHES = 1024  # of an image, at most, where memory is estimated
SUMS = ("sum_x", "sum_y", "sum_h", "xx", "xy", "hh", "hx")


@dataclass
class Sample:
    """Whole windows of input/output pairs of one block, in the block's dtype; of a model on a GPU they wait in CPU memory."""

    x: Tensor  # [windows, seq_len, hidden] what enters the block (after its norm)
    y: Tensor  # [windows, seq_len, hidden] what leaves it (before the residual add)
    residual_energy: Tensor  # [windows, seq_len] squared norm of the residual stream that leaves the layer
    mask: Tensor  # [windows, seq_len] True where a token is real, False where it is padding

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    def head(self, windows: int) -> Sample:
        """The first ``windows`` windows."""
        return Sample(*(getattr(self, f.name)[:windows] for f in fields(self)))

    def to(self, device: torch.device) -> Sample:
        return Sample(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass
class BlockStatistics:
    """Second moments of one block over the fitting tokens, in float64, uncentred, and its samples.

    X, Y and H stack tokens as rows: H is what enters the output projection. A moment that was not asked for is None.
    """

    tokens: int = 0
    sum_x: Tensor | None = None  # [hidden]
    sum_y: Tensor | None = None  # [hidden]
    sum_h: Tensor | None = None  # [intermediate]
    xx: Tensor | None = None  # [hidden, hidden] XᵀX
    xy: Tensor | None = None  # [hidden, hidden] XᵀY
    hh: Tensor | None = None  # [intermediate, intermediate] HᵀH
    hx: Tensor | None = None  # [intermediate, hidden] HᵀX
    train: Sample | None = None  # windows that are in the moments too
    validation: Sample | None = None  # windows that are in no moment
    _parts: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> BlockStatistics:
        """The same with all sums on ``device``; samples stay where they are."""
        sums = {name: t if (t := getattr(self, name)) is None else t.to(device) for name in SUMS}
        return replace(self, **sums)

    def require(self, block: Block, *moments: str) -> None:
        """Raise ValueError, with the name of ``block``, unless every moment was captured, from at least two tokens, and
        all are finite.
        """
        for moment in moments:
            if getattr(self, MOMENTS[moment]) is None:
                raise ValueError(
                    f"{block.name}: the {moment!r} moment was not captured: capture(..., moments=({moment!r}, ...))."
                )
        if self.tokens < 2:
            raise ValueError(f"{block.name}: a fit needs at least 2 tokens, the statistics hold {self.tokens}.")
        if not all(torch.isfinite(t).all() for name in SUMS if (t := getattr(self, name)) is not None):
            raise ValueError(f"{block.name}: the statistics are not finite.")


Statistics = dict[Block, BlockStatistics]


def _add(total: Tensor | None, value: Tensor, home: torch.device | None = None) -> Tensor:
    """Sum in float64, on ``home`` where it is given; the product of one batch is made where the activations are, and in their
    precision, float32 for half precision.
    """
    return value.to(home or value.device, torch.float64) if total is None else total.add_(value.to(total.device))


def _tensor(value) -> Tensor:
    """The hidden states among what a module returns: attention returns them first in a tuple."""
    return value[0] if isinstance(value, tuple) else value


class _Collector:
    """Hooks of one block. State of the running batch: which tokens count, and what has been seen so far."""

    def __init__(self, statistics: BlockStatistics, moments: Collection[str], home: torch.device):
        self.statistics, self.moments, self.home = statistics, moments, home
        self.keep: Tensor | None = None  # [batch, seq_len] real tokens
        self.part: str | None = "train"  # "train", "validation", or None for a batch that only enters the moments
        self.shape: torch.Size | None = None  # [batch, seq_len], where the batch says so
        self.x: Tensor | None = None

    @property
    def in_moments(self) -> bool:
        return self.part != "validation"

    def windows(self, hidden: Tensor) -> Tensor:
        """[batch, seq_len, width], also where a layer flattens its tokens (OPT)."""
        return hidden if self.shape is None else hidden.reshape(*self.shape, hidden.shape[-1])

    def flat(self, hidden: Tensor) -> Tensor:
        rows = hidden if self.keep is None else hidden[self.keep.to(hidden.device)]
        rows = rows.reshape(-1, hidden.shape[-1])  # [tokens, width]
        return rows if rows.dtype == torch.float64 else rows.float()

    def entry(self, module, args, kwargs) -> None:
        self.x = self.windows(args[0] if args else kwargs["hidden_states"])
        if self.in_moments and "input" in self.moments:
            x, s = self.flat(self.x), self.statistics
            s.sum_x, s.xx = self.add(s.sum_x, x.sum(0)), self.add(s.xx, x.T @ x)

    def hidden(self, module, args) -> None:
        if self.in_moments:
            h, s = self.flat(self.windows(args[0])), self.statistics
            s.sum_h = self.add(s.sum_h, h.sum(0))
            if "hidden" in self.moments:
                s.hh = self.add(s.hh, h.T @ h)
            if "cross" in self.moments:
                s.hx = self.add(s.hx, h.T @ self.flat(self.x))

    def exit(self, module, args, output) -> None:
        output, s = self.windows(_tensor(output)), self.statistics
        if self.in_moments:
            y = self.flat(output)
            s.tokens += y.shape[0]
            s.sum_y = self.add(s.sum_y, y.sum(0))
            if "input" in self.moments:
                s.xy = self.add(s.xy, self.flat(self.x).T @ y)
        self.sample("x", self.x)
        self.sample("y", output)
        self.x = None

    def layer(self, module, args, output) -> None:
        if self.part:
            self.sample("r", _tensor(output).float().square().sum(-1))

    def sample(self, name: str, value: Tensor) -> None:
        if self.part:
            # copied: the layers after this one are free to write into the tensor
            self.statistics._parts.setdefault(f"{self.part}.{name}", []).append(value.detach().to("cpu", copy=True))

    def add(self, total: Tensor | None, value: Tensor) -> Tensor:
        return _add(total, value, self.home)


@contextmanager
def _hooks(collectors: dict[Block, _Collector]):
    with ExitStack() as stack:
        for block, c in collectors.items():
            first, last = block.modules[0], block.modules[-1]
            handles = [
                first.register_forward_pre_hook(c.entry, with_kwargs=True),
                last.register_forward_hook(c.exit),
                block.host.register_forward_hook(c.layer),
            ]
            if {"hidden", "cross"} & set(c.moments) and block.has_neurons:
                handles.append(block.down.register_forward_pre_hook(c.hidden))
            for handle in handles:
                stack.callback(handle.remove)
        yield


def capture(
    model: nn.Module,
    blocks: Iterable[Block],
    windows: Tensor | Batch,
    mask: Tensor | None = None,
    *,
    moments: Collection[str] = DEFAULT_MOMENTS,
    validation_windows: int = 4,
    sample_windows: int | None = 4,
    batch_size: int | None = None,
    cached: bool = False,
    progress: bool = True,
) -> Statistics:
    """Run ``windows`` through ``model`` once and collect what the fits of ``blocks`` need.

    Args:
        model: the dense model; it is put into eval mode for the pass and left as it was.
        blocks: from :func:`~mlpreplace.blocks.find_blocks`; any number of them, one pass all the same.
        windows: token ids [windows, seq_len]; or one large batch of any model's inputs, {"pixel_values": …} or {"input_ids": …,
            "attention_mask": …, "labels": …}, whose items are what is called windows here.
        mask: True (or 1) where a token is real, [windows, seq_len]; padding enters no moment and no error. A batch has its own
            masks, as :func:`~mlpreplace.similarity.capture_units` reads them.
        moments: "input" (XᵀX, XᵀY: Linear, LowRank), "hidden" (HᵀH: NarrowMLP, the expensive one) and "cross" (HᵀX:
            NarrowPlusLinear, with the other two). A block without neurons has an input moment only.
        validation_windows: that many last windows enter no moment and measure the error of fits on unseen tokens.
        sample_windows: that many first windows are kept as input/output pairs; None keeps every window that is fitted on.
        batch_size: windows in one forward pass; None for 4 on a CPU, and on a GPU for as many as its free memory has room for.
            Where it has not, the pass starts again with half as many.
        cached: keep the result on disk, and take it from there when model, windows, options and code are the same.

    Returns:
        {block: BlockStatistics}; memory depends on the windows sampled, not on their number in all. Sums are on the device of
        their block, or on the CPU where they would take more than half of what is free; samples are on the CPU.

    Raises:
        ValueError: unknown moment, no window left to fit on, a sequence longer than the model's context, a mask beside a
            batch, or an activation that is not finite (with the name of the block).
    """
    blocks = list(blocks)
    whole = _whole(model, windows, mask)
    n_windows = items(whole)
    unknown = set(moments) - set(MOMENTS)
    if unknown:
        raise ValueError(f"Unknown moments {sorted(unknown)}; expected some of {tuple(MOMENTS)}.")
    n_fit = n_windows - validation_windows
    if n_fit < 1:
        raise ValueError(f"{n_windows} windows minus validation_windows={validation_windows} leave none to fit on.")
    sample_windows = n_fit if sample_windows is None else min(sample_windows, n_fit)
    if cached:
        options = set(moments), validation_windows, sample_windows, batch_size
        entry = Entry("capture", "capture", model, blocks, windows, mask, *options)
        if (stored := entry.load()) is not None:
            return _unflatten(homes(blocks, moments), stored)

    forward, home = through_layers(model), homes(blocks, moments)
    masks = {stack: real_tokens(model, stack, whole) for stack in {block.stack for block in blocks}}
    # sampled windows run in batches of their own, so that a batch is sampled whole or not at all
    parts = [("train", 0, sample_windows), (None, sample_windows, n_fit), ("validation", n_fit, n_windows)]

    def run(batch_size: int) -> Statistics:
        statistics = {block: BlockStatistics() for block in blocks}
        collectors = {block: _Collector(s, moments, home[block]) for block, s in statistics.items()}
        batches = [(p, i, min(i + batch_size, end)) for p, start, end in parts for i in range(start, end, batch_size)]
        with eval_mode(model), _hooks(collectors), torch.inference_mode():
            for part, start, end in tqdm(batches, desc="capture", unit="batch", disable=not progress, leave=False):
                batch = on_device({name: t[start:end] for name, t in whole.items()}, model)
                for block, c in collectors.items():
                    real = real_tokens(model, block.stack, batch)
                    c.keep, c.part = None if real is None else real.bool(), part
                    c.shape = _shape(model, batch, real)
                forward(batch)
        return statistics

    seq_len = max((t.shape[1] for name, t in whole.items() if name.endswith("input_ids")), default=PATCHES)
    statistics = halving(run, batch_size or windows_at_once(blocks, seq_len))
    for block, s in statistics.items():
        _finish(block, s, masks[block.stack], {"train": (0, sample_windows), "validation": (n_fit, n_windows)})
    if cached:
        entry.save(_flatten(statistics))
    return statistics


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


def merge(first: Statistics, second: Statistics) -> Statistics:
    """Statistics over the tokens of both, which must not overlap: sums add up, samples are put together.

    Raises ValueError when the two are not of the same blocks and moments, or their samples not of the same sequence length.
    """
    if set(first) != set(second):
        raise ValueError("The two statistics are of different blocks.")
    merged = {}
    for block, a in first.items():
        b = second[block]
        if any((getattr(a, name) is None) != (getattr(b, name) is None) for name in SUMS):
            raise ValueError(f"The two statistics of {block.name} hold different moments.")
        sums = {name: t + getattr(b, name).to(t.device) for name in SUMS if (t := getattr(a, name)) is not None}
        samples = {part: _join(getattr(a, part), getattr(b, part), block) for part in ("train", "validation")}
        merged[block] = BlockStatistics(a.tokens + b.tokens, **sums, **samples)
    return merged


def _join(a: Sample | None, b: Sample | None, block: Block) -> Sample | None:
    if a is None or b is None:
        return a or b
    if a.mask.shape[1] != b.mask.shape[1]:
        lengths = f"{a.mask.shape[1]} and {b.mask.shape[1]}"
        raise ValueError(f"The two samples of {block.name} are of windows of different lengths, {lengths} tokens.")
    return Sample(*(torch.cat([getattr(a, f.name), getattr(b, f.name)]) for f in fields(Sample)))


def _flatten(statistics: Statistics) -> dict[str, Tensor]:
    """Every tensor under "block name/field" or "block name/sample/field"."""
    flat = {}
    for block, s in statistics.items():
        flat[f"{block.name}/tokens"] = torch.tensor(s.tokens)
        flat |= {f"{block.name}/{f}": getattr(s, f) for f in SUMS if getattr(s, f) is not None}
        for part in ("train", "validation"):
            if (sample := getattr(s, part)) is not None:
                flat |= {f"{block.name}/{part}/{f.name}": getattr(sample, f.name) for f in fields(Sample)}
    return flat


def _unflatten(home: Mapping[Block, torch.device], flat: dict[str, Tensor]) -> Statistics:
    statistics = {}
    for block, device in home.items():
        found = {k.removeprefix(f"{block.name}/"): t for k, t in flat.items() if k.startswith(f"{block.name}/")}
        s = BlockStatistics(tokens=int(found["tokens"]), **{f: found.get(f) for f in SUMS}).to(device)
        statistics[block] = s
        for part in ("train", "validation"):
            if f"{part}/x" in found:
                setattr(s, part, Sample(**{f.name: found[f"{part}/{f.name}"] for f in fields(Sample)}))
    return statistics


def _whole(model: nn.Module, windows: Tensor | Batch, mask: Tensor | None) -> Batch:
    if isinstance(windows, Mapping):
        if mask is not None:
            raise ValueError("A batch has masks of its own, attention_mask and decoder_attention_mask: expected no other.")
        return windows
    check_windows(windows, model, mask)
    return {"input_ids": windows} | ({} if mask is None else {"attention_mask": mask.long()})


def _shape(model: nn.Module, batch: Batch, real: Tensor | None) -> torch.Size | None:
    """[batch, seq_len] of what a block is given; None where only the block itself can tell: patches of an image."""
    if real is not None:
        return real.shape
    return batch["input_ids"].shape if "input_ids" in batch and not is_seq2seq(model) else None


def _backbone(model: nn.Module) -> Callable[[Tensor, Tensor | None], object]:
    """The model without its LM head, of token ids and a mask [batch, seq_len]."""
    forward = through_layers(model)
    return lambda ids, keep: forward({"input_ids": ids} | ({} if keep is None else {"attention_mask": keep.long()}))


def _finish(block: Block, s: BlockStatistics, mask: Tensor | None, spans: dict[str, tuple[int, int]]) -> None:
    if not s.tokens and not s._parts:
        raise ValueError(f"{block.name} was not run: the blocks are of another model.")
    for part, (start, end) in spans.items():
        if end > start:
            x, y, r = (torch.cat(s._parts[f"{part}.{name}"]) for name in "xyr")
            keep = torch.ones(r.shape, dtype=torch.bool) if mask is None else mask[start:end].bool()
            setattr(s, part, Sample(x, y, r, keep.to(x.device)))
    s._parts.clear()
    tensors = [getattr(s, name) for name in SUMS]
    tensors += [t[p.mask] for p in (s.train, s.validation) if p for t in (p.x, p.y)]  # validation windows are in no moment
    if not all(torch.isfinite(t).all() for t in tensors if t is not None):
        raise ValueError(
            f"Activations of {block.name} are not finite: check the model (a half-precision overflow?) and the text."
        )
