"""Logits of a model, with and without its cache."""

from __future__ import annotations

import torch


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def decoded(model, ids, prefill: int, cache=None):
    """Logits of a prefill and then of one token at a time."""
    with torch.no_grad():
        out = model(ids[:, :prefill], use_cache=True, past_key_values=cache)
        parts, cache = [out.logits], out.past_key_values
        for i in range(prefill, ids.shape[1]):
            parts.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)
