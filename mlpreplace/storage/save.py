"""Save a compressed model and load it again: the replacements alone, or all weights.

A folder holds config.json, safetensors weights, replacements.json, a model card and SHA256SUMS. It appears under its name when it
is complete, never overwrites another, and is read only where every byte is what was written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ..models.checkpoints import pretrained, weight_hashes
from ..models.loading import SPREAD, Source, load_model, resolve_device
from ..replacements.splice import unshared
from ..runtime.files import SUMS, check_folder, new_folder, read_checked, whole_folder
from .card import DELTA, PLAIN, STANDALONE
from .rebuild import (
    class_of,
    config_of,
    made_empty,
    parameters_fit,
    rebuilt,
    skeleton_of,
    tensors_inside,
    weights_of,
)
from .record import CONFIG, GENERATION, RECORD, WEIGHTS, check_bare, check_base, describe, json_object, read_record, write_record
from .tensors import at_rest, check_tensors, fill, temporary_buffers, tensors_of

WITHOUT_EFFECT = PreTrainedConfig().to_dict().keys() | {"use_cache"}  # settings that change no output of a model


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    standalone: bool = False,
    metrics: Mapping[str, object] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a spliced model, or one in int8, into a new folder, for :func:`load`. Shared weights are stored once.

    What a model computes from its configuration is stored as it is before the first forward pass: frequencies of dynamic RoPE,
    which follow the length of the last input, are those for short ones.

    Args:
        folder: is made before the work, and may be there already if it is empty.
        standalone: write all weights, so that the base model is not needed. Otherwise only the replacements are written;
            :func:`load` then loads the base model, and refuses one with other weights.
        metrics: measured values that json can hold, for replacements.json and the model card. NaN and infinity become null.
        tokenizer: is saved with the model.

    Raises:
        ValueError: nothing was spliced; a model that is wrapped (compiled, PEFT, DataParallel). Standalone: transformers does
            not have the model's class. Otherwise: the base's weights are not known (from load_model or :meth:`Source.of`), or
            weights outside of replacements have changed.
        FileExistsError: ``folder`` exists and is not empty, or something else was written there meanwhile.
        OSError: it cannot be made or written; nothing is left there.
    """
    with new_folder(folder) as folder:
        form = STANDALONE if standalone else DELTA
        record = describe(model, form, metrics)
        tensors, tied = tensors_of(model)
        if standalone:
            class_of(type(model).__name__)
            tensors |= at_rest(model)
        else:
            inside = tensors_inside(model)
            _check_untouched(model, inside)
            tensors = {name: t for name, t in tensors.items() if name in inside}
            tied = {name: owner for name, owner in tied.items() if name in inside}
        with writing(folder), whole_folder(folder) as whole:
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(whole)
            save_file({name: unshared(t).contiguous() for name, t in tensors.items()}, whole / WEIGHTS[form], {"format": "pt"})
            write_record(whole, model, record | {"tied": tied}, tokenizer)
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Every way in which a library says that files of ``folder`` could not be written becomes one OSError."""
    try:
        yield
    except FileExistsError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):  # as code in Rust says it
            raise
        raise OSError(
            f"{folder} could not be written ({error}). Make room, or choose another place; nothing is left there."
        ) from error


def load(folder: str | Path, *, device: str = "auto", base: nn.Module | None = None) -> nn.Module:
    """The model that :func:`save` or :func:`~mlpreplace.export` wrote, with the same logits, bit for bit on the same machine.
    Shared weights are shared again.

    Files are compared with SHA256SUMS, and modules with the file of weights before they take memory.

    Args:
        device: as for :func:`~mlpreplace.models.load_model`; a standalone or exported model goes onto a single one.
        base: the dense model for a folder with replacements alone, where :func:`~mlpreplace.models.load_model` cannot load it:
            that loads causal language models. It must have the weights and precision of the model that was compressed. The
            result is on its device, and ``base`` stays as it is (see :func:`~mlpreplace.splice`).

    Raises:
        FileNotFoundError: no replacements.json in ``folder``.
        ValueError: a file that is not what was written, or that does not go with the others; the base model differs in its
            weights or configuration from the one that was compressed; a base for a model that needs none; missing weights; a
            standalone or exported model and a way to spread layers over GPUs.
    """
    folder = Path(folder).expanduser()
    record = read_record(folder)
    if record["form"] == DELTA:
        return _load_delta(folder, record, device, base)
    if base is not None:
        raise ValueError(f"{folder} holds a whole model: load it without base=.")
    if device in SPREAD:
        raise ValueError(
            f"{folder} holds a whole model, which is loaded onto one device; accelerate.dispatch_model spreads it then."
        )
    place = resolve_device(device)
    if record["form"] == PLAIN:
        check_folder(folder)
        model = load_plain(folder, record)
    else:
        model = _load_standalone(folder, record)
    written = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    if (file := folder / GENERATION).exists() or any(line.endswith(f"  {GENERATION}") for line in written):
        model.generation_config = _generation(read_checked(file), file)
    return model.to(place)


def _generation(content: bytes, file: Path) -> GenerationConfig:
    settings = json_object(content, file)
    try:
        return GenerationConfig.from_dict(settings)
    except Exception as error:  # whatever transformers makes of values it does not expect
        raise ValueError(f"{file} says no way to generate: {error}.") from error


def _load_standalone(folder: Path, record: dict) -> nn.Module:
    file, where = folder / WEIGHTS[STANDALONE], folder / RECORD
    config = config_of(class_of(record["model"]).config_class, read_checked(folder / CONFIG), folder / CONFIG)
    tensors = weights_of(read_checked(file), file)
    room = sum(t.numel() for t in tensors.values())
    skeleton = rebuilt(made_empty(config, record, folder / CONFIG, meta=True), record, where, room=room)
    check_tensors(skeleton, tensors, record["tied"], (), folder)
    model = rebuilt(made_empty(config, record, folder / CONFIG), record, where)
    fill(model, tensors, record["tied"])
    model.source = Source.from_dict(record["base"]) if record["base"] else None
    return model


def load_plain(folder: Path, record: dict) -> nn.Module:
    """The model of an exported folder, on the CPU. Its files are not compared with SHA256SUMS."""
    model_class, files = class_of(record["model"]), sorted(folder.glob("*.safetensors"))
    config = config_of(model_class.config_class, (folder / CONFIG).read_bytes(), folder / CONFIG)
    if not parameters_fit(made_empty(config, record, folder / CONFIG, meta=True), files):
        raise ValueError(f"{folder}: the model of {CONFIG} has more parameters than the weights beside it.")
    if record["widths"]:
        model = made_empty(config, record, folder / CONFIG)
        model.tie_weights()
        tensors = {name: t for file in files for name, t in weights_of(file.read_bytes(), file).items()}
        tied, temporary = tensors_of(model)[1], temporary_buffers(model)
        check_tensors(model, tensors, tied, temporary, folder)
        fill(model, tensors, tied, temporary)
    else:
        model = pretrained(model_class, folder, dtype=getattr(torch, record["dtype"])).eval()
    model.source = Source.of(model, str(folder.resolve()))  # it is a dense model now
    return model


def _load_delta(folder: Path, record: dict, device: str, base: nn.Module | None) -> nn.Module:
    source, dtype, model = record["base"], getattr(torch, record["dtype"]), base
    file, config = folder / WEIGHTS[DELTA], folder / CONFIG
    tensors, made_with = weights_of(read_checked(file), file), read_checked(config)
    if model is None:
        model, _ = load_model(source["id"], revision=source["revision"], device=device, dtype=dtype)
    check_bare(model)
    if model.dtype != dtype:
        raise ValueError(f"The base model is in {model.dtype}, {folder} was made in {dtype}.")
    check_base(record, weight_hashes(base) if base is not None else model.source.weights, folder)
    expected, own = _settings(config_of(type(model.config), made_with, config)), _settings(model.config)
    if differing := [key for key in expected if expected[key] != own.get(key)]:
        said = f"{differing[0]}={expected[differing[0]]}, found {own.get(differing[0])}"
        raise ValueError(f"The base model differs in its configuration: {folder} was made with {said}. Restore what it was.")
    skeleton = rebuilt(skeleton_of(model), record, folder / RECORD, room=sum(t.numel() for t in tensors.values()))
    inside = tensors_inside(skeleton)
    untouched = {name for name in (*skeleton.state_dict(), *temporary_buffers(skeleton)) if name not in inside}
    check_tensors(skeleton, tensors, record["tied"], untouched, folder)
    compressed = rebuilt(model, record, folder / RECORD)
    fill(compressed, tensors, record["tied"], untouched)
    return compressed


def _settings(config: PreTrainedConfig) -> dict:
    """The settings of ``config`` that may change the model's output, as json has them."""
    return {k: v for k, v in json.loads(config.to_json_string(use_diff=False)).items() if k not in WITHOUT_EFFECT}


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
