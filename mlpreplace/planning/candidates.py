"""The candidates of an allocation: for every block, families at sizes, which are fitted when they are needed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from ..fitting.candidate_errors import Candidate
from ..fitting.fit import fit
from ..models.blocks import Block
from ..replacements.families import Family, LowRank, Mean, NarrowMLP, NarrowPlusLinear, Replacement, ladder
from ..replacements.narrow_attention import NarrowAttention
from ..replacements.splice import Plan
from ..statistics.groups import by_group
from ..statistics.records import Statistics

Candidates = Mapping[Block, Sequence[Candidate]]
Choice = Mapping[Block, Candidate]  # one for each block that is replaced
WIDTH_STEPS = 24  # of NarrowMLP
LINEAR_SIZES = (0.125, 0.25, 0.375, 0.5)  # of NarrowPlusLinear, shares of an MLP block's parameters
ATTENTION_SIZES = (0.05, 0.1, 0.2)  # of LowRank, shares of an attention block's parameters


def narrow_widths(block: Block, steps: int = 16) -> list[Family]:
    """NarrowMLP at ``steps`` − 1 widths, evenly spaced below the block's own; of experts, small dense MLPs of such sizes."""
    if block.opaque:
        return ladder(block, [i / steps for i in range(1, steps)], [NarrowMLP])
    widths = {round(block.intermediate_size * i / steps) for i in range(1, steps)}
    return [NarrowMLP(w) for w in sorted(widths) if w > 0]


def candidate_families(
    blocks: Iterable[Block],
    *,
    width_steps: int = WIDTH_STEPS,
    linear_sizes: Sequence[float] = LINEAR_SIZES,
    attention_sizes: Sequence[float] = ATTENTION_SIZES,
) -> dict[Block, list[Family]]:
    """Families for every one of ``blocks``: {block: [family at a size]}. Nothing is fitted.

    MLP blocks get NarrowMLPs of evenly spaced widths, then NarrowPlusLinears. Attention blocks get a Mean, then LowRanks, then,
    where their heads are known, all :meth:`~mlpreplace.replacements.NarrowAttention.sizes`.

    Args:
        width_steps: see :func:`narrow_widths`.
        linear_sizes, attention_sizes: of NarrowPlusLinear and LowRank, shares of the block's parameters.
    """

    def of(block: Block) -> list[Family]:
        if block.kind == "mlp":
            return narrow_widths(block, width_steps) + ladder(block, linear_sizes, [NarrowPlusLinear])
        narrow = [] if block.heads is None else NarrowAttention.sizes(block)
        return [Mean(), *ladder(block, attention_sizes, [LowRank]), *narrow]

    return {block: of(block) for block in blocks}


def parameters_of(candidate: Candidate, block: Block) -> int:
    """Parameters of a candidate for ``block``."""
    return candidate.n_params(block) if isinstance(candidate, Family) else candidate.n_params


def savings_of(candidates: Candidates) -> dict[Block, list[int]]:
    """{block: parameters that each of its candidates saves}"""
    return {block: [block.n_params - parameters_of(c, block) for c in of_block] for block, of_block in candidates.items()}


def check_captured(stats: Statistics | None, candidates: Candidates) -> None:
    """Raise ValueError for blocks with families among their candidates that cannot be fitted: they were not captured."""
    asked = [block for block, of_block in candidates.items() if any(isinstance(c, Family) for c in of_block)]
    if missing := [block.name for block in asked if stats is None or block not in stats]:
        raise ValueError(f"Not in the statistics: {', '.join(missing)}. Families are fitted to stats=capture(...).")


def fitted_to(
    stats: Statistics | None, chosen: Mapping[tuple[Block, Hashable], Candidate], **options
) -> dict[tuple[Block, Hashable], Replacement]:
    """Candidates as replacements: families are fitted, what was fitted already stays the same object.

    Args:
        stats: what families are fitted to; they are asked for in an order that costs one pass.
        chosen: {(block, anything): candidate}.
        options: those of :func:`~mlpreplace.fitting.fit`.

    Raises ValueError for families of blocks that were not captured, and what ``fit`` raises.
    """
    families: dict[Block, dict[Hashable, Family]] = {}
    for (block, key), candidate in chosen.items():
        if isinstance(candidate, Family):
            families.setdefault(block, {})[key] = candidate
    check_captured(stats, {block: list(of_block.values()) for block, of_block in families.items()})
    found = {pair: candidate for pair, candidate in chosen.items() if isinstance(candidate, Replacement)}
    for group in by_group(stats, families):
        for block in group:
            for key, family in families[block].items():
                found[block, key] = fit(block, stats, family, **options)
    return {pair: found[pair] for pair in chosen}


def fitted_plan(stats: Statistics | None, choice: Choice, **options) -> Plan:
    """A choice as a plan. Arguments and errors are those of :func:`fitted_to`."""
    fitted = fitted_to(stats, {(block, None): candidate for block, candidate in choice.items()}, **options)
    return {block: replacement for (block, _), replacement in fitted.items()}
