"""replacements.json: what a saved model is, written from a model in hand and read with its keys and their kinds checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import NoneType

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.int8 import Int8Linear
from ..models.architectures import ARCHITECTURES, layer_lists, register_architecture, type_of
from ..models.blocks import KINDS, Block, find_blocks
from ..models.layers import layer_blocks
from ..models.loading import empty_model
from ..models.stack import Stack
from ..replacements.splice import replacements_of, sparsity_of
from ..runtime.files import read_checked, strict_json
from ..runtime.fingerprint import fingerprint
from .card import DELTA, PLAIN, STANDALONE, model_card

RECORD, CONFIG, GENERATION = "replacements.json", "config.json", "generation_config.json"
WEIGHTS = {DELTA: "replacements.safetensors", STANDALONE: "weights.safetensors"}  # names that from_pretrained does not read
TEXT = (str, NoneType)
KEYS = {
    "form": str,
    "base": (dict, NoneType),
    "model": str,
    "architecture": dict,
    "dtype": str,
    "replacements": dict,
    "int8": list,
}
KEYS_OF_BASE = {"id": str, "revision": TEXT, "sha256": TEXT, "weights": TEXT}
KEYS_OF_ONE = {"family": str, "body": str, "report": (dict, NoneType)}


def check_bare(model: nn.Module) -> None:
    """Raise ValueError, with what to give instead, unless ``model`` is a model of transformers without wrappers and adapters."""
    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    for path, module in named.items():
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            raise ValueError(
                f"{path or 'The model'} is a {type(module).__name__} of PEFT, whose adapters are in no saved form: give "
                "model.merge_and_unload(), which merges them into the weights."
            )
    if not isinstance(model, PreTrainedModel):
        inner = next((path for path, module in named.items() if isinstance(module, PreTrainedModel)), None)
        instead = "give what splice returned" if inner is None else f"give the model inside, model.{inner}"
        raise ValueError(f"Expected a model of transformers, got a {type(model).__name__}: {instead}.")
    if compiled := [path for path, module in named.items() if type(module).__name__ == "OptimizedModule"]:
        raise ValueError(
            f"{compiled[0]} of the model is compiled, which gives its weights other names: put back what it was, "
            f"model.{compiled[0]}._orig_mod."
        )


def describe(model: nn.Module, form: str, metrics: Mapping[str, object] | None) -> dict:
    """The content of replacements.json.

    Raises ValueError where nothing was replaced nor put in int8, and for a model that is wrapped or none of transformers.
    """
    check_bare(model)
    found, int8 = replacements_of(model), [path for path, module in model.named_modules() if isinstance(module, Int8Linear)]
    if not found and not int8:
        raise ValueError("No replacement was spliced into this model; there is nothing to save.")
    source = getattr(model, "source", None)
    dense = empty_model(type(model), model.config, meta=True)
    blocks = named_blocks(dense, found)
    owners = {r.body: name for name, r in reversed(found.items())}  # the first place of each body
    return {
        "form": form,
        "base": source.as_dict() if source else None,
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
        "int8": int8,
    }


def named_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, Block]:
    """{name: block} of at least all ``names``, which may be whole layers or parts of them. Raises ValueError for others."""
    blocks = {block.name: block for kind in KINDS for block in find_blocks(model, kind)}
    if set(names) - blocks.keys():
        blocks = layer_blocks(model) | blocks
    if missing := sorted(set(names) - blocks.keys()):
        raise ValueError(f"{type(model).__name__} has no block {missing[0]}.")
    return blocks


def write_record(whole: Path, model: nn.Module, record: dict, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write replacements.json, the model card, the tokenizer's files and, unless the base brings it, generation_config.json."""
    if record["form"] != DELTA and getattr(model, "generation_config", None) is not None:
        # not by save_pretrained, which refuses settings of published models, such as a temperature without sampling
        settings = json.loads(model.generation_config.to_json_string())
        (whole / GENERATION).write_text(strict_json(settings, indent=2) + "\n", encoding="utf-8")
    (whole / RECORD).write_text(strict_json(record, indent=2) + "\n", encoding="utf-8")
    (whole / "README.md").write_text(model_card(record), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(whole)


# Reading


def read_record(folder: Path) -> dict:
    """The content of replacements.json in a folder that save or export wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what was written, no json, or lacks something; with the file and the key.
    """
    file = folder / RECORD
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORD}; expected a folder written by mlpreplace.save or export.")
    record = json_object(read_checked(file), file)
    _expect(record, KEYS, file)
    if record["form"] not in (DELTA, STANDALONE, PLAIN):
        raise ValueError(f"{file}: 'form' is {record['form']!r}, expected {DELTA}, {STANDALONE} or {PLAIN}.")
    if not getattr(getattr(torch, record["dtype"], None), "is_floating_point", False):
        raise ValueError(f"{file}: 'dtype' is {record['dtype']!r}, expected a precision of PyTorch, such as float32.")
    _expect(record, {"widths": bool} if record["form"] == PLAIN else {"tied": dict}, file)
    if not all(isinstance(item, str) for item in (*record["int8"], *record.get("tied", {}).values())):
        raise ValueError(f"{file}: 'int8' and 'tied' should name modules and tensors.")
    if record["base"] is not None:
        _expect(record["base"], KEYS_OF_BASE, f"{file}: base")
    elif record["form"] == DELTA:
        raise ValueError(f"{file}: 'base' is null, and replacements alone are of no use without one.")
    for name, spec in record["replacements"].items():
        _expect(spec, KEYS_OF_ONE, f"{file}: the replacement of {name}")
    _register(record["architecture"], f"{file}: architecture")
    return record


def json_object(content: bytes, file: Path) -> dict:
    """``content`` of ``file`` as json; raises ValueError unless it is an object."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no json: {str(error).splitlines()[0]}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} should hold a json object, and holds a {type(found).__name__}.")
    return found


def _expect(record: object, keys: Mapping[str, type | tuple[type, ...]], where: object) -> None:
    """Raise ValueError unless ``record`` has all ``keys``, with values of their kinds."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} should be an object, and is {record!r:.60}.")
    for key, kinds in keys.items():
        names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        if key not in record:
            raise ValueError(f"{where} has no {key!r}, a {names}.")
        if not isinstance(record[key], kinds):
            raise ValueError(f"{where}: {key!r} is {record[key]!r:.60}, expected a {names}.")


def _register(architecture: dict, where: str) -> None:
    """Register an architecture that was registered, or guessed, in the process that compressed the model."""
    _expect(architecture, {"type": str, "stacks": list}, where)
    try:
        stacks = [Stack.from_dict(stack) for stack in architecture["stacks"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: 'stacks' is no list of Stacks ({error!r}).") from error
    if architecture["type"] not in ARCHITECTURES:
        register_architecture(architecture["type"], *stacks)


def check_base(record: dict, found: Mapping[str, str], folder: Path) -> None:
    """Raise ValueError unless the base in hand, with weights of these hashes, is the one that the model was made from."""
    made, hashed = record["base"], fingerprint(found)
    if hashed != made["weights"]:
        raise ValueError(
            f"The base model differs: {folder} was made from {made['id']} with weights of hash {made['weights']}, found "
            f"{hashed}. Restore the weights it was made from, give them as load(folder, base=model), or fit and save again."
        )
