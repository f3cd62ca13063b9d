"""A model made from its configuration alone, and the tensors that fill it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from .blocks import Block, find_blocks

WIDTHS = (  # what configurations call the intermediate size
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "hidden_dim",
)


def empty_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, *, dtype: torch.dtype | None = None, meta: bool = False
) -> PreTrainedModel:
    """A model in eval mode whose weights are yet to be set; it takes no memory before they are.

    ``config.per_layer_config`` may give the MLPs of single layers a width of their own, which no modelling code of
    transformers reads yet.

    Args:
        meta: on the meta device, for names and sizes alone.

    Raises:
        ValueError: the configuration gives single layers something else than a width.
    """
    uniform = copy.deepcopy(config)
    uniform.per_layer_config = None
    with torch.device("meta") if meta else no_init_weights():
        model = model_class._from_config(uniform, dtype=dtype).eval()
    if config.is_heterogeneous:
        blocks = find_blocks(model)
        for layer, changes in config.to_dict()["per_layer_config"].items():
            if others := changes.keys() - set(WIDTHS):
                raise ValueError(f"Layer {layer} has {min(others)} of its own; only a width ({', '.join(WIDTHS)}) is read.")
            _set_width(blocks[int(layer)], max(changes.values()))
        model.config = config
    return model


def _set_width(block: Block, width: int) -> None:
    for layer in (block.up, block.gate):
        if layer is not None:
            _resize(layer, block.hidden_size, width)
    _resize(block.down, width, block.hidden_size)


def _resize(layer: nn.Linear | Conv1D, n_in: int, n_out: int) -> None:
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf, shape = n_in, n_out, (n_in, n_out)
    else:
        layer.in_features, layer.out_features, shape = n_in, n_out, (n_out, n_in)
    layer.weight = nn.Parameter(layer.weight.new_empty(shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(n_out))


def _places(model: nn.Module) -> dict[str, Tensor]:
    """All tensors by name. Buffers outside the state dict are among them: a cast model has cast ones."""
    return dict(model.named_buffers()) | model.state_dict(keep_vars=True)


def temporary_buffers(model: nn.Module) -> set[str]:
    """Names of buffers that are no part of the state dict: what the model computes from its configuration."""
    return {name for name, _ in model.named_buffers()} - model.state_dict().keys()


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({name: tensor}, {another name: name}): every tensor of ``model`` once, and what is tied to it."""
    owners: dict[int, str] = {}
    tensors, tied = {}, {}
    for name, tensor in _places(model).items():
        owner = owners.setdefault(id(tensor), name)
        if owner == name:
            tensors[name] = tensor.detach()
        else:
            tied[name] = owner
    return tensors, tied


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str] | None = None, untouched: Collection[str] = ()
) -> None:
    """Set every tensor of ``model`` but for the ``untouched`` ones: the inverse of :func:`tensors_of`.

    Raises:
        ValueError: a tensor is missing, or has no place in the model.
    """
    places = _places(model)
    for name, owner in (tied or {}).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, places[owner])
    expected = places.keys() - set(untouched) - (tied or {}).keys()
    if differing := sorted(expected ^ tensors.keys()):
        raise ValueError(f"{len(differing)} tensors are missing or have no place in the {type(model).__name__}: {differing[:3]}.")
    for name, tensor in tensors.items():
        if places[name].dtype != tensor.dtype:
            places[name].data = places[name].data.to(tensor.dtype)
    # copied, not assigned: parameters keep their layout in memory, on which the last bits of a product depend
    _, temporary = model.load_state_dict(tensors, strict=False)
    for name in temporary:
        places[name].copy_(tensors[name])
