"""Replacements and the cache of keys and values.

A replacement that looks at earlier tokens must know the sequences of a call and what came before them. A block is given hidden
states only, so a hook on its layer finds the cache among the layer's arguments. What the replacement has to remember is an
additional layer of that cache. Beam search, cropping and copying then treat it like the model's own keys and values.

A layer whose attention was replaced has no keys and values. Its layer of the cache still counts tokens: a model reads the
number of earlier tokens from layer 0, and positions and mask sizes depend on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
)


def cache_among(arguments: Iterable) -> Cache | None:
    """The cache among the arguments of a layer or of its attention, under any name."""
    cache = next((a for a in arguments if isinstance(a, Cache | EncoderDecoderCache)), None)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


class TokenCount(DynamicLayer):
    """A cache layer that only counts tokens: its keys and values have width 0."""

    def get_seq_length(self) -> int:  # a DynamicLayer whose tensors have no elements reports 0
        return self.keys.shape[-2] if self.is_initialized else 0


def count_tokens(cache: Cache, layer: int, x: Tensor) -> None:
    """Add the tokens of ``x`` [batch, seq_len, hidden] to the count of layer ``layer`` of ``cache``, and store nothing.

    Raises ValueError where that layer holds keys and values, and for caches that cannot count without them.
    """
    while cache.layer_class_to_replicate and len(cache.layers) <= layer:  # a cache made without a config grows with use
        cache.layers.append(cache.layer_class_to_replicate())
    own = cache.layers[layer]
    plain = type(own) is DynamicLayer
    if cache.offloading or not (plain or isinstance(own, TokenCount | DynamicSlidingWindowLayer | StaticLayer)):
        raise ValueError(
            f"The attention of layer {layer} was replaced, and an offloaded or {type(cache).__name__} cannot do without its "
            "keys and values: use a DynamicCache, a StaticCache, or use_cache=False."
        )
    if own.is_initialized and own.keys.shape[-1]:
        raise ValueError(
            f"The cache holds keys and values of layer {layer}, whose attention was replaced: "
            "start with a cache of this model, or with an empty one."
        )
    if plain:
        cache.layers[layer] = TokenCount()
    nothing = x.new_empty(*x.shape[:2], 0)[:, None]  # [batch, heads = 1, seq_len, width = 0]
    cache.update(nothing, nothing, layer)


class RecentLayer(DynamicLayer):
    """A cache layer that keeps the tokens of the last call, which can be cropped, and ``window - 1`` tokens before them.

    It is not a sliding layer of transformers, which would make attention masks by its length.
    """

    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.cumulative_length = 0  # all tokens so far, also dropped ones; ``reset`` of transformers sets this name

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            keep = min(self.window - 1, self.keys.shape[-2])
            self.keys, self.values = (t[..., t.shape[-2] - keep :, :] for t in (self.keys, self.values))
        self.cumulative_length += keys.shape[-2]
        return super().update(keys, values)

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        left = self.cumulative_length + tokens_to_remove
        if self.is_initialized and tokens_to_remove < 0:
            if self.keys.shape[-2] + tokens_to_remove < min(self.window - 1, left):
                raise ValueError("A replacement with a convolution keeps too few tokens to crop more than the last call.")
            self.cumulative_length = left
        super().crop(tokens_to_remove)


@dataclass(frozen=True)
class Past:
    """One call of one replacement: the shape of its sequences, and the cache that they continue (None: they start here)."""

    owner: str  # the block's name, which marks the replacement's layer in the cache
    shape: torch.Size  # [batch, seq_len], also where the layer flattens its tokens (OPT)
    cache: DynamicCache | None

    def windows(self, x: Tensor) -> Tensor:
        """[..., hidden] → [batch, seq_len, hidden]"""
        return x.reshape(*self.shape, x.shape[-1])

    @property
    def layer(self) -> DynamicLayer | None:
        """The replacement's own layer of the cache; None before its first call."""
        layers = self.cache.layers if self.cache is not None else ()
        return next((layer for layer in layers if getattr(layer, "owner", None) == self.owner), None)

    def extend(self, keys: Tensor, values: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Store keys and values of new tokens. Returns those of earlier and new tokens, [batch, heads, tokens, width].

        Args:
            window: number of tokens that an output depends on, with the present one; None for all.
        """
        if self.cache is None:
            return keys, values
        layer = self.layer
        if layer is None:
            layer = DynamicLayer() if window is None else RecentLayer(window)
            layer.owner = self.owner
            self.cache.layers.append(layer)
        return layer.update(keys, values)


@dataclass(frozen=True)
class _Watch:
    """Hooks of a layer that give the replacement in it the :class:`Past` of each call.

    They find the replacement by its path, not by reference, so that those of a copied model find the copy.
    """

    path: str  # of the replacement within the layer
    layer: int
    depth: int  # layers of the model, each with one layer of the cache

    def enter(self, host: nn.Module, args: tuple, kwargs: dict) -> None:
        replacement = host.get_submodule(self.path)
        if not getattr(getattr(replacement, "family", None), "looks_back", False):  # replaced once more
            return
        arguments = arguments_of(type(host), host, args, kwargs)
        hidden_states = list(arguments.values())[1]  # after the layer itself
        name = replacement.block_name
        past = Past(name, hidden_states.shape[:-1], self._cache([*args, *kwargs.values()], name))
        if past.layer is None or past.layer.get_seq_length() == 0:  # a sequence starts, or seems to
            if past.cache is not None and (seen := past.cache.get_seq_length(self.layer)):
                raise ValueError(
                    f"The cache holds {seen} tokens that the replacement of {name} did not see: "
                    "start with a cache of this model, or with an empty one."
                )
            if first_is_padding(arguments.get("attention_mask")):
                raise ValueError(
                    f"{replacement.family} in {name} looks at earlier tokens and cannot tell padding from text: "
                    'pad on the right (tokenizer.padding_side = "right"), or run sequences of one length.'
                )
        replacement.past = past

    def leave(self, host: nn.Module, args: tuple, output) -> None:
        replacement = host.get_submodule(self.path)
        if getattr(replacement, "past", None) is not None:
            replacement.past = None

    def _cache(self, arguments: list, name: str) -> DynamicCache | None:
        """The cache among a layer's arguments, with a cache layer for every layer of the model."""
        cache = cache_among(arguments)
        if cache is None:
            return None
        if not isinstance(cache, DynamicCache) or cache.offloading:
            raise ValueError(
                f"The replacement of {name} looks at earlier tokens, and an offloaded or {type(cache).__name__} cannot "
                "keep them: use a plain DynamicCache, or use_cache=False."
            )
        while len(cache.layers) < self.depth:  # a cache made without a config grows with use; ours come last
            cache.layers.append(cache.layer_class_to_replicate())
        return cache


def watch(host: nn.Module, path: str, layer: int, depth: int) -> list[RemovableHandle]:
    """Hooks that give the replacement at ``path`` within ``host``, layer ``layer`` of ``depth``, the past of each call."""
    hooks = _Watch(path, layer, depth)
    return [
        host.register_forward_pre_hook(hooks.enter, with_kwargs=True),
        host.register_forward_hook(hooks.leave, always_call=True),  # also after an error, or the past would stay
    ]


def arguments_of(kind: type[nn.Module], module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """{parameter: value} of a call of ``forward`` of a class of modules, with the module itself first."""
    return _signature(kind.forward).bind_partial(module, *args, **kwargs).arguments


@lru_cache
def _signature(forward: Callable) -> inspect.Signature:
    return inspect.signature(forward)


def first_is_padding(mask) -> bool:
    """Whether the first token of any sequence is masked from itself: by left padding, never by a sliding window."""
    if not isinstance(mask, Tensor):
        return False
    if mask.dim() == 2:  # [batch, tokens]: flash attention handles padding itself
        return bool((mask[:, 0] == 0).any())
    first = mask[:, 0, 0, 0]  # [batch, heads, queries, keys]: True, or 0 to add, where a key is seen
    return bool((~first if mask.dtype == torch.bool else first < torch.finfo(mask.dtype).min / 2).any())
