"""Write a compressed model as a plain transformers checkpoint, which needs nothing of this package to be loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .blocks import Block, find_blocks
from .cache import whole_folder
from .empty import WIDTHS, empty_model
from .layers import Removed, Tuned
from .models import no_progress_bars
from .replacements import NarrowMLP
from .saving import PLAIN, describe, load_plain, named_blocks, new_folder, tensors_inside, write_about
from .splice import replacements_of

Tensors = dict[str, Tensor]


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    metrics: Mapping[str, object] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a spliced model into a new folder as its own architecture: narrow MLPs as MLPs, without the layers that are gone.

    With MLPs of one width in all layers, ``from_pretrained`` of transformers loads it without mlpreplace. With several widths
    the configuration has them as ``per_layer_config``, which modelling code of transformers does not read yet:
    :func:`~mlpreplace.load` does. Both give the same logits as ``model``, bit for bit on the same machine. The checkpoint is
    read back, and every tensor compared, before the folder appears.

    Args:
        metrics: what was measured, anything that json can hold; for replacements.json and the model card.
        tokenizer: to be saved with the model.

    Raises:
        ValueError: nothing was spliced, or something that the architecture has no form for. It has one for :class:`NarrowMLP`,
            for :class:`Tuned`, and for layers removed whole as :func:`without_layers` does it.
        FileExistsError: ``folder`` exists.
    """
    folder = new_folder(folder)
    record = describe(model, PLAIN, metrics)
    if record["int8"]:
        raise ValueError(f"{record['int8'][0]} computes in int8; {_INSTEAD}.")
    dense = empty_model(type(model), model.config, meta=True)
    tensors, widths, gone = _unspliced(model, dense)
    inside, tensors = tensors_inside(model), _renumbered(tensors, gone)
    buffers = _renumbered({name: t for name, t in model.named_buffers() if name not in inside}, gone)
    plain = _plain(type(model), _shrunk(model.config, dense, widths, gone), tensors)
    record["widths"] = plain.config.is_heterogeneous
    with whole_folder(folder) as whole, no_progress_bars():
        # on disk some architectures have other names, which from_pretrained translates; mlpreplace.load does not
        plain.save_pretrained(whole, save_original_format=not record["widths"])
        _read_back(whole, record, buffers | tensors)
        write_about(whole, model, record, tokenizer)
    return folder


_INSTEAD = "transformers has no form for that, save(model, folder, standalone=True) writes any model for mlpreplace.load"


def _unspliced(model: nn.Module, dense: nn.Module) -> tuple[Tensors, dict[Block, int], set[str]]:
    """(tensors under the names of the architecture, widths of MLPs that changed, paths of layers that are gone)."""
    found = replacements_of(model)
    blocks = named_blocks(dense, found)
    gone = {name for name, r in found.items() if blocks[name].kind == "layer" and r.family == Removed()}
    inside = tensors_inside(model)
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in inside}
    names, widths = {module: name for name, module in dense.named_modules()}, {}
    for name, replacement in found.items():
        block, family = blocks[name], replacement.family
        host = f"{block.stack}.{block.layer}"
        if host in gone and family == Removed():  # its attention goes with it
            continue
        if isinstance(family, NarrowMLP):
            widths[block] = family.width
            tensors |= _of_narrow(block, replacement.body, names)
        elif isinstance(family, Tuned):
            bodies = [replacement.body] if len(block.paths) == 1 else replacement.body
            for path, body in zip(block.paths, bodies, strict=True):
                tensors |= {f"{path}.{key}": t for key, t in body.state_dict(keep_vars=True).items()}
        else:
            raise ValueError(f"{name} is replaced by {family}: {_INSTEAD}.")
    if unsilenced := [path for path in gone if any(b.name not in found for b in _attention(dense, path))]:
        raise ValueError(f"{min(unsilenced)} has lost its MLP and its norms but not its attention: {_INSTEAD}.")
    return tensors, widths, gone


def _attention(dense: nn.Module, host: str) -> list[Block]:
    return [block for block in find_blocks(dense, "attention") if f"{block.stack}.{block.layer}" == host]


def _of_narrow(block: Block, body: nn.Module, names: Mapping[nn.Module, str]) -> Tensors:
    tensors = {}
    for own, layer in ((block.gate, body.gate), (block.up, body.up), (block.down, body.down)):
        if own is not None:
            tensors[f"{names[own]}.weight"] = nn.Parameter(layer.weight.T, False) if isinstance(own, Conv1D) else layer.weight
            if layer.bias is not None:
                tensors[f"{names[own]}.bias"] = layer.bias
    return tensors


def _renumbered(tensors: Tensors, gone: set[str]) -> Tensors:
    """Without the tensors of layers that are ``gone``; those behind them move up."""
    if not gone:
        return tensors
    stack = next(iter(gone)).rpartition(".")[0]
    removed, kept = {int(path.rpartition(".")[2]) for path in gone}, {}
    for name, tensor in tensors.items():
        if name.startswith(f"{stack}."):
            index, _, rest = name.removeprefix(f"{stack}.").partition(".")
            if int(index) in removed:
                continue
            name = f"{stack}.{int(index) - sum(i < int(index) for i in removed)}.{rest}"
        kept[name] = tensor
    return kept


def _shrunk(config: PreTrainedConfig, dense: nn.Module, widths: Mapping[Block, int], gone: set[str]) -> PreTrainedConfig:
    """The configuration with fewer layers and narrower MLPs."""
    own = config.to_dict()
    config = copy.deepcopy(config)
    config.per_layer_config = None
    mlps = [block for block in find_blocks(dense) if f"{block.stack}.{block.layer}" not in gone]
    if gone:
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise ValueError(f"Attention of this {type(dense).__name__} depends on the number of its layer: {_INSTEAD}.")
        layers, removed = config.num_hidden_layers, {int(path.rpartition(".")[2]) for path in gone}
        for key, value in own.items():  # layer_types, for one
            if isinstance(value, list) and len(value) == layers and "layer" in key:
                setattr(config, key, [item for i, item in enumerate(value) if i not in removed])
        config.num_hidden_layers = layers - len(removed)
    each = [widths.get(block, block.intermediate_size) if block.has_neurons else None for block in mlps]
    keys = [key for key in WIDTHS if key in own]
    if widths and not keys:
        raise ValueError(f"The configuration of a {type(dense).__name__} has no width of MLPs: {_INSTEAD}.")
    if len(set(each)) > 1:
        if len({block.stack for block in mlps}) > 1:
            raise ValueError(f"MLPs of several widths in an encoder and a decoder: {_INSTEAD}.")
        config.per_layer_config = {i: dict.fromkeys(keys, width) for i, width in enumerate(each)}
    elif each[0] is not None:
        for key in keys:
            setattr(config, key, each[0])
    return config


def _plain(model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Tensors) -> PreTrainedModel:
    """The model of ``config`` with ``tensors``, which are exactly its own."""
    plain = empty_model(model_class, config, meta=True)
    shapes = {name: t.shape for name, t in plain.state_dict().items()}
    if differing := sorted(k for k in shapes.keys() | tensors.keys() if k not in tensors or shapes.get(k) != tensors[k].shape):
        raise ValueError(f"A {model_class.__name__} of the narrower configuration has another {differing[0]}: {_INSTEAD}.")
    if len(kinds := {t.dtype for t in tensors.values() if t.is_floating_point()}) > 1:
        raise ValueError(f"A checkpoint is loaded in one precision, this model is in {sorted(map(str, kinds))}: {_INSTEAD}.")
    plain.load_state_dict(tensors, assign=True)
    return plain


def _read_back(whole: Path, record: dict, expected: Tensors) -> None:
    """Raise ValueError unless what was written is what is loaded: it leaves out what an architecture is said to know."""
    plain = load_plain(whole, record)
    found = dict(plain.named_buffers()) | plain.state_dict()
    if lost := [name for name, t in expected.items() if name not in found or not torch.equal(found[name], t.detach().cpu())]:
        raise ValueError(
            f"{lost[0]} does not come back as it was from a checkpoint of a {record['model']} (was it cast? then load the base "
            f"in that precision): {_INSTEAD}."
        )
