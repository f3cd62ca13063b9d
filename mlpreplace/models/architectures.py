"""Where the blocks of a model are: the only file that knows names of models.

An architecture is registered under its ``config.model_type`` as one :class:`Stack` for each list of layers. What is
registered is checked against the modules of the model in hand. In a model that reads more than text, the layers are those of
the language model inside. A type that is not registered is guessed from the structure of the model, with a warning.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D, FalconLinear)  # their forward is x Wᵀ + b of their own weight and bias


@dataclass(frozen=True)
class Stack:
    """One list of layers, and the paths of the blocks within a layer.

    ``up``, ``down``, ``gate`` and ``activation`` locate the neurons of an MLP down(act(up x)) or down(act(gate x) ⊙ up x).
    Where ``gate`` and ``up`` are one module, its first half of outputs is the gate (Phi-3). Without them the block can be
    replaced but not narrowed.

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

    def __post_init__(self) -> None:
        if len({path is None for path in (self.up, self.down, self.activation)}) > 1 or (self.gate and not self.up):
            raise ValueError(f"Neurons need up, down and activation together, with or without gate; got {self}.")

    @classmethod
    def from_dict(cls, fields: dict) -> Stack:
        """The inverse of ``dataclasses.asdict``, also after json, which makes lists of tuples."""
        groups = (group if isinstance(group, str) else tuple(group) for group in fields["attention"])
        return cls(**fields | {"mlp": tuple(fields["mlp"]), "attention": tuple(groups)})


Architecture = tuple[Stack, ...]


def _ungated(layers: str, attention: str, mlp: str, up: str, down: str, activation: str) -> Architecture:
    return (Stack(layers, (mlp,), (attention,), f"{mlp}.{up}", f"{mlp}.{down}", None, f"{mlp}.{activation}"),)


def _fc(layers: str, *attention: str) -> Stack:
    return Stack(layers, ("fc1", "activation_fn", "fc2"), attention, "fc1", "fc2", None, "activation_fn")


def _bert() -> Architecture:
    up, activation, down = "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"
    attention = ("attention.self", "attention.output.dense")  # "attention" also adds the residual and normalises
    return (Stack("encoder.layer", (up, activation, down), (attention,), up, down, None, activation),)


def _t5(config: PreTrainedConfig) -> Architecture:
    up, gate = ("wi_1", "wi_0") if config.is_gated_act else ("wi", None)

    def stack(layers: str, mlp: str, *attention: str) -> Stack:
        return Stack(layers, (mlp,), attention, f"{mlp}.{up}", f"{mlp}.wo", gate and f"{mlp}.{gate}", f"{mlp}.act")

    return (
        stack("encoder.block", "layer.1.DenseReluDense", "layer.0.SelfAttention"),
        stack("decoder.block", "layer.2.DenseReluDense", "layer.0.SelfAttention", "layer.1.EncDecAttention"),
    )


_GATED = (Stack("layers", ("mlp",), ("self_attn",), "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "mlp.act_fn"),)
_FUSED = (("mlp",), ("self_attn",), "mlp.gate_up_proj", "mlp.down_proj", "mlp.gate_up_proj", "mlp.activation_fn")
_GATED_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text")
ARCHITECTURES: dict[str, Architecture | Callable[[PreTrainedConfig], Architecture]] = {
    **dict.fromkeys(_GATED_TYPES, _GATED),
    **dict.fromkeys(("phi3", "glm", "glm4", "glm4v_text"), (Stack("layers", *_FUSED),)),
    "phi4_multimodal": (Stack("model.layers", *_FUSED),),  # its encoders of images and sounds have lists of layers, too
    "gpt2": _ungated("h", "attn", "mlp", "c_fc", "c_proj", "act"),
    "gpt_neox": _ungated("layers", "attention", "mlp", "dense_h_to_4h", "dense_4h_to_h", "act"),
    "falcon": _ungated("h", "self_attention", "mlp", "dense_h_to_4h", "dense_4h_to_h", "act"),
    "phi": _ungated("layers", "self_attn", "mlp", "fc1", "fc2", "activation_fn"),
    "opt": (_fc("layers", "self_attn"),),
    **dict.fromkeys(("bert", "roberta"), _bert()),
    "distilbert": _ungated("transformer.layer", "attention", "ffn", "lin1", "lin2", "activation"),
    **dict.fromkeys(("vit", "deit"), _ungated("layers", "attention", "mlp", "fc1", "fc2", "activation_fn")),
    "t5": _t5,
    **dict.fromkeys(("bart", "marian"), (_fc("encoder.layers", "self_attn"), _fc("decoder.layers", "self_attn", "encoder_attn"))),
}


def register_architecture(model_type: str, *stacks: Stack) -> None:
    """Make an architecture known to :func:`~mlpreplace.find_blocks`, or correct it; the last call counts.

    >>> from mlpreplace import Stack, register_architecture
    >>> register_architecture("stablelm", Stack("layers", ("mlp",), ("self_attn",), "mlp.up_proj", "mlp.down_proj",
    ...                                         "mlp.gate_proj", "mlp.act_fn"))

    Args:
        model_type: the model's ``config.model_type``; ``config.text_config.model_type`` for a model that also reads images.
        stacks: one for each list of layers, encoder before decoder.

    Raises ValueError without a stack.
    """
    if not stacks:
        raise ValueError(f"register_architecture({model_type!r}) needs at least one Stack.")
    ARCHITECTURES[model_type] = stacks


def known_here() -> Callable[[], None]:
    """A function that registers in another process the architectures that are registered or were guessed in this one."""
    return partial(_register_all, dict(ARCHITECTURES))


def _register_all(architectures: dict[str, Architecture | Callable[[PreTrainedConfig], Architecture]]) -> None:
    ARCHITECTURES.update(architectures)


# Layers and modules of a model in hand

SAY_WHERE = "Say where its blocks are: mlpreplace.register_architecture({!r}, Stack(...))."


def _language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """(path, module) of the model that holds the layers: ``model`` itself, or the language model inside."""
    nested = model.config.get_text_config().model_type
    if model.config.model_type in (nested, *ARCHITECTURES):
        return "", model
    inside = ((n, m) for n, m in model.named_modules() if isinstance(m, PreTrainedModel) and m.config.model_type == nested)
    return next(inside, ("", model))


def type_of(model: nn.Module) -> str:
    """The model type under which the architecture of ``model`` is registered: its own, or that of its language model."""
    return _language_model(model)[1].config.model_type


def _architecture(model: nn.Module) -> Architecture:
    """The registered architecture of ``model``. One that was guessed is registered: a spliced model has lost the structure."""
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
    """(stack, path, layers) of every stack of the model's architecture, in its order.

    Raises ValueError for an unknown architecture that cannot be guessed, and for a model without the registered lists.
    """
    stacks = _architecture(model)
    inner_path, inner = _language_model(model)
    lists = _module_lists(inner, inner_path)
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


def _module_lists(model: nn.Module, prefix: str = "") -> dict[str, nn.ModuleList]:
    return {path: m for path, m in model.named_modules(prefix=prefix) if isinstance(m, nn.ModuleList)}


def _named(lists: Iterable[str]) -> str:
    """Paths of module lists in print; equal paths in all layers are one, "model.layers.*.experts"."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", path) for path in lists)) or "none"


def submodule(host: nn.Module, path: str, where: str, model_type: str) -> nn.Module:
    """The module at ``path`` within the layer ``host`` at ``where``. Raises ValueError, with what it holds, if there is none."""
    try:
        return host.get_submodule(path)
    except AttributeError:
        held = [n for n, m in host.named_modules() if n and len(n.split(".")) <= len(path.split("."))]
        raise ValueError(
            f"{where} ({type(host).__name__}) has no {path!r}, where {model_type!r} should have it; it holds {', '.join(held)}. "
            + SAY_WHERE.format(model_type)
        ) from None


# Guessing an architecture that is not registered


def _guess(model: nn.Module, model_type: str | None) -> Stack:
    """The one list of layers with one attention module and one MLP each. Raises ValueError unless there is exactly one."""
    inner = _language_model(model)[1] if model_type else model
    lists = _module_lists(inner)
    stacks = [stack for path, layers in lists.items() if (stack := _stack(inner, path, layers))]
    if model_type is None or len(stacks) != 1:
        raise ValueError(
            f"Unknown architecture {model_type!r} ({type(model).__name__}). Known: {', '.join(sorted(ARCHITECTURES))}. "
            "Its structure does not tell either: that takes one list of layers, each with one attention module and one MLP of two"
            f" or three linear layers, found {len(stacks)} among {_named(lists)}. " + SAY_WHERE.format(model_type)
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
