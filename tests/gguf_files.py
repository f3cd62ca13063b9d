"""GGUF files of tiny Llamas with a tokenizer of bytes, as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_models import build
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM

TOKENS = ["<end>", *sorted(ByteLevel.alphabet()), "th"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    return build("llama", seed, **dict(vocab_size=len(TOKENS), intermediate_size=64) | changes)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    kind: str = "F32",
    without: Collection[str] = (),
    tensors: Mapping[str, torch.Tensor] | None = None,
    settings: Mapping[str, object] | None = None,
) -> Path:
    """Write ``model``.

    Args:
        kind: of the matrices, "Q8_0" for example.
        without: names of weights, as transformers has them, that are left out.
        tensors, settings: written besides, or instead.
    """
    c, writer = model.config, gguf.GGUFWriter(path, "llama")
    own = {
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.block_count": c.num_hidden_layers,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.rope.dimension_count": c.head_dim,
        "llama.rope.freq_base": c.rope_parameters["rope_theta"],
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (own | dict(settings or {})).items():
        add[type(value)](key, value)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["t h"])
    for name, tensor in model.state_dict().items():
        if name not in without:
            to = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
            writer.add_tensor(_name(name), gguf.quants.quantize(_paired(name, tensor.numpy(), c), to), raw_dtype=to)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.float().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return path


def _name(name: str) -> str:
    stem, _, leaf = name.removeprefix("model.layers.").rpartition(".")
    index, _, inside = stem.partition(".")
    return f"blk.{index}.{NAMES[inside]}.{leaf}" if index.isdigit() else f"{NAMES[stem]}.{leaf}"


def _paired(name: str, weight: np.ndarray, config) -> np.ndarray:
    """Rows in the order of llama.cpp, which turns neighbours where transformers turns halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
