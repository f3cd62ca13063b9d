"""Whole layers as something to replace, with the layer lists of a model left as they are.

A removed layer is an emptied one: its attention and its MLP give zero and its norms are passed over, so that the residual
stream goes through it unchanged. Indices of layers and of the cache stay right, whatever the architecture hands from layer
to layer. What stands in for a layer takes the place of its MLP: with the attention silent and the norms gone it is given
the residual stream itself, and what it gives is added to the stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import Block, find_blocks
from .replacements import Family, Replacement
from .structure import layer_lists


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)  # a new tensor: a layer may add into it


@dataclass(frozen=True)
class Removed(Family):
    """g(x) = 0: the block is gone. No parameters."""

    def n_params(self, block: Block) -> int:
        return 0

    def build(self, block: Block) -> nn.Module:
        return _Nothing()


@dataclass(frozen=True)
class Tuned(Family):
    """The block as it is, with weights of its own to be trained. As many parameters as the block; it saves none."""

    def n_params(self, block: Block) -> int:
        return sum(p.numel() for module in block.modules for p in module.parameters())

    def build(self, block: Block) -> nn.Module:
        modules = [copy.deepcopy(module) for module in block.modules]
        return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def find_layers(model: nn.Module) -> list[Block]:
    """Every layer but for its attention, as a block from residual stream to residual stream: its MLP, and its norms.

    Attention is a block of its own (``find_blocks(model, "attention")``). A replacement of the layer reads the residual
    stream that enters the layer only where the attention is :class:`Removed` as well, as :func:`without_layers` does it.
    ``n_params`` is that of the MLP, since norms are not counted.

    Raises:
        ValueError: an unknown architecture, an encoder-decoder, a layer that holds more than attention, MLP and norms.
    """
    stacks = layer_lists(model)
    if len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of layers; whole layers are removed from a single one."
        )
    _, path, layers = stacks[0]
    attentions, found = find_blocks(model, "attention"), []
    for mlp, host in zip(find_blocks(model), layers, strict=True):
        within = [module for block in (mlp, *attentions) if block.layer == mlp.layer for module in block.modules]
        own = {module for whole in within for module in whole.modules()}
        rest = [(name, m) for name, m in host.named_modules() if m not in own]  # BERT has norms inside of what holds its blocks
        norms = [(name, m) for name, m in rest if any(True for _ in m.parameters(recurse=False))]
        if others := [name for name, m in norms if "norm" not in type(m).__name__.lower()]:
            raise ValueError(f"{path}.{mlp.layer} holds {others[0]!r} beside attention, MLP and norms: it cannot be removed.")
        found.append(
            Block(
                name=f"{path}.{mlp.layer}",
                kind="layer",
                layer=mlp.layer,
                stack=path,
                n_params=mlp.n_params,
                n_active_params=mlp.n_active_params,
                hidden_size=mlp.hidden_size,
                paths=(*mlp.paths, *(f"{path}.{mlp.layer}.{name}" for name, _ in norms)),
                modules=(*mlp.modules, *(m for _, m in norms)),
                host=host,
                up=None,
                down=None,
                gate=None,
                activation=None,
            )
        )
    return found


def find_parts(model: nn.Module, layer: int) -> list[Block]:
    """The smallest modules that hold all weights of a layer and map one tensor to one: its MLP, its norms, and whatever has
    weights inside its attention. Each can be :class:`Tuned` where it stands, while attention itself stays as it is.

    ``n_params`` counts a norm's, too. Raises ValueError as :func:`find_layers` does.
    """
    whole, mlp = find_layers(model)[layer], find_blocks(model)[layer]
    units = {mlp.paths[0]: mlp.paths} | {path: (path,) for path in whole.paths[len(mlp.paths) :]}
    for attention in find_blocks(model, "attention"):
        if attention.layer == layer:
            for path, module in zip(attention.paths, attention.modules, strict=True):
                inside = module.named_modules(prefix=path)
                units |= {name: (name,) for name, m in inside if any(True for _ in m.parameters(recurse=False))}
    parts = []
    for name, paths in units.items():
        modules = tuple(model.get_submodule(path) for path in paths)
        n_params = sum(p.numel() for m in modules for p in m.parameters())
        about = dict(up=None, down=None, gate=None, activation=None, host=whole.host)
        block = Block(name, "part", layer, whole.stack, n_params, n_params, whole.hidden_size, paths, modules, **about)
        parts.append(block)
    return parts


def layer_blocks(model: nn.Module) -> dict[str, Block]:
    """{name: block} of all layers and of all their parts."""
    layers = find_layers(model)
    return {block.name: block for layer in layers for block in (layer, *find_parts(model, layer.layer))}


def layer_parameters(model: nn.Module) -> list[int]:
    """Parameters of attention and MLP, layer by layer: what removing a layer saves."""
    attentions: dict[int, int] = {}
    for block in find_blocks(model, "attention"):
        attentions[block.layer] = attentions.get(block.layer, 0) + block.n_params
    return [layer.n_params + attentions[layer.layer] for layer in find_layers(model)]


def without_layers(
    model: nn.Module, layers: Iterable[int], stand_ins: Mapping[int, Replacement] | None = None
) -> dict[Block, Replacement]:
    """The plan that removes ``layers``.

    Args:
        stand_ins: {layer, one of ``layers``: replacement of its block from :func:`find_layers`}, which reads the residual
            stream that enters the layer and adds to it.

    Raises:
        ValueError: a layer that the model does not have, a stand-in for a layer that stays.
    """
    layers, stand_ins = sorted(set(layers)), dict(stand_ins or {})
    found, attentions = find_layers(model), find_blocks(model, "attention")
    if unknown := [i for i in (*layers, *stand_ins) if not 0 <= i < len(found)]:
        raise ValueError(f"{type(model).__name__} has {len(found)} layers and none of number {unknown[0]}.")
    if kept := stand_ins.keys() - set(layers):
        raise ValueError(f"A stand-in for layer {min(kept)}, which is not removed.")
    plan = {block: Replacement(Removed(), block) for block in attentions if block.layer in layers}
    return plan | {found[i]: stand_ins.get(i) or Replacement(Removed(), found[i]) for i in layers}
