"""What a model is given: windows that are refused before any work, batches, and positions that do not count padding."""

import numpy as np
import pytest
import torch
from conftest import capture_quietly, word_tokenizer
from tiny_models import CONTEXT, DECODERS, ENCODERS, MODELS, MULTIMODAL, SINGLE, VOCABULARY, batches_for, build, random_windows

from mlpreplace import NarrowMLP, allocate, capture, compare, find_blocks, fit, heal, perplexity
from mlpreplace.evaluation.speed import latency
from mlpreplace.models import inputs
from mlpreplace.models.inputs import check_batches, check_windows, in_batches, on_device, token_batches
from mlpreplace.planning.damage import measured_damage, second_order_damage
from mlpreplace.planning.refit import refit
from mlpreplace.planning.search import search
from mlpreplace.statistics import Span, capture_spans, capture_stream, capture_units, sample
from mlpreplace.statistics.gradients import probe

IDS = random_windows(4)
NO_WINDOWS = {
    "list": (IDS.tolist(), r"list.*torch\.tensor"),
    "numpy": (IDS.numpy(), r"ndarray.*torch\.tensor"),
    "text": ("bundled/wiki", r"str.*torch\.tensor"),
    "nothing": (None, "NoneType"),
    "bool": (IDS > 5, r"int64, got torch\.bool.*long\(\)"),
    "floating": (IDS.float(), r"int64, got torch\.float32.*long\(\)"),
    "complex": (IDS.cfloat(), r"int64, got torch\.complex64"),
    "bytes": (IDS.to(torch.uint8), r"int64, got torch\.uint8.*long\(\)"),
    "one axis": (IDS[0], r"got torch\.int64 \(12,\): windows\[None\]"),
    "three axes": (IDS[None], r"got torch\.int64 \(1, 4, 12\)"),
    "negative": (IDS - 50, "is negative"),
    "no window": (IDS[:0], "1 window or more"),
    "no token": (IDS[:, :0], "1 tokens or more|2 tokens or more"),
    "too long": (random_windows(2, CONTEXT + 1), f"longer than the model's context of {CONTEXT}"),
    "another vocabulary": (IDS + VOCABULARY, f"vocabulary of {VOCABULARY}"),
}


@pytest.fixture(scope="module")
def case():
    """(model, plan, statistics)"""
    model = build("llama")
    blocks, stats = capture_quietly(model, random_windows())
    return model, {b: fit(b, stats, NarrowMLP(24)) for b in blocks}, stats


READS = {  # all that reads windows
    "capture": lambda m, plan, stats, ids: capture(m, find_blocks(m), ids, progress=False),
    "sample": lambda m, plan, stats, ids: sample(m, find_blocks(m), ids, progress=False),
    "stream": lambda m, plan, stats, ids: capture_stream(m, ids, progress=False),
    "spans": lambda m, plan, stats, ids: capture_spans(m, [Span(0, 1)], ids, progress=False),
    "refit": lambda m, plan, stats, ids: refit(m, plan, ids, progress=False),
    "latency": lambda m, plan, stats, ids: latency({"dense": m}, ids, rounds=1, decode_tokens=1),
}
PREDICTS = {  # all that predicts their tokens, too
    "perplexity": lambda m, plan, stats, ids: perplexity(m, ids, progress=False),
    "compare": lambda m, plan, stats, ids: compare(m, {"": plan}, ids, progress=False),
    "probe": lambda m, plan, stats, ids: probe(m, plan, plan, ids, progress=False),
    "second order": lambda m, plan, stats, ids: second_order_damage(m, {b: [r] for b, r in plan.items()}, ids, progress=False),
    "measured": lambda m, plan, stats, ids: measured_damage(m, {b: [r] for b, r in plan.items()}, ids, progress=False),
    "search": lambda m, plan, stats, ids: search(m, plan, {b: [r] for b, r in plan.items()}, ids, progress=False),
    "allocate": lambda m, plan, stats, ids: allocate(m, stats, 0.2, "joint", windows=ids, progress=False),
    "heal": lambda m, plan, stats, ids: heal(m, plan, ids, IDS, progress=False),
    "heal's validation": lambda m, plan, stats, ids: heal(m, plan, IDS, ids, progress=False),
}


@pytest.mark.parametrize("kind", NO_WINDOWS)
@pytest.mark.parametrize("name", READS | PREDICTS)
def test_what_no_model_reads_is_refused_before_any_work(name, kind, case, monkeypatch):
    ids, message = NO_WINDOWS[kind]
    if name == "allocate" and ids is None:
        message = "pass windows="
    monkeypatch.setattr(torch.nn.functional, "embedding", None)  # nothing runs
    with pytest.raises(ValueError, match=message):
        (READS | PREDICTS)[name](*case, ids)


@pytest.mark.parametrize("name", PREDICTS)
def test_a_single_token_predicts_nothing(name, case):
    with pytest.raises(ValueError, match="2 tokens or more, got 4 of 1: a prediction needs a token before it"):
        PREDICTS[name](*case, IDS[:, :1])


@pytest.mark.parametrize("name", ["capture", "sample", "refit", "latency"])
def test_a_single_token_can_be_read(name, case):
    READS[name](*case, random_windows(8, 1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_size_are_the_same_tokens(dtype, case):
    model, plan, stats = case
    assert perplexity(model, IDS.to(dtype), progress=False) == perplexity(model, IDS, progress=False)
    assert torch.equal(capture_stream(model, IDS.to(dtype), progress=False).distance, capture_stream(model, IDS).distance)


NO_MASKS = {
    "list": ([[1] * 12] * 4, "mask as a tensor.*list"),
    "another shape": (torch.ones(4, 11), r"mask is \(4, 11\), the windows are \(4, 12\)"),
    "additive": (torch.zeros(4, 12).masked_fill(IDS < 50, float("-inf")), "mask of 0 and 1"),
    "counts": (torch.arange(48).view(4, 12), "mask of 0 and 1"),
    "shares": (torch.full((4, 12), 0.5), "mask of 0 and 1"),
    "nothing real": (torch.zeros(4, 12), "needs a real token"),
    "nan": (torch.full((4, 12), float("nan")), "mask of 0 and 1"),
}


@pytest.mark.parametrize("kind", NO_MASKS)
def test_what_is_no_mask_is_refused(kind, llama):
    mask, message = NO_MASKS[kind]
    reads = [
        lambda: capture(llama, find_blocks(llama), IDS, mask),
        lambda: capture_stream(llama, IDS, mask),
        lambda: capture_spans(llama, [Span(0, 1)], IDS, mask),
        lambda: token_batches(IDS, mask),
        lambda: capture_units(llama, find_blocks(llama), [{"input_ids": IDS, "attention_mask": mask}]),
    ]
    for read in reads[: 4 if kind == "list" else 5]:
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_a_mask_of_any_type_is_the_same(dtype, llama):
    mask = torch.arange(12) < torch.tensor([12, 7, 9, 4])[:, None]
    found = [capture_quietly(llama, IDS, mask=m, validation_windows=0)[1] for m in (mask, mask.to(dtype))]
    for a, b in zip(*(f.values() for f in found), strict=True):
        assert a.tokens == b.tokens == 32 and torch.equal(a.xx, b.xx)
    labels = [token_batches(IDS, m, labels=True)[0]["labels"] for m in (mask, mask.to(dtype))]
    assert torch.equal(*labels) and int((labels[0] == inputs.IGNORED).sum()) == 16


@pytest.mark.parametrize("kind", [k for k in NO_WINDOWS if k not in ("too long", "another vocabulary")])
def test_batches_are_checked_as_windows_are(kind, llama):
    ids, message = NO_WINDOWS[kind]
    with pytest.raises(ValueError, match=message):
        token_batches(ids)
    if kind in ("negative", "floating", "bool", "one axis"):
        for read in (lambda b: capture(llama, find_blocks(llama), b), lambda b: check_batches([b])):
            with pytest.raises(ValueError, match=message):
                read({"input_ids": ids})


def test_a_batch_has_ids_of_the_model(llama):
    for ids in (IDS + VOCABULARY, random_windows(2, CONTEXT + 1)):
        with pytest.raises(ValueError, match=f"{VOCABULARY}|{CONTEXT}"):
            capture(llama, find_blocks(llama), {"input_ids": ids})


@pytest.mark.parametrize("batch_size", [-1, 0, 2.5, True, "4"])
def test_batches_hold_one_window_or_more(batch_size, case):
    model, plan, _ = case
    options = dict(batch_size=batch_size, progress=False)
    for ask in (
        lambda: in_batches({"input_ids": IDS}, batch_size),
        lambda: token_batches(IDS, batch_size=batch_size),
        lambda: perplexity(model, IDS, **options),
        lambda: probe(model, plan, plan, IDS, **options),
        lambda: refit(model, plan, IDS, **options),
        lambda: search(model, plan, {b: [r] for b, r in plan.items()}, IDS, **options),
    ):
        with pytest.raises(ValueError, match="batch_size ≥ 1"):
            ask()


def test_labels_need_a_token_to_predict():
    assert len(token_batches(IDS[:, :1])) == 1
    with pytest.raises(ValueError, match="a prediction needs a token before it"):
        token_batches(IDS[:, :1], labels=True)


# positions


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of 12, 5, 7, 9 tokens, and their mask."""
    mask = torch.arange(12) < torch.tensor([12, 5, 7, 9])[:, None]
    mask = mask.flip(1) if side == "left" else mask
    return IDS.masked_fill(~mask, 1), mask  # RoBERTa tells padding by its id, 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_padding_on_either_side_gives_the_moments_of_the_windows_alone(name, side):
    model = build(name) if name in SINGLE else build(name).double()
    ids, mask = padded(side)
    options = dict(validation_windows=0, sample_windows=None)
    blocks, together = capture_quietly(model, ids, mask=mask, **options)
    each = [capture_quietly(model, ids[i][mask[i]][None], **options)[1] for i in range(4)]
    for block in blocks:
        assert together[block].tokens == 33
        for moment in ("sum_x", "xx", "xy"):
            alone = sum(getattr(s[block], moment) for s in each)
            assert (getattr(together[block], moment) - alone).norm() < 1e-5 * alone.norm()


def test_padding_in_a_batch_of_ones_own_and_in_units(gpt2):
    ids, mask = padded("left")
    blocks = find_blocks(gpt2)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    for given in (batch, batch | {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}):
        found = capture_units(gpt2, blocks, [given], progress=False)
        alone = capture_units(gpt2, blocks, [{"input_ids": ids[i][mask[i]][None]} for i in range(4)], progress=False)
        for block in blocks:
            torch.testing.assert_close(found.of(block), alone.of(block), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_only_padding_before_the_text_gives_positions(name):
    model, (batch, _) = build(name), batches_for(name)
    assert on_device(batch, model).keys() == batch.keys()
    if "input_ids" not in batch:
        return
    shape = batch["input_ids"].shape
    for mask in (torch.ones(shape), (torch.arange(shape[1]) < 5).expand(shape)):
        assert "position_ids" not in on_device(batch | {"attention_mask": mask.long()}, model)
    left = (torch.arange(shape[1]) >= 5).expand(shape).long()
    found = on_device(batch | {"attention_mask": left}, model).get("position_ids")
    if name in [*DECODERS, *MULTIMODAL, "bert", "distilbert"]:
        assert torch.equal(found[0, 5:], torch.arange(shape[1] - 5)) and found.min() == 0
    else:
        assert found is None, "an encoder-decoder has none, and RoBERTa makes its own of real tokens"
    given = batch | {"attention_mask": left, "position_ids": torch.zeros(shape)}
    assert torch.equal(on_device(given, model)["position_ids"], torch.zeros(shape))


def test_positions_are_those_of_generate(gpt2):
    tokenizer = word_tokenizer(f"w{i}" for i in range(1, VOCABULARY))
    tokenizer.pad_token, tokenizer.padding_side = "[UNK]", "left"
    read = tokenizer(["w3 w4 w5 w6", "w7 w8"], padding=True, return_tensors="pt")
    with torch.no_grad():
        greedy = gpt2.generate(**read, do_sample=False, max_new_tokens=1, pad_token_id=0)[:, -1]
        logits = gpt2(**on_device({"input_ids": read.input_ids, "attention_mask": read.attention_mask}, gpt2)).logits[:, -1]
    assert torch.equal(logits.argmax(-1), greedy)


def test_numpy_counts_are_counts(llama):
    assert len(in_batches({"input_ids": IDS}, np.int64(3))) == 2
    check_windows(IDS, llama)
