"""Measured KL divergence of choices of candidates, whose replacements are held for one layer at a time."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..evaluation.sweep import Dense, score
from ..models.forward import eval_mode
from ..models.walk import Walk
from ..replacements.splice import spliced
from ..runtime.memory import WINDOWS, halving
from ..statistics.records import Statistics
from .candidates import Choice, fitted_to


def choice_kls(
    model: nn.Module,
    choices: Mapping[Hashable, Choice],
    windows: Tensor,
    stats: Statistics | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[Hashable, float]:
    """KL(dense ‖ model with a choice in place) in nats per predicted token, {label: KL}.

    All choices go through the model side by side, one layer after another. So a family is fitted when its layer comes, once for
    all choices that take it, and dropped behind it. Choices that agree up to a layer share what ran so far.

    Args:
        choices: {label: {block: family or replacement}}.
        stats: what families are fitted to.
        batch_size: windows in one pass, 4 by default. Where memory runs out, all starts again with half as many.

    Raises ValueError for families without statistics, and an encoder-decoder.
    """
    with eval_mode(model):
        return halving(lambda size: _kls(model, choices, windows, stats, size, progress), batch_size or WINDOWS)


@torch.inference_mode()
def _kls(
    model: nn.Module, choices, windows: Tensor, stats: Statistics | None, size: int, progress: bool
) -> dict[Hashable, float]:
    batches = windows.split(size)
    start = Walk(model, batches)
    walks = {(): start} | {(label,): start for label in choices}  # (): the dense model
    for layer in tqdm(range(len(start.layers)), desc="choices", unit="layer", disable=not progress, leave=False):
        here = {run: {b: c for b, c in (choices[run[0]] if run else {}).items() if b.layer == layer} for run in walks}
        fitted = fitted_to(stats, {pair: pair[1] for of_run in here.values() for pair in of_run.items()}, samples=())
        alike: dict[tuple, list[tuple]] = {}  # runs with the same past and the same choice here
        for run, walk in walks.items():
            alike.setdefault((walk, frozenset(here[run].items())), []).append(run)
        for (walk, chosen), runs in alike.items():
            onward = walk.branch()
            with spliced(model, {pair[0]: fitted[pair] for pair in chosen}):
                for batch in range(len(batches)):
                    onward.run(batch, layer + 1)
            walks |= dict.fromkeys(runs, onward)
        del fitted  # before there are those of the next layer
    return _scored(walks, batches, windows)


def _scored(walks: Mapping[tuple, Walk], batches: Sequence[Tensor], windows: Tensor) -> dict[Hashable, float]:
    sums = {walk: 0.0 for walk in walks.values()}
    for batch, ids in enumerate(batches):
        dense = Dense(walks[()].logits(batch))
        for walk in sums:
            sums[walk] += score(walk.logits(batch), ids, dense)[1].sum().item()
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return {run[0]: sums[walk] / predicted for run, walk in walks.items() if run}
