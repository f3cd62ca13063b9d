"""Windows that the model generates: from its own distribution, repeatable, whole."""

import pytest
import torch
from conftest import word_tokenizer
from tiny_models import CAUSAL, CONTEXT, VOCABULARY, build, random_windows
from tokenizers.processors import TemplateProcessing

from mlpreplace import perplexity
from mlpreplace.models import generation
from mlpreplace.models.generation import cache_error, draw, generate_windows

UNIFORM = torch.arange(0.0005, 1, 0.001, dtype=torch.float64)  # [1000], evenly over [0, 1)
P = torch.tensor([0.5, 0.05, 0.3, 0.15])


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(f"w{i}" for i in range(1, VOCABULARY))


def generated(model, tokenizer, **options) -> torch.Tensor:
    return generate_windows(model, tokenizer, **{"n_windows": 6, "seq_len": 12, "batch_size": 4, "progress": False} | options)


def test_windows_are_token_ids_without_special_tokens(llama, tokenizer):
    windows = generated(llama, tokenizer, n_windows=20, seq_len=40)
    assert windows.shape == (20, 40)
    assert windows.dtype == torch.int64
    assert windows.min() > 0 and windows.max() < VOCABULARY  # token 0 is special
    assert len(windows.unique(dim=0)) == 20
    assert len(windows[:, 0].unique()) > 10  # first tokens are drawn from all of the vocabulary


@pytest.mark.parametrize("name", CAUSAL)
def test_every_token_follows_from_those_before(name, tokenizer, monkeypatch):
    """Drawn greedily, a token is the one that a pass over the whole window, without a cache, finds most likely."""
    monkeypatch.setattr(generation, "draw", lambda logits, uniform: logits.argmax(-1))
    model = build(name)
    windows = generated(model, tokenizer)
    with torch.no_grad():
        likeliest = model(windows).logits[:, :-1].argmax(-1)
    goes_on = likeliest != 0  # where token 0 is the likeliest, the document ends
    assert goes_on.float().mean() > 0.5
    assert torch.equal(windows[:, 1:][goes_on], likeliest[goes_on])


def test_tokens_have_the_frequencies_of_the_model(llama, tokenizer):
    windows = generated(llama, tokenizer, n_windows=4000, seq_len=2, batch_size=500)
    with torch.no_grad():
        p = llama(windows[:, :1]).logits[:, 0].double().softmax(-1)  # [windows, vocab]
    expected, deviation = p.sum(0)[1:], (p * (1 - p)).sum(0).sqrt()[1:]
    count = torch.bincount(windows[:, 1], minlength=VOCABULARY)[1:]
    ends = p[:, 0].sum() / (VOCABULARY - 1)  # after an end of document every token is as likely
    assert ((count - expected - ends).abs() < 5 * deviation.clamp(min=1)).all()
    assert expected.max() > 3 * expected.min()  # else: this would hold for even draws as well


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
def test_draws_have_the_frequencies_of_the_softmax(shift):
    drawn = draw(P.log().expand(1000, -1) + shift, UNIFORM)
    assert torch.allclose(torch.bincount(drawn, minlength=4) / 1000, P, atol=0.002)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_impossible_tokens_are_never_drawn(uniform):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).item() == (2 if uniform else 1)


def test_fewer_windows_are_a_prefix_of_more(llama, tokenizer):
    many = generated(llama, tokenizer, n_windows=11)
    for n in (1, 4, 6):
        assert torch.equal(generated(llama, tokenizer, n_windows=n), many[:n])


def test_a_seed_gives_its_windows_whatever_was_drawn_before(llama, tokenizer):
    first = generated(llama, tokenizer, seed=1)
    torch.manual_seed(5)
    assert torch.equal(first, generated(llama, tokenizer, seed=1))
    assert not torch.equal(first, generated(llama, tokenizer, seed=2))


def test_the_size_of_a_batch_changes_rounding_alone(llama, tokenizer):
    double = llama.double()
    assert torch.equal(generated(double, tokenizer, batch_size=4), generated(double, tokenizer, batch_size=3))


def test_a_special_token_ends_a_document_not_the_window(llama):
    """A model that would write nothing but end-of-text: every token starts a document, after a blank line."""
    ending = word_tokenizer(f"w{i}" for i in range(1, VOCABULARY))
    ending.add_special_tokens({"eos_token": "w7"})
    blank = 9
    llama.lm_head.weight.data.zero_()
    llama.lm_head.weight.data[7] = 1000.0
    llama.model.norm.weight.data.fill_(1.0)
    llama.lm_head.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
    windows = generated(llama, _WithBlank(ending, [blank]), seq_len=40)
    assert not (windows == 7).any()
    assert (windows[:, 1::2] == blank).all()
    assert len(windows[:, 0::2].unique()) > 50


class _WithBlank:
    """A tokenizer for which a blank line is ``ids``."""

    def __init__(self, tokenizer, ids: list[int]):
        self.tokenizer, self.ids = tokenizer, ids
        self.all_special_ids, self.get_vocab = tokenizer.all_special_ids, tokenizer.get_vocab

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: str, add_special_tokens: bool):
        found = self.tokenizer(text, add_special_tokens=add_special_tokens)
        return type(found)({"input_ids": self.ids}) if text == "\n\n" and not add_special_tokens else found


def test_rows_that_pad_the_vocabulary_are_never_written(llama):
    short = word_tokenizer(f"w{i}" for i in range(1, 20))
    assert generated(llama, short, n_windows=8, seq_len=40).max() < 20


def test_batches_are_kept_and_a_larger_request_adds_to_them(llama, tokenizer, results, monkeypatch):
    many = generated(llama, tokenizer, n_windows=8)
    assert not results.exists()
    few = generated(llama, tokenizer, n_windows=4, cached=True)
    assert len(list(results.iterdir())) == 1
    assert torch.equal(generated(llama, tokenizer, n_windows=8, cached=True), many)
    assert len(list(results.iterdir())) == 2
    monkeypatch.setattr(generation, "draw", None)  # nothing is left to draw
    assert torch.equal(generated(llama, tokenizer, n_windows=8, cached=True), many)
    assert torch.equal(few, many[:4])


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 10}, {"batch_size": 5}])
def test_what_was_kept_for_another_request_is_not_returned(change, llama, tokenizer, results):
    generated(llama, tokenizer, cached=True)
    assert torch.equal(generated(llama, tokenizer, cached=True, **change), generated(llama, tokenizer, **change))


def test_the_model_is_left_as_it_was(llama, tokenizer):
    llama.train()
    generated(llama, tokenizer)
    assert llama.training and not any(p.grad is not None for p in llama.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_windows": 0}, "n_windows ≥ 1"),
        ({"seq_len": 1}, "seq_len ≥ 2"),
        ({"batch_size": 0}, "batch_size ≥ 1"),
        ({"seq_len": CONTEXT + 1}, f"context of {CONTEXT}"),
    ],
)
def test_a_request_that_cannot_be_right(options, message, llama, tokenizer):
    with pytest.raises(ValueError, match=message):
        generated(llama, tokenizer, **options)


@pytest.mark.bundled
def test_the_bundled_model_writes_what_it_finds_likely(bundled):
    model, tokenizer = bundled
    windows = generated(model, tokenizer, n_windows=4, seq_len=24)
    assert not set(windows.flatten().tolist()) & set(tokenizer.all_special_ids)
    shuffled = windows[:, torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    likely, unlikely = (perplexity(model, w, progress=False).value for w in (windows, shuffled))
    assert 3 * likely < unlikely


def beginning(ids: list[str]):
    """The tokenizer of words, which begins every text with ``ids``."""
    made = word_tokenizer(f"w{i}" for i in range(1, VOCABULARY))
    made.add_special_tokens({"bos_token": "w3", "eos_token": "w4"})
    tokens = [(word, made.convert_tokens_to_ids(word)) for word in ("w3", "w4", "w5")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=" ".join([*ids, "$A"]), special_tokens=tokens)
    return made


@pytest.mark.parametrize("ids", [["w3"], ["w3", "w5"]])
def test_windows_begin_as_texts_do(ids, llama, monkeypatch):
    """With BOS, where the tokenizer writes it; what follows is drawn from what the model makes of it, and holds none."""
    made = beginning(ids)
    windows = generated(llama, made, n_windows=10)
    opening, rest = windows[:, : len(ids)], windows[:, len(ids) :]
    assert (opening == torch.tensor(made.convert_tokens_to_ids(ids))).all()
    assert not torch.isin(rest, torch.tensor(made.all_special_ids)).any() and len(rest[:, 0].unique()) > 5
    monkeypatch.setattr(generation, "draw", lambda logits, uniform: logits.argmax(-1))
    windows = generated(llama, made)
    with torch.no_grad():
        likeliest = llama(windows).logits[:, len(ids) : -1].argmax(-1)
    goes_on = ~torch.isin(likeliest, torch.tensor(made.all_special_ids))
    assert torch.equal(windows[:, len(ids) + 1 :][goes_on], likeliest[goes_on]) and goes_on.float().mean() > 0.5


def test_a_bos_that_is_known_but_not_written_begins_no_window(llama):
    windows = generated(llama, beginning([]), n_windows=10)
    assert not torch.isin(windows, torch.tensor(beginning([]).all_special_ids)).any()


def test_windows_are_longer_than_what_they_begin_with(llama):
    assert generated(llama, beginning(["w3"]), seq_len=2).shape == (6, 2)
    with pytest.raises(ValueError, match="seq_len > 2"):
        generated(llama, beginning(["w3", "w5"]), seq_len=2)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_only_a_causal_language_model_writes(name, tokenizer):
    with pytest.raises(ValueError, match="causal language model"):
        generated(build(name), tokenizer)


def test_a_tokenizer_of_another_model_is_refused(llama):
    large = word_tokenizer(f"w{i}" for i in range(1, 500))
    large.add_special_tokens({"eos_token": "w400"})
    assert generated(llama, large).max() < VOCABULARY, "special tokens beyond the model's are not written"
    for other in (_WithBlank(large, [400]), _begun(large, 400)):
        with pytest.raises(ValueError, match="500 tokens do not fit the model's vocabulary of 101"):
            generated(llama, other)


def _begun(made, bos: int):
    word = made.convert_ids_to_tokens(bos)
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{word} $A", special_tokens=[(word, bos)])
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_with_a_cache_logits_differ_by_rounding(name, dtype):
    if (name, dtype) == ("mixtral", torch.float64):
        pytest.skip("its experts are in float32")
    error, tolerance = cache_error(build(name).to(dtype), random_windows(3, 20), prompt=8)
    assert error <= tolerance
    assert tolerance == pytest.approx(16 * torch.finfo(dtype).eps, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_that_forgets_is_found(dtype, llama):
    """One layer of three attends to the newest token alone."""
    attention = llama.to(dtype).model.layers[1].self_attn
    attend = attention.forward

    def forgetting(hidden_states, **options):
        return attend(
            hidden_states, **options | ({"attention_mask": None, "past_key_values": None} if hidden_states.shape[1] == 1 else {})
        )

    attention.forward = forgetting
    error, tolerance = cache_error(llama, random_windows(3, 20), prompt=8)
    assert error > tolerance


def test_a_cache_needs_tokens_before_and_behind_the_prompt(llama):
    for prompt in (0, 12):
        with pytest.raises(ValueError, match="prompt of 1 to 11 of the 12 tokens"):
            cache_error(llama, random_windows(), prompt)
