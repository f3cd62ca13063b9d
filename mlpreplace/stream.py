"""What methods that remove whole layers or submodules must know of the residual stream, from streaming passes over text.

The stream r_i enters layer i; the last, r_L, leaves the last layer. :func:`capture_stream` measures how far it moves between
any two layers and in each block, which is what choices are made by. :func:`capture_spans` collects for chosen spans of layers
what a stand-in is fitted to. Sums are in float64, memory does not grow with the tokens, padding enters nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Block, find_blocks
from .cache import Entry
from .capture import BlockStatistics, _add, _backbone, _finish, _flatten, _tensor, _unflatten
from .models import check_windows, eval_mode, input_device
from .splice import _check_attention
from .structure import layer_lists


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

    def cache_key(self) -> tuple[int, int]:
        return self.start, self.stop


@dataclass(frozen=True)
class StreamStatistics:
    """Means over real tokens, but for ``angle``."""

    tokens: int
    distance: Tensor  # [layers + 1, layers + 1] 1 − cos(r_i, r_j)
    angle: Tensor  # [layers + 1, layers + 1] arccos(cos(r_i, r_j)) / π of each window's last token
    magnitude: dict[str, float]  # {block name: ‖a‖ / ‖r‖}, a what the block adds to the stream r
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
    """What a stand-in for a span of layers is fitted to; the outputs of both are what the span adds, r_stop − r_start."""

    stream: BlockStatistics  # inputs: r_start
    mlp: BlockStatistics | None  # inputs: what the MLP of the layer before gives; None without one that adds it as it is


class _Recorder:
    """Hooks that keep of the running batch the streams r_i and what blocks add to them, [batch, seq_len, hidden]."""

    def __init__(self, model: nn.Module, depths: Iterable[int], blocks: Iterable[Block]):
        for block in find_blocks(model, "attention"):
            _check_attention(model, block)  # what cannot be removed need not be measured
        self.layers, self.depths, self.blocks = layer_lists(model)[0][2], set(depths), list(blocks)
        self.device = input_device(model)
        self.streams: dict[int, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}  # of blocks
        self.added: dict[str, Tensor] = {}  # of blocks: the output, or what a norm between it and the stream makes of it
        self.shape: torch.Size | None = None  # [batch, seq_len]

    def _keep(self, store: dict, key):
        def keep(value: Tensor) -> None:
            # copied: a layer is free to write into what it was given; to one device, as streams meet those of other layers
            store[key] = value.detach().reshape(*self.shape, value.shape[-1]).to(self.device, copy=True)

        return keep

    def _stream(self, depth: int):
        keep = self._keep(self.streams, depth)
        if depth < len(self.layers):
            return self.layers[depth].register_forward_pre_hook(
                lambda module, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        return self.layers[-1].register_forward_hook(lambda module, args, output: keep(_tensor(output)))

    def _block(self, block: Block) -> list:
        leaving: list[Tensor] = []
        keep, keep_added = self._keep(self.outputs, block.name), self._keep(self.added, block.name)

        def leave(module, args, output) -> None:
            leaving[:] = [_tensor(output)]
            keep(leaving[0])
            keep_added(leaving[0])

        def follow(module, args, output) -> None:
            if leaving and args and args[0] is leaving[0]:  # Gemma 2 has a norm there
                keep_added(_tensor(output))

        children = [child for child in block.host.children() if child not in block.modules]
        handles = [child.register_forward_hook(follow) for child in children]
        return [*handles, block.modules[-1].register_forward_hook(leave)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with ExitStack() as stack:
            handles = [self._stream(depth) for depth in self.depths]
            for handle in [*handles, *(handle for block in self.blocks for handle in self._block(block))]:
                stack.callback(handle.remove)
            yield

    def run(self, model: nn.Module, windows: Tensor, mask: Tensor | None, start: int, end: int) -> Tensor | None:
        """One batch, from window ``start`` to before ``end``; returns which of its tokens are real."""
        ids = windows[start:end].to(self.device)
        keep = None if mask is None else mask[start:end].to(self.device).bool()
        self.shape = ids.shape
        _backbone(model)(ids, keep)
        return keep


def _rows(t: Tensor, keep: Tensor | None) -> Tensor:
    """[batch, seq_len, hidden] → real tokens [tokens, hidden] in at least float32."""
    rows = t.flatten(0, 1) if keep is None else t[keep]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def capture_stream(
    model: nn.Module,
    windows: Tensor,
    mask: Tensor | None = None,
    *,
    batch_size: int = 4,
    cached: bool = False,
    progress: bool = True,
) -> StreamStatistics:
    """Run ``windows`` through the dense ``model`` once and measure how its residual stream moves.

    These are means of numbers near 0 and 1, to choose by: a few thousand tokens settle them.

    Args:
        windows: token ids [windows, seq_len].
        mask: True (or 1) where a token is real, [windows, seq_len].
        cached: keep the result on disk, and take it from there.

    Raises:
        ValueError: windows the model cannot read, no real token, activations that are not finite, attention that cannot be
            replaced (an encoder-decoder's), layers that do more than add what their blocks give (BERT's).
    """
    check_windows(windows, model, mask)
    if not len(windows) or (mask is not None and not bool(mask.any(1).all())):
        raise ValueError("Every window needs a real token.")
    blocks = [*find_blocks(model, "attention"), *find_blocks(model)]
    if cached:
        entry = Entry("stream", "stream", model, windows, mask, batch_size)
        if (stored := entry.load()) is not None:
            per_block = [dict(zip([b.name for b in blocks], stored[n].tolist(), strict=True)) for n in ("magnitude", "rotation")]
            return StreamStatistics(int(stored["tokens"]), stored["distance"], stored["angle"], *per_block)
    depth = len(layer_lists(model)[0][2]) + 1
    recorder = _Recorder(model, range(depth), blocks)
    cosines, angles, tokens = 0, 0, 0
    moved = torch.zeros(2, len(blocks), dtype=torch.float64)  # magnitude and rotation
    starts = tqdm(range(0, len(windows), batch_size), desc="stream", unit="batch", disable=not progress, leave=False)
    with eval_mode(model), recorder(), torch.inference_mode():
        for start in starts:
            keep = recorder.run(model, windows, mask, start, start + batch_size)
            rows = torch.stack([_rows(recorder.streams[i], keep) for i in range(depth)], 1)  # [tokens, layers + 1, hidden]
            unit = nn.functional.normalize(rows, dim=-1)
            cosines = cosines + (unit @ unit.mT).double().sum(0).cpu()
            last = unit[_last_tokens(recorder.shape, keep)].double()  # [windows, layers + 1, hidden]
            angles = angles + ((last @ last.mT).clamp(-1, 1).arccos() / math.pi).sum(0).cpu()
            tokens += len(rows)
            given = torch.zeros_like(rows[:, 1:])  # by the blocks of each layer
            for i, block in enumerate(blocks):
                a = _rows(recorder.added[block.name], keep)
                given[:, block.layer] += a
                # attention reads the stream that enters the layer; what leaves the layer holds what its MLP added
                r = rows[:, block.layer] if block.kind == "attention" else rows[:, block.layer + 1] - a
                moved[0, i] += (a.norm(dim=-1) / r.norm(dim=-1).clamp_min(torch.finfo(r.dtype).tiny)).double().sum().cpu()
                moved[1, i] += (1 - torch.cosine_similarity(r, r + a, dim=-1).double()).sum().cpu()
            _check_sums(model, rows, given, torch.finfo(recorder.streams[0].dtype).eps)
    moved /= tokens
    distance, angle = (1 - cosines / tokens).fill_diagonal_(0), (angles / len(windows)).fill_diagonal_(0)
    if not all(torch.isfinite(t).all() for t in (distance, angle, moved)):
        raise ValueError("The residual stream is not finite: check the model (a half-precision overflow?) and the text.")
    if cached:
        entry.save(dict(tokens=torch.tensor(tokens), distance=distance, angle=angle, magnitude=moved[0], rotation=moved[1]))
    names = [block.name for block in blocks]
    return StreamStatistics(tokens, distance, angle, *(dict(zip(names, m.tolist(), strict=True)) for m in moved))


def _check_sums(model: nn.Module, rows: Tensor, given: Tensor, eps: float) -> None:
    """Raise ValueError unless a layer adds to the stream [tokens, layers + 1, hidden] what its blocks give, and that alone."""
    left = (rows.diff(dim=1) - given).norm(dim=(0, 2))  # [layers]
    rounding = 8 * eps * rows.norm(dim=(0, 2))[1:]
    if more := (left > 0.1 * given.norm(dim=(0, 2)) + rounding).nonzero().flatten().tolist():
        raise ValueError(
            f"Layer {more[0]} of {type(model).__name__} does more than add what its blocks give to the residual stream (scale it,"
            " or normalise the sum, as BERT does): how far a block moves the stream is not defined there."
        )


def _last_tokens(shape: torch.Size, keep: Tensor | None) -> Tensor:
    """Positions of each window's last real token among the real tokens of a batch, [batch]."""
    counts = torch.full(shape[:1], shape[1]) if keep is None else keep.sum(1)
    return counts.cumsum(0) - 1


def capture_spans(
    model: nn.Module,
    spans: Iterable[Span],
    windows: Tensor,
    mask: Tensor | None = None,
    *,
    validation_windows: int = 4,
    sample_windows: int | None = 4,
    batch_size: int = 4,
    cached: bool = False,
    progress: bool = True,
) -> dict[Span, SpanStatistics]:
    """Run ``windows`` through the dense ``model`` once and collect what stand-ins for ``spans`` of layers are fitted to.

    Arguments and errors are those of :func:`~mlpreplace.capture.capture`; a span beyond the last layer is a ValueError, too.
    Memory for a span: 4 · hidden² numbers, and 4 · hidden for every sampled token.
    """
    spans = sorted(set(spans))
    if not spans:
        return {}
    check_windows(windows, model, mask)
    n_fit = len(windows) - validation_windows
    if n_fit < 1:
        raise ValueError(f"{len(windows)} windows minus validation_windows={validation_windows} leave none to fit on.")
    sample_windows = n_fit if sample_windows is None else min(sample_windows, n_fit)
    mlps = find_blocks(model)
    if beyond := [span for span in spans if span.stop > len(mlps)]:
        raise ValueError(f"{beyond[0]} goes beyond the {len(mlps)} layers of {type(model).__name__}.")
    keys, device = {}, input_device(model)  # of the two statistics of every span
    for span in spans:
        block = mlps[span.start - 1] if span.start else None
        keys[span] = _Key(f"{span}"), block and _Key(f"MLP before {span}", block.name)
    flat_keys = [key for pair in keys.values() for key in pair if key]
    if cached:
        options = validation_windows, sample_windows, batch_size
        entry = Entry("stream", "spans", model, spans, windows, mask, *options)
        if (stored := entry.load()) is not None:
            found = _unflatten({key: device for key in flat_keys if f"{key.name}/tokens" in stored}, stored)
            return {span: SpanStatistics(found[stream], found.get(mlp)) for span, (stream, mlp) in keys.items()}
    statistics = {key: BlockStatistics() for key in flat_keys}
    before = {mlps[span.start - 1] for span in spans if span.start}
    recorder = _Recorder(model, {end for span in spans for end in (span.start, span.stop)}, before)
    parts = [("train", 0, sample_windows), (None, sample_windows, n_fit), ("validation", n_fit, len(windows))]
    batches = [(p, i, min(i + batch_size, end)) for p, start, end in parts for i in range(start, end, batch_size)]
    with eval_mode(model), recorder(), torch.inference_mode():
        for part, start, end in tqdm(batches, desc="spans", unit="batch", disable=not progress, leave=False):
            keep = recorder.run(model, windows, mask, start, end)
            for span, (stream, mlp) in keys.items():
                entering, leaving = recorder.streams[span.start], recorder.streams[span.stop]
                inputs = {stream: entering} | ({mlp: recorder.outputs[mlp.mlp]} if mlp else {})
                for key, x in inputs.items():
                    _collect(statistics[key], part, x, leaving - entering, leaving, keep)
    for _, mlp in keys.values():
        if mlp and not torch.equal(*(store[mlp.mlp] for store in (recorder.outputs, recorder.added))):
            del statistics[mlp]  # a norm stands between it and the stream (Gemma 2)
    for key, s in statistics.items():
        _finish(key, s, mask, {"train": (0, sample_windows), "validation": (n_fit, len(windows))})
    if cached:
        entry.save(_flatten(statistics))
    return {span: SpanStatistics(statistics[stream], statistics.get(mlp)) for span, (stream, mlp) in keys.items()}


@dataclass(frozen=True)
class _Key:
    """What the statistics of a span go by where a block's go by the block."""

    name: str
    mlp: str | None = None  # the block whose outputs are the inputs


def _collect(s: BlockStatistics, part: str | None, x: Tensor, y: Tensor, leaving: Tensor, keep: Tensor | None) -> None:
    if part != "validation":
        x_rows, y_rows = _rows(x, keep), _rows(y, keep)
        s.tokens += len(x_rows)
        s.sum_x, s.sum_y = _add(s.sum_x, x_rows.sum(0)), _add(s.sum_y, y_rows.sum(0))
        s.xx, s.xy = _add(s.xx, x_rows.T @ x_rows), _add(s.xy, x_rows.T @ y_rows)
    if part:
        for name, value in (("x", x), ("y", y), ("r", leaving.float().square().sum(-1))):
            s._parts.setdefault(f"{part}.{name}", []).append(value.cpu())
