"""Numbers in words of several languages, the translator that reads them, and BLEU."""

import pytest
import torch

from mlpreplace import find_blocks
from mlpreplace.beyond_language.translation import (
    LANGUAGES,
    SPLITS,
    bleu,
    encoded,
    in_words,
    load_pairs,
    number_tokenizer,
    small_marian,
    translate,
)
from mlpreplace.methods.sliding import drop_mlps


@pytest.mark.parametrize(
    ("n", "language", "words"),
    [
        (342_005, "english", "three hundred and forty two thousand and five"),
        (97, "french", "quatre vingt dix sept"),
        (21_000, "russian", "двадцать одна тысяча"),  # feminine, and singular after a one
        (2_000, "polish", "dwa tysiące"),
        (5_000, "polish", "pięć tysięcy"),  # another case
    ],
)
def test_numbers_in_words(n, language, words):
    assert in_words(n, language) == words


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_numbers_are_said_alike(language):
    some = [*range(1100), *range(100_000, 100_200)]
    assert len({in_words(n, language) for n in some}) == len(some)


def test_pairs_are_split_without_overlap():
    parts = {name: load_pairs("numbers", name, 500) for name in SPLITS}
    assert len({pair for part in parts.values() for pair in part}) == 1500
    assert parts["test"][:3] == load_pairs("numbers", "test", 3)


def test_bad_requests_for_pairs():
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        load_pairs("numbers", "dev", 1)
    with pytest.raises(ValueError, match="holds 10,000 numbers, asked for 10,001"):
        load_pairs("numbers", "test", 10_001)


def test_pairs_of_the_hub_are_read_in_the_direction_asked_for(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"translation": [{"en": f"e{i}", "zh": f"z{i}"} for i in range(3)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: rows)
    assert load_pairs("owner/name:en-zh", "test", 2) == [("e0", "z0"), ("e1", "z1")]
    assert load_pairs("owner/name:en-zh/zh-en", "test", 1) == [("z0", "e0")]


def test_every_word_has_a_token_and_sentences_end():
    tokenizer, pairs = number_tokenizer(), load_pairs("numbers", "train", 400)
    batch = encoded(pairs, tokenizer)
    assert tokenizer.unk_token_id not in batch["input_ids"] and tokenizer.unk_token_id not in batch["labels"]
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert {source.split()[0] for source, _ in pairs} == set(LANGUAGES)
    for (source, target), mask, labels in zip(pairs, batch["attention_mask"], batch["labels"], strict=True):
        *words, end = labels[labels != -100].tolist()
        assert tokenizer.decode(words) == target and end == tokenizer.eos_token_id
        assert mask.sum() == len(source.split()) + 1


def test_bleu_of_translations(monkeypatch):
    """100 for the references themselves; a plan is in place while it translates."""
    pairs, tokenizer = load_pairs("numbers", "test", 6), number_tokenizer()
    model = small_marian(tokenizer, layers=1, hidden=16)
    said = translate(model, tokenizer, [source for source, _ in pairs], batch_size=4)
    assert len(said) == 6
    own = [(source, text) for (source, _), text in zip(pairs, said, strict=True) if text]
    plan = drop_mlps(find_blocks(model))
    found = bleu(model, {"dense": {}, "dropped": plan}, own or pairs, tokenizer, batch_size=4)
    if own:
        assert found["dense"].value == pytest.approx(100)
    assert list(found) == ["dense", "dropped"] and found["dense"].tokens == len(own or pairs)
    assert all(0 <= e.low <= e.value <= e.high + 1e-6 for e in [found["dense"]])


def test_the_decoder_starts_as_it_was_trained():
    model = small_marian(number_tokenizer(), layers=1, hidden=16)
    assert [block.stack for block in find_blocks(model)] == ["model.encoder.layers", "model.decoder.layers"]
    batch = encoded(load_pairs("numbers", "train", 4), number_tokenizer())
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)
