"""The model and the tokenizer that lm-eval is given: measured as they are, left as they were, BOS where the tokenizer has it."""

import copy

import lm_tasks
import pytest
import torch
from conftest import capture_quietly, word_tokenizer
from lm_tasks import WORDS, direct, evaluated
from tiny_models import build, random_windows
from tokenizers.processors import TemplateProcessing
from torch import nn

from mlpreplace import NarrowMLP, fit, spliced
from mlpreplace.evaluation.tasks import run
from mlpreplace.evaluation.tasks.run import evaluate_tasks


@pytest.fixture
def tokenizer():
    return lm_tasks.tokenizer()


@pytest.fixture(autouse=True)
def items(monkeypatch):
    lm_tasks.items(monkeypatch)


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    lm_tasks.index(tmp_path, monkeypatch)


TIED = {"llama": "lm_head.weight", "gpt2": "lm_head.weight", "gemma": "lm_head.weight", "opt": "lm_head.weight"}


def with_own_head(name: str):
    """A model whose configuration ties the head to the embedding, and whose head was trained apart from it."""
    model = build(name, tie_word_embeddings=True)
    model.tie_weights()
    head = model.get_output_embeddings()
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1))
    head.weight = nn.Parameter(head.weight.detach() + noise)
    return model


def state_of(model) -> dict:
    """Every tensor by identity and content, and all that is not a tensor."""
    tensors = {name: (t, t.clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    settings = model.config.to_dict(), model.generation_config.to_dict(), model.config._attn_implementation
    others = {name: (dict(vars(m)).keys(), m.training) for name, m in model.named_modules()}
    return {"tensors": tensors, "settings": copy.deepcopy(settings), "others": others, "config": model.config}


def assert_unchanged(model, before: dict) -> None:
    after = state_of(model)
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (t, content, grad) in before["tensors"].items():
        found, _, found_grad = after["tensors"][name]
        assert found is t and torch.equal(found, content) and found_grad == grad, name
    assert after["settings"] == before["settings"] and after["config"] is before["config"]
    assert after["others"] == before["others"]


@pytest.mark.parametrize("name", TIED)
def test_a_head_of_its_own_is_measured_and_kept(name, tokenizer):
    model = with_own_head(name)
    before, head = state_of(model), model.get_output_embeddings().weight
    correct, _ = direct(model, tokenizer, run.bundled_items(member="")["test"])
    assert evaluated(model, tokenizer).correct.tolist() == correct
    assert_unchanged(model, before)
    assert model.get_output_embeddings().weight is head is not model.get_input_embeddings().weight
    tied = build(name, tie_word_embeddings=True)
    tied.load_state_dict(model.state_dict() | {TIED[name]: model.get_input_embeddings().weight})
    assert evaluated(tied, tokenizer).correct.tolist() != correct, "else the head would not matter here"


def test_a_head_of_its_own_in_a_spliced_model(tokenizer):
    model = with_own_head("llama")
    blocks, stats = capture_quietly(model, random_windows())
    with spliced(model, {blocks[1]: fit(blocks[1], stats, NarrowMLP(24))}):
        before = state_of(model)
        correct, _ = direct(model, tokenizer, run.bundled_items(member="")["test"])
        assert evaluated(model, tokenizer).correct.tolist() == correct
        assert_unchanged(model, before)


def test_a_model_ties_again_when_it_is_told_to(llama, tokenizer):
    """Afterwards tie_weights is the model's own, be it of its class or of the instance."""
    model, called = with_own_head("llama"), []
    evaluated(model, tokenizer, limit=2)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.tie_weights = own = lambda *args, **kwargs: called.append(args)
    evaluated(model, tokenizer, limit=2)
    assert vars(model)["tie_weights"] is own and not called


@pytest.mark.parametrize("task", ["written", "bundled/piqa"])
def test_settings_of_generation_are_kept(task, llama, tokenizer, own_tasks):
    llama.generation_config.update(pad_token_id=5, eos_token_id=[3, 4], max_length=20)
    llama.config.pad_token_id = None
    llama.model.layers[0].eval()
    llama.lm_head.weight.requires_grad_(False)
    before, text = state_of(llama.train()), repr(tokenizer)
    evaluated(llama, tokenizer, task, batch_size=2)
    assert_unchanged(llama, before)
    assert repr(tokenizer) == text and tokenizer.pad_token is None


def test_everything_is_kept_when_a_task_fails(llama, tokenizer, own_tasks):
    model = with_own_head("llama").train()
    before = state_of(model)
    with pytest.raises(ValueError, match="no accuracy of each item"):
        evaluated(model, tokenizer, "rolling")
    assert_unchanged(model, before)


# special tokens


def adding(single: str, **special: str):
    """The tokenizer of words, which writes every text as ``single``; BOS is w1, EOS is w2."""
    made = word_tokenizer(WORDS)
    made.add_special_tokens({"bos_token": "w1", "eos_token": "w2", **special})
    ids = [(word, made.convert_tokens_to_ids(word)) for word in ("w1", "w2")]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    return made


def read_by(model, made, monkeypatch, task="bundled/piqa", **options) -> list[list[int]]:
    """Every row of token ids that the model is given."""
    rows, embedding = [], nn.functional.embedding

    def watch(ids, *args, **kwargs):
        rows.extend(ids.tolist())
        return embedding(ids, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "embedding", watch)
        evaluated(model, made, task, **{"batch_size": 1} | options)
    return rows


@pytest.mark.parametrize("batch_size", [1, 5])
def test_texts_begin_with_bos_where_the_tokenizer_adds_it(batch_size, llama, monkeypatch):
    gemma, plain = adding("w1 $A"), adding("$A")
    bos = gemma.convert_tokens_to_ids("w1")
    for made, begins in ((gemma, True), (plain, False)):
        rows = read_by(llama, made, monkeypatch, batch_size=batch_size)
        assert rows and all((row[0] == bos and row[1] != bos) == begins for row in rows)
        correct, _ = direct(llama, made, run.bundled_items(member="")["test"])
        assert evaluated(llama, made, batch_size=batch_size).correct.tolist() == correct


def test_bos_makes_a_difference_and_a_result_of_its_own(llama, results):
    gemma, plain = adding("w1 $A"), adding("$A")
    assert evaluated(llama, gemma, cached=True).n_items == 24 and len(list(results.iterdir())) == 1
    evaluated(llama, plain, cached=True)
    assert len(list(results.iterdir())) == 2


def test_generation_begins_with_bos_once(llama, own_tasks, monkeypatch):
    gemma = adding("w1 $A")
    bos, prompts = gemma.convert_tokens_to_ids("w1"), read_by(llama, gemma, monkeypatch, "written")
    assert all(row[0] == bos and row[1] != bos for row in prompts if len(row) > 1)


def test_a_token_behind_every_text_is_left_out_or_refused(llama, monkeypatch):
    """lm-eval would take it for a part of the option, and the option's last token for the context."""
    plain = adding("$A")
    expected = read_by(llama, plain, monkeypatch)
    assert read_by(llama, adding("$A w2"), monkeypatch) == expected
    with pytest.raises(ValueError, match="'w2' behind every text.*add_eos_token"):
        evaluated(llama, adding("w1 $A w2"))


def test_a_tokenizer_without_an_end_is_refused(llama):
    with pytest.raises(ValueError, match="tokenizer with an end of text"):
        evaluated(llama, word_tokenizer(WORDS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "bundled/piqa"}, r"list of tasks, got 'bundled/piqa'"),
        ({"limit": 2.5}, "at least one item"),
        ({"limit": -1}, "at least one item"),
        ({"batch_size": 0}, "batch_size ≥ 1"),
        ({"batch_size": "auto"}, "batch_size ≥ 1"),
    ],
)
def test_what_cannot_be_asked(options, message, llama, tokenizer):
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(llama, tokenizer, **{"label": "a model"} | options)
