"""The projections of an attention block, head by head, in one layout for all architectures."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from .blocks import Block, NotApplicable
from .weights import weight_bias

PARTS = ("query", "key", "value", "output")


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of self-attention. Query head i reads the keys and values of group ``group_of[i]``."""

    query: Tensor  # [heads, head_dim, hidden]
    key: Tensor  # [groups, head_dim, hidden]
    value: Tensor  # [groups, value_dim, hidden]
    output: Tensor  # [heads, value_dim, hidden]: what a head adds to the block's output is h_i @ output[i]
    group_of: Tensor  # [heads]
    query_bias: Tensor | None  # [heads, head_dim]
    key_bias: Tensor | None  # [groups, head_dim]
    value_bias: Tensor | None  # [groups, value_dim]
    output_bias: Tensor | None  # [hidden]

    def of(self, heads: Tensor) -> AttentionWeights:
        """Those of some query ``heads``, ascending, and of the groups that these read."""
        heads = heads.to(self.query.device)
        groups, group_of = self.group_of[heads].unique(return_inverse=True)
        parts = {part: heads for part in ("query", "query_bias", "output")}
        parts |= {part: groups for part in ("key", "value", "key_bias", "value_bias")}
        own = {part: None if (t := getattr(self, part)) is None else t[rows] for part, rows in parts.items()}
        return replace(self, **own, group_of=group_of)

    def with_keys(self, kept: Tensor) -> AttentionWeights:
        """Those of some dimensions of queries and keys, ``kept`` [groups, key_dim] for each group."""
        own, groups = {}, torch.arange(len(kept), device=kept.device)
        for part, of in (("query", self.group_of.to(kept.device)), ("key", groups)):
            rows = of.new_tensor(range(len(of)))[:, None], kept[of]
            own[part] = getattr(self, part)[rows]
            own[f"{part}_bias"] = None if (bias := getattr(self, f"{part}_bias")) is None else bias[rows]
        return replace(self, **own)

    def state(self) -> dict[str, Tensor]:
        """State dict of a :class:`~mlpreplace.replacements.narrow_attention.HeadAttention` with these weights."""
        state = {f"{part}.weight": getattr(self, part).flatten(0, 1) for part in PARTS}
        state["output.weight"] = state["output.weight"].T
        biases = {part: getattr(self, f"{part}_bias") for part in PARTS}
        return state | {f"{part}.bias": bias.flatten() for part, bias in biases.items() if bias is not None}


def attention_weights(block: Block) -> AttentionWeights:
    """The projections of ``block``. Raises NotApplicable where they are not known (see :attr:`Block.heads`)."""
    if block.heads is None:
        raise NotApplicable(
            f"{block.name} ({block.kind}): its heads are not known and cannot be selected. Mean, Linear and LowRank replace any "
            "block; register_architecture(…, Stack(…, heads=Heads(…))) says where the projections of self-attention are."
        )
    layers = {part: block.host.get_submodule(getattr(block.heads, part)) for part in PARTS}
    output, output_bias = weight_bias(layers["output"])
    n_heads = block.modules[0].config.num_attention_heads
    dim = output.shape[1] // n_heads
    read = {part: weight_bias(layers[part]) for part in PARTS[:3]}
    if block.heads.layout != "separate":
        fused, bias = read["query"]
        rows = _rows(block.heads.layout, len(fused) // dim, n_heads, dim, fused.device)
        read = {part: (fused[of_part], None if bias is None else bias[of_part]) for part, of_part in rows.items()}
    by_head = {part: weight.unflatten(0, (-1, dim)) for part, (weight, _) in read.items()}
    biases = {f"{part}_bias": None if bias is None else bias.unflatten(0, (-1, dim)) for part, (_, bias) in read.items()}
    group_of = torch.arange(n_heads, device=output.device) // (n_heads // len(by_head["key"]))
    by_head["output"] = output.T.unflatten(0, (-1, dim))
    return AttentionWeights(**by_head, group_of=group_of, **biases, output_bias=output_bias)


def head_norms(block: Block) -> list[nn.Module | None]:
    """What normalises the queries and the keys of a head."""
    found: list[nn.Module | None] = [None, None]
    for i, path in enumerate(block.heads.norms or ()):
        parent, _, name = path.rpartition(".")
        found[i] = getattr(block.host.get_submodule(parent), name, None)
    return found


def key_units(block: Block) -> Tensor | None:
    """Dimensions of queries and keys that are left out together, [units, 1 or 2]; None where none can be.

    Rotary positions turn dimensions i and i + half of them as a pair; the rest, which they leave alone, is taken in pairs as
    well. Without rotary positions every dimension is a unit. Norms of heads need all dimensions, and positions that pair
    neighbours (GLM) are not taken apart.
    """
    dim = attention_weights(block).query.shape[1]
    own = block.modules[0]
    if any(head_norms(block)):
        return None
    if "position_embeddings" not in inspect.signature(type(own).forward).parameters:
        return torch.arange(dim, device="cpu")[:, None]
    settings = getattr(own.config, "rope_parameters", None) or {}
    rotary = int(dim * settings.get("partial_rotary_factor", 1.0))
    if rotary % 2 or dim % 2 or not _turns_halves(type(own).__module__):
        return None
    of_each = (torch.arange(*ends, device="cpu").view(2, -1).T for ends in ((0, rotary), (rotary, dim)))
    return torch.cat(list(of_each))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of the dimensions i and i + half, all of one shape (Su et al. 2021, arXiv 2104.09864)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@lru_cache
def _turns_halves(source: str) -> bool:
    """Whether the functions of an architecture turn positions as :func:`turned` does."""
    if (function := getattr(sys.modules[source], "apply_rotary_pos_emb", None)) is None:
        return False
    x, angles = (torch.arange(n, device="cpu", dtype=torch.float32) for n in (24, 6))
    x, angles = x.view(1, 2, 3, 4), angles.view(1, 3, 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.allclose(function(x, x, cos, sin)[0], turned(x, cos[:, None], sin[:, None]))


def query_columns(block: Block) -> Tensor:
    """Where the queries are in the outputs of the layer that makes them, [heads · head_dim]."""
    weights, layer = attention_weights(block), block.host.get_submodule(block.heads.query)
    heads, dim, _ = weights.query.shape
    if block.heads.layout == "separate":
        return torch.arange(heads * dim, device="cpu")
    return _rows(block.heads.layout, len(weight_bias(layer)[0]) // dim, heads, dim, torch.device("cpu"))["query"]


def _rows(layout: str, total: int, heads: int, dim: int, device: torch.device) -> dict[str, Tensor]:
    """{part: its rows} of a fused projection of ``total`` heads: queries, keys and values."""
    groups = (total - heads) // 2
    rows = torch.arange(total * dim, device=device).unflatten(0, (total, dim))  # [total, dim]
    if layout == "stacked":
        parts = rows.split([heads, groups, groups])
    else:
        by_group = rows.unflatten(0, (groups, -1))  # [groups, heads of a group + 2, dim]
        parts = by_group[:, :-2], by_group[:, -2], by_group[:, -1]
    return {part: indices.flatten() for part, indices in zip(PARTS, parts, strict=False)}
