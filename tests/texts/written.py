"""Texts for tests: words that tell which document they are of, written to files or on a stand-in for the hub."""

from __future__ import annotations

import json

from datasets import Dataset

WORDS = 40  # different words of a document, each in no other
DOCUMENTS = 120


def text_of(document: int, words: int = WORDS) -> str:
    return " ".join(f"d{document}w{j % WORDS}" for j in range(words))


def write_jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def hub_of(monkeypatch, records: list[dict], name: str = "owner/name", configuration: str | None = "small") -> None:
    """The hub's only data set is ``name`` in its configuration."""

    def load(*asked, **options):
        assert (asked, options) == ((name, configuration), {"split": "train", "streaming": True})
        return Dataset.from_list(records).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
