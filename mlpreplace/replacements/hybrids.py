"""Hybrid families: replacements that combine a narrow MLP with convolution, attention or routing.

Convolution and attention look at earlier tokens, which an MLP block cannot, and never at later ones, in an encoder neither.
They do not know of padding: sequences must be padded on the right, where a causal module does not see it. Only the taps of a
convolution encode positions; attention sees which tokens came before, not where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.blocks import Block
from .families import Family, NarrowMLP, TwoLayerMLP, check_sizes
from .kv_cache import Past


def inner_mlp(block: Block, width: int) -> Family:
    """The MLP inside a hybrid: a NarrowMLP, or a TwoLayerMLP where the block has no neurons (a mixture of experts)."""
    return NarrowMLP(width) if block.has_neurons else TwoLayerMLP(width)


class LookingBack(nn.Module):
    """A module whose outputs depend on earlier tokens, so that it must know where sequences begin."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """[batch, seq_len, hidden], or [tokens, hidden] with a ``past`` that knows the sequences. Raises ValueError for less."""
        windows = x if past is None else past.windows(x)
        if windows.dim() != 3:
            name, shape = type(self).__name__, list(x.shape)
            raise ValueError(f"{name} looks at earlier tokens: expected [batch, seq_len, hidden], got {shape}.")
        return self.mix(windows, past).reshape(x.shape)

    def mix(self, x: Tensor, past: Past | None) -> Tensor:
        """[batch, seq_len, hidden] → the same shape."""
        raise NotImplementedError


class CausalAttention(nn.Module):
    """Self-attention over this and earlier tokens, without positional encoding and without biases."""

    def __init__(self, hidden: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(hidden, heads * head_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        # each [batch, heads, seq_len, head_dim]
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if past is not None:
            k, v = past.extend(k, v)  # [batch, heads, earlier + seq_len, head_dim]
        queries, keys = q.shape[-2], k.shape[-2]
        if queries == keys:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class _ConvMLP(LookingBack):
    def __init__(self, hidden: int, kernel: int, mlp: nn.Module):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(hidden, kernel))  # the last tap is that of the present token
        self.mlp = mlp

    def mix(self, x: Tensor, past: Past | None) -> Tensor:
        hidden, kernel = self.taps.shape
        seen = x  # [batch, earlier + seq_len, hidden]
        if past is not None:
            seen = past.extend(x[:, None], x[:, None, :, :0], window=kernel)[0].squeeze(1)
        missing = kernel - 1 + x.shape[1] - seen.shape[1]  # at the start of a sequence: zeros
        padded = F.pad(seen.transpose(1, 2), (missing, 0))  # [batch, hidden, kernel - 1 + seq_len]
        mixed = F.conv1d(padded, self.taps[:, None], groups=hidden).transpose(1, 2)
        return self.mlp(x + mixed)


@dataclass(frozen=True)
class ConvMLP(Family):
    """g(x)_t = MLP(x_t + Σ_j w_j ⊙ x_{t-j}), j < kernel: a causal depthwise-separable convolution around a narrow MLP.

    The MLP is the pointwise part. d·kernel parameters beside those of a NarrowMLP (TwoLayerMLP where a block has no neurons).
    """

    width: int
    kernel: int = 4
    looks_back: ClassVar[bool] = True

    @classmethod
    def most(cls, block: Block) -> int:
        return inner_mlp(block, 1).most(block)

    def n_params(self, block: Block) -> int:
        check_sizes(block, kernel=(self.kernel, 2, None))
        return inner_mlp(block, self.width).n_params(block) + block.hidden_size * self.kernel

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the sizes do not fit
        return _ConvMLP(block.hidden_size, self.kernel, inner_mlp(block, self.width).build(block))


class _AttentionMLP(LookingBack):
    def __init__(self, attention: CausalAttention, mlp: nn.Module):
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def mix(self, x: Tensor, past: Past | None) -> Tensor:
        return self.mlp(x) + self.attention(x, past)


@dataclass(frozen=True)
class AttentionMLP(Family):
    """g(x) = MLP(x) + W_o head(x): a narrow MLP and one small causal head side by side.

    4d·head_dim parameters beside those of a NarrowMLP (TwoLayerMLP where a block has no neurons).
    """

    width: int
    head_dim: int = 16
    looks_back: ClassVar[bool] = True

    @classmethod
    def most(cls, block: Block) -> int:
        return inner_mlp(block, 1).most(block)

    def n_params(self, block: Block) -> int:
        check_sizes(block, head_dim=(self.head_dim, 1, None))
        return inner_mlp(block, self.width).n_params(block) + 4 * block.hidden_size * self.head_dim

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the sizes do not fit
        attention = CausalAttention(block.hidden_size, 1, self.head_dim)
        return _AttentionMLP(attention, inner_mlp(block, self.width).build(block))


class _TransformerBlock(LookingBack):
    def __init__(self, hidden: int, width: int, heads: int):
        super().__init__()
        self.down = nn.Linear(hidden, width, bias=False)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, width // heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.up = nn.Linear(width, hidden)

    def mix(self, x: Tensor, past: Past | None) -> Tensor:
        z = self.down(x)  # [batch, seq_len, width]
        z = z + self.attention(self.attention_norm(z), past)
        return self.up(z + self.mlp(self.mlp_norm(z)))


@dataclass(frozen=True)
class TransformerBlock(Family):
    """g(x) = W_up layer(W_down x) + b with one causal pre-norm transformer layer of width k = heads · head_dim ≤ d.

    2dk + d parameters for the projections and 12k² + 9k for the layer.
    """

    head_dim: int
    heads: int = 4
    looks_back: ClassVar[bool] = True

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def most(cls, block: Block) -> int:
        return max(1, block.hidden_size // cls.heads)

    def n_params(self, block: Block) -> int:
        d, k = block.hidden_size, self.width
        check_sizes(block, heads=(self.heads, 1, d), head_dim=(self.head_dim, 1, d // max(1, self.heads)))
        return 2 * d * k + d + 12 * k**2 + 9 * k

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the sizes do not fit
        return _TransformerBlock(block.hidden_size, self.width, self.heads)


class _MixtureOfExperts(nn.Module):
    def __init__(self, hidden: int, experts: list[nn.Module]):
        super().__init__()
        self.router = nn.Linear(hidden, len(experts))
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, hidden]
        chosen = self.router(tokens).argmax(-1)  # [tokens]
        order = chosen.argsort()  # the tokens of one expert together
        groups = tokens[order].split(chosen.bincount(minlength=len(self.experts)).tolist())
        y = torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])[order.argsort()]
        return y.reshape(x.shape)


@dataclass(frozen=True)
class MixtureOfExperts(Family):
    """g(x) = MLP_e(x), e = argmax of a linear router: top-1 of ``experts`` narrow MLPs, each of ``width`` neurons.

    The router assigns clusters of inputs to experts. It is not trained: a choice has no gradient, and the usual straight-through
    gradient made experts worse, both on planted mixtures and on a 135M-parameter Llama. (d + 1)·experts parameters for the
    router, and ``experts`` times those of a NarrowMLP (TwoLayerMLP where a block has no neurons). One token uses the router and
    one expert.
    """

    width: int
    experts: int = 4

    @classmethod
    def most(cls, block: Block) -> int:
        return inner_mlp(block, 1).most(block)

    def n_params(self, block: Block) -> int:
        return self._router(block) + self.experts * inner_mlp(block, self.width).n_params(block)

    def n_active_params(self, block: Block) -> int:
        return self._router(block) + inner_mlp(block, self.width).n_params(block)

    def build(self, block: Block) -> nn.Module:
        self.n_params(block)  # raises where the sizes do not fit
        return _MixtureOfExperts(block.hidden_size, [inner_mlp(block, self.width).build(block) for _ in range(self.experts)])

    def _router(self, block: Block) -> int:
        check_sizes(block, experts=(self.experts, 2, None))
        return (block.hidden_size + 1) * self.experts
