"""Whole layers as blocks, and the parts of a layer.

A removed layer stays in the model, emptied: its attention and its MLP give zero and its norms are skipped, so the residual
stream passes it unchanged. Indices of layers and of the cache stay valid, whatever an architecture hands from layer to layer.
The replacement of a layer takes the place of its MLP. With the attention silent and the norms skipped it reads the residual
stream, and its output is added to the stream.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .architectures import layer_lists
from .blocks import ROLES, Block, find_blocks, is_norm


def find_layers(model: nn.Module) -> list[Block]:
    """Every layer without its attention, as a block from residual stream to residual stream: its MLP and its norms.

    Attention is a block of its own (``find_blocks(model, "attention")``). A replacement of the layer reads the residual stream
    that enters the layer only where the attention is removed as well (:func:`~mlpreplace.replacements.without_layers`).
    ``n_params`` is that of the MLP, since norms are not counted.

    Raises:
        ValueError: an unknown architecture, an encoder-decoder, a layer that holds more than attention, MLP and norms; and all
            that :func:`~mlpreplace.find_blocks` refuses.
    """
    stacks = layer_lists(model)
    if len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of layers; whole layers are removed from a single one."
        )
    attentions, found = find_blocks(model, "attention"), []
    for mlp in find_blocks(model):
        name = f"{mlp.stack}.{mlp.layer}"
        within = [module for block in (mlp, *attentions) if block.layer == mlp.layer for module in block.modules]
        own = {module for whole in within for module in whole.modules()}
        # all of the layer and not its children alone: BERT has norms inside of the modules that hold its blocks
        norms = {path: m for path, m in _holding(mlp.host, name).items() if m not in own}
        if others := [path for path, m in norms.items() if not is_norm(m)]:
            held = others[0].removeprefix(f"{name}.")
            raise ValueError(f"{name} holds {held!r} beside attention, MLP and norms: it cannot be removed.")
        places = dict(paths=(*mlp.paths, *norms), modules=(*mlp.modules, *norms.values()))
        found.append(replace(mlp, name=name, kind="layer", **places, **dict.fromkeys(ROLES)))
    return found


def find_parts(model: nn.Module, layer: int) -> list[Block]:
    """The smallest modules that hold all weights of a layer and map one tensor to one: its MLP, its norms, and the modules
    with weights inside its attention. Each can be tuned where it is, while attention itself stays as it is.

    ``n_params`` includes norms. Raises ValueError as :func:`find_layers` does.
    """
    whole, mlp = find_layers(model)[layer], find_blocks(model)[layer]
    units = {mlp.paths[0]: mlp.paths} | {path: (path,) for path in whole.paths[len(mlp.paths) :]}
    for attention in find_blocks(model, "attention"):
        if attention.layer == layer:
            for path, module in zip(attention.paths, attention.modules, strict=True):
                units |= {name: (name,) for name in _holding(module, path)}
    parts = []
    for name, paths in units.items():
        modules = tuple(model.get_submodule(path) for path in paths)
        n_params = sum(p.numel() for m in modules for p in m.parameters())
        sizes = dict(n_params=n_params, n_active_params=n_params)
        parts.append(replace(whole, name=name, kind="part", **sizes, paths=paths, modules=modules))
    return parts


def layer_blocks(model: nn.Module) -> dict[str, Block]:
    """{name: block} of all layers and of all their parts."""
    layers = find_layers(model)
    return {block.name: block for layer in layers for block in (layer, *find_parts(model, layer.layer))}


def layer_parameters(model: nn.Module) -> list[int]:
    """Parameters of attention and MLP of each layer: what removing the layer saves."""
    layers = find_layers(model)
    of_attention = dict.fromkeys((layer.layer for layer in layers), 0)
    for block in find_blocks(model, "attention"):
        of_attention[block.layer] += block.n_params
    return [layer.n_params + of_attention[layer.layer] for layer in layers]


def _holding(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """{path: module} of all modules within ``module`` that have parameters of their own."""
    return {path: m for path, m in module.named_modules(prefix=prefix) if any(True for _ in m.parameters(recurse=False))}
