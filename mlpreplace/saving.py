"""Save a compressed model and load it again: what was replaced alone, or everything.

A folder holds config.json, the weights as safetensors, a readable replacements.json and a model card. It appears when it is
whole and never overwrites another.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .architectures import ARCHITECTURES, Stack, register_architecture
from .blocks import KINDS, Block, find_blocks
from .cache import fingerprint, whole_folder
from .card import model_card
from .empty import empty_model, fill, temporary_buffers, tensors_of
from .layers import layer_blocks
from .models import SPREAD, Source, load_model, no_progress_bars, resolve_device, weight_hashes
from .quantize import Int8Linear
from .replacements import Family, FitReport, Replacement
from .splice import replacements_of, sparsity, splice
from .structure import layer_lists, type_of

RECORD = "replacements.json"
DELTA, STANDALONE, PLAIN = "delta", "standalone", "plain"
WEIGHTS = {DELTA: "replacements.safetensors", STANDALONE: "weights.safetensors"}  # no name that from_pretrained would take
NO_MATTER = PreTrainedConfig().to_dict().keys() | {"use_cache"}  # settings of any model, that change none of its numbers


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    standalone: bool = False,
    metrics: Mapping[str, object] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a spliced model into a new folder, for :func:`load`. A body that stands in several places is stored once.

    Args:
        standalone: everything, so that the base model is not needed. Otherwise what was replaced: the base is loaded anew, and
            refused when its weights differ.
        metrics: what was measured, anything that json can hold; for replacements.json and the model card.
        tokenizer: to be saved with the model.

    Raises:
        ValueError: nothing was spliced. Standalone: transformers does not have the model's class. Otherwise: the weights of the
            base are not known (neither load_model nor :meth:`Source.of` saw them), or are others by now outside of replacements.
        FileExistsError: ``folder`` exists.
    """
    folder, form = new_folder(folder), STANDALONE if standalone else DELTA
    record = describe(model, form, metrics)
    tensors, tied = tensors_of(model)
    if standalone:
        _class_of(type(model).__name__)
    else:
        inside = tensors_inside(model)
        _check_untouched(model, inside)
        tensors = {name: t for name, t in tensors.items() if name in inside}
        tied = {name: owner for name, owner in tied.items() if name in inside}
    with whole_folder(folder) as whole:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(whole)
        save_file({name: t.contiguous() for name, t in tensors.items()}, whole / WEIGHTS[form], {"format": "pt"})
        write_about(whole, model, record | {"tied": tied}, tokenizer)
    return folder


def load(folder: str | Path, *, device: str = "auto", base: nn.Module | None = None) -> nn.Module:
    """The model that :func:`save` or :func:`~mlpreplace.export` wrote: the same logits, bit for bit on the same machine. What
    stood in several places does so again.

    Args:
        base: the dense model of a folder that holds replacements alone, where :func:`~mlpreplace.models.load_model` cannot load
            it: it loads causal language models. Weights and precision must be those it had when it was compressed. ``device``
            is then the one it is on.
        device: as for :func:`~mlpreplace.models.load_model`; a whole model goes onto one.

    Raises:
        FileNotFoundError: no replacements.json in ``folder``.
        ValueError: the base model is not the one that was compressed, by the hash of its weights or its configuration; one was
            given and none is needed; the weights are not whole; a whole model and a way to spread it.
    """
    folder = Path(folder)
    if not (folder / RECORD).exists():
        raise FileNotFoundError(f"{folder} holds no {RECORD}; expected a folder written by mlpreplace.save or export.")
    record = json.loads((folder / RECORD).read_text())
    architecture = record["architecture"]
    if architecture["type"] not in ARCHITECTURES:  # registered, or guessed, where it was compressed
        register_architecture(architecture["type"], *map(Stack.from_dict, architecture["stacks"]))
    if record["form"] == DELTA:
        return _load_delta(folder, record, device, base)
    if base is not None:
        raise ValueError(f"{folder} holds a whole model: load it without base=.")
    if device in SPREAD:
        raise ValueError(
            f"{folder} holds a whole model, which is loaded onto one device; accelerate.dispatch_model spreads it then."
        )
    model = load_plain(folder, record) if record["form"] == PLAIN else _load_standalone(folder, record)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(resolve_device(device))


def _empty(folder: Path, record: dict) -> nn.Module:
    model_class = _class_of(record["model"])
    return empty_model(model_class, model_class.config_class.from_pretrained(folder), dtype=getattr(torch, record["dtype"]))


def _load_standalone(folder: Path, record: dict) -> nn.Module:
    model = _rebuilt(_empty(folder, record), record)
    fill(model, load_file(folder / WEIGHTS[STANDALONE]), record["tied"])
    model.source = Source(**{k: v for k, v in record["base"].items() if k != "weights"}) if record["base"] else None
    return model


def load_plain(folder: Path, record: dict) -> nn.Module:
    """The model of an exported folder, on the CPU."""
    if record["widths"]:
        model = _empty(folder, record)
        model.tie_weights()
        tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        fill(model, tensors, tensors_of(model)[1], temporary_buffers(model))
    else:
        with no_progress_bars():
            model = _class_of(record["model"]).from_pretrained(folder, dtype=getattr(torch, record["dtype"])).eval()
    model.source = Source.of(model, str(folder))  # a dense model in its own right
    return model


def _load_delta(folder: Path, record: dict, device: str, base: nn.Module | None) -> nn.Module:
    about, dtype, model = dict(record["base"]), getattr(torch, record["dtype"]), base
    expected = about.pop("weights")
    if model is None:
        model, _ = load_model(about["id"], revision=about["revision"], device=device, dtype=dtype)
    if model.dtype != dtype:
        raise ValueError(f"The base model is in {model.dtype}, {folder} was made in {dtype}.")
    found = fingerprint(weight_hashes(base) if base is not None else model.source.weights)
    if found != expected:
        raise ValueError(
            f"The base model differs: {folder} was made from {about['id']} with weights of hash {expected}, found {found}. "
            "Restore the weights it was made from, give them as load(folder, base=model), or fit and save again."
        )
    made_with, own = _settings(type(model.config).from_pretrained(folder)), _settings(model.config)
    if differing := [key for key in made_with if made_with[key] != own.get(key)]:
        said = f"{differing[0]}={made_with[differing[0]]}, found {own.get(differing[0])}"
        raise ValueError(f"The base model differs in its configuration: {folder} was made with {said}. Restore what it was.")
    compressed = _rebuilt(model, record)
    inside = tensors_inside(compressed)
    untouched = {name for name in (*compressed.state_dict(), *temporary_buffers(compressed)) if name not in inside}
    fill(compressed, load_file(folder / WEIGHTS[DELTA]), record["tied"], untouched)
    return compressed


def _settings(config: PreTrainedConfig) -> dict:
    """What ``config`` says about the numbers of its model, as json has it."""
    return {k: v for k, v in json.loads(config.to_json_string(use_diff=False)).items() if k not in NO_MATTER}


def _rebuilt(model: nn.Module, record: dict) -> nn.Module:
    """``model`` with the modules that ``record`` names in place, their tensors yet to be set."""
    blocks = named_blocks(model, record["replacements"])
    plan: dict[Block, Replacement] = {}
    for name, about in record["replacements"].items():
        spec = dict(about)
        report, owner = spec.pop("report"), spec.pop("body")
        plan[blocks[name]] = replacement = Replacement(Family.from_dict(spec), blocks[name])
        if owner != name:  # which was there before
            replacement.body = plan[blocks[owner]].body
        replacement.report = FitReport.from_dict(report) if report else None
    compressed = splice(model, plan)
    for path in record["int8"]:
        compressed.set_submodule(path, Int8Linear(compressed.get_submodule(path)))
    return compressed


def named_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, Block]:
    """{name: block} with all of ``names``, whole layers and parts of them where they are asked for."""
    blocks = {block.name: block for kind in KINDS for block in find_blocks(model, kind)}
    if set(names) - blocks.keys():
        blocks = layer_blocks(model) | blocks
    if missing := sorted(set(names) - blocks.keys()):
        raise ValueError(f"{type(model).__name__} has no block {missing[0]}.")
    return blocks


def describe(model: nn.Module, form: str, metrics: Mapping[str, object] | None) -> dict:
    """What stands in replacements.json: base, what was replaced and by what, sizes, versions, metrics."""
    from . import __version__  # which is set when all modules are there

    found = replacements_of(model)
    if not found:
        raise ValueError("No replacement was spliced into this model; there is nothing to save.")
    source = getattr(model, "source", None)
    dense = empty_model(type(model), model.config, meta=True)
    blocks = named_blocks(dense, found)
    owners = {r.body: name for name, r in reversed(found.items())}  # the first place of each body
    return {
        "form": form,
        "base": source.as_dict() | {"weights": fingerprint(source.weights) if source.weights else None} if source else None,
        "model": type(model).__name__,
        "architecture": {"type": type_of(dense), "stacks": [asdict(stack) for stack, _, _ in layer_lists(dense)]},
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": {"dense": dense.num_parameters(), "compressed": sum(p.numel() for p in model.parameters())},
        "sparsity": sparsity(dense, {blocks[name]: r for name, r in found.items()}),
        "metrics": dict(metrics or {}),
        "versions": {"mlpreplace": __version__} | {name: version(name) for name in ("torch", "transformers", "safetensors")},
        "replacements": {
            name: {**r.family.as_dict(), "report": asdict(r.report) if r.report else None, "body": owners[r.body]}
            for name, r in found.items()
        },
        "int8": [path for path, module in model.named_modules() if isinstance(module, Int8Linear)],
    }


def write_about(whole: Path, model: nn.Module, record: dict, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """replacements.json, the model card, how to generate (a base brings its own), and the tokenizer's files."""
    if record["form"] != DELTA and getattr(model, "generation_config", None) is not None:
        # as it is: save_pretrained refuses settings that published models have, a temperature without sampling for one
        model.generation_config.to_json_file(whole / "generation_config.json")
    (whole / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    (whole / "README.md").write_text(model_card(record))
    if tokenizer is not None:
        tokenizer.save_pretrained(whole)


def new_folder(folder: str | Path) -> Path:
    """Raises FileExistsError where ``folder`` exists."""
    if (folder := Path(folder)).exists():
        raise FileExistsError(f"{folder} exists; choose a new folder.")
    return folder


def _class_of(name: str) -> type:
    if not hasattr(transformers, name):
        raise ValueError(f"transformers has no class {name}, so a model that holds everything could not be loaded.")
    return getattr(transformers, name)


def tensors_inside(model: nn.Module) -> set[str]:
    """Names of all tensors inside of replacements."""
    replaced = [path for path, module in model.named_modules() if isinstance(module, Replacement)]
    tensors, tied = tensors_of(model)
    return {name for name in (*tensors, *tied) if any(name.startswith(f"{path}.") for path in replaced)}


def _check_untouched(model: nn.Module, inside: set[str]) -> None:
    """Raise ValueError unless all that is outside of replacements is as the base model's file has it."""
    source = getattr(model, "source", None)
    if source is None or source.weights is None:
        raise ValueError(
            "The base model's source is not known. Load it with load_model; or, before splicing, set model.source = "
            "Source.of(model, id) and load with base=; or save(..., standalone=True)."
        )
    for name, hashed in weight_hashes(model).items():
        if name not in inside and source.weights.get(name) != hashed:
            raise ValueError(
                f"{name} is not what {source.id} had when it was loaded (trained, cast or quantized since?), and what was not "
                "replaced would be taken from there: save(model, folder, standalone=True) writes everything."
            )
