"""Save a compressed model and load it again: the replacements alone, or all weights.

A folder holds config.json, safetensors weights, replacements.json and a model card. It appears under its name when it is
complete, and never overwrites another.
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

from ..evaluation.int8 import Int8Linear
from ..models.architectures import ARCHITECTURES, Stack, layer_lists, register_architecture, type_of
from ..models.blocks import KINDS, Block, find_blocks, layer_blocks
from ..models.loading import SPREAD, Source, empty_model, load_model, no_progress_bars, resolve_device, weight_hashes
from ..replacements.families import Family, Replacement
from ..replacements.records import FitReport
from ..replacements.splice import replacements_of, sparsity_of, splice
from ..runtime.files import whole_folder
from ..runtime.fingerprint import fingerprint
from .card import DELTA, PLAIN, STANDALONE, model_card
from .tensors import fill, temporary_buffers, tensors_of

RECORD = "replacements.json"
WEIGHTS = {DELTA: "replacements.safetensors", STANDALONE: "weights.safetensors"}  # names that from_pretrained does not read
WITHOUT_EFFECT = PreTrainedConfig().to_dict().keys() | {"use_cache"}  # settings that change no output of a model


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    standalone: bool = False,
    metrics: Mapping[str, object] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a spliced model into a new folder, for :func:`load`. Shared weights are stored once.

    Args:
        standalone: write all weights, so that the base model is not needed. Otherwise only the replacements are written;
            :func:`load` then loads the base model, and refuses one with other weights.
        metrics: measured values that json can hold, for replacements.json and the model card.
        tokenizer: is saved with the model.

    Raises:
        ValueError: nothing was spliced. Standalone: transformers does not have the model's class. Otherwise: the base's weights
            are not known (from load_model or :meth:`Source.of`), or weights outside of replacements have changed.
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
        write_record(whole, model, record | {"tied": tied}, tokenizer)
    return folder


def load(folder: str | Path, *, device: str = "auto", base: nn.Module | None = None) -> nn.Module:
    """The model that :func:`save` or :func:`~mlpreplace.export` wrote, with the same logits, bit for bit on the same machine.
    Shared weights are shared again.

    Args:
        device: as for :func:`~mlpreplace.models.load_model`; a standalone or exported model goes onto a single one.
        base: the dense model for a folder with replacements alone, where :func:`~mlpreplace.models.load_model` cannot load it:
            that loads causal language models. It must have the weights and precision of the model that was compressed. The
            result is on its device.

    Raises:
        FileNotFoundError: no replacements.json in ``folder``.
        ValueError: the base model differs in its weights or configuration from the one that was compressed; a base for a model
            that needs none; missing weights; a standalone or exported model and a way to spread layers over GPUs.
    """
    folder = Path(folder)
    if not (folder / RECORD).exists():
        raise FileNotFoundError(f"{folder} holds no {RECORD}; expected a folder written by mlpreplace.save or export.")
    record = json.loads((folder / RECORD).read_text())
    architecture = record["architecture"]
    if architecture["type"] not in ARCHITECTURES:  # it was registered or guessed in the process that compressed the model
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
    model.source = Source.of(model, str(folder))  # it is a dense model now
    return model


def _load_delta(folder: Path, record: dict, device: str, base: nn.Module | None) -> nn.Module:
    source, dtype, model = record["base"], getattr(torch, record["dtype"]), base
    if model is None:
        model, _ = load_model(source["id"], revision=source["revision"], device=device, dtype=dtype)
    if model.dtype != dtype:
        raise ValueError(f"The base model is in {model.dtype}, {folder} was made in {dtype}.")
    found = fingerprint(weight_hashes(base) if base is not None else model.source.weights)
    if found != source["weights"]:
        raise ValueError(
            f"The base model differs: {folder} was made from {source['id']} with weights of hash {source['weights']}, found "
            f"{found}. Restore the weights it was made from, give them as load(folder, base=model), or fit and save again."
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
    """The settings of ``config`` that may change the model's output, as json has them."""
    return {k: v for k, v in json.loads(config.to_json_string(use_diff=False)).items() if k not in WITHOUT_EFFECT}


def _rebuilt(model: nn.Module, record: dict) -> nn.Module:
    """``model`` with the replacements and int8 layers of ``record``, whose tensors are yet to be set."""
    blocks = named_blocks(model, record["replacements"])
    plan: dict[Block, Replacement] = {}
    for name, saved in record["replacements"].items():
        spec = dict(saved)
        report, owner = spec.pop("report"), spec.pop("body")
        plan[blocks[name]] = replacement = Replacement(Family.from_dict(spec), blocks[name])
        if owner != name:  # a block before this one, whose body it shares
            replacement.body = plan[blocks[owner]].body
        replacement.report = FitReport.from_dict(report) if report else None
    compressed = splice(model, plan)
    for path in record["int8"]:
        compressed.set_submodule(path, Int8Linear(compressed.get_submodule(path)))
    return compressed


def named_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, Block]:
    """{name: block} of at least all ``names``, which may be whole layers or parts of them. Raises ValueError for others."""
    blocks = {block.name: block for kind in KINDS for block in find_blocks(model, kind)}
    if set(names) - blocks.keys():
        blocks = layer_blocks(model) | blocks
    if missing := sorted(set(names) - blocks.keys()):
        raise ValueError(f"{type(model).__name__} has no block {missing[0]}.")
    return blocks


def describe(model: nn.Module, form: str, metrics: Mapping[str, object] | None) -> dict:
    """The content of replacements.json. Raises ValueError where nothing was replaced."""
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
        "sparsity": sparsity_of(dense, {blocks[name]: r for name, r in found.items()}),
        "metrics": dict(metrics or {}),
        "versions": {name: version(name) for name in ("mlpreplace", "torch", "transformers", "safetensors")},
        "replacements": {
            name: {**r.family.as_dict(), "report": asdict(r.report) if r.report else None, "body": owners[r.body]}
            for name, r in found.items()
        },
        "int8": [path for path, module in model.named_modules() if isinstance(module, Int8Linear)],
    }


def write_record(whole: Path, model: nn.Module, record: dict, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write replacements.json, the model card, the tokenizer's files and, unless the base brings it, generation_config.json."""
    if record["form"] != DELTA and getattr(model, "generation_config", None) is not None:
        # not by save_pretrained, which refuses settings of published models, such as a temperature without sampling
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
    """Names of all tensors inside of replacements, tied ones included."""
    replaced = [path for path, module in model.named_modules() if isinstance(module, Replacement)]
    tensors, tied = tensors_of(model)
    return {name for name in (*tensors, *tied) if any(name.startswith(f"{path}.") for path in replaced)}


def _check_untouched(model: nn.Module, inside: set[str]) -> None:
    """Raise ValueError unless all tensors outside of replacements are those of the base model when it was loaded."""
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
