"""Token windows for calibration, validation and held-out measurement, from one text or a mixture of several.

A hash of its id assigns each document to a split. So no calibration window shares a document with a held-out one, whatever
the sizes asked for. Windows come in a fixed order: a smaller request is a prefix of a larger one.

Where a tokenizer begins a text with a token of its own (BOS), every window begins with it: the model has seen no text without.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from operator import index

import torch
from torch import Tensor
from tqdm import tqdm

from .corpora import check_name, documents

SPLITS = {"calibration": 0.8, "validation": 0.1, "heldout": 0.1}  # share of documents
Text = str | os.PathLike | Mapping[str, float]  # a text's name, or {name: share}
MIXTURES = {  # shares of windows; never with speeches, the out-of-domain test
    "bundled/mixture": {"bundled/wiki": 2, "bundled/passages": 1, "bundled/dialogue": 1},  # see notebooks/studies/04_calibration
}


def opening_of(tokenizer) -> list[int]:
    """Ids that ``tokenizer`` puts before a text: BOS of Gemma and Llama, [CLS] of BERT, none of GPT-2 and SmolLM2.

    What it puts behind a text (EOS, [SEP]) is no part of it.

    Raises ValueError for a tokenizer of which this cannot be told, since it knows no word.
    """
    for word in ("a", *tokenizer.get_vocab()):
        bare, whole = (tokenizer(word, add_special_tokens=special).input_ids for special in (False, True))
        places = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
        if bare and len(places) == 1:  # else the word is unknown, and written as the token that was added
            return whole[: places[0]]
    raise ValueError("The tokenizer knows no word, so what it puts before a text cannot be told: is it the model's own?")


def bos_of(tokenizer) -> int | None:
    """The id that ``tokenizer`` begins a text with, None where it adds none."""
    return next(iter(opening_of(tokenizer)), None)


def _hash(*parts: str) -> float:
    """A number in [0, 1) that depends on ``parts`` alone."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big") / 2**64


def _split_of(identifier: str) -> str:
    position = _hash("split", identifier)
    for split, share in SPLITS.items():
        if position < share:
            return split
        position -= share
    return split


def _pack(token_lists: Iterable[tuple[str, list[int]]], separator: list[int], seq_len: int) -> Iterator[list[int]]:
    """Windows of seq_len tokens. Short documents are joined. A long one gives one window, at a place drawn by its id, so that
    few windows already cover many documents. Its other windows follow after those of all documents.
    """
    buffer: list[int] = []
    later: list[tuple[float, list[int]]] = []  # (position in the order, window)
    for identifier, tokens in token_lists:
        if len(tokens) < seq_len:
            buffer += tokens + separator
            if len(buffer) >= seq_len:
                yield buffer[:seq_len]
                buffer = buffer[seq_len:]
            continue
        chunks = [tokens[i : i + seq_len] for i in range(0, len(tokens) - seq_len + 1, seq_len)]
        yield chunks.pop(int(_hash("window", identifier) * len(chunks)))
        later += [(_hash("later", identifier, str(i)), chunk) for i, chunk in enumerate(chunks)]
    for _, chunk in sorted(later):
        yield chunk


def _shares(text: Text) -> dict[str, float]:
    """{name: share} of a text, with a sum of 1. Raises ValueError for shares that are not positive and unknown bundled names."""
    if not isinstance(text, Mapping):
        text = MIXTURES.get(text, {text: 1.0}) if isinstance(text, str) else {text: 1.0}
    if not text or not all(isinstance(share, (int, float)) and 0 < share < float("inf") for share in text.values()):
        raise ValueError(f"Expected a text's name or {{name: share}} with positive shares, got {dict(text)}.")
    names = [check_name(name) for name in text]
    return {name: share / sum(text.values()) for name, share in zip(names, text.values(), strict=True)}


def text_name(text: Text) -> str:
    """The display name of a text: its name, or "bundled/wiki 50 %, bundled/passages 50 %".

    A name may also be of windows that are no text's, such as those that a model wrote. Raises ValueError as :func:`load_windows`
    does for the shares of a mixture.
    """
    if isinstance(text, Mapping):
        return ", ".join(f"{name} {100 * share:.3g} %" for name, share in _shares(text).items())
    return os.fspath(text)


def _interleaved(shares: Mapping[str, float], n_windows: int) -> list[str]:
    """The source of each window: the one furthest behind its share; the first named of equals."""
    taken = dict.fromkeys(shares, 0)
    order = []
    for n in range(1, n_windows + 1):
        order.append(max(shares, key=lambda name: round(shares[name] * n - taken[name], 9)))  # so that 0.1 + 0.2 equals 0.3
        taken[order[-1]] += 1
    return order


def load_windows(
    text: Text, tokenizer, split: str = "calibration", *, seq_len: int = 512, n_windows: int = 32, progress: bool = True
) -> Tensor:
    """Token ids [n_windows, seq_len] (int64) of one split of a text.

    Args:
        text: a bundled name (see :mod:`mlpreplace.texts.corpora`) or "bundled/mixture", half of which is wiki; a local
            .txt/.jsonl file (UTF-8) or folder; or a hub data set ("owner/name" or "owner/name:config", its "text" column, where
            "#…" may follow to say which rows are one document). Or a mixture {name: share of windows}, any positive numbers;
            every prefix of the windows has these shares.
        tokenizer: of the model. Where it begins a text with BOS, each window is BOS and seq_len - 1 tokens of text. No other
            special token is added, and documents are joined by a blank line.
        split: "calibration" (80 % of the documents), "validation" (10 %) or "heldout" (10 %). No document is in two.

    Raises:
        FileNotFoundError: ``text`` is written as a path, and nothing is there.
        ValueError: unknown text or split, a file that is not UTF-8, a data set whose rows look like parts of documents, shares
            that are not positive, or fewer tokens than asked for.
    """
    if split not in tuple(SPLITS):
        raise ValueError(f"Unknown split {split!r}; expected one of {tuple(SPLITS)}.")
    if not callable(tokenizer):
        raise ValueError(f"Expected a tokenizer, got {tokenizer!r}: load_model(name) returns (model, tokenizer).")
    opening = opening_of(tokenizer)
    seq_len, n_windows = _count("seq_len", seq_len, max(2, len(opening) + 1)), _count("n_windows", n_windows, 1)
    order = _interleaved(_shares(text), n_windows)
    counts = Counter(order)
    sources = {name: iter(_windows(name, tokenizer, opening, split, seq_len, n, progress)) for name, n in counts.items()}
    return torch.tensor([next(sources[name]) for name in order])


def _count(name: str, value: int, least: int) -> int:
    try:
        found = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        found = -1
    if found < least:
        raise ValueError(f"Expected {name} ≥ {least}, got {value!r}.")
    return found


def _windows(
    name: str, tokenizer, opening: list[int], split: str, seq_len: int, n_windows: int, progress: bool
) -> list[list[int]]:
    """The first windows of one source, each ``opening`` and text."""
    chosen = [d for d in documents(name) if _split_of(d[0]) == split]
    chosen.sort(key=lambda d: _hash("order", d[0]))  # mixes topics, whatever the order of the source

    def tokens(document: str) -> list[int]:
        return tokenizer(document, add_special_tokens=False, verbose=False).input_ids

    windows: list[list[int]] = []
    with tqdm(total=n_windows, desc=f"{name} {split}", unit="window", disable=not progress, leave=False) as bar:
        for window in _pack(((i, tokens(t)) for i, t in chosen), tokens("\n\n"), seq_len - len(opening)):
            windows.append(opening + window)
            bar.update()
            if len(windows) == n_windows:
                return windows
    raise ValueError(
        f"{name} has {len(windows)} {split} windows of {seq_len} tokens in {len(chosen)} documents, {n_windows} were asked "
        "for. Ask for fewer or shorter windows, or bring more text."
    )
