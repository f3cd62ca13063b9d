"""How many parameters a model has, by part."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..runtime.turns import turn
from .blocks import KINDS, located, own_parameters


def block_parameters(model: nn.Module) -> int:
    """Parameters of all attention and MLP blocks: what sparsity is a share of."""
    with turn(model):
        return _count(own_parameters(_modules(model, *KINDS)), set())


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part: mlp, attention, embedding (with positions), head (untied), other; and total.

    Tied parameters count once: a head tied to the embedding, MLPs that were merged.
    """
    seen: set[int] = set()
    parts = {kind: _count(own_parameters(_modules(model, kind)), seen) for kind in KINDS}
    # the position bias of T5 is an Embedding inside an attention block, and was counted there
    embedding = _count((module.weight for module in model.modules() if isinstance(module, nn.Embedding)), seen)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    untied = 0 if head is None else _count([head.weight], seen)
    total = sum(p.numel() for p in model.parameters())  # parameters() yields a tied tensor once
    other = total - sum(parts.values()) - embedding - untied
    return {**parts, "embedding": embedding, "head": untied, "other": other, "total": total}


def _modules(model: nn.Module, *kinds: str) -> tuple[nn.Module, ...]:
    return tuple(module for kind in kinds for block in located(model, kind) for module in block.modules)


def _count(parameters: Iterable[Tensor], seen: set[int]) -> int:
    """Size of those ``parameters`` that are not in ``seen``, to which they are added."""
    new = {id(p): p.numel() for p in parameters if id(p) not in seen}
    seen.update(new)
    return sum(new.values())
