"""Fit a replacement to a block: in closed form, and trained on from there."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from tqdm import tqdm

from .blocks import Block
from .capture import Statistics
from .closed_form import RIDGE, ClosedForm, solve
from .replacements import Family, Replacement
from .reports import SAMPLES, FitReport, sample_errors


def fit(
    block: Block,
    stats: Statistics,
    family: Family,
    *,
    ridge: float = RIDGE,
    selection: str = "energy",
    seed: int = 0,
    samples: Collection[str] = SAMPLES,
) -> Replacement:
    """Fit ``family`` to ``block`` in closed form.

    Args:
        stats: from :func:`~mlpreplace.capture.capture`, with the moments the family needs.
        ridge: λ relative to the mean of the Gram matrix's diagonal; keeps fits with fewer tokens than dimensions defined.
        selection: which neurons a NarrowMLP keeps, see :func:`~mlpreplace.selection.select`.
        samples: which errors to report, "train" and "validation"; measuring them costs about as much as the fit.

    Returns:
        The replacement, in the block's dtype and on its device; ``.report`` holds its errors on the samples.

    Raises:
        ValueError: a size larger than the block, a moment that was not captured, a family that cannot take the block.
    """
    if block not in stats:
        raise ValueError(f"{block.name} is not in the statistics: capture it first.")
    start = time.perf_counter()
    replacement = Replacement(family, block)
    replacement.body.load_state_dict(solve(family, block, stats[block], ClosedForm(ridge, selection, seed)))
    seconds = time.perf_counter() - start
    errors = {}
    for name in SAMPLES:
        sample = getattr(stats[block], name) if name in samples else None
        errors[name] = None if sample is None else sample_errors(replacement, sample)
    replacement.report = FitReport(stats[block].tokens, seconds, **errors)
    return replacement


def fit_all(
    blocks: Iterable[Block],
    stats: Statistics,
    families: Iterable[Family],
    *,
    ridge: float = RIDGE,
    samples: Collection[str] = SAMPLES,
    progress: bool = True,
) -> dict[Block, list[Replacement]]:
    """Every family fitted to every block: {block: [replacement of each family]}."""
    blocks, families = list(blocks), list(families)
    bar = tqdm(total=len(blocks) * len(families), desc="fit", unit="fit", disable=not progress, leave=False)
    fitted: dict[Block, list[Replacement]] = {}
    with bar:
        for block in blocks:
            fitted[block] = []
            for family in families:
                fitted[block].append(fit(block, stats, family, ridge=ridge, samples=samples))
                bar.update()
    return fitted
