"""The MLP and attention blocks of a model, its whole layers as blocks, and their parameters.

A removed layer stays in the model, emptied: its attention and its MLP give zero and its norms are skipped, so the residual
stream passes it unchanged. Indices of layers and of the cache stay valid, whatever an architecture hands from layer to layer.
The replacement of a layer takes the place of its MLP. With the attention silent and the norms skipped it reads the residual
stream, and its output is added to the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .architectures import Stack, layer_lists, submodule

KINDS = ("mlp", "attention")
ROLES = ("up", "down", "gate", "activation")  # of the modules that make the neurons of an MLP


class NotApplicable(ValueError):
    """A method does not apply to this model or this block. The rest of a comparison can go on without it."""


@dataclass(frozen=True)
class MLPWeights:
    """The projections of an MLP in one layout for all layer classes: weights are [out, in]."""

    up: Tensor  # [intermediate, hidden]
    down: Tensor  # [hidden, intermediate]
    gate: Tensor | None  # [intermediate, hidden]
    up_bias: Tensor | None  # [intermediate]
    down_bias: Tensor | None  # [hidden]
    gate_bias: Tensor | None  # [intermediate]


@dataclass(frozen=True)
class Block:
    """One MLP or attention block of a model. Equal and hashed by name, so that it survives reloading the model."""

    name: str  # path of the first module, "model.layers.3.mlp"
    kind: str = field(compare=False)  # "mlp", "attention"; "layer" of find_layers, "part" of find_parts
    layer: int = field(compare=False)  # position in its stack
    stack: str = field(compare=False)  # path of the layer list
    n_params: int = field(compare=False)  # norms not counted
    n_active_params: int = field(compare=False)  # used by one token; fewer than n_params in a mixture of experts
    hidden_size: int = field(compare=False)
    paths: tuple[str, ...] = field(compare=False, repr=False)  # of its modules, first to last, from the model's root
    modules: tuple[nn.Module, ...] = field(compare=False, repr=False)
    host: nn.Module = field(compare=False, repr=False)  # the layer it is in
    up: nn.Module | None = field(default=None, compare=False, repr=False)
    down: nn.Module | None = field(default=None, compare=False, repr=False)
    gate: nn.Module | None = field(default=None, compare=False, repr=False)
    activation: nn.Module | None = field(default=None, compare=False, repr=False)

    def cache_key(self) -> tuple:
        """Its name, and where its architecture finds its modules."""
        names = {module: name for name, module in self.host.named_modules()}
        return self.name, self.kind, self.paths, [names.get(getattr(self, role)) for role in ROLES]

    @property
    def has_neurons(self) -> bool:
        """Whether the block is down(act(up x)) or down(act(gate x) ⊙ up x), so that neurons can be kept or dropped."""
        return None not in (self.up, self.down, self.activation)

    @property
    def holds_experts(self) -> bool:
        """Whether the block is an MLP without neurons of its own: a mixture of experts."""
        return self.kind == "mlp" and not self.has_neurons

    @property
    def intermediate_size(self) -> int:
        if not self.has_neurons:
            raise NotApplicable(f"{self.name} is no up/down MLP: it has no neurons of its own, and no intermediate size.")
        return _weight_bias(self.down)[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.modules[0].parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of its weights. Raises ValueError where they are offloaded."""
        weights = chain.from_iterable(module.parameters() for module in (*self.modules, self.host))
        return check_held(next(weights), self.name).device

    def weights(self) -> MLPWeights:
        """Up, gate and down projection as [out, in] tensors. Raises NotApplicable where the block has none."""
        if not self.has_neurons:
            raise NotApplicable(
                f"{self.name} ({self.kind}) is no up/down MLP; its neurons cannot be selected. "
                "Mean, Linear and LowRank replace any block, TwoLayerMLP a mixture of experts, too."
            )
        (up, up_bias), (down, down_bias) = _weight_bias(self.up), _weight_bias(self.down)
        gate, gate_bias = _weight_bias(self.gate) if self.gate is not None else (None, None)
        return MLPWeights(up, down, gate, up_bias, down_bias, gate_bias)


def _weight_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out]."""
    weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
    return (weight.T if isinstance(layer, Conv1D) else weight), (None if bias is None else bias.detach())


def check_held(weight: Tensor, whose: str) -> Tensor:
    """``weight``; raises ValueError where it has no content here: it is offloaded, or was never loaded."""
    if weight.device.type == "meta":
        raise ValueError(
            f"Weights of {whose} are not on any device (offloaded to the CPU or to disk?). They are needed where they compute: "
            'take more or larger GPUs with device="balanced", dtype=torch.bfloat16, or device="cpu".'
        )
    return weight


def find_blocks(model: nn.Module, kind: str = "mlp") -> list[Block]:
    """All blocks of one kind, "mlp" or "attention", in order of depth (encoder before decoder).

    A mixture of experts is one block without neurons of its own. In a model that also reads images, blocks are those of its
    language model. Works on dense and compressed models, also on the meta device.

    Raises ValueError for an unknown kind, for an unknown architecture whose structure does not show where its blocks are, and
    for a layer without a module that its architecture should have.
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
                sizes = dict(
                    n_params=sum(p.numel() for p in _parameters(modules)),
                    n_active_params=_n_active(modules, getattr(config, "num_experts_per_tok", None)),
                    hidden_size=config.hidden_size,
                )
                blocks.append(Block(paths[0], kind, index, path, **sizes, paths=paths, modules=modules, host=host, **neurons))
    return blocks


def _neurons(stack: Stack, host: nn.Module, modules: tuple[nn.Module, ...], where: str, model_type: str) -> dict[str, nn.Module]:
    """{role: module} of the neurons of an MLP; empty for a mixture of experts and for a replacement."""
    if hasattr(modules[0], "block_name") or any(_is_mixture(module) for module in modules):
        return {}
    paths = {role: getattr(stack, role) for role in ROLES}
    return {role: submodule(host, path, where, model_type) for role, path in paths.items() if path}


def _is_mixture(mlp: nn.Module) -> bool:
    """Experts are one tensor [expert, out, in], or a list of modules."""
    return any(p.dim() == 3 for p in mlp.parameters()) or any(isinstance(m, nn.ModuleList) for m in mlp.modules())


def evenly(blocks: Sequence[Block], most: int) -> list[Block]:
    """Every k-th of ``blocks`` from the first on, with the smallest k that gives at most ``most``.

    Raises ValueError unless 1 ≤ most.
    """
    if most < 1:
        raise ValueError(f"Expected most ≥ 1, got {most}.")
    return list(blocks[:: max(1, -(-len(blocks) // most))])


# Parameters


def block_parameters(model: nn.Module) -> int:
    """Parameters of all attention and MLP blocks: what sparsity is a share of."""
    return _count(_parameters(_modules(model, *KINDS)), set())


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part: mlp, attention, embedding (with positions), head (untied), other; and total.

    Tied parameters count once: a head tied to the embedding, MLPs that were merged.
    """
    seen: set[int] = set()
    parts = {kind: _count(_parameters(_modules(model, kind)), seen) for kind in KINDS}
    # the position bias of T5 is an Embedding inside an attention block, and was counted there
    embedding = _count((module.weight for module in model.modules() if isinstance(module, nn.Embedding)), seen)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    untied = 0 if head is None else _count([head.weight], seen)
    total = sum(p.numel() for p in model.parameters())  # parameters() yields a tied tensor once
    other = total - sum(parts.values()) - embedding - untied
    return {**parts, "embedding": embedding, "head": untied, "other": other, "total": total}


def _modules(model: nn.Module, *kinds: str) -> tuple[nn.Module, ...]:
    return tuple(module for kind in kinds for block in find_blocks(model, kind) for module in block.modules)


def _parameters(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters of ``modules`` except those of norms."""
    for module in modules:
        for child in module.modules():
            if not _is_norm(child):
                yield from child.parameters(recurse=False)


def _count(parameters: Iterable[Tensor], seen: set[int]) -> int:
    """Size of those ``parameters`` that are not in ``seen``, to which they are added."""
    new = {id(p): p.numel() for p in parameters if id(p) not in seen}
    seen.update(new)
    return sum(new.values())


def _n_active(modules: Iterable[nn.Module], experts: int | None) -> int:
    """Parameters that one token uses, where each token goes through so many ``experts``."""
    return sum(
        p.numel() * experts // p.shape[0] if p.dim() == 3 and experts else p.numel()  # experts: [expert, out, in]
        for p in _parameters(modules)
    )


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _holding(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """{path: module} of all modules within ``module`` that have parameters of their own."""
    return {path: m for path, m in module.named_modules(prefix=prefix) if any(True for _ in m.parameters(recurse=False))}


# Whole layers


def find_layers(model: nn.Module) -> list[Block]:
    """Every layer without its attention, as a block from residual stream to residual stream: its MLP and its norms.

    Attention is a block of its own (``find_blocks(model, "attention")``). A replacement of the layer reads the residual stream
    that enters the layer only where the attention is removed as well (:func:`~mlpreplace.replacements.without_layers`).
    ``n_params`` is that of the MLP, since norms are not counted.

    Raises:
        ValueError: an unknown architecture, an encoder-decoder, a layer that holds more than attention, MLP and norms.
    """
    stacks = layer_lists(model)
    if len(stacks) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(stacks)} stacks of layers; whole layers are removed from a single one."
        )
    attentions, found = find_blocks(model, "attention"), []
    for mlp in find_blocks(model):
        name = f"{mlp.stack}.{mlp.layer}"
        within = [module for block in (mlp, *attentions) if block.layer == mlp.layer for module in block.modules]
        own = {module for whole in within for module in whole.modules()}
        # all of the layer and not its children alone: BERT has norms inside of the modules that hold its blocks
        norms = {path: m for path, m in _holding(mlp.host, name).items() if m not in own}
        if others := [path for path, m in norms.items() if not _is_norm(m)]:
            held = others[0].removeprefix(f"{name}.")
            raise ValueError(f"{name} holds {held!r} beside attention, MLP and norms: it cannot be removed.")
        places = dict(paths=(*mlp.paths, *norms), modules=(*mlp.modules, *norms.values()))
        found.append(replace(mlp, name=name, kind="layer", **places, **dict.fromkeys(ROLES)))
    return found


def find_parts(model: nn.Module, layer: int) -> list[Block]:
    """The smallest modules that hold all weights of a layer and map one tensor to one: its MLP, its norms, and the modules
    with weights inside its attention. Each can be tuned where it is, while attention itself stays as it is.

    ``n_params`` includes norms. Raises ValueError as :func:`find_layers` does.
    """
    whole, mlp = find_layers(model)[layer], find_blocks(model)[layer]
    units = {mlp.paths[0]: mlp.paths} | {path: (path,) for path in whole.paths[len(mlp.paths) :]}
    for attention in find_blocks(model, "attention"):
        if attention.layer == layer:
            for path, module in zip(attention.paths, attention.modules, strict=True):
                units |= {name: (name,) for name in _holding(module, path)}
    parts = []
    for name, paths in units.items():
        modules = tuple(model.get_submodule(path) for path in paths)
        n_params = sum(p.numel() for m in modules for p in m.parameters())
        sizes = dict(n_params=n_params, n_active_params=n_params)
        parts.append(replace(whole, name=name, kind="part", **sizes, paths=paths, modules=modules))
    return parts


def layer_blocks(model: nn.Module) -> dict[str, Block]:
    """{name: block} of all layers and of all their parts."""
    layers = find_layers(model)
    return {block.name: block for layer in layers for block in (layer, *find_parts(model, layer.layer))}


def layer_parameters(model: nn.Module) -> list[int]:
    """Parameters of attention and MLP of each layer: what removing the layer saves."""
    layers = find_layers(model)
    of_attention = dict.fromkeys((layer.layer for layer in layers), 0)
    for block in find_blocks(model, "attention"):
        of_attention[block.layer] += block.n_params
    return [layer.n_params + of_attention[layer.layer] for layer in layers]
