"""Put replacements into a model, take them out again, save and load what was replaced."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .blocks import Block, block_parameters, find_blocks
from .cache import whole_folder
from .layers import layer_blocks
from .models import Source, load_model
from .past import cache_among, count_tokens, watch
from .replacements import Family, FitReport, Replacement

Plan = Mapping[Block, Replacement]


class AttentionStandIn(nn.Module):
    """A replacement as a layer calls its attention: masks, positions and a cache beside the hidden states, for a pair."""

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


def _check(model: nn.Module, plan: Plan) -> None:
    for block, replacement in plan.items():
        for path in block.paths:
            try:
                model.get_submodule(path)
            except AttributeError:
                raise ValueError(f"{type(model).__name__} has no module {path}: the plan is for another model.") from None
        if block.kind == "attention":
            _check_attention(model, block)
        if block.hidden_size != (hidden_size := model.config.get_text_config().hidden_size):
            sizes = f"hidden size {block.hidden_size}, the model {hidden_size}"
            raise ValueError(f"{block.name} has {sizes}: the plan is for another model.")
        if replacement.block_name != block.name:
            raise ValueError(f"The replacement for {block.name} was fitted to {replacement.block_name}.")


def _check_attention(model: nn.Module, block: Block) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{block.name}: attention of an encoder-decoder cannot be replaced. It may read the other stack (cross-attention), "
            "or other layers its position bias (T5). MLP blocks can."
        )
    inner = [name for name, module in block.modules[0].named_modules() if name and hasattr(module, "is_causal")]
    if inner:
        raise ValueError(
            f"{block.name} holds more than attention, which is its {inner[0]!r} (BERT: residual and norm, too): its output is "
            "none that is added to the residual stream, so it cannot be replaced. MLP blocks can."
        )


def _put(model: nn.Module, block: Block, replacement: Replacement) -> list[RemovableHandle]:
    """The first module of the block becomes the replacement; what followed inside the block has no work left.

    Returns the hooks by which a replacement that looks back learns what came before.
    """
    attention = block.kind == "attention"
    model.set_submodule(block.paths[0], AttentionStandIn(replacement, block.layer) if attention else replacement)
    for path in block.paths[1:]:
        model.set_submodule(path, nn.Identity())
    if not replacement.family.looks_back:
        return []
    host = f"{block.stack}.{block.layer}"
    within = block.paths[0].removeprefix(f"{host}.")
    return watch(model.get_submodule(host), within, block.layer, len(model.get_submodule(block.stack)))


@contextmanager
def spliced(model: nn.Module, plan: Plan) -> Iterator[nn.Module]:
    """``model`` with the replacements of ``plan`` in place; the exact modules return, also after an exception.

    Raises ValueError, before anything is changed, when the plan does not belong to the model.
    """
    _check(model, plan)
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
    """A compressed model that shares every untouched weight with ``model``, which stays as it is."""
    with spliced(model, plan):
        shared = {id(t): t for tensors in (model.parameters(), model.buffers()) for t in tensors}
        compressed = copy.deepcopy(model, shared)
    compressed.source = getattr(model, "source", None)
    return compressed


def replacements_of(model: nn.Module) -> dict[str, Replacement]:
    """{block name: replacement} of what was spliced into ``model``."""
    return {m.block_name: m for m in model.modules() if isinstance(m, Replacement)}


def bodies(plan: Plan) -> nn.ModuleList:
    """The modules that do the work in ``plan``, in its order; one that stands in several places is there once."""
    return nn.ModuleList(list(dict.fromkeys(replacement.body for replacement in plan.values())))


def copied(plan: Plan) -> dict[Block, Replacement]:
    """A plan of its own; replacements that share a body share its copy."""
    return dict(zip(plan, copy.deepcopy(list(plan.values())), strict=True))


def removed_parameters(plan: Plan) -> int:
    """Net parameters that ``plan`` removes. A body that stands in several places counts once against it."""
    return sum(block.n_params for block in plan) - sum(p.numel() for p in bodies(plan).parameters())


def sparsity(model: nn.Module, plan: Plan) -> float:
    """Net parameters removed ÷ parameters of all attention and MLP blocks of the dense ``model``."""
    return removed_parameters(plan) / block_parameters(model)


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write the replacements of a spliced model: replacements.safetensors, and replacements.json that names the base.

    Only what was replaced is written, and a body that stands in several places once. The folder appears when it is whole and
    never overwrites another.

    Raises:
        ValueError: nothing was spliced, or the base model's source is not known (it was not made by load_model).
        FileExistsError: ``folder`` exists.
    """
    folder = Path(folder)
    found = replacements_of(model)
    source = getattr(model, "source", None)
    if not found:
        raise ValueError("No replacement was spliced into this model; there is nothing to save.")
    if source is None:
        raise ValueError("The base model's source is not known. Load it with load_model, or set model.source = Source(id).")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose a new folder.")
    owners = {r.body: name for name, r in reversed(found.items())}  # the first place of each body
    record = {
        "base": source.as_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "replacements": {
            name: {**r.family.as_dict(), "report": asdict(r.report) if r.report else None, "body": owners[r.body]}
            for name, r in found.items()
        },
    }
    owned = {name: found[name].state_dict() for name in owners.values()}
    tensors = {f"{name}.{key}": t.contiguous() for name, state in owned.items() for key, t in state.items()}
    with whole_folder(folder) as whole:
        save_file(tensors, whole / "replacements.safetensors")
        (whole / "replacements.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def load(folder: str | Path, *, device: str = "auto", base: nn.Module | None = None) -> nn.Module:
    """The model that :func:`save` wrote, its base loaded anew: the same logits, bit for bit on the same machine. What stood in
    several places does so again.

    Args:
        base: the dense model, where :func:`~mlpreplace.models.load_model` cannot load it: it loads causal language models. Its
            ``source`` and precision must be those it had when it was compressed. ``device`` is then the one it is on.

    Raises:
        FileNotFoundError: no replacements.json in ``folder``.
        ValueError: the base model is not the one that was compressed.
    """
    folder = Path(folder)
    if not (folder / "replacements.json").exists():
        raise FileNotFoundError(f"{folder} holds no replacements.json; expected a folder written by mlpreplace.save.")
    record = json.loads((folder / "replacements.json").read_text())
    source, dtype, model = Source(**record["base"]), getattr(torch, record["dtype"]), base
    if model is None:
        model, _ = load_model(source.id, revision=source.revision, device=device, dtype=dtype)
    if (found := getattr(model, "source", None)) != source:
        raise ValueError(f"The base model differs: {folder} was made from {source}, found {found}.")
    if model.dtype != dtype:
        raise ValueError(f"The base model is in {model.dtype}, {folder} was made in {dtype}.")
    tensors = load_file(folder / "replacements.safetensors")
    blocks = {b.name: b for kind in ("mlp", "attention") for b in find_blocks(model, kind)}
    if record["replacements"].keys() - blocks.keys():
        blocks = layer_blocks(model) | blocks
    plan = {}
    for name, spec in record["replacements"].items():
        report, owner = spec.pop("report"), spec.pop("body", name)
        replacement = Replacement(Family.from_dict(spec), blocks[name])
        if owner == name:
            state = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            replacement.load_state_dict(state)
        else:  # which was saved before
            replacement.body = plan[blocks[owner]].body
        replacement.report = FitReport.from_dict(report) if report else None
        plan[blocks[name]] = replacement
    return splice(model, plan)
