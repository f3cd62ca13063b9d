"""Attention with fewer heads and narrower values, which stays attention: it reads positions, masks and the cache of its layer.

Four parts of self-attention can be left out. A query head goes with its share of the output projection. A key-value head (a
group) goes with all query heads that read it, and with its part of the KV cache. Values of a group can be narrowed: the block
keeps the directions of a head's output that the output projection needs most, so values are shorter, and so is the cache.
Dimensions of queries and keys can be left out, rotary pairs as a whole: their products are missing from the scores then (the CR
decomposition of MoDeGPT, arXiv 2408.09632).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..models.attention import attention_weights, head_norms, key_units, turned
from ..models.blocks import Block
from .families import Family, check_sizes

SHARES = (15 / 16, 7 / 8, 13 / 16, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4, 1 / 8)  # of heads, groups and value dimensions to keep
KEY_SHARES = (15 / 16, 7 / 8, 3 / 4, 5 / 8, 1 / 2)  # of the dimensions of queries and keys
POSITIONAL = "position_embeddings"  # cosines and sines [batch, seq_len, rotary], as layers hand them to attention


class HeadAttention(nn.Module):
    """Self-attention of chosen heads, behind the functions of the model's own attention: eager, sdpa, flash, flex.

    Args:
        block: the attention that it stands in for; scale, norms of heads, sliding window and position of the cache are its own.
        heads, groups, value_dim, key_dim: that are kept. Which query head reads which group, and which dimensions of queries
            and keys are kept, comes with the weights.
        biased: whether there is an output bias even where the block has none.
    """

    def __init__(self, block: Block, heads: int, groups: int, value_dim: int, key_dim: int, biased: bool = False):
        super().__init__()
        own, weights = block.modules[0], attention_weights(block)
        head_dim, d = weights.query.shape[1], block.hidden_size
        sizes = {"query": heads * key_dim, "key": groups * key_dim, "value": groups * value_dim}
        for part, size in sizes.items():
            self.add_module(part, nn.Linear(d, size, bias=getattr(weights, f"{part}_bias") is not None))
        self.output = nn.Linear(heads * value_dim, d, bias=biased or weights.output_bias is not None)
        self.query_norm, self.key_norm = _norms(block)
        self.heads, self.head_dim, self.key_dim, self.value_dim = heads, head_dim, key_dim, value_dim  # head_dim: of the block
        # dimensions of queries and keys of each group, where some are left out; which ones comes with the weights
        self.kept = None if key_dim == head_dim else (tuple(range(key_dim)),) * groups
        self.config, self.layer_idx = own.config, getattr(own, "layer_idx", None)
        self.scaling = getattr(own, "scaling", head_dim**-0.5)
        self.is_causal = getattr(own, "is_causal", False)
        self.source = type(own).__module__  # of the functions that the architecture attends and rotates by
        self.limits = _limits(block)
        self.read_by(torch.arange(heads, device="cpu") * groups // heads)

    def read_by(self, group_of: Tensor) -> None:
        """Say which group each query head reads, [heads], ascending.

        Functions that attend know groups of one size. Where some groups have fewer readers, a head of theirs is asked again.
        """
        self.group_of = tuple(group_of.tolist())
        heads = [[i for i, g in enumerate(self.group_of) if g == group] for group in dict.fromkeys(self.group_of)]
        self.num_key_value_groups = most = max(map(len, heads))  # the name that functions of transformers know
        asked = [of_group + of_group[:1] * (most - len(of_group)) for of_group in heads]
        self.asked = tuple(chain(*asked)) if any(len(of_group) < most for of_group in heads) else None

    def get_extra_state(self) -> Tensor:
        return torch.tensor([*self.group_of, *chain(*self.kept or ())], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.read_by(state[: self.heads])
        self.kept = tuple(map(tuple, state[self.heads :].view(-1, self.key_dim).tolist())) or None

    def forward(self, x: Tensor, *, cache=None, position_embeddings=None, attention_mask=None, **options) -> Tensor:
        """[batch, seq_len, hidden] → [batch, seq_len, hidden]

        Args:
            cache: of keys and values, or None.
            position_embeddings, attention_mask: as the model hands them to attention.
            options: for the function that attends.
        """
        widths = self.key_dim, self.key_dim, self.value_dim
        projected = (project(x) for project in (self.query, self.key, self.value))
        # [batch, heads or groups, seq_len, width]
        query, key, value = (p.unflatten(-1, (-1, w)).transpose(1, 2) for p, w in zip(projected, widths, strict=True))
        query, key = self.query_norm(query), self.key_norm(key)
        if position_embeddings is not None:
            query, key = self._rotated(query, key, *position_embeddings)
        if attention_mask is not None and attention_mask.is_floating_point():  # made for the model's precision
            attention_mask = attention_mask.to(query.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if self.asked is not None:
            query = query.index_select(1, _index(self.asked, query.device))
        query, key, value = self._of_one_width(query, key, value)
        functions = sys.modules[self.source]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, getattr(functions, "eager_attention_forward", eager_attention_forward)
        )
        options = self.limits | options
        mixed, _ = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **options)
        mixed = mixed[..., : self.value_dim]  # [batch, seq_len, heads, value_dim]
        if self.asked is not None:
            first = tuple(self.asked.index(head) for head in range(len(self.group_of)))
            mixed = mixed.index_select(2, _index(first, mixed.device))
        return self.output(mixed.reshape(*x.shape[:-1], -1))

    def _of_one_width(self, *parts: Tensor) -> Iterable[Tensor]:
        """Filled up with zeros, which change no score and no value: fused kernels take heads of one width alone."""
        if self.key_dim == self.value_dim or self.config._attn_implementation == "eager":
            return parts
        widest = max(self.key_dim, self.value_dim)
        return (t if t.shape[-1] == widest else F.pad(t, (0, widest - t.shape[-1])) for t in parts)

    def _rotated(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """With positions in the first dimensions, as many as there are cosines; the others pass."""
        rotary = cos.shape[-1]
        if self.kept is not None:
            if rotary < self.head_dim:
                cos, sin = (F.pad(t, (0, self.head_dim - rotary), value=at_0) for t, at_0 in ((cos, 1), (sin, 0)))
            columns, read = (_index(of, cos.device) for of in (self.kept, self.group_of))
            cos, sin = (t[..., columns].transpose(1, 2) for t in (cos, sin))  # [batch, groups, seq_len, key_dim]
            return turned(query, *(t.index_select(1, read) for t in (cos, sin))), turned(key, cos, sin)
        rotated = sys.modules[self.source].apply_rotary_pos_emb(query[..., :rotary], key[..., :rotary], cos, sin)
        if rotary == self.head_dim:
            return rotated
        return tuple(torch.cat([t, whole[..., rotary:]], -1) for t, whole in zip(rotated, (query, key), strict=True))


def _index(places: tuple, device: torch.device) -> Tensor:
    """``places`` as a tensor, made once: at every call and in every layer that would take longer than what reads it."""
    return _index_for(places, device, torch.is_inference_mode_enabled())  # of which no gradient can pass what it reads


@lru_cache(maxsize=4096)
def _index_for(places: tuple, device: torch.device, inference: bool) -> Tensor:
    return torch.tensor(places, device=device)


def _norms(block: Block) -> tuple[nn.Module, nn.Module]:
    """Copies of what normalises the queries and the keys of a head."""
    return tuple(nn.Identity() if norm is None else copy.deepcopy(norm) for norm in head_norms(block))


def _limits(block: Block) -> dict[str, object]:
    """What the architecture tells the function that attends, beside scale and mask."""
    own = block.modules[0]
    window = getattr(own, "sliding_window", getattr(own.config, "sliding_window", None))
    softcap = getattr(own, block.heads.softcap) if block.heads.softcap else None
    return {name: value for name, value in (("sliding_window", window), ("softcap", softcap)) if value is not None}


@dataclass(frozen=True)
class NarrowAttention(Family):
    """Self-attention with some of its query heads and groups, values, queries and keys narrowed, and a new output projection.

    With h heads and g groups that are kept, queries and keys of dimension c, and values of dimension r: d(hc + gc + gr + hr)
    parameters, those of biases, and those of the norms of heads.
    """

    heads: int  # query heads that are kept, at least one of each kept group
    groups: int  # key-value heads that are kept
    value_dim: int  # dimensions of a value that are kept
    key_dim: int | None = None  # dimensions of queries and keys that are kept; None for all

    attends: ClassVar[bool] = True
    biased: ClassVar[bool] = False  # whether there is an output bias even where the block has none

    def n_params(self, block: Block) -> int:
        weights = attention_weights(block)  # raises where the heads are not known
        (n, c, d), (most, own, _) = weights.query.shape, weights.value.shape
        each = n // most  # heads of a group
        check_sizes(block, groups=(self.groups, 1, most), value_dim=(self.value_dim, 1, own))
        check_sizes(block, heads=(self.heads, self.groups, self.groups * each))
        c = self._key_dim(block, c)
        sizes = {"query": self.heads * c, "key": self.groups * c, "value": self.groups * self.value_dim}
        biases = sum(size for part, size in sizes.items() if getattr(weights, f"{part}_bias") is not None)
        biases += d if self.biased or weights.output_bias is not None else 0
        norms = sum(p.numel() for norm in _norms(block) for p in norm.parameters())
        return d * (sum(sizes.values()) + self.heads * self.value_dim) + biases + norms

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where a size does not fit
        key_dim = self._key_dim(block, attention_weights(block).query.shape[1])
        return HeadAttention(block, self.heads, self.groups, self.value_dim, key_dim, self.biased)

    def _key_dim(self, block: Block, own: int) -> int:
        """Raises ValueError where queries and keys cannot be that narrow."""
        if self.key_dim is None:
            return own
        if (units := key_units(block)) is None:
            why = "norms of heads, or positions that turn neighbours, need all dimensions of queries and keys"
            raise ValueError(f"{block.name}: {why}. Expected key_dim=None, got {self.key_dim}.")
        size = units.shape[1]
        check_sizes(block, key_dim=(self.key_dim, size, own - size))
        if self.key_dim % size:
            raise ValueError(f"{block.name}: rotary positions turn pairs. Expected an even key_dim, got {self.key_dim}.")
        return self.key_dim

    @classmethod
    def nearest(cls, block: Block, n_params: float) -> Family:
        """Of :meth:`sizes` with all of queries and keys, the one whose number of parameters is nearest."""
        return min(cls.sizes(block, key_shares=()), key=lambda size: abs(size.n_params(block) - n_params))

    @classmethod
    def sizes(
        cls, block: Block, shares: Iterable[float] = SHARES, key_shares: Iterable[float] = KEY_SHARES
    ) -> list[NarrowAttention]:
        """Fewer heads; fewer groups, with values as they are or narrowed; narrower values of all heads. Each of these, and all
        heads as they are, with narrower queries and keys, where these can be narrowed.

        Args:
            shares: of heads, groups and dimensions of values that are kept, each rounded to whole ones.
            key_shares: of dimensions of queries and keys, rounded to whole units (see :func:`~mlpreplace.models.key_units`).
        """
        weights = attention_weights(block)
        n, (groups, dim, _) = len(weights.query), weights.value.shape
        each = n // groups
        shares = list(shares)

        def parts(of: int) -> list[int]:
            return sorted({min(of - 1, max(1, round(share * of))) for share in shares if of > 1}, reverse=True)

        narrow = [cls(n, groups, r) for r in parts(dim)]
        fewer = [cls(heads, groups, dim) for heads in parts(n) if heads >= groups] if each > 1 else []
        kept = [cls(g * each, g, r) for g in parts(groups) for r in (dim, *parts(dim)[1::2])]
        sizes, units = narrow + fewer + kept, key_units(block)
        if units is None:
            return sizes
        counts = {round(share * len(units)) for share in key_shares}
        dims = sorted((n * units.shape[1] for n in counts if 0 < n < len(units)), reverse=True)
        return sizes + [replace(size, key_dim=c) for c in dims for size in (cls(n, groups, dim), *sizes)]
