"""What a pass leaves of a block: second moments, and samples of input/output pairs.

Closed-form fits need the moments. They are running sums in float64, so their size depends on the block and not on the number
of tokens. Whole windows are sampled, not single tokens: a replacement that looks at earlier tokens is fitted and tested on the
same sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..models.blocks import Block
from ..replacements.records import SAMPLES

MOMENTS = {"input": "xx", "hidden": "hh", "cross": "hx"}  # and the field that tells whether one was captured
SUMS = ("sum_x", "sum_y", "sum_h", "xx", "xy", "hh", "hx")


@dataclass
class Sample:
    """Whole windows of input/output pairs of one block, in the block's dtype and in CPU memory."""

    x: Tensor  # [windows, seq_len, hidden] what enters the block (after its norm)
    y: Tensor  # [windows, seq_len, hidden] what leaves it (before the residual add)
    residual_energy: Tensor  # [windows, seq_len] squared norm of the residual stream that leaves the layer
    mask: Tensor  # [windows, seq_len] True where a token is real, False where it is padding
    h: Tensor | None = None  # [windows, seq_len, intermediate] outputs of heads, with the "hidden" moment of attention

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())

    def head(self, windows: int) -> Sample:
        """The first ``windows`` windows."""
        return self._each(lambda tensor: tensor[:windows])

    def to(self, device: torch.device) -> Sample:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Sample:
        tensors = (getattr(self, f.name) for f in fields(self))
        return Sample(*(None if tensor is None else change(tensor) for tensor in tensors))

    @property
    def left_padded(self) -> bool:
        """Whether padding comes before real tokens: a module that looks back would read it as text."""
        return bool((~self.mask[:, :-1] & self.mask[:, 1:]).any())


@dataclass
class BlockStatistics:
    """Uncentred second moments of one block over the fitting tokens, in float64, and its samples.

    Rows of X, Y and H are tokens; H is what enters the output projection: neurons, or the outputs of heads side by side, whose
    number is called intermediate here. A moment that was not asked for is None.
    """

    tokens: int = 0
    sum_x: Tensor | None = None  # [hidden]
    sum_y: Tensor | None = None  # [hidden]
    sum_h: Tensor | None = None  # [intermediate]
    xx: Tensor | None = None  # [hidden, hidden] XᵀX
    xy: Tensor | None = None  # [hidden, hidden] XᵀY
    hh: Tensor | None = None  # [intermediate, intermediate] HᵀH
    hx: Tensor | None = None  # [intermediate, hidden] HᵀX
    effect: Tensor | None = None  # [intermediate] or [parts, parts], see fisher_effects; no sum over the fitting tokens
    train: Sample | None = None  # windows that are in the moments too
    validation: Sample | None = None  # windows that are in no moment

    def to(self, device: torch.device) -> BlockStatistics:
        """A copy with all sums on ``device``; samples stay where they are."""
        return replace(self, **{name: t.to(device) for name in (*SUMS, "effect") if (t := getattr(self, name)) is not None})

    def require(self, block: Block, *moments: str) -> None:
        """Raise ValueError unless all ``moments`` were captured, from two tokens at least, and all sums are finite."""
        for moment in moments:
            if getattr(self, MOMENTS[moment]) is None:
                ask = f"capture(..., moments=({moment!r}, ...))"
                raise ValueError(f"{block.name}: the {moment!r} moment was not captured: {ask}.")
        if self.tokens < 2:
            raise ValueError(f"{block.name}: a fit needs at least 2 tokens, the statistics hold {self.tokens}.")
        if not all(torch.isfinite(t).all() for name in SUMS if (t := getattr(self, name)) is not None):
            raise ValueError(f"{block.name}: the statistics are not finite.")


Statistics = Mapping[Block, BlockStatistics]


def combine(first: Statistics, second: Statistics) -> Statistics:
    """Statistics over the tokens of both, which must not overlap: sums add up, samples are put together.

    Raises ValueError when the two are not of the same blocks and moments, their samples not of the same sequence length, or where
    one has effects.
    """
    if set(first) != set(second):
        raise ValueError("The two statistics are of different blocks.")
    both = {}
    for block, a in first.items():
        b = second[block]
        if a.effect is not None or b.effect is not None:
            raise ValueError(
                f"The statistics of {block.name} have effects, which do not add up: combine first, then with_effects."
            )
        if any((getattr(a, name) is None) != (getattr(b, name) is None) for name in SUMS):
            raise ValueError(f"The two statistics of {block.name} hold different moments.")
        sums = {name: t + getattr(b, name).to(t.device) for name in SUMS if (t := getattr(a, name)) is not None}
        samples = {part: _join(getattr(a, part), getattr(b, part), block) for part in SAMPLES}
        both[block] = BlockStatistics(a.tokens + b.tokens, **sums, **samples)
    return both


def _join(a: Sample | None, b: Sample | None, block: Block) -> Sample | None:
    if a is None or b is None:
        return a or b
    if (one := a.mask.shape[1]) != (other := b.mask.shape[1]):
        raise ValueError(f"The two samples of {block.name} are of windows of different lengths, {one} and {other} tokens.")
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(Sample))
    return Sample(*(None if one is None or other is None else torch.cat([one, other]) for one, other in pairs))
