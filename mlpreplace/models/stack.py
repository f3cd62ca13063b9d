"""Where the blocks of one list of layers are, and the linear layers that they are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D, FalconLinear)  # their forward is x Wᵀ + b of their own weight and bias

SAY_WHERE = "Say where its blocks are: mlpreplace.register_architecture({!r}, Stack(...))."


@dataclass(frozen=True)
class Heads:
    """The projections of an attention block: paths within a layer.

    Where queries, keys and values are made by one module, their paths are the same, and ``layout`` says in which order its
    outputs lie: "stacked" is all queries, all keys, all values (GPT-2); "grouped" is, for each key-value head, its queries, its
    key and its value (GPT-NeoX, Falcon).

    Raises ValueError for an unknown layout, and one that does not fit the paths.
    """

    query: str
    key: str
    value: str
    output: str
    layout: str = "separate"
    norms: tuple[str, str] | None = None  # of the queries and the keys of each head, where the layer has them
    softcap: str | None = None  # attribute of the attention module: a limit of its scores

    def __post_init__(self) -> None:
        fused = self.query == self.key == self.value
        if self.layout not in ("separate", "stacked", "grouped") or fused != (self.layout != "separate"):
            raise ValueError(f'Expected layout "separate" for three paths, "stacked" or "grouped" for one; got {self}.')


@dataclass(frozen=True)
class Stack:
    """One list of layers, and the paths of the blocks within a layer.

    ``up``, ``down``, ``gate`` and ``activation`` locate the neurons of an MLP down(act(up x)) or down(act(gate x) ⊙ up x).
    Where ``gate`` and ``up`` are one module, its first half of outputs is the gate (Phi-3). Without them the block can be
    replaced but not narrowed.

    ``heads`` locates the projections of its self-attention. Without them attention can be replaced but not narrowed.

    Raises ValueError where some of ``up``, ``down`` and ``activation`` are given and others are not.
    """

    layers: str  # path of the list, or its end
    mlp: tuple[str, ...]  # the MLP module; its modules from first to last where it is no module (OPT, BERT, BART)
    attention: tuple[
        str | tuple[str, ...], ...
    ]  # blocks, each a path or paths from first to last (BERT); two with cross-attention
    up: str | None = None
    down: str | None = None
    gate: str | None = None
    activation: str | None = None
    heads: Heads | None = None

    def __post_init__(self) -> None:
        if len({path is None for path in (self.up, self.down, self.activation)}) > 1 or (self.gate and not self.up):
            raise ValueError(f"Neurons need up, down and activation together, with or without gate; got {self}.")

    @classmethod
    def from_dict(cls, fields: dict) -> Stack:
        """The inverse of ``dataclasses.asdict``, also after json, which makes lists of tuples."""
        groups = (group if isinstance(group, str) else tuple(group) for group in fields["attention"])
        heads = fields.get("heads")
        heads = heads and Heads(**heads | {"norms": heads["norms"] and tuple(heads["norms"])})
        return cls(**fields | {"mlp": tuple(fields["mlp"]), "attention": tuple(groups), "heads": heads})


def module_lists(model: nn.Module, prefix: str = "") -> dict[str, nn.ModuleList]:
    return {path: m for path, m in model.named_modules(prefix=prefix) if isinstance(m, nn.ModuleList)}


def named(lists: Iterable[str]) -> str:
    """Paths of module lists in print; equal paths in all layers are one, "model.layers.*.experts"."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in lists)) or "none"
