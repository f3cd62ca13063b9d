"""What the costs of a model depend on, from its configuration: a model on the meta device, without weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from mlpreplace import find_blocks
from mlpreplace.evaluation.parameter_share import PublishedModel, model_shares, published_configs
from mlpreplace.models.blocks import Block

LLAMA = dict(model_type="llama", class_name="LlamaForCausalLM")
SMALL = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, tie_word_embeddings=True)
OTHERS = (  # beside published_models.yaml; the 8B and the 70B of Llama 3.1 have the shapes of Llama 3
    PublishedModel(
        "Llama-3.2-1B",
        config=dict(SMALL, vocab_size=128256, num_hidden_layers=16, num_key_value_heads=8, max_position_embeddings=131072),
        published_params=1_235_814_400,
        **LLAMA,
    ),
    PublishedModel(
        "SmolLM2-1.7B",
        config=dict(SMALL, vocab_size=49152, num_hidden_layers=24, num_key_value_heads=32, max_position_embeddings=8192),
        published_params=1_711_376_384,
        **LLAMA,
    ),
)


@dataclass(frozen=True)
class Size:
    """What the costs of a model depend on. Bytes are in bfloat16."""

    blocks: tuple[Block, ...]  # MLPs, then attention, on the meta device
    vocabulary: int
    parameters: int
    layer_flops: float  # of a token in a forward pass through all layers
    head_flops: float
    itemsize: int

    @property
    def mlp(self) -> Block:
        return self.blocks[0]

    @property
    def attention(self) -> Block:
        return self.blocks[-1]

    @property
    def layers(self) -> int:
        return len(self.blocks) // 2

    def of_kind(self, kind: str) -> int:
        """Parameters of all blocks of a kind."""
        return sum(block.n_params for block in self.blocks if block.kind == kind)


@cache
def size_of(name: str, seq_len: int, layers: int | None = None) -> Size:
    """Of a published model, with another number of ``layers`` if given. Raises ValueError for an unknown name."""
    known = {published.name: published for published in (*published_configs(), *OTHERS)}
    if name not in known:
        raise ValueError(f"Unknown model {name!r}; known are {', '.join(known)}.")
    changed = {"num_hidden_layers": layers} if layers else {}
    published = PublishedModel(**vars(known[name]) | {"config": known[name].config | changed})
    return size(published.build().to(torch.bfloat16), seq_len)


def size(model: nn.Module, seq_len: int) -> Size:
    """Of a model in its own precision; it may be on the meta device."""
    flops = model_shares(model, "", context=seq_len)
    return Size(
        blocks=(*find_blocks(model), *find_blocks(model, "attention")),
        vocabulary=model.config.vocab_size,
        parameters=flops["total"],
        layer_flops=flops["mlp_flops"] + flops["attention_flops"],
        head_flops=flops["head_flops"],
        itemsize=model.dtype.itemsize,
    )
