"""Narrow blocks with an output bias, which takes up the mean of what was left out (FLAP, arXiv 2312.11983).

It is there even where the block has none, and costs as many parameters as the stream is wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..models.blocks import Block
from .families import NarrowMLP
from .narrow_attention import NarrowAttention


@dataclass(frozen=True)
class NarrowPlusMean(NarrowMLP):
    """A NarrowMLP with an output bias."""

    def has_bias(self, block: Block) -> bool:
        return True

    def build(self, block: Block) -> nn.Module:
        body = super().build(block)
        body.down = nn.Linear(self.width, block.hidden_size)
        return body


@dataclass(frozen=True)
class NarrowAttentionPlusMean(NarrowAttention):
    """A NarrowAttention with an output bias."""

    biased: ClassVar[bool] = True
