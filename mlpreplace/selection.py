"""Which neurons of an MLP to keep."""

from __future__ import annotations

from torch import Tensor

from .blocks import Block
from .capture import BlockStatistics


def output_energy(block: Block, s: BlockStatistics) -> Tensor:
    """‖h_j‖²·‖W_down,j‖² of each neuron, [intermediate]: what it adds to the output on its own."""
    return s.hh.diagonal() * block.weights().down.to(s.hh).square().sum(0)


SELECTIONS = ("energy",)


def select(block: Block, s: BlockStatistics, width: int, selection: str, ridge: float, seed: int) -> Tensor:
    """Indices of the ``width`` neurons to keep, [width], ascending."""
    s.require(block, "hidden")
    return output_energy(block, s).topk(width).indices.sort().values
