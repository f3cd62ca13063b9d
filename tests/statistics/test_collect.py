"""The pass behind all statistics: what a collector sees, the parts of a text, full memory, and what stays in a model: nothing."""

import warnings

import pytest
import torch
from conftest import captured_whole, fail_after
from tiny_models import build, random_windows

from mlpreplace import find_blocks
from mlpreplace.models.forward import watching
from mlpreplace.models.inputs import token_batches
from mlpreplace.statistics import Span, capture_spans, capture_stream, capture_units
from mlpreplace.statistics.collect import Collector, collect, in_parts
from mlpreplace.statistics.records import SUMS

SPANS = [Span(0, 1), Span(1, 3)]
OPTIONS = dict(validation_windows=2, sample_windows=3)
PASSES = {  # every pass over text, of 4 windows at a time where nothing else is said
    "capture": lambda model, windows, **options: captured_whole(model, windows, **OPTIONS, **options)[1],
    "stream": lambda model, windows, **options: capture_stream(model, windows, progress=False, **options),
    "spans": lambda model, windows, **options: capture_spans(model, SPANS, windows, progress=False, **OPTIONS, **options),
    "units": lambda model, windows, batch_size=4: capture_units(
        model, find_blocks(model), token_batches(windows, batch_size=batch_size), progress=False
    ),
}


def tensors(result) -> list[torch.Tensor]:
    """All numbers of what a pass returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (int, float)):
        return [torch.tensor(result)]
    if isinstance(result, dict):
        return [t for value in result.values() for t in tensors(value)]
    return tensors(vars(result)) if result is not None else []


def assert_equal(a, b) -> None:
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def has_hooks(model) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Log(Collector):
    """Writes down what it sees: starts, inputs of the first layer, ends."""

    def __init__(self, layer):
        super().__init__(["model.layers"])
        self.layer, self.seen = layer, []

    def watch(self, hooks):
        hooks.enter_context(watching(self.layer, enter=lambda x, _: self.seen.append(("runs", self.part, len(x)))))

    def start(self, model, part, batch):
        super().start(model, part, batch)
        self.seen.append(("starts", part, batch["input_ids"], self.real["model.layers"], self.shape["model.layers"]))

    def finish(self):
        self.seen.append(("ends", self.part))


@pytest.mark.parametrize("masked", [False, True])
def test_a_collector_sees_each_batch_once_in_order_and_with_its_part(llama, masked):
    windows, mask = random_windows(9), torch.ones(9, 12, dtype=torch.long)
    mask[4, 7:] = 0
    whole = {"input_ids": windows} | ({"attention_mask": mask} if masked else {})
    batches = in_parts(whole, 2, **OPTIONS)
    log = collect(llama, batches, Log(llama.model.layers[0]), name="log", progress=False)
    expected = [("train", 0, 2), ("train", 2, 3), (None, 3, 5), (None, 5, 7), ("validation", 7, 9)]
    assert len(log.seen) == 3 * len(expected)
    for (part, start, end), starts, runs, ends in zip(expected, log.seen[::3], log.seen[1::3], log.seen[2::3], strict=True):
        assert starts[:2] == ("starts", part) and runs == ("runs", part, end - start) and ends == ("ends", part)
        assert torch.equal(starts[2], windows[start:end]) and starts[4] == (end - start, 12)
        assert torch.equal(starts[3], mask[start:end].bool()) if masked else starts[3] is None


def test_parts_hold_every_window_once():
    whole = {"input_ids": random_windows(11), "labels": torch.arange(11)}
    for options in ({}, {"sample_windows": None}, {"sample_windows": 20, "validation_windows": 3}, {"validation_windows": 10}):
        parts = in_parts(whole, 4, **options)
        assert torch.equal(torch.cat([batch["labels"] for _, batch in parts]), whole["labels"])
        assert torch.equal(torch.cat([batch["input_ids"] for _, batch in parts]), whole["input_ids"])
        counts = {p: sum(len(batch["labels"]) for part, batch in parts if part == p) for p in ("train", None, "validation")}
        held = options.get("validation_windows", 0)
        sampled = options.get("sample_windows", 0)
        sampled = 11 - held if sampled is None else min(sampled, 11 - held)
        assert counts == {"train": sampled, None: 11 - held - sampled, "validation": held}
    with pytest.raises(ValueError, match="11 windows minus validation_windows=11 leave none to fit on"):
        in_parts(whole, 4, validation_windows=11)
    for options in ({"validation_windows": -1}, {"sample_windows": -2}):
        with pytest.raises(ValueError, match="Expected 0 windows or more"):
            in_parts(whole, 4, **options)


@pytest.mark.parametrize("name", PASSES)
def test_the_model_is_left_as_it_was(name, llama, windows):
    llama.train()
    llama.model.layers[1].eval()  # someone froze it
    before = [m.training for m in llama.modules()]
    PASSES[name](llama, windows)
    assert [m.training for m in llama.modules()] == before
    assert not has_hooks(llama)


@pytest.mark.parametrize("name", PASSES)
def test_an_exception_leaves_no_hook_and_the_training_mode(name, llama, windows, monkeypatch):
    llama.train()
    layer = llama.model.layers[2]
    monkeypatch.setattr(layer, "forward", fail_after(1, layer.forward, RuntimeError("in the model")))
    with pytest.raises(RuntimeError, match="in the model"):
        PASSES[name](llama, windows, batch_size=2)
    assert not has_hooks(llama)
    assert llama.training


def test_hooks_that_cannot_all_be_made_are_gone(llama):
    class Broken(Log):
        def watch(self, hooks):
            super().watch(hooks)
            raise RuntimeError("no second hook")

    with pytest.raises(RuntimeError, match="no second hook"):
        collect(llama, [], Broken(llama.model.layers[0]), name="broken", progress=False)
    assert not has_hooks(llama)


@pytest.mark.parametrize("name", PASSES)
def test_dropout_is_off(name, gpt2, windows):
    """GPT-2 has dropout 0.1 in training mode."""
    dense = PASSES[name](gpt2, windows)
    assert_equal(PASSES[name](gpt2.train(), windows), dense)


@pytest.mark.parametrize("name", ["capture", "stream", "spans"])
def test_a_pass_without_room_starts_again_with_half_the_windows(name, llama):
    """The device has no room for more than 2 windows, and says so in the second batch, when the first is in the sums."""
    windows, asked = random_windows(11), []
    expected = PASSES[name](llama, windows, batch_size=2)

    def full(module, args, kwargs):
        asked.append(len(args[0] if args else kwargs["hidden_states"]))
        if asked[-1] > 2 and len(asked) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = llama.model.layers[2].register_forward_pre_hook(full, with_kwargs=True)
    with pytest.warns(UserWarning, match="going on with 2 windows at a time"):
        found = PASSES[name](llama, windows)
    handle.remove()
    assert max(asked) == 4 and asked.index(2) > 1
    assert_equal(found, expected)
    assert not has_hooks(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PASSES[name](llama, windows)  # with room again, no word of it


@pytest.mark.filterwarnings("ignore:Out of memory")
@pytest.mark.parametrize("name", ["capture", "stream", "spans"])
def test_no_room_for_one_window_is_an_error(name, llama, windows, monkeypatch):
    monkeypatch.setattr(llama.model.layers[2], "forward", fail_after(0, None, torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError) as error:
        PASSES[name](llama, windows)
    assert "Not even one window" in error.value.__notes__[0]
    assert not has_hooks(llama)


def test_masks_are_those_of_each_stack_of_an_encoder_decoder():
    model, ids = build("marian"), random_windows(3, 9)
    real = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    labels = random_windows(3, 7).masked_fill(torch.arange(7) >= torch.tensor([5, 7, 2])[:, None], -100)

    class Masks(Collector):
        def watch(self, hooks):
            """No hook: only the masks are asked for."""

    masks = Masks(block.stack for block in find_blocks(model))
    batch = {"input_ids": ids, "attention_mask": real.long(), "labels": labels}
    collect(model, [(None, batch)], masks, name="masks", progress=False)
    assert masks.stacks == ("model.encoder.layers", "model.decoder.layers")
    assert torch.equal(masks.real["model.encoder.layers"], real)
    assert torch.equal(masks.real["model.decoder.layers"], labels != -100)
    assert masks.shape == {"model.encoder.layers": (3, 9), "model.decoder.layers": (3, 7)}


def test_sums_are_in_float64_whatever_the_pass(llama, windows):
    found = PASSES["spans"](llama.to(torch.bfloat16), windows)
    for statistics in (found[SPANS[1]].stream, found[SPANS[1]].mlp):
        assert {t.dtype for name in SUMS if (t := getattr(statistics, name)) is not None} == {torch.float64}
        assert statistics.train.x.dtype == torch.bfloat16
