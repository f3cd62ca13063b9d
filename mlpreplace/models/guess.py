"""The architecture of a model that is not registered, guessed from its structure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import permutations, product

import torch
from torch import Tensor, nn

from .stack import LINEAR, SAY_WHERE, Stack, module_lists, named


def guess(model: nn.Module, inner: nn.Module, model_type: str | None, known: Iterable[str]) -> Stack:
    """The one list of layers with one attention module and one MLP each.

    Args:
        inner: the language model in ``model``.
        known: types that are registered.

    Raises ValueError unless there is exactly one.
    """
    lists = module_lists(inner)
    stacks = [stack for path, layers in lists.items() if (stack := _stack(inner, path, layers))]
    if model_type is None or len(stacks) != 1:
        raise ValueError(
            f"Unknown architecture {model_type!r} ({type(model).__name__}). Known: {', '.join(sorted(known))}. "
            "Its structure does not tell either: that takes one list of layers, each with one attention module and one MLP of two"
            f" or three linear layers, found {len(stacks)} among {named(lists)}. " + SAY_WHERE.format(model_type)
        )
    return stacks[0]


def _stack(model: nn.Module, path: str, layers: nn.ModuleList) -> Stack | None:
    """The stack of ``layers``, or None where they are not layers of one attention module and one MLP each."""
    match list({(tuple(_children(layer, _is_attention)), tuple(_children(layer, _is_mlp))) for layer in layers}):
        case [((attention,), (mlp,))]:
            roles = _guess_neurons(layers[0].get_submodule(mlp), model.config.get_text_config().hidden_size)
            if roles is not None:
                within_base = path.removeprefix(f"{model.base_model_prefix}.")
                return Stack(within_base, (mlp,), (attention,), **{role: f"{mlp}.{name}" for role, name in roles.items()})
    return None


def _children(layer: nn.Module, is_one: Callable[[nn.Module], bool]) -> Iterator[str]:
    return (name for name, child in layer.named_children() if is_one(child))


def _is_attention(module: nn.Module) -> bool:
    return any(word in type(module).__name__.lower() for word in ("attention", "attn"))


def _is_mlp(module: nn.Module) -> bool:
    return not _is_attention(module) and len(list(_children(module, _is_linear))) in (2, 3)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LINEAR)


@torch.no_grad()
def _guess_neurons(mlp: nn.Module, hidden_size: int) -> dict[str, str] | None:
    """{role: child} for which down(act(up x)) or down(act(gate x) ⊙ up x) is the output of ``mlp``; {} where there are none.

    All assignments are tried on random tokens, since names are not reliable. None where the module does not map hidden states
    [..., hidden] alone, or has no weights to try (meta device). An activation with weights makes no neurons.
    """
    weight = next(mlp.parameters())
    if weight.is_meta:
        return None
    # large inputs, for which the activation is not linear
    x = 4 * torch.randn(1, 16, hidden_size, generator=torch.Generator().manual_seed(0)).to(weight)
    linear = list(_children(mlp, _is_linear))
    others = [n for n, m in mlp.named_children() if n not in linear and next(m.parameters(), None) is None]
    mlp = copy.deepcopy(mlp).eval()
    y = _output(mlp, x)
    if y is None or y.shape != x.shape:
        return None
    errors = {}
    fused = [(a, b, a) for a, b in permutations(linear)] if len(linear) == 2 else []
    for activation, names in product(others, [*permutations(linear), *fused]):
        roles = dict(zip(("up", "down", "gate"), names, strict=False)) | {"activation": activation}
        composed = _output(_composed(**{role: mlp.get_submodule(name) for role, name in roles.items()}), x)
        if composed is not None and composed.shape == y.shape:
            errors[(composed - y).norm().item()] = roles
    return errors[min(errors)] if errors and min(errors) < 1e-2 * y.norm() else {}


def _composed(up: nn.Module, down: nn.Module, activation: nn.Module, gate: nn.Module | None = None):
    def output(x: Tensor) -> Tensor:
        if gate is up:
            a, b = up(x).chunk(2, -1)
        else:
            a, b = (up(x), 1) if gate is None else (gate(x), up(x))
        return down(activation(a) * b)

    return output


def _output(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """``function(x)`` where that is a tensor; None where it is not, and where ``function`` takes other arguments."""
    try:
        y = function(x)
    except (TypeError, RuntimeError):
        return None
    return y if isinstance(y, Tensor) else None
