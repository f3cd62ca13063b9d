"""Where the MLP and attention blocks of an architecture are, and what they weigh.

An :class:`Architecture` says, per stack of layers, which submodules of a layer make up its MLP and its attention. It is
the only place that knows model names; everything else works on :class:`Block`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KINDS = ("mlp", "attention")


@dataclass(frozen=True)
class Stack:
    """One list of layers and where a layer keeps its blocks; all paths are relative to the layer.

    ``mlp`` lists the modules a token passes through, first to last: one module where the architecture has one, and
    entry projection, activation, output projection where it has not (OPT, BERT, Marian). ``gate``, ``up``, ``down`` and
    ``activation`` locate the neurons; leave them out and the block can be replaced but not narrowed.
    """

    layers: str
    mlp: tuple[str, ...]
    attention: tuple[str, ...]
    up: str | None = None
    down: str | None = None
    gate: str | None = None
    activation: str | None = None


Architecture = tuple[Stack, ...]


def _gated(layers: str = "layers", attention: tuple[str, ...] = ("self_attn",)) -> Architecture:
    return (Stack(layers, ("mlp",), attention, "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "mlp.act_fn"),)


def _ungated(layers: str, attention: str, up: str, down: str, activation: str) -> Architecture:
    return (Stack(layers, ("mlp",), (attention,), f"mlp.{up}", f"mlp.{down}", None, f"mlp.{activation}"),)


def _fc(layers: str, *attention: str) -> Stack:
    return Stack(layers, ("fc1", "activation_fn", "fc2"), attention, "fc1", "fc2", None, "activation_fn")


def _t5(layers: str, mlp: str, *attention: str) -> Stack:
    return Stack(layers, (mlp,), attention, f"{mlp}.wi", f"{mlp}.wo", None, f"{mlp}.act")


_ARCHITECTURES: dict[str, Architecture] = {
    **{name: _gated() for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")},
    "gpt2": _ungated("h", "attn", "c_fc", "c_proj", "act"),
    "gpt_neox": _ungated("layers", "attention", "dense_h_to_4h", "dense_4h_to_h", "act"),
    "falcon": _ungated("h", "self_attention", "dense_h_to_4h", "dense_4h_to_h", "act"),
    "phi": _ungated("layers", "self_attn", "fc1", "fc2", "activation_fn"),
    "vit": _ungated("layers", "attention", "fc1", "fc2", "activation_fn"),
    "opt": (_fc("layers", "self_attn"),),
    "marian": (_fc("encoder.layers", "self_attn"), _fc("decoder.layers", "self_attn", "encoder_attn")),
    "mixtral": (Stack("layers", ("mlp",), ("self_attn",)),),  # experts: one block, no neurons of its own to keep
    "bert": (
        Stack(
            "encoder.layer",
            ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
            ("attention",),
            "intermediate.dense",
            "output.dense",
            None,
            "intermediate.intermediate_act_fn",
        ),
    ),
    "t5": (
        _t5("encoder.block", "layer.1.DenseReluDense", "layer.0.SelfAttention"),
        _t5("decoder.block", "layer.2.DenseReluDense", "layer.0.SelfAttention", "layer.1.EncDecAttention"),
    ),
}


def register_architecture(model_type: str, *stacks: Stack) -> None:
    """Teach :func:`find_blocks` an architecture; ``model_type`` is the model's ``config.model_type``.

    >>> register_architecture("my_llama", Stack("layers", ("mlp",), ("self_attn",), "mlp.up_proj", "mlp.down_proj",
    ...                                         "mlp.gate_proj", "mlp.act_fn"))
    """
    if not stacks:
        raise ValueError(f"register_architecture({model_type!r}) needs at least one Stack.")
    _ARCHITECTURES[model_type] = stacks


def architecture(model: nn.Module) -> Architecture:
    """The registered architecture of ``model``; raises ValueError for an unknown ``config.model_type``."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"Unknown architecture {model_type!r} ({type(model).__name__}). Known: {', '.join(sorted(_ARCHITECTURES))}. "
            "For another one, say where its blocks are with mlpreplace.register_architecture(model_type, Stack(...))."
        )
    return _ARCHITECTURES[model_type]


@dataclass(frozen=True)
class MLPWeights:
    """The projections of an MLP in one layout, whatever the layer class: weights are [out, in]."""

    up: Tensor  # [intermediate, hidden]
    down: Tensor  # [hidden, intermediate]
    gate: Tensor | None  # [intermediate, hidden]
    up_bias: Tensor | None  # [intermediate]
    down_bias: Tensor | None  # [hidden]
    gate_bias: Tensor | None  # [intermediate]


@dataclass(frozen=True)
class Block:
    """One MLP or attention block of a model. Equal and hashed by name, so it survives reloading the model."""

    name: str  # path of the first module, "model.layers.3.mlp"
    kind: str = field(compare=False)
    layer: int = field(compare=False)  # position in its stack
    stack: str = field(compare=False)  # path of the layer list
    n_params: int = field(compare=False)  # norms not counted
    n_active_params: int = field(compare=False)  # what one token uses; smaller than n_params for a mixture of experts
    hidden_size: int = field(compare=False)
    paths: tuple[str, ...] = field(compare=False, repr=False)  # its modules, first to last, from the model's root
    modules: tuple[nn.Module, ...] = field(compare=False, repr=False)
    host: nn.Module = field(compare=False, repr=False)  # the layer it stands in
    up: nn.Module | None = field(compare=False, repr=False)
    down: nn.Module | None = field(compare=False, repr=False)
    gate: nn.Module | None = field(compare=False, repr=False)
    activation: nn.Module | None = field(compare=False, repr=False)

    def cache_key(self) -> tuple:
        return self.name, self.kind

    @property
    def has_neurons(self) -> bool:
        """Whether the block is down(act(up x)) or down(act(gate x) * (up x)), so that neurons can be kept or dropped."""
        return None not in (self.up, self.down, self.activation)

    @property
    def intermediate_size(self) -> int:
        if not self.has_neurons:
            raise ValueError(f"{self.name} is no up/down MLP: it has no intermediate size.")
        return _out_in(self.down)[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.modules[0].parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.modules[0].parameters()).device

    def weights(self) -> MLPWeights:
        """Up, gate and down projection as [out, in] tensors; raises ValueError where the block has none."""
        if not self.has_neurons:
            raise ValueError(f"{self.name} ({self.kind}) is no up/down MLP; its neurons cannot be selected.")
        (up, up_bias), (down, down_bias) = _weight_bias(self.up), _weight_bias(self.down)
        gate, gate_bias = _weight_bias(self.gate) if self.gate is not None else (None, None)
        return MLPWeights(up, down, gate, up_bias, down_bias, gate_bias)


def _find(host: nn.Module, path: str | None) -> nn.Module | None:
    try:
        return host.get_submodule(path) if path else None
    except AttributeError:  # replaced by now, or an architecture's ungated variant
        return None


def _weight_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight.detach()
    bias = getattr(layer, "bias", None)
    return (weight.T if isinstance(layer, Conv1D) else weight), (None if bias is None else bias.detach())


def _out_in(layer: nn.Module) -> tuple[int, int]:
    out_in = tuple(layer.weight.shape)
    return out_in[::-1] if isinstance(layer, Conv1D) else out_in


def _parameters(modules: tuple[nn.Module, ...]) -> Iterator[Tensor]:
    """Parameters of ``modules`` but for those of norms."""
    for module in modules:
        for child in module.modules():
            if "norm" not in type(child).__name__.lower():
                yield from child.parameters(recurse=False)


def _n_active(modules: tuple[nn.Module, ...], config) -> int:
    active = getattr(config, "num_experts_per_tok", None)
    return sum(
        p.numel() * active // p.shape[0] if p.dim() == 3 and active else p.numel()  # experts: [expert, out, in]
        for p in _parameters(modules)
    )


def layer_lists(model: nn.Module) -> list[tuple[Stack, str, nn.ModuleList]]:
    """(stack, path, layers) of every stack of the model's architecture, in order of the architecture."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = []
    for stack in architecture(model):
        named = [(n, m) for n, m in lists if n == stack.layers or n.endswith("." + stack.layers)]
        if len(named) != 1:
            raise ValueError(
                f"{type(model).__name__} should hold one module list named {stack.layers!r}, found {len(named)}; "
                "register_architecture can name it by a longer path."
            )
        found.append((stack, *named[0]))
    return found


def find_blocks(model: nn.Module, kind: str = "mlp") -> list[Block]:
    """All blocks of one kind, "mlp" or "attention", in order of depth (encoder before decoder).

    Works on the dense model, also on the meta device. Raises ValueError for an unknown kind or architecture.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of block {kind!r}; expected one of {KINDS}.")
    blocks = []
    for stack, path, layers in layer_lists(model):
        for index, host in enumerate(layers):
            groups = [stack.mlp] if kind == "mlp" else [(name,) for name in stack.attention]
            for names in groups:
                modules = tuple(host.get_submodule(name) for name in names)
                paths = tuple(f"{path}.{index}.{name}" for name in names)
                blocks.append(
                    Block(
                        name=paths[0],
                        kind=kind,
                        layer=index,
                        stack=path,
                        n_params=sum(p.numel() for p in _parameters(modules)),
                        n_active_params=_n_active(modules, model.config),
                        hidden_size=model.config.hidden_size,
                        paths=paths,
                        modules=modules,
                        host=host,
                        up=_find(host, stack.up) if kind == "mlp" else None,
                        down=_find(host, stack.down) if kind == "mlp" else None,
                        gate=_find(host, stack.gate) if kind == "mlp" else None,
                        activation=_find(host, stack.activation) if kind == "mlp" else None,
                    )
                )
    return blocks


def block_parameters(model: nn.Module) -> int:
    """Parameters of all attention and MLP blocks: what sparsity is a share of."""
    return _unseen(_parameters(_modules(model, *KINDS)), set())


def _modules(model: nn.Module, *kinds: str) -> tuple[nn.Module, ...]:
    return tuple(module for kind in kinds for block in find_blocks(model, kind) for module in block.modules)


def _unseen(parameters: Iterable[Tensor], seen: set[int]) -> int:
    """Size of those ``parameters`` that are not in ``seen``, and that are from then on: what is tied counts once."""
    new = {id(p): p.numel() for p in parameters if id(p) not in seen}
    seen.update(new)
    return sum(new.values())


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part: mlp, attention, embedding (incl. positions), head (untied), other; and total. What is tied, a head
    to the embedding or merged MLPs to one another, counts once.
    """
    seen: set[int] = set()
    parts = {kind: _unseen(_parameters(_modules(model, kind)), seen) for kind in KINDS}
    # a T5 position bias is an Embedding inside an attention block: it is counted there already
    embedding = _unseen((module.weight for module in model.modules() if isinstance(module, nn.Embedding)), seen)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    untied = 0 if head is None else _unseen([head.weight], seen)
    total = sum(p.numel() for p in model.parameters())  # parameters() yields a tied tensor once
    other = total - sum(parts.values()) - embedding - untied
    return {**parts, "embedding": embedding, "head": untied, "other": other, "total": total}
