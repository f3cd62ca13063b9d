"""The candidates of an allocation: replacements of several families and sizes, fitted to every block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from ..fitting.fit import fit_all
from ..models.blocks import Block
from ..replacements.families import Family, LowRank, Mean, NarrowMLP, NarrowPlusLinear, Replacement, ladder
from ..statistics.moments import Statistics

WIDTH_STEPS = 12  # of NarrowMLP
LINEAR_SIZES = (0.125, 0.25, 0.375, 0.5)  # of NarrowPlusLinear, shares of an MLP block's parameters
ATTENTION_SIZES = (0.05, 0.1, 0.2)  # of LowRank, shares of an attention block's parameters


def narrow_widths(block: Block, steps: int = 16) -> list[Family]:
    """NarrowMLP at ``steps`` − 1 widths, evenly spaced below the block's own; of experts, small dense MLPs of such sizes."""
    if block.opaque:
        return ladder(block, [i / steps for i in range(1, steps)], [NarrowMLP])
    widths = {round(block.intermediate_size * i / steps) for i in range(1, steps)}
    return [NarrowMLP(w) for w in sorted(widths) if w > 0]


def fit_candidates(
    stats: Statistics,
    *,
    width_steps: int = WIDTH_STEPS,
    linear_sizes: Sequence[float] = LINEAR_SIZES,
    attention_sizes: Sequence[float] = ATTENTION_SIZES,
    samples: Iterable[str] = ("validation",),
    progress: bool = True,
    **options,
) -> dict[Block, list[Replacement]]:
    """Fitted candidates for every block in ``stats``: {block: [replacements]}, MLP blocks first.

    MLP blocks get NarrowMLPs of evenly spaced widths, then NarrowPlusLinears. Attention blocks get a Mean, then LowRanks.

    Args:
        width_steps: see :func:`narrow_widths`.
        linear_sizes, attention_sizes: of NarrowPlusLinear and LowRank, shares of the block's parameters.
        samples, options: as for :func:`~mlpreplace.fitting.fit_all`.

    Raises:
        ValueError: a moment or a sample that was not captured.
    """
    narrow = {b: narrow_widths(b, width_steps) for b in stats if b.kind == "mlp"}
    families = {b: widths + ladder(b, linear_sizes, [NarrowPlusLinear]) for b, widths in narrow.items()}
    families |= {b: [Mean(), *ladder(b, attention_sizes, [LowRank])] for b in stats if b.kind == "attention"}
    bar = tqdm(families.items(), desc="fit", unit="block", disable=not progress, leave=False)
    options |= dict(samples=samples, progress=False)
    return {block: fit_all([block], stats, of_block, **options)[block] for block, of_block in bar}
