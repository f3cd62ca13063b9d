"""Modules of a saved model without its tensors, first on the meta device, to be compared with the file before memory is taken."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
import transformers
from safetensors.torch import load as tensors_in
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..evaluation.int8 import Int8Linear
from ..models.blocks import Block
from ..models.checkpoints import IMPLEMENTATIONS
from ..models.loading import empty_model
from ..replacements.families import Family, Replacement
from ..replacements.records import FitReport
from ..replacements.splice import splice
from .record import json_object, named_blocks
from .tensors import tensors_of

COMPUTED = 2**28  # bytes of parameters that a checkpoint may lack: sinusoids of positions
MOST_LAYERS = 10_000  # of a configuration, before anything is compared with its weights


class _WithoutMemory(Block):
    """A block on the meta device, for the names and shapes of what replaces it."""

    device = torch.device("meta")


def class_of(name: str) -> type[PreTrainedModel]:
    """The class of transformers of that ``name``. Raises ValueError where it has none."""
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class):
        raise ValueError(f"transformers has no class {name}, so a model that holds everything could not be loaded.")
    return found


def config_of(config_class: type[PreTrainedConfig], content: bytes, file: Path) -> PreTrainedConfig:
    """The configuration in ``content``, which is that of ``file``. Raises ValueError for one that transformers does not take."""
    settings = _settings(json_object(content, file))
    if deep := _too_deep(settings):
        raise ValueError(f"{file}: {deep[0]} is {deep[1]:,}; expected at most {MOST_LAYERS:,} layers.")
    try:
        return config_class.from_dict(settings)
    except Exception as error:  # whatever transformers makes of values it does not expect
        raise ValueError(f"{file} is no {config_class.__name__}: {error}.") from error


def _settings(value):
    """``value`` of a config.json with its infinite numbers, and without names of kernels, which may be fetched from a hub."""
    if isinstance(value, list):
        return [_settings(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _settings(item) for key, item in value.items() if key not in IMPLEMENTATIONS}


def weights_of(content: bytes, file: Path) -> dict[str, Tensor]:
    """The tensors in ``content``, which is that of ``file``. Raises ValueError unless it is safetensors."""
    try:
        return tensors_in(content)
    except Exception as error:  # a type of numbers that PyTorch does not have is a KeyError
        raise ValueError(f"{file} is no safetensors file: {error!r}.") from error


def made_empty(config: PreTrainedConfig, record: dict, where: object, *, meta: bool = False) -> nn.Module:
    """The dense model of a saved one, without weights. Raises ValueError for a configuration that makes none."""
    try:
        return empty_model(class_of(record["model"]), config, dtype=getattr(torch, record["dtype"]), meta=meta)
    except Exception as error:
        raise ValueError(f"{where}: no {record['model']} can be made of its configuration ({error}).") from error


def _too_deep(settings: dict) -> tuple[str, int] | None:
    """The setting that asks for more layers than can be made in a reasonable time, also in a part of the configuration."""
    for key, value in settings.items():
        if isinstance(value, dict) and (found := _too_deep(value)):
            return found
        if str(key).endswith(("layers", "layer")) and isinstance(value, int) and value > MOST_LAYERS:
            return key, value
    return None


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of ``model`` on the meta device."""

    def shell(tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    return copy.deepcopy(model, {id(t): shell(t) for tensors in (model.parameters(), model.buffers()) for t in tensors})


def tensors_inside(model: nn.Module) -> set[str]:
    """Names of all tensors inside of replacements, tied ones included."""
    replaced = [path for path, module in model.named_modules() if isinstance(module, Replacement)]
    tensors, tied = tensors_of(model)
    return {name for name in (*tensors, *tied) if any(name.startswith(f"{path}.") for path in replaced)}


def rebuilt(model: nn.Module, record: dict, where: object, *, room: int | None = None) -> nn.Module:
    """``model`` with the replacements and int8 layers of ``record``, whose tensors are yet to be set.

    Args:
        where: the file of ``record``, for errors.
        room: numbers in the file of weights, which no replacement exceeds. Given for a ``model`` on the meta device.

    Raises:
        ValueError: a replacement that does not fit its block, or is larger than the file.
    """
    try:
        blocks = named_blocks(model, record["replacements"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    plan: dict[Block, Replacement] = {}
    for name, saved in record["replacements"].items():
        try:
            plan[blocks[name]] = _made(saved, name, blocks, plan, room)
        except Exception as error:  # whatever a family makes of values it does not expect
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{where}: the replacement of {name} cannot be made of {saved!r:.200}: {reason}") from error
    compressed = splice(model, plan)
    for path in record["int8"]:
        layer = dict(compressed.named_modules()).get(path)
        if not isinstance(layer, nn.Linear | Conv1D):
            raise ValueError(f"{where}: 'int8' names {path!r}, which is no linear layer.")
        compressed.set_submodule(path, Int8Linear(layer))
    return compressed


def _made(
    saved: dict, name: str, blocks: Mapping[str, Block], plan: Mapping[Block, Replacement], room: int | None
) -> Replacement:
    """The replacement of one block."""
    spec, block = dict(saved), blocks[name]
    report, owner = spec.pop("report"), spec.pop("body")
    family = Family.from_dict(spec)
    if room is not None:
        if (needed := family.n_params(block)) > room:
            raise ValueError(f"{family} has {needed:,} parameters, the file of weights holds {room:,} numbers")
        block = _WithoutMemory(**{field.name: getattr(block, field.name) for field in fields(block)})
    with torch.device("meta") if room is not None else nullcontext():
        replacement = Replacement(family, block)
    if owner != name:  # a block before this one, whose body it shares
        body = plan[blocks[owner]].body
        if shapes_of(body) != shapes_of(replacement.body):
            raise ValueError(f"it cannot share the module of {owner}")
        replacement.body = body
    replacement.report = FitReport.from_dict(report) if report else None
    return replacement


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def parameters_fit(model: nn.Module, files: list[Path]) -> bool:
    """Whether ``files`` are large enough for the parameters of ``model``, but for the few that an architecture computes."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    return needed <= sum(file.stat().st_size for file in files) + COMPUTED
