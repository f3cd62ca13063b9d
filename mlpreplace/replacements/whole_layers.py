"""Families for whole layers: a removed block, a block that is trained further, one MLP shared by several layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..models.blocks import Block, find_blocks
from ..models.layers import find_layers
from .families import Family, Replacement
from .modules import mlp_like


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)  # a new tensor: a layer may add into it


@dataclass(frozen=True)
class Removed(Family):
    """g(x) = 0: the block is removed. No parameters."""

    def n_params(self, block: Block) -> int:
        return 0

    def build(self, block: Block) -> nn.Module:
        return _Nothing()


@dataclass(frozen=True)
class Tuned(Family):
    """A copy of the block, to be trained. As many parameters as the block, so it saves none."""

    keeps_precision: ClassVar[bool] = True

    def n_params(self, block: Block) -> int:
        return sum(p.numel() for module in block.modules for p in module.parameters())

    def build(self, block: Block) -> nn.Module:
        modules = [copy.deepcopy(module) for module in block.modules]
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def without_layers(
    model: nn.Module, layers: Iterable[int], stand_ins: Mapping[int, Replacement] | None = None
) -> dict[Block, Replacement]:
    """The plan that removes ``layers``.

    Args:
        stand_ins: {removed layer: replacement of its block from :func:`~mlpreplace.models.layers.find_layers`}. A stand-in reads
            the residual stream that enters the layer and adds to it.

    Raises:
        ValueError: a layer that the model does not have, a stand-in for a layer that is not removed.
    """
    layers, stand_ins = sorted(set(layers)), dict(stand_ins or {})
    found, attentions = find_layers(model), find_blocks(model, "attention")
    if unknown := [i for i in (*layers, *stand_ins) if not 0 <= i < len(found)]:
        raise ValueError(f"{type(model).__name__} has {len(found)} layers and none of number {unknown[0]}.")
    if kept := stand_ins.keys() - set(layers):
        raise ValueError(f"A stand-in for layer {min(kept)}, which is not removed.")
    plan = {block: Replacement(Removed(), block) for block in attentions if block.layer in layers}
    return plan | {found[i]: stand_ins.get(i) or Replacement(Removed(), found[i]) for i in layers}


@dataclass(frozen=True)
class Merged(Family):
    """One MLP of the block's form and size, shared by ``layers`` of a stack. Its parameters count once for all of them."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))  # from json

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """Tuned: a single block has no other to share with."""
        return Tuned()

    def n_params(self, block: Block) -> int:
        return sum(t.numel() for t in vars(block.weights()).values() if t is not None)

    def build(self, block: Block) -> nn.Module:
        return mlp_like(block, block.intermediate_size)
