"""Windows begin with the token that the tokenizer puts before a text, where it puts one there."""

import pytest
import torch
from conftest import byte_tokenizer, word_tokenizer
from tokenizers.processors import TemplateProcessing
from written import DOCUMENTS, WORDS, text_of, write_jsonl

from mlpreplace import load_windows
from mlpreplace.texts.windows import SPLITS, bos_of, opening_of

BOS, EOS, MASK = "<bos>", "<eos>", "<mask>"
WORD_LIST = [f"d{i}w{j}" for i in range(DOCUMENTS) for j in range(WORDS)]
TEMPLATES = {  # what a tokenizer makes of a text A: how many tokens come before it
    "gemma, llama": (f"{BOS} $A", 1),
    "bert, roberta": (f"{BOS} $A {EOS}", 1),
    "glm": (f"{MASK} {BOS} $A", 2),
    "t5": (f"$A {EOS}", 0),
    "bos behind": (f"$A {BOS}", 0),
    "twice the same": (f"{BOS} $A {BOS}", 1),
    "nothing": ("$A", 0),
}


def tokenizer_of(template: str | None, known: list[str] = WORD_LIST):
    """One that marks texts by ``template``; None is one that has no such step at all."""
    tokenizer = word_tokenizer([*known, BOS, EOS, MASK])
    if template:
        ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in (BOS, EOS, MASK)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", (text_of(i) for i in range(DOCUMENTS)))


@pytest.mark.parametrize("template", TEMPLATES)
def test_bos_is_what_stands_before_a_text(template):
    form, count = TEMPLATES[template]
    tokenizer = tokenizer_of(form)
    opening = [tokenizer.convert_tokens_to_ids(name) for name in form.split()[:count]]
    assert opening_of(tokenizer) == opening
    assert bos_of(tokenizer) == (opening[0] if opening else None)


@pytest.mark.parametrize("declared", [True, False])
def test_a_token_that_is_only_declared_is_not_bos(declared):
    """SmolLM2 and Qwen have a BOS token, which their tokenizers do not add."""
    tokenizer = tokenizer_of(None)
    if declared:
        tokenizer.bos_token = BOS
    assert bos_of(tokenizer) is None and opening_of(byte_tokenizer()) == []


def test_an_unknown_word_tells_nothing(tmp_path):
    """It is written as the unknown token, which may be the one that was added, and others as nothing."""
    tokenizer = tokenizer_of(f"{BOS} $A", known=["b"])
    tokenizer.backend_tokenizer.model.unk_token = BOS
    assert tokenizer("a").input_ids == [2, 2]
    assert bos_of(tokenizer) == 2
    tokenizer.backend_tokenizer.add_special_tokens(list(tokenizer.get_vocab()))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} {BOS}", special_tokens=[(BOS, 2)])
    with pytest.raises(ValueError, match="knows no word"):
        bos_of(tokenizer)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_window_is_bos_and_text(template, split, jsonl):
    form, count = TEMPLATES[template]
    tokenizer = tokenizer_of(form)
    windows = load_windows(jsonl, tokenizer, split, seq_len=16 + count, n_windows=7, progress=False)
    plain = load_windows(jsonl, tokenizer_of(None), split, seq_len=16, n_windows=7, progress=False)
    assert windows.tolist() == [opening_of(tokenizer) + row for row in plain.tolist()]
    assert windows.dtype == torch.int64


def test_windows_of_a_mixture_and_of_several_sizes_begin_with_bos(jsonl, tmp_path):
    tokenizer, other = tokenizer_of(f"{BOS} $A"), write_jsonl(tmp_path / "other.jsonl", (text_of(i, 9) for i in range(90)))
    for text in ({jsonl: 2, other: 1}, other):
        for seq_len, n_windows in ((2, 9), (8, 9), (100, 3)):
            windows = load_windows(text, tokenizer, seq_len=seq_len, n_windows=n_windows, progress=False)
            assert windows.shape == (n_windows, seq_len)
            assert (windows == bos_of(tokenizer)).sum() == n_windows and (windows[:, 0] == bos_of(tokenizer)).all()
            assert not (windows == tokenizer.convert_tokens_to_ids(EOS)).any()


def test_fewer_windows_with_bos_are_a_prefix_of_more(jsonl):
    few, many = (load_windows(jsonl, tokenizer_of(f"{BOS} $A"), seq_len=30, n_windows=n, progress=False) for n in (4, 8))
    assert torch.equal(few, many[:4])


def test_a_window_holds_text_beside_what_it_begins_with(jsonl):
    with pytest.raises(ValueError, match="seq_len ≥ 3, got 2"):
        load_windows(jsonl, tokenizer_of(f"{MASK} {BOS} $A"), seq_len=2)


def test_too_few_windows_are_counted_as_they_were_asked_for(jsonl):
    with pytest.raises(ValueError, match="windows of 64 tokens in .* 1000 were asked"):
        load_windows(jsonl, tokenizer_of(f"{BOS} $A"), seq_len=64, n_windows=1000, progress=False)
