"""Token windows that the dense model wrote itself: calibration without any text.

As in LLM-QAT (Liu et al., 2023, arXiv:2305.17888) a document starts with a token drawn evenly from the vocabulary and goes on
with tokens drawn from the model. Starting from the document separator instead would give every document the model's few
favourite openings, which are a chat's where the model was tuned to chat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .cache import Entry, fingerprint
from .models import check_windows, eval_mode, input_device


def sample_windows(
    model: nn.Module,
    tokenizer,
    *,
    n_windows: int = 32,
    seq_len: int = 512,
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 32,
    cached: bool = False,
    progress: bool = True,
) -> Tensor:
    """Token ids [n_windows, seq_len] (int64, on the CPU) that a causal language model generates.

    Every window has random numbers of its own, so a smaller request is a prefix of a larger one. A special token (end of
    text or of a turn) is never written: where the model draws one, the document ends, and after a blank line, as between
    the documents of :func:`load_windows`, the next starts with a random token.

    Args:
        tokenizer: of the model; its special tokens end a document.
        temperature: of the softmax, > 0; 1 samples the model's own distribution.
        top_p: draw among the most likely tokens that together have this probability, 0 < top_p ≤ 1 (nucleus sampling,
            Holtzman et al., 2020, arXiv:1904.09751).
        batch_size: windows written side by side, always that many (the last are cut off): rounding errors depend on it, and
            may after many tokens change one.
        cached: keep every batch on disk.

    Raises:
        ValueError: sizes, temperature or top_p that cannot be, or windows longer than the model's context.
    """
    if n_windows < 1 or seq_len < 2 or batch_size < 1:
        raise ValueError(f"Expected n_windows ≥ 1, seq_len ≥ 2, batch_size ≥ 1, got {n_windows}, {seq_len}, {batch_size}.")
    if not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError(f"Expected temperature > 0 and 0 < top_p ≤ 1, got {temperature} and {top_p}.")
    check_windows(torch.empty(0, seq_len, dtype=torch.int64), model)
    rows = model.config.get_text_config().vocab_size  # of the embedding: some may only pad it
    writable = torch.zeros(rows, dtype=torch.bool)  # [vocab]
    writable[: len(tokenizer)] = True
    writable[tokenizer.all_special_ids] = False
    separator = tokenizer("\n\n", add_special_tokens=False).input_ids
    key = fingerprint(model, writable, separator, seq_len, seed, temperature, top_p, batch_size) if cached else ""
    batches = []
    for start in tqdm(range(0, n_windows, batch_size), desc="sample", unit="batch", disable=not progress, leave=False):
        entry = Entry("sampling", "sample", key, start)
        batch = entry.load() if cached else None
        if batch is None:
            randoms = [np.random.default_rng([seed, window]) for window in range(start, start + batch_size)]
            with eval_mode(model), torch.inference_mode():
                batch = {"ids": _write(model, randoms, writable, separator, seq_len, temperature, top_p)}
            if cached:
                entry.save(batch)
        batches.append(batch["ids"])
    return torch.cat(batches)[:n_windows]


def _write(
    model: nn.Module,
    randoms: Sequence[np.random.Generator],
    writable: Tensor,
    separator: list[int],
    seq_len: int,
    temperature: float,
    top_p: float,
) -> Tensor:
    """One window for each random generator, [windows, seq_len]."""
    device = input_device(model)
    starts = writable.nonzero().squeeze(1).numpy()
    uniform = torch.from_numpy(np.stack([random.random(seq_len) for random in randoms]))  # [windows, seq_len]
    waiting = [[int(random.choice(starts))] for random in randoms]  # tokens of each window to write before the model goes on
    ids = torch.empty(len(randoms), seq_len, dtype=torch.int64)
    drawn, past = ids[:, 0], None
    for position in range(seq_len):
        if position:
            output = model(ids[:, position - 1, None].to(device), past_key_values=past, use_cache=True)
            past = output.past_key_values
            drawn = draw(output.logits[:, -1], uniform[:, position].to(device), temperature, top_p).cpu()
        for row, tokens in enumerate(waiting):
            if not tokens and not writable[drawn[row]]:
                tokens += [*separator, int(randoms[row].choice(starts))]
            ids[row, position] = tokens.pop(0) if tokens else drawn[row]
    return ids


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Tokens [windows] drawn from ``logits`` [windows, vocab] by inverting their distribution at ``uniform`` [windows]."""
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0  # what more likely tokens have filled up already
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    cumulative = p.cumsum(-1)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
