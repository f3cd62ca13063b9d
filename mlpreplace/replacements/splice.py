"""Put replacements into a model and take them out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..models.blocks import Block
from ..models.parameters import block_parameters
from ..runtime.turns import claimed, turn
from .families import Replacement
from .kv_cache import arguments_of, cache_among, count_tokens, watch
from .records import TrainingReport

Plan = dict[Block, Replacement]


class Improved(NamedTuple):
    """What ``refit``, ``search``, ``heal`` and ``tune`` return: a new plan, and the record of how it was found."""

    plan: Plan
    report: TrainingReport | list[dict]  # curves, or tidy records


class AttentionStandIn(nn.Module):
    """A replacement behind the interface of attention: it takes masks, positions and a cache, too, and returns a pair.

    Args:
        own: class of the attention in whose place it is.
        layer: of the cache.
    """

    def __init__(self, replacement: Replacement, own: type[nn.Module], layer: int):
        super().__init__()
        self.replacement, self.own, self.layer = replacement, own, layer

    def forward(self, *args, **kwargs) -> tuple[Tensor, None]:
        """The replacement's output [batch, seq_len, hidden], and no attention weights."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        cache = cache_among([*args, *kwargs.values()])
        if self.replacement.family.attends:
            call = arguments_of(self.own, self, args, kwargs)
            named = {name: call[name] for name in ("position_embeddings", "attention_mask") if name in call}
            return self.replacement(hidden_states, cache=cache, **named), None
        if cache is not None:
            count_tokens(cache, self.layer, hidden_states)
        return self.replacement(hidden_states), None


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise ValueError unless ``plan`` is one and belongs to ``model``."""
    pairs = plan.items() if isinstance(plan, Mapping) else [(plan, None)]
    if strange := [(b, r) for b, r in pairs if not (isinstance(b, Block) and isinstance(r, Replacement))]:
        got = type(plan) if not isinstance(plan, Mapping) else type(strange[0][1])
        raise ValueError(f"Expected a plan, {{block: replacement}} of find_blocks and fit, got a {got.__name__}.")
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
    device = next((p.device for p in model.get_submodule(block.paths[0]).parameters() if p.device.type != "meta"), None)
    own = model.get_submodule(block.paths[0])
    inserted = (
        AttentionStandIn(replacement, getattr(own, "own", type(own)), block.layer) if block.kind == "attention" else replacement
    )
    model.set_submodule(block.paths[0], inserted)
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

    Within, ``model.save_pretrained`` raises (see :func:`refuse_checkpoint`).

    Raises ValueError, before anything is changed, where the plan is for another model.
    """
    with claimed(model):
        check_plan(model, plan)
        before = [(path, model.get_submodule(path)) for block in plan for path in block.paths]
        own, hooks = {key: vars(model)[key] for key in vars(model).keys() & {"save_pretrained"}}, []
        try:
            for block, replacement in plan.items():
                hooks += _put(model, block, replacement)
            if plan:
                model.save_pretrained = refuse_checkpoint
            yield model
        finally:
            for hook in hooks:
                hook.remove()
            for path, module in before:
                model.set_submodule(path, module)
            vars(model).pop("save_pretrained", None)
            vars(model).update(own)


def splice(model: nn.Module, plan: Plan) -> nn.Module:
    """A compressed model, which stands alone: ``model`` stays as it is, whatever is done to the copy, and the other way round.

    The weights that are not replaced, and those of the plan, take no memory of their own until one side writes into them
    (copy-on-write of PyTorch). Then the written tensor is copied, the others stay shared: after ``.to(dtype)``, a step of an
    optimizer, ``load_state_dict`` or an edit in place. Code that asks for the address of a weight (``data_ptr``, ``numpy``)
    counts as a writer. Memory that PyTorch did not allocate, such as a mapped checkpoint, is copied at once. Gradients are not
    copied, ties between weights are kept.

    ``save_pretrained`` and ``push_to_hub`` of the result raise ValueError (see :func:`refuse_checkpoint`).

    Raises ValueError where the plan is for another model.
    """
    with turn(model), spliced(model, plan):
        compressed = lazy_copy(model)
    for moving in ("to", "cuda"):  # set by accelerate on a model that it spreads; a copy of them would move ``model``
        vars(compressed).pop(moving, None)
    compressed.source = getattr(model, "source", None)
    return compressed


def lazy_copy(model: nn.Module, instead: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A deep copy of ``model`` whose tensors are objects of their own, in memory that is shared until one side writes into it.

    Args:
        instead: {module: what takes its place in the copy, as it is}.
    """
    instead = dict(instead or {})
    kept = [module for module in model.modules() if module not in instead]
    tensors = [t for module in kept for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    known = {id(module): other for module, other in instead.items()} | {id(t): lazy_clone(t) for t in tensors}
    return copy.deepcopy(model, known)


def lazy_clone(tensor: Tensor) -> Tensor:
    """A tensor, or parameter, with the content of ``tensor``, in memory that is shared until one side writes into it."""
    if type(tensor) not in (Tensor, nn.Parameter):  # packed weights, for example, which know how to copy themselves
        return copy.deepcopy(tensor)
    try:
        own = torch._lazy_clone(tensor.detach())
    except RuntimeError:  # in memory that PyTorch did not allocate
        own = tensor.detach().clone()
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own


def unshared(tensor: Tensor) -> Tensor:
    """``tensor`` for code that asks for its address: a copy where it shares memory, which would else be copied for good."""
    if tensor.device.type != "cpu":
        return tensor.detach().cpu()
    lazy = type(tensor) in (Tensor, nn.Parameter) and torch._C._is_cow_tensor(tensor)
    return tensor.detach().clone() if lazy else tensor.detach()


def refuse_checkpoint(*args, **kwargs) -> None:
    """In the place of ``save_pretrained`` of a compressed model, whose checkpoint would be read as one of the dense architecture.

    Raises ValueError.
    """
    raise ValueError(
        "save_pretrained would write a compressed model as a checkpoint of its dense architecture, which loads with random "
        "weights where blocks were replaced. Use mlpreplace.save(model, folder); or mlpreplace.export(model, folder) for a "
        "checkpoint that transformers loads, where the architecture has a form for it."
    )


def replacements_of(model: nn.Module) -> dict[str, Replacement]:
    """{block name: replacement} of all replacements in ``model``."""
    with turn(model):
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
