"""The MLP and attention blocks of a model, and their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.turns import turn
from .architectures import layer_lists, submodule, type_of
from .stack import Heads, Stack
from .weights import (
    Inserted,
    MLPWeights,
    check_linear,
    check_plain,
    check_unquantized,
    check_unshared,
    unlike_linear,
    weight_bias,
)

KINDS = ("mlp", "attention")
ROLES = ("up", "down", "gate", "activation")  # of the modules that make the neurons of an MLP


class NotApplicable(ValueError):
    """A method does not apply to this model or this block. The rest of a comparison can go on without it."""


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
    heads: Heads | None = field(default=None, compare=False, repr=False)  # projections of attention, if known and linear layers

    def cache_key(self) -> tuple:
        """Its name, and where its architecture finds its modules."""
        names = {module: name for name, module in self.host.named_modules()}
        return self.name, self.kind, self.paths, [names.get(getattr(self, role)) for role in ROLES], self.heads

    @property
    def has_neurons(self) -> bool:
        """Whether the block is down(act(up x)) or down(act(gate x) ⊙ up x), so that neurons can be kept or dropped."""
        return None not in (self.up, self.down, self.activation)

    @property
    def compressed(self) -> bool:
        """Whether it holds a module of this package: a replacement, or layers in int8."""
        return any(isinstance(inner, Inserted) for module in self.modules for inner in module.modules())

    @property
    def opaque(self) -> bool:
        """Whether it is an MLP of the model's own without neurons to see: a mixture of experts, or registered without them."""
        return self.kind == "mlp" and not self.has_neurons and not self.compressed

    @property
    def holds_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return self.opaque and any(_is_mixture(module) for module in self.modules)

    @property
    def output_projection(self) -> nn.Module | None:
        """The linear layer whose inputs are neurons, or the outputs of heads; None where it is not known."""
        return self.down if self.heads is None else self.host.get_submodule(self.heads.output)

    @property
    def inner_size(self) -> int:
        """Width of what enters the output projection; 0 where that is not known."""
        return 0 if self.output_projection is None else weight_bias(self.output_projection)[0].shape[1]

    @property
    def intermediate_size(self) -> int:
        self._require_neurons(": it has no neurons of its own, and no intermediate size")
        return weight_bias(self.down)[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The widest precision of its parameters, norms left out where there are others."""
        chosen = own_parameters(self.modules), _all(self.modules), _all([self.host])
        return next(filter(None, map(_widest, chosen)), torch.get_default_dtype())

    @property
    def widens(self) -> bool:
        """Whether it gives a higher precision than it reads: T5 keeps the output projection in float32 beside float16."""
        return self.has_neurons and torch.promote_types(self.up.weight.dtype, self.down.weight.dtype) != self.up.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of its weights. Raises ValueError where they are offloaded."""
        weights = chain.from_iterable(module.parameters() for module in (*self.modules, self.host))
        return check_held(next(weights), self.name).device

    def weights(self) -> MLPWeights:
        """Up, gate and down projection as [out, in] tensors. Raises NotApplicable where the block has none."""
        self._require_neurons("; its neurons cannot be selected")
        (up, up_bias), (down, down_bias) = weight_bias(self.up), weight_bias(self.down)
        if self.gate is self.up:  # one projection for both, the gate first
            gate, up = up.chunk(2)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        else:
            gate, gate_bias = weight_bias(self.gate) if self.gate is not None else (None, None)
        return MLPWeights(up, down, gate, up_bias, down_bias, gate_bias)

    def _require_neurons(self, lacking: str) -> None:
        if self.has_neurons:
            return
        if self.compressed:
            raise NotApplicable(
                f"{self.name} is compressed already ({', '.join(type(m).__name__ for m in self.modules)}){lacking}. "
                "Find, capture and fit the blocks of the dense model."
            )
        raise NotApplicable(
            f"{self.name} ({self.kind}) is no up/down MLP{lacking}. Mean, Linear and LowRank replace any block, "
            "TwoLayerMLP an MLP without neurons (a mixture of experts), too."
        )


def block_neurons(block: Block, x: Tensor) -> Tensor:
    """What its weights say that enters the block's output projection, [tokens, intermediate], in the precision of ``x``."""
    w = block.weights()

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x), None if bias is None else bias.to(x))

    up = project(w.up, w.up_bias)
    return block.activation(up) if w.gate is None else block.activation(project(w.gate, w.gate_bias)) * up


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

    Raises:
        ValueError: an unknown kind; an unknown architecture whose structure does not show where its blocks are; a layer without
            a module that its architecture should have; weights that are quantized, packed or spread over processes; projections
            of an MLP that are not exactly linear layers (adapted, scaled, normalised, pruned); a module or a weight in two
            places.
    """
    with turn(model):  # another thread may have other modules in place
        blocks = located(model, kind)
        for block in blocks:
            _check_projections(block, type_of(model))
        check_unshared(model, [path for block in blocks for path in block.paths])
    return blocks


def listed(blocks: Iterable[Block]) -> list[Block]:
    """``blocks`` as a list, each once. Raises ValueError for anything else than blocks."""
    found = list(dict.fromkeys(blocks)) if isinstance(blocks, Iterable) else [blocks]
    if strange := [block for block in found if not isinstance(block, Block)]:
        raise ValueError(f"Expected blocks, as find_blocks(model) lists them, got a {type(strange[0]).__name__}.")
    return found


def located(model: nn.Module, kind: str) -> list[Block]:
    """All blocks of one kind. Raises ValueError where their parameters are not what they weigh."""
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of block {kind!r}; expected one of {KINDS}.")
    check_unquantized(model)
    blocks, lists = [], layer_lists(model)
    config = model.config.get_text_config()
    for stack, path, layers in lists:
        groups = [stack.mlp] if kind == "mlp" else [(g,) if isinstance(g, str) else g for g in stack.attention]
        for index, host in enumerate(layers):
            where = f"{path}.{index}"
            for names in groups:
                modules = tuple(submodule(host, name, where, config.model_type) for name in names)
                paths = tuple(f"{where}.{name}" for name in names)
                for path_of_module, module in zip(paths, modules, strict=True):
                    check_plain(module, path_of_module)
                neurons = _neurons(stack, host, modules, where, config.model_type) if kind == "mlp" else {}
                heads = _heads(stack, host, modules) if kind == "attention" else None
                sizes = dict(
                    n_params=sum(p.numel() for p in own_parameters(modules)),
                    n_active_params=_n_active(modules, getattr(config, "num_experts_per_tok", None)),
                    hidden_size=config.hidden_size,
                )
                inside = dict(paths=paths, modules=modules, host=host, heads=heads, **neurons)
                blocks.append(Block(paths[0], kind, index, path, **sizes, **inside))
    return blocks


def _neurons(stack: Stack, host: nn.Module, modules: tuple[nn.Module, ...], where: str, model_type: str) -> dict[str, nn.Module]:
    """{role: module} of the neurons of an MLP; empty for a mixture of experts, for a replacement and in int8."""
    paths = {role: path for role in ROLES if (path := getattr(stack, role))}
    if isinstance(modules[0], Inserted) or (not _all_there(host, paths.values()) and any(map(_is_mixture, modules))):
        return {}
    neurons = {role: submodule(host, path, where, model_type) for role, path in paths.items()}
    return {} if any(isinstance(module, Inserted) for module in neurons.values()) else neurons


def _heads(stack: Stack, host: nn.Module, modules: tuple[nn.Module, ...]) -> Heads | None:
    """Where the projections of attention are; None where they are not there, or are no plain linear layers."""
    heads = stack.heads
    if heads is None or isinstance(modules[0], Inserted):
        return None
    paths = heads.query, heads.key, heads.value, heads.output
    return heads if _all_there(host, paths) and not any(unlike_linear(host.get_submodule(p)) for p in paths) else None


def _all_there(host: nn.Module, paths: Iterable[str]) -> bool:
    names = {name for name, _ in host.named_modules()}
    return names.issuperset(paths)


def _is_mixture(mlp: nn.Module) -> bool:
    """Experts are one tensor [expert, out, in], or a list of modules."""
    inside = [m for m in mlp.modules() if not isinstance(m, nn.Conv1d)]  # [out, in, taps]
    return any(isinstance(m, nn.ModuleList) or any(p.dim() == 3 for p in m.parameters(recurse=False)) for m in inside)


def _check_projections(block: Block, model_type: str) -> None:
    """Raise ValueError unless the neurons of ``block`` are made by linear layers and an activation without weights."""
    names = {module: f"{block.stack}.{block.layer}.{name}" for name, module in block.host.named_modules()}
    for layer in filter(None, (block.up, block.gate, block.down)):
        check_linear(layer, names[layer], model_type)
    if block.has_neurons and any(True for _ in block.activation.parameters()):
        raise ValueError(
            f"{names[block.activation]} is an activation with weights of its own, which every replacement would share with the "
            f"model: register_architecture({model_type!r}, Stack(...)) without up, gate, down and activation."
        )


def evenly(blocks: Sequence[Block], most: int) -> list[Block]:
    """Every k-th of ``blocks`` from the first on, with the smallest k that gives at most ``most``.

    Raises ValueError unless 1 ≤ most.
    """
    if most < 1:
        raise ValueError(f"Expected most ≥ 1, got {most}.")
    return list(blocks[:: max(1, -(-len(blocks) // most))])


def own_parameters(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters of ``modules`` except those of norms."""
    for module in modules:
        for child in module.modules():
            if not is_norm(child):
                yield from child.parameters(recurse=False)


def _n_active(modules: Iterable[nn.Module], experts: int | None) -> int:
    """Parameters that one token uses, where each token goes through so many ``experts``."""
    return sum(
        p.numel() * experts // p.shape[0] if p.dim() == 3 and experts else p.numel()  # experts: [expert, out, in]
        for p in own_parameters(modules)
    )


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _all(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    return chain.from_iterable(module.parameters() for module in modules)


def _widest(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """A precision that holds all of ``tensors``; None without one of floating-point numbers."""
    floating = [t.dtype for t in tensors if t.is_floating_point()]
    return reduce(torch.promote_types, floating) if floating else None
