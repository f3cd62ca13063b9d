"""Texts for tests: words that tell which document they are of, written to files."""

from __future__ import annotations

import json

WORDS = 40  # different words of a document, each in no other
DOCUMENTS = 120


def text_of(document: int, words: int = WORDS) -> str:
    return " ".join(f"d{document}w{j % WORDS}" for j in range(words))


def write_jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return str(path)
