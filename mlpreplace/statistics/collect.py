"""The pass over text behind all statistics: batches run through a model's layers, and a collector keeps what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.forward import eval_mode, run_layers, token_rows
from ..models.inputs import Batch, in_batches, is_seq2seq, items, on_device, real_tokens

Part = str | None  # "train", "validation", or None for windows that are fitted on and not sampled


class Collector:
    """What a pass is for. It knows the batch that is running: its part, its shape, and which of its tokens are real.

    Args:
        stacks: paths of the layer lists whose hidden states it reads.
    """

    def __init__(self, stacks: Iterable[str]):
        self.stacks = tuple(dict.fromkeys(stacks))
        self.part: Part = None
        self.real: dict[str, Tensor | None] = {}  # {stack: [batch, seq_len] bool}, None where all tokens are real
        self.shape: dict[str, torch.Size | None] = {}  # {stack: [batch, seq_len]}, None where only a block can tell (patches)

    def watch(self, hooks: ExitStack) -> None:
        """Enter into ``hooks`` all that see the running batch."""
        raise NotImplementedError

    def start(self, model: nn.Module, part: Part, batch: Batch) -> None:
        """Called before each batch."""
        self.part = part
        for stack in self.stacks:
            mask = real_tokens(model, stack, batch)
            self.real[stack] = None if mask is None else mask.bool()
            ids = batch.get("input_ids") if mask is None and not is_seq2seq(model) else mask
            self.shape[stack] = None if ids is None else ids.shape

    def finish(self) -> None:
        """Called after each batch."""

    def windows(self, stack: str, hidden: Tensor) -> Tensor:
        """[batch, seq_len, width], also where a layer flattens its tokens (OPT)."""
        return hidden if (shape := self.shape[stack]) is None else hidden.reshape(*shape, hidden.shape[-1])

    def rows(self, stack: str, hidden: Tensor) -> Tensor:
        """Real tokens [tokens, width] in at least float32."""
        return token_rows(self.windows(stack, hidden), self.real[stack])


AnyCollector = TypeVar("AnyCollector", bound=Collector)


def collect(
    model: nn.Module,
    batches: Iterable[tuple[Part, Batch]],
    collector: AnyCollector,
    *,
    name: str,
    progress: bool = True,
    run: Callable[[int], object] | None = None,
) -> AnyCollector:
    """Run ``batches`` through the layers of the dense ``model`` once, in eval mode and without gradients.

    Args:
        batches: (part, batch), see :func:`in_parts`.
        name: of the progress bar.
        run: runs the batch of a number through some of the layers; None runs all layers.

    Returns:
        ``collector``. No hook is left in the model, also after an exception.
    """
    with eval_mode(model), ExitStack() as hooks, torch.inference_mode():
        collector.watch(hooks)
        for number, (part, batch) in enumerate(tqdm(batches, desc=name, unit="batch", disable=not progress, leave=False)):
            batch = on_device(batch, model)
            collector.start(model, part, batch)
            run_layers(model, batch) if run is None else run(number)
            collector.finish()
    return collector


def in_parts(
    whole: Batch, batch_size: int, *, validation_windows: int = 0, sample_windows: int | None = 0
) -> list[tuple[Part, Batch]]:
    """``whole`` as (part, batch) in order: the last windows are for validation, the first of the others are sampled.

    A batch holds windows of one part only. ``sample_windows`` None samples all windows that are fitted on.

    Raises ValueError where no window is left to fit on, and for numbers of windows below 0.
    """
    windows = items(whole)
    if not all(isinstance(n, Integral) and n >= 0 for n in (validation_windows, sample_windows or 0)):
        raise ValueError(f"Expected 0 windows or more, got {validation_windows=}, {sample_windows=}.")
    if (fitted := windows - validation_windows) < 1:
        raise ValueError(f"{windows} windows minus validation_windows={validation_windows} leave none to fit on.")
    sampled = fitted if sample_windows is None else min(sample_windows, fitted)
    ranges = [("train", 0, sampled), (None, sampled, fitted), ("validation", fitted, windows)]
    parts = [(part, {name: t[start:end] for name, t in whole.items()}) for part, start, end in ranges]
    return [(part, batch) for part, of_part in parts for batch in in_batches(of_part, batch_size)]
