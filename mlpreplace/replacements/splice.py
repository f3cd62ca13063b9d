"""Put replacements into a model and take them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.blocks import Block, block_parameters
from .families import Replacement
from .kv_cache import cache_among, count_tokens, watch
from .records import TrainingReport

Plan = dict[Block, Replacement]


class Improved(NamedTuple):
    """What ``refit``, ``search``, ``heal`` and ``tune`` return: a new plan, and the record of how it was found."""

    plan: Plan
    report: TrainingReport | list[dict]  # curves, or tidy records


class AttentionStandIn(nn.Module):
    """A replacement behind the interface of attention: it takes masks, positions and a cache, too, and returns a pair."""

    def __init__(self, replacement: Replacement, layer: int):
        super().__init__()
        self.replacement = replacement
        self.layer = layer  # of the cache

    def forward(self, *args, **kwargs) -> tuple[Tensor, None]:
        """The replacement's output [batch, seq_len, hidden], and no attention weights."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if (cache := cache_among([*args, *kwargs.values()])) is not None:
            count_tokens(cache, self.layer, hidden_states)
        return self.replacement(hidden_states), None


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError unless ``plan`` belongs to ``model``."""
    for block, replacement in plan.items():
        for path in block.paths:
            try:
                model.get_submodule(path)
            except AttributeError:
                raise ValueError(f"{type(model).__name__} has no module {path}: the plan is for another model.") from None
        if block.kind == "attention":
            check_attention(model, block)
        if block.hidden_size != (hidden_size := model.config.get_text_config().hidden_size):
            sizes = f"hidden size {block.hidden_size}, the model {hidden_size}"
            raise ValueError(f"{block.name} has {sizes}: the plan is for another model.")
        if replacement.block_name != block.name:
            raise ValueError(f"The replacement for {block.name} was fitted to {replacement.block_name}.")


def check_attention(model: nn.Module, block: Block) -> None:
    """Raise ValueError for attention that cannot be replaced."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{block.name}: attention of an encoder-decoder cannot be replaced. It may read the other stack (cross-attention), "
            "or other layers may read its position bias (T5). MLP blocks can be replaced."
        )
    inner = [name for name, module in block.modules[0].named_modules() if name and hasattr(module, "is_causal")]
    if inner:
        raise ValueError(
            f"{block.name} holds more than attention, which is its {inner[0]!r} (BERT: residual and norm, too). Its output is "
            "not added to the residual stream, so it cannot be replaced. MLP blocks can be replaced."
        )


def _put(model: nn.Module, block: Block, replacement: Replacement) -> list[RemovableHandle]:
    """Put ``replacement`` in the place of the block's first module, and identities in the places of the others.

    Returns hooks: those that move activations to another device, and those that give a replacement that looks back its past.
    """
    attention = block.kind == "attention"
    device = next((p.device for p in model.get_submodule(block.paths[0]).parameters() if p.device.type != "meta"), None)
    model.set_submodule(block.paths[0], AttentionStandIn(replacement, block.layer) if attention else replacement)
    for path in block.paths[1:]:
        model.set_submodule(path, nn.Identity())
    hooks = _aligned(replacement, device) if device else []
    if not replacement.family.looks_back:
        return hooks
    host = f"{block.stack}.{block.layer}"
    within = block.paths[0].removeprefix(f"{host}.")
    return hooks + watch(model.get_submodule(host), within, block.layer, len(model.get_submodule(block.stack)))


def _aligned(replacement: Replacement, device: torch.device) -> list[RemovableHandle]:
    """Hooks that move activations from ``device`` to the replacement's weights and back, where layers on several devices share
    one body.
    """
    own = next((p.device for p in replacement.parameters()), device)
    if own == device:
        return []
    return [
        replacement.register_forward_pre_hook(lambda module, args: (args[0].to(own), *args[1:])),
        replacement.register_forward_hook(lambda module, args, output: output.to(device)),
    ]


@contextmanager
def spliced(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """``model`` with the replacements of ``plan`` in place. Afterwards, also after an exception, it has its own modules again.

    Raises ValueError, before anything is changed, where the plan is for another model.
    """
    check_plan(model, plan)
    before = [(path, model.get_submodule(path)) for block in plan for path in block.paths]
    hooks: list[RemovableHandle] = []
    try:
        for block, replacement in plan.items():
            hooks += _put(model, block, replacement)
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        for path, module in before:
            model.set_submodule(path, module)


def splice(model: nn.Module, plan: Plan) -> nn.Module:
    """A compressed model that shares all other weights with ``model``, which stays as it is."""
    with spliced(model, plan):
        shared = {id(t): t for tensors in (model.parameters(), model.buffers()) for t in tensors}
        compressed = copy.deepcopy(model, shared)
    for moving in ("to", "cuda"):  # set by accelerate on a model that it spreads; a copy of them would move ``model``
        vars(compressed).pop(moving, None)
    compressed.source = getattr(model, "source", None)
    return compressed


def replacements_of(model: nn.Module) -> dict[str, Replacement]:
    """{block name: replacement} of all replacements in ``model``."""
    return {m.block_name: m for m in model.modules() if isinstance(m, Replacement)}


def bodies(plan: Plan) -> nn.ModuleList:
    """The bodies of the plan's replacements in its order, a shared one once."""
    return nn.ModuleList(list(dict.fromkeys(replacement.body for replacement in plan.values())))


def copied(plan: Plan) -> Plan:
    """A deep copy of ``plan``. Replacements that share a body share its copy."""
    return dict(zip(plan, copy.deepcopy(list(plan.values())), strict=True))


def sharing(plan: Plan) -> list[int]:
    """For each replacement of ``plan``, the index of its body among :func:`bodies`."""
    places = list(bodies(plan))
    return [places.index(replacement.body) for replacement in plan.values()]


def removed_parameters(plan: Plan) -> int:
    """Net parameters that ``plan`` removes; a shared body is counted once against it."""
    return sum(block.n_params for block in plan) - sum(p.numel() for p in bodies(plan).parameters())


def sparsity_of(model: nn.Module, plan: Plan) -> float:
    """Net parameters removed ÷ parameters of all attention and MLP blocks of the dense ``model``."""
    return removed_parameters(plan) / block_parameters(model)
