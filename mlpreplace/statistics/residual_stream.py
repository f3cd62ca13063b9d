"""Statistics of the residual stream, for methods that remove whole layers or submodules.

The stream r_i enters layer i; the last one, r_L, leaves the last layer. :func:`capture_stream` measures how much it changes
between any two layers and in each block, which tells what to remove. :func:`capture_spans` collects what replacements of spans
of layers are fitted to. Sums are in float64, memory does not grow with the number of tokens, and padding is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..models.architectures import layer_lists
from ..models.blocks import Block, find_blocks
from ..models.forward import State, eval_mode, hidden_states, watching
from ..models.inputs import as_batch, input_device, items
from ..replacements.splice import check_attention
from ..runtime.cache import cached
from ..runtime.memory import WINDOWS, halving
from .accumulator import Accumulator
from .collect import Collector, collect, in_parts
from .records import BlockStatistics
from .weight_check import WeightCheck


@dataclass(frozen=True, order=True)
class Span:
    """Layers ``start`` to ``stop`` − 1. The stream enters them as r_start and leaves them as r_stop."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"Expected 0 ≤ start < stop, got {self.start}, {self.stop}.")

    @property
    def layers(self) -> range:
        return range(self.start, self.stop)


@dataclass(frozen=True)
class StreamStatistics:
    """Change of the residual stream: means over real tokens, except ``angle``, a mean over windows."""

    tokens: int
    distance: Tensor  # [layers + 1, layers + 1] 1 − cos(r_i, r_j)
    angle: Tensor  # [layers + 1, layers + 1] arccos(cos(r_i, r_j)) / π of each window's last token
    magnitude: dict[str, float]  # {block name: ‖a‖ / ‖r‖} where the block adds a to the stream r
    rotation: dict[str, float]  # {block name: 1 − cos(r, r + a)}

    @property
    def layers(self) -> int:
        return len(self.distance) - 1

    @property
    def influence(self) -> Tensor:
        """Block Influence of each layer, 1 − cos(r_i, r_{i+1}), [layers] (ShortGPT, arXiv 2403.03853)."""
        return self.distance.diagonal(1)


@dataclass
class SpanStatistics:
    """What a replacement of a span of layers is fitted to. The outputs of both are what the span adds, r_stop − r_start."""

    stream: BlockStatistics  # inputs: r_start
    mlp: BlockStatistics | None  # inputs: outputs of the MLP before the span; None without one, or with a norm behind it


class _Recorder(Collector):
    """Keeps the streams r_i of the running batch, and what blocks give, [batch, seq_len, hidden]."""

    def __init__(self, model: nn.Module, depths: Iterable[int], blocks: Iterable[Block]):
        _, self.stack, self.layers = layer_lists(model)[0]
        super().__init__([self.stack])
        self.model, self.depths, self.blocks = model, sorted(set(depths)), list(blocks)
        self.device = input_device(model)
        self.streams: dict[int, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}  # {block name: what it gives}
        self.norms: dict[str, nn.Module] = {}  # {block name: what stands between it and the stream}, where anything does

    def watch(self, hooks: ExitStack) -> None:
        for depth in self.depths:
            keep = self._keeping(self.streams, depth)
            if depth < len(self.layers):
                hooks.enter_context(watching(self.layers[depth], enter=keep))
            else:
                hooks.enter_context(watching(self.layers[-1], leave=keep))
        for block in self.blocks:
            keep, norm = self._keeping(self.outputs, block.name), partial(self.norms.setdefault, block.name)
            first, last = block.modules[0], block.modules[-1]
            hooks.enter_context(watching(first, last, leave=keep, follow=norm, within=block.host))

    def _keeping(self, store: dict, key: int | str) -> Callable[..., None]:
        def keep(value: State, *_) -> None:
            # copied: a layer is free to write into what it was given; to one device, as streams meet those of other layers
            windows = self.windows(self.stack, hidden_states(value).detach())
            store[key] = windows.to(self.device, copy=True)

        return keep

    def added(self, block: Block) -> Tensor:
        """What ``block`` adds to the stream, [batch, seq_len, hidden]: what it gives, or what a norm makes of that (Gemma 2)."""
        y, norm = self.outputs[block.name], self.norms.get(block.name)
        return y if norm is None else norm(y.to(block.device)).to(self.device)


class _Movement(_Recorder):
    """The collector of :func:`capture_stream`."""

    def __init__(self, model: nn.Module, blocks: list[Block]):
        super().__init__(model, range(len(layer_lists(model)[0][2]) + 1), blocks)
        self.cosines, self.angles, self.tokens, self.n_windows = 0, 0, 0, 0
        self.moved = torch.zeros(2, len(blocks), dtype=torch.float64, device="cpu")  # sums of magnitude and of rotation

    def finish(self) -> None:
        rows = torch.stack([self.rows(self.stack, self.streams[i]) for i in self.depths], 1)  # [tokens, layers + 1, hidden]
        unit = nn.functional.normalize(rows, dim=-1)
        self.cosines = self.cosines + (unit @ unit.mT).double().sum(0).cpu()
        last = unit[self._last_tokens()].double()  # [windows, layers + 1, hidden]
        self.angles = self.angles + ((last @ last.mT).clamp(-1, 1).arccos() / math.pi).sum(0).cpu()
        self.tokens, self.n_windows = self.tokens + len(rows), self.n_windows + len(last)
        given = torch.zeros_like(rows[:, 1:])  # by the blocks of each layer
        for i, block in enumerate(self.blocks):
            a = self.rows(self.stack, self.added(block))
            given[:, block.layer] += a
            # attention reads the stream that enters the layer; what leaves the layer holds what its MLP added
            r = rows[:, block.layer] if block.kind == "attention" else rows[:, block.layer + 1] - a
            self.moved[0, i] += (a.norm(dim=-1) / r.norm(dim=-1).clamp_min(torch.finfo(r.dtype).tiny)).double().sum().cpu()
            self.moved[1, i] += (1 - torch.cosine_similarity(r, r + a, dim=-1).double()).sum().cpu()
        _check_sums(self.model, rows, given, torch.finfo(self.streams[0].dtype).eps)

    def _last_tokens(self) -> Tensor:
        """Positions of each window's last real token among the real tokens of the batch, [batch]."""
        real, (batch, seq_len, _) = self.real[self.stack], self.streams[0].shape
        counts = torch.full((batch,), seq_len, device=self.device) if real is None else real.sum(1)
        return counts.cumsum(0) - 1

    def means(self) -> StreamStatistics:
        moved = self.moved / self.tokens
        distance, angle = (1 - self.cosines / self.tokens).fill_diagonal_(0), (self.angles / self.n_windows).fill_diagonal_(0)
        if not all(torch.isfinite(t).all() for t in (distance, angle, moved)):
            raise ValueError("The residual stream is not finite: check the model (a half-precision overflow?) and the text.")
        names = [block.name for block in self.blocks]
        return StreamStatistics(self.tokens, distance, angle, *(dict(zip(names, m.tolist(), strict=True)) for m in moved))


def _check_sums(model: nn.Module, rows: Tensor, given: Tensor, eps: float) -> None:
    """Raise ValueError where a layer adds anything else to the stream [tokens, layers + 1, hidden] than its blocks give."""
    left = (rows.diff(dim=1) - given).norm(dim=(0, 2))  # [layers]
    rounding = 8 * eps * rows.norm(dim=(0, 2))[1:]
    if more := (left > 0.1 * given.norm(dim=(0, 2)) + rounding).nonzero().flatten().tolist():
        raise ValueError(
            f"Layer {more[0]} of {type(model).__name__} does more than add what its blocks give to the residual stream (scale it,"
            " or normalise the sum, as BERT does): how far a block moves the stream is not defined there."
        )


def _check_removable(model: nn.Module) -> None:
    for block in find_blocks(model, "attention"):
        check_attention(model, block)  # what cannot be removed need not be measured


@cached("stream")
def capture_stream(
    model: nn.Module,
    windows: Tensor,
    mask: Tensor | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> StreamStatistics:
    """Run ``windows`` through the dense ``model`` once and measure how much its residual stream changes.

    The results are means of numbers between 0 and about 1; a few thousand tokens are enough to choose by them.

    Args:
        windows: token ids [windows, seq_len].
        mask: True (or 1) where a token is real, [windows, seq_len].
        batch_size: windows in one forward pass, 4 by default. Where memory runs out, the pass starts again with half as many.
        cached: keep the result on disk, and take it from there.

    Raises:
        ValueError: windows the model cannot read, no real token, activations that are not finite, attention that cannot be
            replaced (an encoder-decoder's), layers that do more than add what their blocks give (BERT's).
    """
    whole = as_batch(windows, model, mask)
    real = whole.get("attention_mask")
    if not items(whole) or (real is not None and not bool(real.any(1).all())):
        raise ValueError("Every window needs a real token.")

    def run(batch_size: int) -> _Movement:
        return collect(model, in_parts(whole, batch_size), _Movement(model, blocks), name="stream", progress=progress)

    with eval_mode(model):  # also where another thread would put other blocks in place
        _check_removable(model)
        blocks = [*find_blocks(model, "attention"), *find_blocks(model)]
        return halving(run, batch_size or WINDOWS).means()


class _Spans(_Recorder):
    """The collector of :func:`capture_spans`."""

    def __init__(self, model: nn.Module, spans: list[Span]):
        mlps = find_blocks(model)
        self.before = {span: mlps[span.start - 1] for span in spans if span.start}
        super().__init__(model, {end for s in spans for end in (s.start, s.stop)}, dict.fromkeys(self.before.values()))
        self.of_stream = {span: Accumulator(self, self.stack, ("input",)) for span in spans}
        self.of_mlp = {span: Accumulator(self, self.stack, ("input",)) for span in self.before}

    def watch(self, hooks: ExitStack) -> None:
        super().watch(hooks)
        for block in dict.fromkeys(self.before.values()):  # into whose weights a map may be fused
            WeightCheck(self, block).watch(hooks)

    def finish(self) -> None:
        for span, of_stream in self.of_stream.items():
            entering, leaving = self.streams[span.start], self.streams[span.stop]
            inputs = [(of_stream, entering)]
            if span in self.before:
                inputs.append((self.of_mlp[span], self.outputs[self.before[span].name]))
            for accumulator, x in inputs:
                accumulator.enter(x)
                accumulator.leave(leaving - entering)
                accumulator.stream(leaving)

    def result(self) -> dict[Span, SpanStatistics]:
        found = {}
        for span, of_stream in self.of_stream.items():
            adds = span in self.before and self.before[span].name not in self.norms
            mlp = self.of_mlp[span].result(f"MLP before {span}") if adds else None
            found[span] = SpanStatistics(of_stream.result(f"{span}"), mlp)
        return found


@cached("spans")
def capture_spans(
    model: nn.Module,
    spans: Iterable[Span],
    windows: Tensor,
    mask: Tensor | None = None,
    *,
    validation_windows: int = 4,
    sample_windows: int | None = 4,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[Span, SpanStatistics]:
    """Run ``windows`` through the dense ``model`` once and collect what replacements of ``spans`` of layers are fitted to.

    Arguments and errors are those of :func:`~mlpreplace.statistics.capture`. A span beyond the last layer, and attention that
    cannot be replaced, are ValueErrors, too. Memory for a span: 4 · hidden² numbers, and 4 · hidden for every sampled token.
    """
    spans = sorted(set(spans))
    if not spans:
        return {}
    whole, parts = as_batch(windows, model, mask), dict(validation_windows=validation_windows, sample_windows=sample_windows)
    layers = len(layer_lists(model)[0][2])
    if beyond := [span for span in spans if span.stop > layers]:
        raise ValueError(f"{beyond[0]} goes beyond the {layers} layers of {type(model).__name__}.")

    def run(batch_size: int) -> _Spans:
        return collect(model, in_parts(whole, batch_size, **parts), _Spans(model, spans), name="spans", progress=progress)

    with eval_mode(model):  # also where another thread would put other blocks in place
        _check_removable(model)
        return halving(run, batch_size or WINDOWS).result()
