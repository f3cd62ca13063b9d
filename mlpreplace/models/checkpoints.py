"""Checkpoints: the one place that reads them. Every tensor comes from the file, and no code but that of transformers runs."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, modeling_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import logging as transformers_logging

from ..runtime.fingerprint import fingerprint
from ..runtime.memory import trim

CONFIG, WEIGHTS, INDEX, ADAPTER = "config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
POINTER = b"version https://git-lfs"  # how the file begins that git-lfs leaves in the place of a large one
FLOATS = ("F16", "BF16", "F32", "F64")  # weights in any other type are codes of quantized ones
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(.*)")  # name of a tensor of one of the experts of a mixture
MASKS = re.compile(r"\battn\.(attention\.)?(masked_)?bias$")  # causal masks that old checkpoints of GPT-2's relatives hold


def weight_hashes(model: nn.Module) -> dict[str, str]:
    """{name: hash of dtype, shape and content} of every tensor in the state dict of ``model``."""
    return {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch the progress bars of transformers off."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Whatever a library raises while it reads ``what`` becomes a ValueError that names it and the reason, in one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):  # the fault of the machine
        raise
    except Exception as error:
        reason = shorten(str(error), 240, placeholder=" …")
        raise ValueError(f"{what} cannot be loaded ({type(error).__name__}: {reason})") from error


def pretrained(model_class: type, path: str | Path, *, called: str | None = None, **options) -> PreTrainedModel:
    """The model of a checkpoint in safetensors or GGUF, in eval mode: the one call of a model's ``from_pretrained``.

    What a class declares that checkpoints may lack or hold beside (tied weights, masks) is no difference. Weights are in memory
    of their own, not mapped from the file: whatever is written there later leaves the model as it is.

    Args:
        model_class: a class of models of transformers, or one of its Auto classes.
        path: a local folder or a hub id.
        called: what errors call it, ``path`` by default.
        options: as for ``from_pretrained``: dtype, revision, device_map, gguf_file …

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; the model brings code of its own, is quantized or an
            adapter; files that cannot be read, that do not go together, or that were written meanwhile.
    """
    path, called = str(path), called or str(path)
    files, settings = [], {}
    if not options.get("gguf_file"):
        options["use_safetensors"] = True
        settings = settings_of(path, options.get("revision"))
        _check_settings(settings, called)
        if os.path.isdir(path):
            files = _weight_files(Path(path), settings)
    before = _states(files)
    with no_progress_bars(), _one_by_one(), reading(called):
        model, found = model_class.from_pretrained(
            path, **options, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
        )
    if _states(files) != before:
        raise ValueError(f"The weights in {called} were written while they were read: load it again.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(_adapter(called))
    of_text = "text_config" in settings and not hasattr(model.config, "text_config")
    _check_tensors(model, found, called, of_text)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():  # memory that PyTorch did not allocate
            tensor.data = tensor.data.clone()
    trim()  # or the heap keeps an eighth of a model as large as a gigabyte
    return model


def tokenizer_of(
    path: str | Path, *, revision: str | None = None, gguf_file: str | None = None, called: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id, or the one inside of a GGUF file in that folder.

    Raises:
        ValueError: there is none, it cannot be read, or it brings code of its own.
    """
    called = called or f"The tokenizer of {path}"
    with reading(called):
        own = get_tokenizer_config(str(path), revision=revision).get("auto_map") or ()
    own = own.get("AutoTokenizer") or () if isinstance(own, Mapping) else own
    for reference in map(str, filter(None, own if isinstance(own, (list, tuple)) else [own])):
        if tokenizer_class_from_name(reference.rpartition(".")[-1]) is None:
            raise ValueError(_own_code(called, reference))
    with reading(called):
        return AutoTokenizer.from_pretrained(str(path), revision=revision, gguf_file=gguf_file, trust_remote_code=False)


def settings_of(path: str | Path, revision: str | None = None) -> dict:
    """The content of config.json in a local folder or a hub repository. Raises ValueError where there is none to be read."""
    if not os.path.isdir(path):
        with reading(path):
            return PreTrainedConfig.get_config_dict(str(path), revision=revision)[0] or {}
    folder = Path(path)
    with reading(folder):
        files = [file for file in folder.iterdir() if file.is_file()]
    for file in files:
        check_fetched(file)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder} holds no {CONFIG}; expected a folder with {CONFIG}, safetensors weights and tokenizer, or with one .gguf."
        )
    if (folder / ADAPTER).exists():
        raise ValueError(_adapter(str(folder)))
    return json_of(folder / CONFIG)


def check_fetched(file: Path) -> None:
    """Raise ValueError for a file that git-lfs has yet to fetch."""
    with reading(file), file.open("rb") as opened:
        start = opened.read(len(POINTER))
    if start == POINTER:
        raise ValueError(f"{file} is a pointer of git-lfs, not the file itself: fetch it with git lfs pull.")


def json_of(file: Path) -> dict:
    """The content of a json file that holds an object. Raises ValueError where it does not."""
    with reading(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a json {type(content).__name__}; expected an object.")
    return content


def _check_settings(settings: dict, called: str) -> None:
    """Raise ValueError for a model that needs code which transformers does not have, or whose weights are codes."""
    own = settings.get("auto_map") or {}
    for name, native in _native_names(settings).items():
        reference = own.get(name) if isinstance(own, dict) else own
        if reference and str(reference).rpartition(".")[-1].casefold() not in native:
            raise ValueError(_own_code(called, str(reference)))
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):  # text_config, for example
        for name in IMPLEMENTATIONS:
            if "/" in str(part.get(name)):
                raise ValueError(_own_code(called, f"{name} {part[name]!r}"))
        if quantized := part.get("quantization_config") or part.get("compression_config"):
            method = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else quantized
            raise ValueError(
                f"{called} is quantized ({method}): its layers do not compute with the weights that they store. Load the "
                "checkpoint that it was made from, or one that was dequantized."
            )


def _native_names(settings: dict) -> dict[str, set[str]]:
    """{Auto class: names in lower case of what transformers has for it}. Checkpoints may name code that it has by now."""
    kind = settings.get("model_type")
    config_class = CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None
    models = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, ()) if config_class else ()
    models = models if isinstance(models, tuple) else (models,)
    found = {"AutoConfig": (config_class,) if config_class else (), "AutoModelForCausalLM": models}
    return {name: {c.__name__.casefold() for c in classes} for name, classes in found.items()}


def _own_code(called: str, what: str) -> str:
    return f"{called} brings code of its own ({what}), which is never run here: load a model that transformers has the code of."


def _adapter(called: str) -> str:
    return f"{called} is an adapter of PEFT ({ADAPTER}): merge it into its base model (merge_and_unload) and save that."


def _weight_files(folder: Path, settings: dict) -> list[Path]:
    """The files that transformers takes the weights of a local checkpoint from.

    Raises ValueError unless they are whole, hold weights and not codes, and go together.
    """
    if spread := sorted(folder.glob("shard-*-model-*.safetensors")):
        raise ValueError(f"{spread[0]} is a part of a distributed checkpoint: consolidate it, then load the result.")
    name = settings.get("transformers_weights") or (WEIGHTS if (folder / WEIGHTS).is_file() else INDEX)
    if not str(name).endswith((".safetensors", ".safetensors.index.json")) or not (folder / name).is_file():
        raise ValueError(f"{folder} holds no .safetensors weights ({WEIGHTS} or {INDEX}; pickled checkpoints are not loaded).")
    if name.endswith(".safetensors"):
        _check_experts(folder, _tensors_in(folder / name))
        return [folder / name]
    listed = json_of(folder / name).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{folder / name} has no weight_map, which says which file holds which tensor.")
    files = [folder / file for file in sorted(set(listed.values()))]
    if lost := [file for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {lost[0].name}, which {name} names: download or copy it again.")
    for file in files:
        held, expected = _tensors_in(file), {tensor for tensor, place in listed.items() if folder / place == file}
        if wrong := sorted(expected - held) + sorted(t for t in held - expected if t in listed):
            raise ValueError(f"{file} and {name} disagree on where {wrong[0]} is: they are not of one checkpoint.")
    _check_experts(folder, listed)
    return files


def _check_experts(folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError where an expert is missing, or a tensor of one: transformers stacks those that are there."""
    mixtures: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for mixture, expert, tensor in (found.groups() for name in names if (found := EXPERT.fullmatch(name))):
        mixtures[mixture][int(expert)].add(tensor)
    for mixture, held in mixtures.items():
        expected = set().union(*held.values())
        for expert in range(max(held) + 1):
            if lost := expected - held[expert]:
                raise ValueError(f"{folder} lacks {mixture}.{expert}.{min(lost)}: download or copy it again.")


def _tensors_in(file: Path) -> set[str]:
    """Names of the tensors of a safetensors file. Raises ValueError unless it is whole and its weights are numbers."""
    try:
        with safe_open(file, "pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}): download or copy it again.") from error
    if codes := [name for name, kind in kinds.items() if name.endswith((".weight", ".bias")) and kind not in FLOATS]:
        if codes := [name for name in codes if not MASKS.search(name)]:
            raise ValueError(f"{file} stores {codes[0]} as {kinds[codes[0]]}, not as numbers: load a model without quantization.")
    return set(kinds)


def _states(files: list[Path]) -> list[tuple]:
    """What changes when a file is replaced or written to."""
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(os.stat, files)]


@contextmanager
def _one_by_one() -> Iterator[None]:
    """transformers reads tensors one by one, and does not report those that differ, which is raised here.

    Files that it maps would stay in memory beside the copies of their tensors until all of these are made.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    modeling_utils.safe_open = lambda *args, **options: safe_open(*args, **options | {"backend": "pread"})
    try:
        yield
    finally:
        modeling_utils.safe_open = safe_open
        transformers_logging.set_verbosity(level)


def _check_tensors(model: PreTrainedModel, found: Mapping, called: str, of_text: bool) -> None:
    """Raise ValueError for tensors that ``found`` names, except for those which a checkpoint may hold beside the model's.

    Args:
        of_text: the checkpoint also holds a vision model, for example.
    """
    own = model.state_dict().keys()
    beside = {name for name, _ in model.named_buffers()} - own  # the model computes them
    parts = {name.partition(".")[0] for name in (*own, model.base_model_prefix)}
    unexpected = [
        name
        for name in found["unexpected_keys"]
        if not (name in beside or MASKS.search(name) or (of_text and name.partition(".")[0] not in parts))
    ]
    other_shape = {name: f"{name}: {list(has)}, expected {list(due)}" for name, has, due in found["mismatched_keys"]}
    kinds = {
        "missing": set(found["missing_keys"]) - other_shape.keys(),
        "unexpected": unexpected,
        "of another shape": other_shape.values(),
        "not loaded": found["error_msgs"],
    }
    if wrong := [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]:
        raise ValueError(
            f"{called} is not the checkpoint of a {type(model).__name__} with this configuration. Tensors: {'; '.join(wrong)}."
        )


def _some(names: Collection[str]) -> str:
    """The first three of ``names``."""
    return ", ".join([*sorted(names)[:3], *["…"] * (len(names) > 3)])
