"""GGUF files, the format of llama.cpp: converted into a folder that transformers reads, in float32, once per file.

A model is refused where a part of it would be lost on the way: transformers passes over tensors and settings it does not know.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..runtime.files import WRITING, cache_dir, check_folder, sha256, whole_folder
from .checkpoints import check_fetched, no_progress_bars, pretrained, reading, tokenizer_of, weight_hashes

PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3.1 divides each frequency of its positions by
LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
REPEATED = {  # settings that transformers does not read, with the names that its configurations have for them
    "attention.key_length": ["head_dim"],
    "attention.value_length": ["head_dim"],
    "attention.layer_norm_epsilon": ["layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"],
    "attention.sliding_window": ["sliding_window"],
    "attn_logit_softcapping": ["attn_logit_softcapping"],
    "expert_feed_forward_length": ["moe_intermediate_size"],
    "expert_shared_feed_forward_length": ["shared_expert_intermediate_size"],
    "final_logit_softcapping": ["final_logit_softcapping"],
    "rope.dimension_count": ["head_dim"],
    "rope.freq_base": ["rope_theta"],
    "rope.scaling.type": ["rope_type"],
    "vocab_size": ["vocab_size"],
}
# how GPT-2 splits text, or single digits besides, which merges then never join
AS_GPT2 = "default gpt-2 phi-2 mpt olmo jais smollm starcoder refact codeshell command-r exaone".split()
WITHOUT_EFFECT = ("tensor_data_layout", "rope.scaling.finetuned", "attention.causal", "context_length", "feed_forward_length")


def the_gguf_of(folder: Path) -> Path | None:
    """The GGUF file of a folder without safetensors, if it holds one. Raises ValueError for several."""
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".gguf")
    if not found or list(folder.glob("*.safetensors")):
        return None
    if len(found) > 1 and not all(map(PART.search, map(str, found))):
        raise ValueError(f"{folder} holds several models: give one of {', '.join(file.name for file in found)} by its path.")
    return found[0]


def kept_conversion(name: str, digest: str, gguf: AbstractContextManager[tuple[Path, str]]) -> Path:
    """The folder in the cache with the model of a GGUF file. It is converted where there is none, or one that has changed.

    Args:
        name, digest: of the folder.
        gguf: gives the file and its sha256 where they are needed.
    """
    folder = cache_dir() / "models" / f"{name}-{digest[:12]}"
    if not _is_whole(folder):
        # moved out of the way first: another process may be about to write the same folder
        with suppress(FileNotFoundError), tempfile.TemporaryDirectory(dir=folder.parent, prefix=WRITING) as aside:
            folder.rename(Path(aside) / "spoiled")
        with gguf as (file, expected):
            convert_gguf(file, expected, folder)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except ValueError:  # there is none, or it has changed since
        return False
    return True


def convert_gguf(gguf: Path, digest: str, target: Path) -> None:
    """Write a GGUF checkpoint as float32 safetensors, config and tokenizer into the folder ``target``, whole or not at all.

    Args:
        digest: sha256 of the file.

    Raises:
        ValueError: no GGUF file, a part of one, an architecture that transformers does not read from GGUF, tensors or settings
            that it would pass over, or a file that was written meanwhile.
    """
    metadata, names = _header(gguf)
    with tempfile.TemporaryDirectory() as alone:  # away from files that are not of this model
        (Path(alone) / gguf.name).symlink_to(gguf.resolve())
        of = dict(gguf_file=gguf.name, called=str(gguf))
        how = GgufConfig(dequantize=True)  # the kernels for packed weights are code from the hub
        model = pretrained(AutoModelForCausalLM, alone, **of, dtype=torch.float32, quantization_config=how)
        tokenizer = tokenizer_of(alone, **of)
    _check_all_is_read(gguf, model, metadata, names)
    config = _config(gguf, model, names)
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    dense.load_state_dict(model.state_dict(), assign=True)
    dense.generation_config = model.generation_config
    with suppress(FileExistsError), whole_folder(target) as folder:  # or else another process has written the same
        with no_progress_bars():
            dense.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if weight_hashes(pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)) != weight_hashes(model):
            raise ValueError(f"The weights of {gguf} do not come back as they were from a checkpoint of transformers.")
        if sha256(gguf) != digest:
            raise ValueError(f"{gguf} was written while it was read: load it again.")


def _header(gguf: Path) -> tuple[dict, tuple[str, ...]]:
    """(metadata, names of the tensors) of a GGUF file that holds a whole model."""
    from transformers.integrations.gguf import read_gguf_metadata  # here and below: parts that may move
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    check_fetched(gguf)
    with reading(gguf):
        metadata, names = read_gguf_metadata(str(gguf))
    part = PART.search(gguf.name)
    if metadata.get("split.count", 1) > 1 or (part and int(part[1]) > 1):
        raise ValueError(f"{gguf} is a part of a split file: join them (llama-gguf-split --merge) and load the result.")
    split = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and split not in GGUF_PRE_TOKENIZER_SPLITS and split not in AS_GPT2:
        raise ValueError(f"{gguf} splits text as {split!r}, which transformers does not know: load its safetensors checkpoint.")
    return metadata, names


def _check_all_is_read(gguf: Path, model: PreTrainedModel, metadata: Mapping, names: tuple[str, ...]) -> None:
    """Raise ValueError for tensors and settings that transformers passed over."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = metadata["general.architecture"]
    if not is_gguf_arch_supported(architecture):  # by the newer of its two readers, which reports such tensors itself
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
        read = get_gguf_hf_weights_map(model, processor).keys() | {ROPE_FACTORS}
        if lost := [name for name in names if name not in read and name.removesuffix(".weight") not in read]:
            raise ValueError(
                f"{gguf} holds {len(lost)} tensors that a {type(model).__name__} has no place for ({', '.join(lost[:3])} …): "
                "transformers cannot load this model from GGUF. Load its safetensors checkpoint."
            )
    if architecture in GGUF_CONFIG_ARCHS:  # which are read whole
        return
    read = GGUF_CONFIG_MAPPING.get(architecture) or GGUF_CONFIG_MAPPING.get(model.config.model_type, {})
    own = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items() if key.startswith(f"{architecture}.")}
    for key, said in own.items():
        if read.get(key) is None and key not in WITHOUT_EFFECT and not _agrees(model.config, key, said):
            raise ValueError(
                f"{gguf} sets {architecture}.{key} to {said}, which transformers does not read from GGUF: the model would be "
                "another one. Load its safetensors checkpoint."
            )


def _agrees(config: PreTrainedConfig, key: str, said: object) -> bool:
    """Whether the configuration has for ``key`` what the file says."""
    if key == "rope.scaling.type" and said == "none":
        said = "default"
    own = config.to_dict() | (getattr(config, "rope_parameters", None) or {})
    if own.get("head_dim") is None:
        own["head_dim"] = config.hidden_size // config.num_attention_heads
    found = [own[name] for name in REPEATED.get(key, ()) if own.get(name) is not None]
    if isinstance(said, float):  # of 32 bits
        return any(abs(value - said) <= 1e-6 * abs(said) for value in found)
    return said in found


def _config(gguf: Path, model: PreTrainedModel, names: tuple[str, ...]) -> PreTrainedConfig:
    """The configuration of ``model`` without quantization, and with the positions of Llama 3.1 where the file has them."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    config = AutoConfig.for_model(**settings)
    if ROPE_FACTORS not in names:
        return config
    factors = next(torch.tensor(t.data) for t in GGUFReader(gguf).tensors if t.name == ROPE_FACTORS).double().flatten()
    plain = _frequencies(config)
    config.rope_parameters = {**config.rope_parameters, **LLAMA3, "factor": round(float(factors.max()), 4)}
    if factors.shape != plain.shape or not torch.allclose(_frequencies(config) * factors, plain, rtol=1e-4):
        raise ValueError(f"{gguf} scales its positions ({ROPE_FACTORS}) by other factors than Llama 3.1: load its safetensors.")
    return config


def _frequencies(config: PreTrainedConfig) -> torch.Tensor:
    """Of the positions of a Llama, [head size / 2], in float64."""
    if config.rope_parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0].double()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
