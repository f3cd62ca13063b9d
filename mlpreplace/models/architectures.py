"""Where the blocks of a model are: the only file that knows names of models.

An architecture is registered under its ``config.model_type`` as one :class:`Stack` for each list of layers. What is
registered is checked against the modules of the model in hand. In a model that reads more than text, the layers are those of
the language model inside. A type that is not registered is guessed from the structure of the model, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .guess import guess
from .stack import SAY_WHERE, Heads, Stack, module_lists, named

Architecture = tuple[Stack, ...]


def _heads(attention: str, *names: str, **options) -> Heads:
    """Four ``names`` are those of query, key, value and output; two are those of a fused projection and of output."""
    names = names if len(names) == 4 else (names[0],) * 3 + names[1:]
    return Heads(*(f"{attention}.{name}" for name in names), **options)


def _ungated(layers: str, attention: str, mlp: str, up: str, down: str, activation: str, heads: Heads) -> Architecture:
    return (Stack(layers, (mlp,), (attention,), f"{mlp}.{up}", f"{mlp}.{down}", None, f"{mlp}.{activation}", heads),)


def _fc(layers: str, *attention: str, heads: Heads | None = None) -> Stack:
    return Stack(layers, ("fc1", "activation_fn", "fc2"), attention, "fc1", "fc2", None, "activation_fn", heads)


def _bert() -> Architecture:
    up, activation, down = "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"
    attention = ("attention.self", "attention.output.dense")  # "attention" also adds the residual and normalises
    heads = _heads("attention", "self.query", "self.key", "self.value", "output.dense")
    return (Stack("encoder.layer", (up, activation, down), (attention,), up, down, None, activation, heads),)


def _t5(config: PreTrainedConfig) -> Architecture:
    up, gate = ("wi_1", "wi_0") if config.is_gated_act else ("wi", None)

    def stack(layers: str, mlp: str, *attention: str) -> Stack:
        return Stack(layers, (mlp,), attention, f"{mlp}.{up}", f"{mlp}.wo", gate and f"{mlp}.{gate}", f"{mlp}.act")

    return (
        stack("encoder.block", "layer.1.DenseReluDense", "layer.0.SelfAttention"),
        stack("decoder.block", "layer.2.DenseReluDense", "layer.0.SelfAttention", "layer.1.EncDecAttention"),
    )


def _falcon(config: PreTrainedConfig) -> Architecture:
    heads = None if config.alibi else _heads("self_attention", "query_key_value", "dense", layout="grouped")
    return _ungated("h", "self_attention", "mlp", "dense_h_to_4h", "dense_4h_to_h", "act", heads)


def _gpt2(config: PreTrainedConfig) -> Architecture:
    heads = None if config.reorder_and_upcast_attn else _heads("attn", "c_attn", "c_proj", layout="stacked")
    return _ungated("h", "attn", "mlp", "c_fc", "c_proj", "act", heads)


def _gated(heads: Heads) -> Architecture:
    return (Stack("layers", ("mlp",), ("self_attn",), "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "mlp.act_fn", heads),)


def _fused(heads: Heads | None, layers: str = "layers") -> Architecture:
    gate_and_up = "mlp.gate_up_proj"
    return (Stack(layers, ("mlp",), ("self_attn",), gate_and_up, "mlp.down_proj", gate_and_up, "mlp.activation_fn", heads),)


_QKVO = _heads("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_NORMED = replace(_QKVO, norms=("self_attn.q_norm", "self_attn.k_norm"))
_QKV = _heads("self_attn", "qkv_proj", "o_proj", layout="stacked")
_VIT = _heads("attention", "q_proj", "k_proj", "v_proj", "o_proj")
ARCHITECTURES: dict[str, Architecture | Callable[[PreTrainedConfig], Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma"), _gated(_QKVO)),
    **dict.fromkeys(("qwen3", "qwen3_moe", "gemma3_text"), _gated(_NORMED)),
    "gemma2": _gated(replace(_QKVO, softcap="attn_logit_softcapping")),
    "phi3": _fused(_QKV),
    **dict.fromkeys(("glm", "glm4"), _fused(_QKVO)),
    "glm4v_text": _fused(None),  # its positions have three axes
    "phi4_multimodal": _fused(_QKV, "model.layers"),  # its encoders of images and sounds have lists of layers, too
    "gpt2": _gpt2,
    "gpt_neox": _ungated(
        *("layers", "attention", "mlp", "dense_h_to_4h", "dense_4h_to_h", "act"),
        _heads("attention", "query_key_value", "dense", layout="grouped"),
    ),
    "falcon": _falcon,
    "phi": _ungated(
        *("layers", "self_attn", "mlp", "fc1", "fc2", "activation_fn"),
        replace(
            _heads("self_attn", "q_proj", "k_proj", "v_proj", "dense"), norms=("self_attn.q_layernorm", "self_attn.k_layernorm")
        ),
    ),
    "opt": (_fc("layers", "self_attn", heads=_heads("self_attn", "q_proj", "k_proj", "v_proj", "out_proj")),),
    **dict.fromkeys(("bert", "roberta"), _bert()),
    "distilbert": _ungated(
        *("transformer.layer", "attention", "ffn", "lin1", "lin2", "activation"),
        _heads("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
    ),
    **dict.fromkeys(("vit", "deit"), _ungated("layers", "attention", "mlp", "fc1", "fc2", "activation_fn", _VIT)),
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
        stack = guess(model, _language_model(model)[1] if model_type else model, model_type, ARCHITECTURES)
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
    lists = module_lists(inner, inner_path)
    found = []
    for stack in stacks:
        found_at = [path for path in lists if f".{path}".endswith(f".{stack.layers}")]
        if len(found_at) != 1:
            apart = " A longer path tells them apart." if found_at else ""
            raise ValueError(
                f"{type(model).__name__} ({inner.config.model_type!r}) should hold one module list named {stack.layers!r}, found "
                f"{len(found_at)} among {named(lists)}.{apart} " + SAY_WHERE.format(inner.config.model_type)
            )
        found.append((stack, found_at[0], lists[found_at[0]]))
    return found


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
