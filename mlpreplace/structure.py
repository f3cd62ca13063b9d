"""Where the layers of a model in hand are: by the type its configuration names, checked against what the model holds.

A model that reads more than text keeps a language model inside, of a type of its own: its layers are the ones meant. A type
that nobody registered is guessed from the structure of the model, and a warning says what was taken.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import permutations, product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import ARCHITECTURES, Architecture, Stack, register_architecture
from .models import eval_mode

LINEAR = (nn.Linear, Conv1D)
SAY_WHERE = "Say where its blocks are: mlpreplace.register_architecture({!r}, Stack(...))."


def _language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) of what holds the layers: the model itself, or the language model inside."""
    nested = model.config.get_text_config().model_type
    if model.config.model_type in (nested, *ARCHITECTURES):
        return "", model
    inside = ((n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel) and m.config.model_type == nested)
    return next(inside, ("", model))


def type_of(model: nn.Module) -> str:
    """The type that says where the blocks of ``model`` are: its own, or its language model's."""
    return _language_model(model)[1].config.model_type


def _architecture(model: nn.Module) -> Architecture:
    """Where the blocks of ``model`` are, by its type; of a model around a language model, where they are in that.

    A type that is not registered is guessed from the structure of the model, with a warning, and kept as if registered: what
    is spliced later no longer has that structure.
    """
    model_type = type_of(model) if hasattr(model, "config") else None
    if model_type not in ARCHITECTURES:
        stack = _guess(model, model_type)
        warnings.warn(
            f"{model_type!r} ({type(model).__name__}) is no registered architecture. Its blocks were guessed from its structure: "
            f"{stack}. Check that; register_architecture({model_type!r}, {stack}) says the same without this warning.",
            stacklevel=2,
        )
        register_architecture(model_type, stack)
    found = ARCHITECTURES[model_type]
    return found(model.config.get_text_config()) if callable(found) else found


def layer_lists(model: nn.Module) -> list[tuple[Stack, str, nn.ModuleList]]:
    """(stack, path, layers) of every stack of the model's architecture, in order of the architecture.

    Raises ValueError for an unknown architecture whose structure leaves nothing or too much to guess, and where the model does
    not hold the lists that were registered.
    """
    stacks = _architecture(model)
    inner_path, inner = _language_model(model)
    root = f"{inner_path}." if inner_path else ""
    lists = {root + n: m for n, m in inner.named_modules() if isinstance(m, nn.ModuleList)}
    found = []
    for stack in stacks:
        named = [path for path in lists if f".{path}".endswith(f".{stack.layers}")]
        if len(named) != 1:
            apart = " A longer path tells them apart." if named else ""
            raise ValueError(
                f"{type(model).__name__} ({inner.config.model_type!r}) should hold one module list named {stack.layers!r}, found "
                f"{len(named)} among {_named(lists)}.{apart} " + SAY_WHERE.format(inner.config.model_type)
            )
        found.append((stack, named[0], lists[named[0]]))
    return found


def _named(lists: Iterable[str]) -> str:
    """Paths of module lists, those of all layers alike as one: "model.layers.*.experts"."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in lists)) or "none"


def submodule(host: nn.Module, path: str, where: str, model_type: str) -> nn.Module:
    """The module at ``path`` within a layer; raises ValueError, with what the layer ``where`` does hold, if there is none."""
    try:
        return host.get_submodule(path)
    except AttributeError:
        held = [n for n, m in host.named_modules() if n and len(n.split(".")) <= len(path.split("."))]
        raise ValueError(
            f"{where} ({type(host).__name__}) has no {path!r}, where {model_type!r} should have it; it holds {', '.join(held)}. "
            + SAY_WHERE.format(model_type)
        ) from None


def _guess(model: nn.Module, model_type: str | None) -> Stack:
    """The one list of layers with one attention module and one MLP each.

    Raises ValueError, with the known types and how to register another, unless there is exactly one.
    """
    inner = _language_model(model)[1] if model_type else model
    lists = {n: m for n, m in inner.named_modules() if isinstance(m, nn.ModuleList)}
    stacks = [stack for path, layers in lists.items() if (stack := _stack(inner, path, layers))]
    if model_type is None or len(stacks) != 1:
        raise ValueError(
            f"Unknown architecture {model_type!r} ({type(model).__name__}). Known: {', '.join(sorted(ARCHITECTURES))}. "
            "Its structure does not tell either: that takes one list of layers, each with one attention module and one MLP of two"
            f" or three linear layers, found {len(stacks)} among {_named(lists)}. " + SAY_WHERE.format(model_type)
        )
    return stacks[0]


def _stack(model: nn.Module, path: str, layers: nn.ModuleList) -> Stack | None:
    match list({(tuple(_children(layer, _is_attention)), tuple(_children(layer, _is_mlp))) for layer in layers}):
        case [((attention,), (mlp,))]:
            roles = _guess_neurons(layers[0].get_submodule(mlp), model.config.get_text_config().hidden_size)
        case _:
            roles = None
    if roles is None:
        return None
    within_base = path.removeprefix(f"{model.base_model_prefix}.")
    return Stack(within_base, (mlp,), (attention,), **{role: f"{mlp}.{name}" for role, name in roles.items()})


def _children(layer: nn.Module, is_one: Callable[[nn.Module], bool]) -> Iterator[str]:
    return (name for name, child in layer.named_children() if is_one(child))


def _is_attention(module: nn.Module) -> bool:
    return any(word in type(module).__name__.lower() for word in ("attention", "attn"))


def _is_mlp(module: nn.Module) -> bool:
    return not _is_attention(module) and len(list(_children(module, lambda child: isinstance(child, LINEAR)))) in (2, 3)


@torch.no_grad()
def _guess_neurons(mlp: nn.Module, hidden_size: int) -> dict[str, str] | None:
    """{role: child} for which down(act(up x)) or down(act(gate x) ⊙ up x) is what the module gives, {} where it never is.

    Tried on random tokens, for names say little. None where the module is no map of hidden states [..., hidden] alone, or has
    no weights to be tried with (meta device).
    """
    weight = next(mlp.parameters())
    if weight.is_meta:
        return None
    x = 4 * torch.randn(1, 16, hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)  # large: act bends there
    linear = list(_children(mlp, lambda child: isinstance(child, LINEAR)))
    others = list(_children(mlp, lambda child: not isinstance(child, LINEAR)))
    with eval_mode(mlp):
        y = _called(mlp, x)
        if y is None or y.shape != x.shape:
            return None
        errors = {}
        for activation, names in product(others, permutations(linear)):
            roles = dict(zip(("up", "down", "gate"), names, strict=False)) | {"activation": activation}
            by_hand = _called(_composed(**{role: mlp.get_submodule(name) for role, name in roles.items()}), x)
            if by_hand is not None and by_hand.shape == y.shape:
                errors[(by_hand - y).norm().item()] = roles
    return errors[min(errors)] if errors and min(errors) < 1e-2 * y.norm() else {}


def _composed(up: nn.Module, down: nn.Module, activation: nn.Module, gate: nn.Module | None = None):
    return lambda x: down(activation(up(x)) if gate is None else activation(gate(x)) * up(x))


def _called(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """What ``function`` makes of ``x`` where that is a tensor; None where it takes something else."""
    try:
        y = function(x)
    except (TypeError, RuntimeError):
        return None
    return y if isinstance(y, Tensor) else None
