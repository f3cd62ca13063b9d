"""Pairs of sentences, a small translation model, and BLEU of plans.

"numbers" is the numbers below a million in English words, after the name of one of eight languages, and in the words of that
language. A translator has to look up words, to change their order and to inflect them: forms depend on gender and case in the
Slavic and Baltic languages, and French counts in twenties. Words come from num2words.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

import datasets
import numpy as np
import torch
from num2words import num2words
from sacrebleu.metrics import BLEU
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from ..evaluation.perplexity import RESAMPLES, Estimate
from ..models.forward import eval_mode
from ..models.inputs import IGNORED, input_device
from ..models.loading import Source
from ..replacements.splice import Plan, spliced

Pair = tuple[str, str]  # source and target
NUMBERS = 10**6
HELD = 10_000  # numbers in each of the validation and the test split
SPLITS = ("train", "validation", "test")
SPECIAL = ("<pad>", "</s>", "<unk>")
LONGEST = 128  # tokens of a sentence of the hub
PADDED = dict(padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
SENTENCES = 64  # translated side by side
LANGUAGES = {  # that set words apart, so that a word is a token: name in a source sentence, code of num2words
    **{"french": "fr", "spanish": "es", "portuguese": "pt", "russian": "ru"},
    **{"ukrainian": "uk", "polish": "pl", "lithuanian": "lt", "latvian": "lv"},
}


def in_words(n: int, language: str = "english") -> str:
    """A number below a million in words, without commas and hyphens: "three hundred and forty two"."""
    return " ".join(re.findall(r"\w+", num2words(n, lang=LANGUAGES.get(language, "en"))))


def load_pairs(name: str, split: str, n: int) -> list[Pair]:
    """``n`` pairs of sentences.

    Args:
        name: "numbers", each in one language; or "owner/name:source-target", a hub data set with a column "translation" that
            holds both languages. "Helsinki-NLP/opus-100:en-zh/zh-en" names the configuration and the direction, where they
            differ.
        split: "train", "validation" or "test".

    Raises:
        ValueError: an unknown split, more numbers than there are, a data set without such a column.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; expected one of {', '.join(SPLITS)}.")
    if name == "numbers":
        draw = np.random.default_rng(0)
        numbers, languages = draw.permutation(NUMBERS), draw.choice(list(LANGUAGES), NUMBERS)
        parts = dict(zip(SPLITS, (numbers[2 * HELD :], numbers[:HELD], numbers[HELD : 2 * HELD]), strict=True))
        if n > len(parts[split]):
            raise ValueError(f"Split {split!r} holds {len(parts[split]):,} numbers, asked for {n:,}.")
        said = ((i, str(languages[i])) for i in parts[split][:n].tolist())
        return [(f"{language} {in_words(i)}", in_words(i, language)) for i, language in said]
    path, _, config = name.partition(":")
    config, _, direction = config.partition("/")
    source, _, target = (direction or config).partition("-")
    rows = datasets.load_dataset(path, config or None, split=split)
    if "translation" not in rows.features:
        raise ValueError(f"{name} should have a column 'translation', it has {', '.join(rows.features)}.")
    return [(pair[source], pair[target]) for pair in rows.select(range(min(n, len(rows))))["translation"]]


def number_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of all languages of "numbers"."""
    apart = [*range(1000), *range(1000, NUMBERS, 1000)]  # a number is one or two of these
    said = (in_words(n, language) for language in ("english", *LANGUAGES) for n in apart)
    words = [*LANGUAGES, *dict.fromkeys(word for text in said for word in text.split())]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def encoded(pairs: Sequence[Pair], tokenizer) -> dict[str, Tensor]:
    """Pairs as one large batch, {"input_ids", "attention_mask", "labels"}, [pairs, seq_len] each; padded labels are -100."""
    sources, targets = map(list, zip(*pairs, strict=True))
    read, wanted = tokenizer(sources, **PADDED), tokenizer(text_target=targets, **PADDED)
    labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, IGNORED)
    return {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels}


def small_marian(tokenizer, layers: int = 6, hidden: int = 24, *, seed: int = 0) -> MarianMTModel:
    """A Marian translation model with random weights, with ``layers`` in the encoder and as many in the decoder."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = MarianConfig(
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=4 * hidden,
        decoder_ffn_dim=4 * hidden,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=LONGEST,
        init_std=0.8 * hidden**-0.5,
        scale_embedding=True,  # positions are of the order of one: unscaled embeddings would be too small beside them
        pad_token_id=pad,
        eos_token_id=end,
        decoder_start_token_id=pad,
        forced_eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = MarianMTModel(config).eval()
    model.source = Source(f"Marian, {layers} + {layers} layers of {hidden}, trained on numbers")
    return model


@torch.no_grad()
def translate(model: nn.Module, tokenizer, sentences: Sequence[str], *, batch_size: int | None = None) -> list[str]:
    """Greedy translations.

    Args:
        batch_size: sentences translated side by side, 64 by default.
    """
    found, batch_size = [], batch_size or SENTENCES
    for i in range(0, len(sentences), batch_size):
        read = tokenizer(sentences[i : i + batch_size], **PADDED)
        asked = {name: read[name].to(input_device(model)) for name in ("input_ids", "attention_mask")}
        longest = 2 * asked["input_ids"].shape[1] + 8
        ids = model.generate(**asked, num_beams=1, do_sample=False, max_new_tokens=longest)
        found += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found


def bleu(
    model: nn.Module, plans: Mapping[Hashable, Plan], pairs: Sequence[Pair], tokenizer, *, batch_size: int | None = None
) -> dict:
    """Corpus BLEU of greedy translations under each plan, {label: Estimate}; ``tokens`` are sentences. {} is the dense model.

    The interval is sacrebleu's own bootstrap over sentences.

    Args:
        batch_size: as for :func:`translate`.

    Raises:
        ValueError: a plan for another model.
    """
    sources, targets = map(list, zip(*pairs, strict=True))
    found, metric = {}, BLEU()
    with eval_mode(model):
        for label, plan in plans.items():
            with spliced(model, plan):
                said = translate(model, tokenizer, sources, batch_size=batch_size)
            score = metric.corpus_score(said, [targets], n_bootstrap=RESAMPLES)
            middle, half = score._mean, score._ci  # sacrebleu prints its interval, but has no public name for it
            found[label] = Estimate(score.score, middle - half, middle + half, len(pairs))
    return found
