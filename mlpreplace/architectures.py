"""Which modules of which architecture are its MLP and attention blocks: the only place that knows model names.

An :class:`Architecture` says so, stack by stack, and goes by ``config.model_type``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Stack:
    """One list of layers and where a layer keeps its blocks; all paths are relative to the layer.

    ``mlp`` lists the modules a token passes through, first to last: one module where the architecture has one, and entry
    projection, activation, output projection where it has not (OPT, BERT, BART). ``attention`` lists attention blocks, each a
    path or, likewise, the paths from first to last (BERT); two of them make a layer that reads another stack as well.
    ``gate``, ``up``, ``down`` and ``activation`` locate the neurons of an MLP down(act(up x)) or down(act(gate x) ⊙ up x);
    leave them out and the block can be replaced but not narrowed.

    Raises ValueError where some of ``up``, ``down`` and ``activation`` are given and others are not.
    """

    layers: str
    mlp: tuple[str, ...]
    attention: tuple[str | tuple[str, ...], ...]
    up: str | None = None
    down: str | None = None
    gate: str | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        if len({path is None for path in (self.up, self.down, self.activation)}) > 1 or (self.gate and not self.up):
            raise ValueError(f"Neurons need up, down and activation together, with or without gate; got {self}.")

    @classmethod
    def from_dict(cls, fields: dict) -> Stack:
        """The inverse of ``dataclasses.asdict``, also after json, which knows no tuples."""
        groups = (group if isinstance(group, str) else tuple(group) for group in fields["attention"])
        return cls(**fields | {"mlp": tuple(fields["mlp"]), "attention": tuple(groups)})


Architecture = tuple[Stack, ...]


def _gated() -> Architecture:
    return (Stack("layers", ("mlp",), ("self_attn",), "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "mlp.act_fn"),)


def _ungated(layers: str, attention: str, mlp: str, up: str, down: str, activation: str) -> Architecture:
    return (Stack(layers, (mlp,), (attention,), f"{mlp}.{up}", f"{mlp}.{down}", None, f"{mlp}.{activation}"),)


def _fc(layers: str, *attention: str) -> Stack:
    return Stack(layers, ("fc1", "activation_fn", "fc2"), attention, "fc1", "fc2", None, "activation_fn")


def _bert() -> Architecture:
    up, activation, down = "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"
    attention = ("attention.self", "attention.output.dense")  # "attention" itself adds the residual and normalises
    return (Stack("encoder.layer", (up, activation, down), (attention,), up, down, None, activation),)


def _t5(config: PreTrainedConfig) -> Architecture:
    up, gate = ("wi_1", "wi_0") if config.is_gated_act else ("wi", None)

    def stack(layers: str, mlp: str, *attention: str) -> Stack:
        return Stack(layers, (mlp,), attention, f"{mlp}.{up}", f"{mlp}.wo", gate and f"{mlp}.{gate}", f"{mlp}.act")

    return (
        stack("encoder.block", "layer.1.DenseReluDense", "layer.0.SelfAttention"),
        stack("decoder.block", "layer.2.DenseReluDense", "layer.0.SelfAttention", "layer.1.EncDecAttention"),
    )


_GATED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text")

ARCHITECTURES: dict[str, Architecture | Callable[[PreTrainedConfig], Architecture]] = {
    **dict.fromkeys(_GATED, _gated()),
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
    """Teach :func:`~mlpreplace.blocks.find_blocks` an architecture, or correct one; the last call counts.

    >>> from mlpreplace import Stack, register_architecture
    >>> register_architecture("stablelm", Stack("layers", ("mlp",), ("self_attn",), "mlp.up_proj", "mlp.down_proj",
    ...                                         "mlp.gate_proj", "mlp.act_fn"))

    Args:
        model_type: the model's ``config.model_type``; of a model that reads images as well, ``config.text_config.model_type``.
        stacks: one for each list of layers, encoder before decoder.

    Raises ValueError without a stack.
    """
    if not stacks:
        raise ValueError(f"register_architecture({model_type!r}) needs at least one Stack.")
    ARCHITECTURES[model_type] = stacks
