"""Sentences with a label each: SST-2 (1 for praise) and CoLA (1 for what speakers accept) of GLUE (arXiv 1804.07461)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from ..runtime.files import sha256

GLUE = ("sst2", "cola")
HUB = "nyu-mll/glue"
SPLITS = {"train": "train", "validation": "validation|dev"}  # and what is in the names of their files
HEADER = ("sentence", "label")


@dataclass(frozen=True)
class Labelled:
    """Sentences of one split, in the order of their file."""

    sentences: tuple[str, ...]
    labels: tuple[int, ...]  # 0 or 1
    source: dict[str, str]  # the file and its sha256, or the data set of a hub and its fingerprint

    def some(self, n: int, seed: int = 0) -> Labelled:
        """``n`` of them, drawn at random, which are among those of any larger n; all where there are no more."""
        chosen = sorted(random.Random(seed).sample(range(len(self.labels)), len(self.labels))[:n])
        parts = (tuple(values[i] for i in chosen) for values in (self.sentences, self.labels))
        return Labelled(*parts, self.source)


def glue(task: str, split: str, folder: str | Path | None = None) -> Labelled:
    """The sentences of a task and split.

    Args:
        task: "sst2" or "cola".
        split: "train" or "validation".
        folder: with a file <task>_…train….tsv and one <task>_…validation….tsv (or …dev….tsv), a sentence, a tab and a label a
            line; a first line "sentence", "label" is passed over. None for the data set of a hub.

    Raises:
        ValueError: another task or split, a folder without that file or with several, a line of another form, data that could
            not be loaded.
    """
    if task not in GLUE:
        raise ValueError(f"Unknown task {task!r}; expected one of {', '.join(GLUE)}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")
    return _from_hub(task, split) if folder is None else _from_file(_file(Path(folder), task, split))


def _file(folder: Path, task: str, split: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} with the sentences of {task}.")
    found = [file for file in sorted(folder.glob(f"{task}_*.tsv")) if re.search(SPLITS[split], file.stem.removeprefix(task))]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"{folder}: expected one file {task}_…{split}….tsv, found {names}.")
    return found[0]


def _from_file(file: Path) -> Labelled:
    pairs = []
    for n, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        fields = tuple(line.rstrip("\r").split("\t"))
        if fields == ("",) or (n == 1 and fields == HEADER):
            continue
        if len(fields) != 2 or not fields[0].strip() or fields[1] not in ("0", "1"):
            raise ValueError(f"{file}, line {n}: expected a sentence, a tab and a label of 0 or 1, got {line!r}.")
        pairs.append((fields[0].strip(), int(fields[1])))
    if not pairs:
        raise ValueError(f"{file} holds no sentence.")
    return Labelled(*zip(*pairs, strict=True), {"file": file.name, "sha256": sha256(file)})


def _from_hub(task: str, split: str) -> Labelled:
    from datasets import load_dataset

    try:
        rows = load_dataset(HUB, task, split=split)
    except Exception as error:  # a hub may raise anything
        raise ValueError(f"{HUB}, {task} could not be loaded ({type(error).__name__}: {error}): pass folder=.") from error
    return Labelled(
        tuple(sentence.strip() for sentence in rows["sentence"]), tuple(rows["label"]), {"hub": HUB, "sha256": rows._fingerprint}
    )
