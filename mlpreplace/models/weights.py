"""What may be taken for the weights of a block: plain tensors of exact linear layers, each at one place of its model.

Counts, fits and exports read the ``weight`` of a layer as its map. A layer that is packed in few bits, scaled, normalised, pruned
or adapted computes something else, and a module in several places has several inputs. Both are refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .stack import LINEAR

PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)  # several weights in one number, or one in few bits
FORWARDS = [linear.forward for linear in LINEAR]
MOVING = (AlignDevicesHook, CpuOffload)  # hooks of accelerate that move tensors and change none
DENSE = "Load the model in float32, float16 or bfloat16 without quantization; to measure int8, mlpreplace.evaluation.quantized."


class Inserted(nn.Module):
    """A module of this package in the place of a model's own: a replacement, an int8 layer. What it holds is its own matter."""


@dataclass(frozen=True)
class MLPWeights:
    """The projections of an MLP in one layout for all layer classes: weights are [out, in]."""

    up: Tensor  # [intermediate, hidden]
    down: Tensor  # [hidden, intermediate]
    gate: Tensor | None  # [intermediate, hidden]
    up_bias: Tensor | None  # [intermediate]
    down_bias: Tensor | None  # [hidden]
    gate_bias: Tensor | None  # [intermediate]

    def of(self, neurons: Tensor) -> MLPWeights:
        """Those of some ``neurons``, in that order: rows of gate and up, columns of down."""
        neurons = neurons.to(self.up.device)
        rows = {name: getattr(self, name) for name in ("up", "gate", "up_bias", "gate_bias")}
        rows = {name: None if t is None else t[neurons] for name, t in rows.items()}
        return replace(self, down=self.down[:, neurons], **rows)

    def state(self) -> dict[str, Tensor]:
        """State dict of a :class:`~mlpreplace.replacements.modules.MLP` with these weights."""
        named = {f"{part}.weight": getattr(self, part) for part in ("gate", "up", "down")}
        named |= {f"{part}.bias": getattr(self, f"{part}_bias") for part in ("gate", "up", "down")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def weight_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a linear layer."""
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    return (weight.T if isinstance(layer, Conv1D) else weight), (None if bias is None else bias.detach())


# Quantized models


def check_unquantized(model: nn.Module) -> None:
    """Raise ValueError where the configuration says that weights are quantized."""
    config = getattr(model, "config", None)
    for part in filter(None, (config, config and config.get_text_config())):
        found = getattr(part, "quantization_config", None)
        own = found if isinstance(found, dict) or found is None else vars(found)
        if own and not own.get("dequantize"):  # a GGUF file that was unpacked keeps its configuration
            how = own.get("quant_method", "of an unknown method")
            how = getattr(how, "value", how)
            raise ValueError(f"{type(model).__name__} is quantized ({how}): its weights are not what it computes with. {DENSE}")


def check_plain(module: nn.Module, path: str) -> None:
    """Raise ValueError where a tensor inside of ``module`` at ``path`` is packed, quantized or spread over processes, and where
    PEFT keeps a second copy of it.
    """
    for where, inner in own_modules(module, path):
        if hasattr(inner, "original_module"):
            raise ValueError(f"{where} is {_a(inner)} around two copies: use the model that PEFT's merge_and_unload() gives.")
        if inspect.isfunction(getattr(type(inner), "weight", None)):  # of torch.ao
            raise ValueError(f"{where} is {_a(inner)}, whose weights are packed: they are no parameters. {DENSE}")
        for name, tensor in inner.named_parameters(recurse=False):
            if why := _not_plain(tensor):
                raise ValueError(f"{where}.{name} is {why} and not a plain tensor of floating-point numbers. {DENSE}")
        for name, tensor in inner.named_buffers(recurse=False):
            if tensor.dim() > 1 and tensor.dtype in PACKED:
                raise ValueError(f"{where}.{name} of {_a(inner)} is {_of(tensor)}: it holds packed weights. {DENSE}")


def _not_plain(tensor: Tensor) -> str | None:
    """What ``tensor`` is, unless it is plain. A back end that is written in Python has tensors of a class of its own."""
    own_backend = torch._C._get_privateuse1_backend_name()
    if tensor.dtype in PLAIN and (type(tensor) in (Tensor, nn.Parameter) or tensor.device.type == own_backend):
        return None
    return f"a {type(tensor).__name__} {_of(tensor)}"


def _of(tensor: Tensor) -> str:
    return f"of {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _a(module: nn.Module) -> str:
    return f"a {type(module).__module__.partition('.')[0]} {type(module).__name__}"


# Linear layers


def check_linear(layer: nn.Module, path: str, model_type: str) -> None:
    """Raise ValueError unless the projection ``layer`` of an MLP computes x Wᵀ + b with its own weight and bias."""
    if why := unlike_linear(layer):
        raise ValueError(
            f"{path} {why}: what it computes is not known from its weight. Give it a linear layer that computes the same; or, to "
            f"replace MLPs as a whole, register_architecture({model_type!r}, Stack(...)) without up, gate, down and activation."
        )


def unlike_linear(layer: nn.Module) -> str | None:
    """Why ``layer`` may compute something else than x Wᵀ + b with its own weight and bias; None where it does just that."""
    if hasattr(layer, "base_layer"):
        return f"is {_a(layer)}, an adapter (LoRA) around a layer; model.merge_and_unload() of PEFT merges the two"
    if not isinstance(layer, LINEAR):
        return f"is {_a(layer)} and no linear layer"
    if type(layer).forward not in FORWARDS:
        return f"is {_a(layer)}, a linear layer with a forward of its own"
    if "forward" in vars(layer) and not _only_moved(layer):
        return f"is {_a(layer)} whose forward was replaced"
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            return (
                f"has a {name} that is computed from other tensors (weight_norm, spectral_norm, pruning, a parametrization; "
                "parametrize.remove_parametrizations or prune.remove of torch.nn.utils makes it permanent)"
            )
    if layer.weight is None or layer.weight.dim() != 2:
        return f"has a weight of shape {None if layer.weight is None else list(layer.weight.shape)}, which is no matrix"
    return (why := _not_plain(layer.weight)) and f"has a weight that is {why}"


def _only_moved(layer: nn.Module) -> bool:
    """Whether the forward of ``layer`` was replaced by accelerate, to move what it reads and gives between devices."""
    hook = getattr(layer, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    moved = getattr(layer, "_old_forward", None)
    return all(type(one) in MOVING for one in hooks) and getattr(moved, "__func__", None) is type(layer).forward


# Places


def own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of ``module`` and all within, but for what is inserted. A module in two places comes twice."""
    if not isinstance(module, Inserted):
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from own_modules(child, f"{path}.{name}" if path else name)


def check_unshared(model: nn.Module, paths: Collection[str]) -> None:
    """Raise ValueError where a parameter of the modules at ``paths`` has another place in ``model``, too.

    Such modules read one input here and another there. Neither can be captured, replaced or counted without the other.
    """
    places: dict[int, str] = {}
    for where, module in own_modules(model):
        for name, parameter in module.named_parameters(where, recurse=False):
            first = places.setdefault(id(parameter), name)
            if first != name and any(place.startswith(f"{path}.") for place in (first, name) for path in paths):
                raise ValueError(
                    f"{first} and {name} are one tensor: one module, or one weight, is in two places of {type(model).__name__}, "
                    "and neither can be captured, replaced or counted alone. Give each place its own with copy.deepcopy, "
                    "as in layer.mlp = copy.deepcopy(layer.mlp); outputs stay the same."
                )
