"""The MLP and attention blocks of a model, and what they weigh."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .architectures import Stack
from .models import check_held
from .structure import layer_lists, submodule

KINDS = ("mlp", "attention")
ROLES = ("up", "down", "gate", "activation")  # of the modules that make the neurons of an MLP


class NotApplicable(ValueError):
    """A method that this model, or this block, is not made for: the rest of a comparison can go on without it."""


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
        """Its name, and what its architecture says of it."""
        names = {module: name for name, module in self.host.named_modules()}
        return self.name, self.kind, self.paths, [names.get(getattr(self, role)) for role in ROLES]

    @property
    def has_neurons(self) -> bool:
        """Whether the block is down(act(up x)) or down(act(gate x) * (up x)), so that neurons can be kept or dropped."""
        return None not in (self.up, self.down, self.activation)

    @property
    def holds_experts(self) -> bool:
        """Whether the block is an MLP without neurons of its own: a mixture of experts."""
        return self.kind == "mlp" and not self.has_neurons

    @property
    def intermediate_size(self) -> int:
        if not self.has_neurons:
            raise NotApplicable(f"{self.name} is no up/down MLP: it has no neurons of its own, and no intermediate size.")
        return _out_in(self.down)[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.modules[0].parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of its weights; raises ValueError where they are offloaded."""
        weights = chain.from_iterable(module.parameters() for module in (*self.modules, self.host))
        return check_held(next(weights), self.name).device

    def weights(self) -> MLPWeights:
        """Up, gate and down projection as [out, in] tensors; raises NotApplicable where the block has none."""
        if not self.has_neurons:
            raise NotApplicable(
                f"{self.name} ({self.kind}) is no up/down MLP; its neurons cannot be selected. "
                "Mean, Linear and LowRank replace any block, TwoLayerMLP a mixture of experts, too."
            )
        (up, up_bias), (down, down_bias) = _weight_bias(self.up), _weight_bias(self.down)
        gate, gate_bias = _weight_bias(self.gate) if self.gate is not None else (None, None)
        return MLPWeights(up, down, gate, up_bias, down_bias, gate_bias)


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


def find_blocks(model: nn.Module, kind: str = "mlp") -> list[Block]:
    """All blocks of one kind, "mlp" or "attention", in order of depth (encoder before decoder).

    A mixture of experts is one block without neurons of its own. Of a model that reads images, too, the blocks are those of
    its language model. Works on the dense model, also on the meta device, and on a compressed one.

    Raises ValueError for an unknown kind, an unknown architecture whose structure does not say where its blocks are either, or
    a layer without a module that its architecture should have.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of block {kind!r}; expected one of {KINDS}.")
    blocks, lists = [], layer_lists(model)
    config = model.config.get_text_config()
    for stack, path, layers in lists:
        groups = [stack.mlp] if kind == "mlp" else [(g,) if isinstance(g, str) else g for g in stack.attention]
        for index, host in enumerate(layers):
            where = f"{path}.{index}"
            for names in groups:
                modules = tuple(submodule(host, name, where, config.model_type) for name in names)
                paths = tuple(f"{where}.{name}" for name in names)
                neurons = _neurons(stack, host, modules, where, config.model_type) if kind == "mlp" else {}
                blocks.append(
                    Block(
                        name=paths[0],
                        kind=kind,
                        layer=index,
                        stack=path,
                        n_params=sum(p.numel() for p in _parameters(modules)),
                        n_active_params=_n_active(modules, config),
                        hidden_size=config.hidden_size,
                        paths=paths,
                        modules=modules,
                        host=host,
                        **dict.fromkeys(ROLES) | neurons,
                    )
                )
    return blocks


def _neurons(stack: Stack, host: nn.Module, modules: tuple[nn.Module, ...], where: str, model_type: str) -> dict[str, nn.Module]:
    """{role: module} of the neurons of an MLP; empty for a mixture of experts, and where a replacement stands in for the MLP."""
    if hasattr(modules[0], "block_name") or any(_is_mixture(module) for module in modules):
        return {}
    paths = {role: getattr(stack, role) for role in ROLES}
    return {role: submodule(host, path, where, model_type) for role, path in paths.items() if path}


def _is_mixture(mlp: nn.Module) -> bool:
    """Experts are one tensor [expert, out, in], or a list of modules."""
    return any(p.dim() == 3 for p in mlp.parameters()) or any(isinstance(m, nn.ModuleList) for m in mlp.modules())


def evenly(blocks: Sequence[Block], most: int) -> list[Block]:
    """``blocks`` at equal distances, from the first on: all of them, every second, every third …, at most ``most``.

    Raises ValueError unless 1 ≤ most.
    """
    if most < 1:
        raise ValueError(f"Expected most ≥ 1, got {most}.")
    return list(blocks[:: max(1, -(-len(blocks) // most))])


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
