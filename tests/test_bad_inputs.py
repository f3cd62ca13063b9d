"""Requests that cannot be met: each error names what was given and what was expected, and nothing is left half-written."""

from __future__ import annotations

import copy
import json
import math
from functools import cached_property
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, capture_quietly, save_locally
from tiny_models import VOCABULARY, build, random_windows

import mlpreplace as m
from mlpreplace import Linear, LowRank, Mean, NarrowMLP, Stack, Training
from mlpreplace.evaluation import evaluate_tasks, perplexity_ratio, quantized
from mlpreplace.evaluation.perplexity import measure
from mlpreplace.fitting.training import Tuning
from mlpreplace.methods import METHODS, calibrate, merge_mlps
from mlpreplace.models import generate_windows, in_batches, token_batches
from mlpreplace.planning import candidate_families, search, second_order_damage, tune
from mlpreplace.replacements import without_layers
from mlpreplace.reporting import Run
from mlpreplace.statistics import Span, capture_spans, capture_stream, capture_units

WINDOWS, NAN = random_windows(), math.nan
QUIET = dict(progress=False)


class Given:
    """A tiny model and what can be made of it, each made when it is first asked for."""

    def __init__(self, place: Path):
        self.place = place
        self.model, self.other, self.tokenizer = build("llama"), build("gpt2"), byte_tokenizer()
        self.blocks, self.foreign = m.find_blocks(self.model), m.find_blocks(self.other)

    @cached_property
    def stats(self):
        return capture_quietly(self.model, WINDOWS)[1]

    @cached_property
    def plan(self):
        return {self.blocks[0]: m.fit(self.blocks[0], self.stats, NarrowMLP(20))}

    @cached_property
    def alien(self):
        blocks, stats = capture_quietly(self.other, WINDOWS)
        return {blocks[0]: m.fit(blocks[0], stats, NarrowMLP(20))}

    @cached_property
    def candidates(self):
        return candidate_families(self.stats, width_steps=3, linear_sizes=())

    def text(self, *lines: str, name: str = "text.jsonl") -> str:
        (path := self.place / name).write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    def documents(self) -> str:
        return self.text(*(json.dumps({"text": f"word number {i} " * 20}) for i in range(60)))

    def folder(self) -> str:
        return save_locally(self.model, self.place / "model", self.tokenizer)

    def damaged(self, name: str, content: str) -> str:
        folder = Path(self.folder())
        (folder / name).write_text(content)
        return str(folder)


def load(name, **options):
    return lambda g: m.load_model(name, device="cpu", **options)


def read(text, split="calibration", **sizes):
    return lambda g: m.load_windows(text, g.tokenizer, split, **dict(seq_len=8, n_windows=2) | sizes, **QUIET)


def windows(ids, mask=None):
    return lambda g: m.capture(g.model, g.blocks, ids, mask, **QUIET)


def measured(ids):
    return lambda g: m.perplexity(g.model, ids, **QUIET)


def fitted(family, **options):
    return lambda g: m.fit(g.blocks[0], g.stats, family, **QUIET | options)


def allocated(sparsity=0.2, strategy="greedy", **options):
    return lambda g: m.allocate(g.model, g.stats, sparsity, strategy, **QUIET | options)


def damages(g, value):
    return {block: [value] * len(of_block) for block, of_block in g.candidates.items()}


ONE = WINDOWS[:, :1]
LOADING = {
    "no name": (load(""), ["model"]),
    "nothing for a name": (load(None), ["None"]),
    "a number for a name": (load(3), ["3"]),
    "an unknown bundled model": (load("bundled/gpt5"), ["bundled/gpt5", "bundled/smollm2-135m"]),
    "a folder that is not there": (load("./nowhere"), ["nowhere"]),
    "a home folder that is not there": (load("~/nowhere"), ["nowhere"]),
    "a path that is not there": (load("a/b/c"), ["a/b/c"]),
    "a gguf file that is not there": (load("model.gguf"), ["model.gguf"]),
    "an empty folder": (lambda g: m.load_model(str(g.place)), ["safetensors"]),
    "a pointer instead of weights": (
        lambda g: m.load_model(g.damaged("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n")),
        ["model", "git-lfs"],
    ),
    "weights that are none": (lambda g: m.load_model(g.damaged("model.safetensors", "x" * 99)), ["model"]),
    "a configuration that is no json": (lambda g: m.load_model(g.damaged("config.json", "{")), ["config"]),
    "a quantized checkpoint": (
        lambda g: m.load_model(
            g.damaged("config.json", json.dumps(g.model.config.to_dict() | {"quantization_config": {"quant_method": "gptq"}}))
        ),
        ["gptq", "quantiz"],
    ),
    "code of its own": (
        lambda g: m.load_model(
            g.damaged("config.json", json.dumps({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}}))
        ),
        ["code"],
    ),
    "a device that is none": (lambda g: m.load_model(g.folder(), device="tpu9"), ["tpu9"]),
    "a folder that save wrote": (lambda g: m.load_model(str(m.save(g.spliced, g.place / "s", standalone=True))), ["load"]),
}
TEXTS = {
    "no text": (read(""), ["text"]),
    "nothing for a text": (read(None), ["None"]),
    "an unknown bundled text": (read("bundled/poems"), ["bundled/poems", "bundled/wiki"]),
    "a file that is not there": (read("nowhere.txt"), ["nowhere.txt"]),
    "a folder that is not there": (read("./nowhere/texts"), ["nowhere/texts"]),
    "an unknown split": (read("bundled/wiki", "test"), ["test", "heldout"]),
    "windows of one token": (read("bundled/wiki", seq_len=1), ["seq_len", "1"]),
    "no windows": (read("bundled/wiki", n_windows=0), ["n_windows", "0"]),
    "no share": (read({"bundled/wiki": 0}), ["positive"]),
    "a negative share": (read({"bundled/wiki": -1}), ["positive"]),
    "no texts in a mixture": (read({}), ["share"]),
    "a file without text": (lambda g: read(g.text('{"body": 1}'))(g), ["text.jsonl", "line 1", "body"]),
    "a file that is no json": (lambda g: read(g.text("{"))(g), ["text.jsonl", "line 1"]),
    "no tokenizer": (lambda g: m.load_windows("bundled/wiki", None), ["tokenizer", "None"]),
    "too little text": (lambda g: read(g.documents(), n_windows=10**6)(g), ["1000000", "fewer"]),
}
INPUTS = {
    "a list of windows": (windows(WINDOWS.tolist()), ["list"]),
    "an array of windows": (windows(WINDOWS.numpy()), ["ndarray"]),
    "windows of true and false": (windows(WINDOWS > 5), ["bool"]),
    "windows of fractions": (windows(WINDOWS / 2), ["float32"]),
    "negative tokens": (windows(WINDOWS - 50), ["-"]),
    "tokens of another vocabulary": (windows(WINDOWS + VOCABULARY), [str(VOCABULARY)]),
    "windows beyond the context": (windows(random_windows(2, 80)), ["80", "64"]),
    "one window without its axis": (windows(WINDOWS[0]), ["[windows, seq_len]"]),
    "no window at all": (windows(WINDOWS[:0]), ["window"]),
    "a mask of another shape": (windows(WINDOWS, WINDOWS[:, 1:] > 0), ["mask"]),
    "a mask beside a batch": (windows({"input_ids": WINDOWS}, WINDOWS > 0), ["mask"]),
    "no real token": (lambda g: capture_stream(g.model, WINDOWS, torch.zeros_like(WINDOWS), **QUIET), ["real token"]),
    "perplexity of single tokens": (measured(ONE), ["token"]),
    "perplexity of nothing": (measured(WINDOWS[:0]), ["window"]),
    "perplexity of a list": (measured([[1, 2]]), ["list"]),
    "perplexity of negative tokens": (measured(WINDOWS - 50), ["-"]),
    "second order of single tokens": (lambda g: second_order_damage(g.model, g.candidates, ONE, **QUIET), ["token"]),
    "search on single tokens": (lambda g: search(g.model, {}, g.candidates, ONE, **QUIET), ["token"]),
    "healing on single tokens": (lambda g: m.heal(g.model, g.plan, ONE, ONE, **QUIET), ["token"]),
    "refit on a list": (lambda g: m.refit(g.model, g.plan, [[1, 2]], **QUIET), ["list"]),
    "spans of nothing": (lambda g: capture_spans(g.model, [Span(0, 1)], WINDOWS[:0], **QUIET), ["window"]),
    "units of no batch": (lambda g: capture_units(g.model, g.blocks, [], **QUIET), ["batches"]),
    "a batch of unequal lengths": (lambda g: in_batches({"a": WINDOWS, "b": WINDOWS[1:]}, 2), ["length"]),
    "batches of no windows": (lambda g: token_batches([[1]]), ["list"]),
    "generated windows of one token": (lambda g: generate_windows(g.model, g.tokenizer, seq_len=1), ["seq_len", "1"]),
    "measurements of other windows": (
        lambda g: perplexity_ratio(measure(g.model, WINDOWS, **QUIET), measure(g.model, WINDOWS[1:], **QUIET)),
        ["same windows"],
    ),
}
BLOCKS = {
    "an unknown kind": (lambda g: m.find_blocks(g.model, "mlps"), ["mlps", "attention"]),
    "an unknown architecture": (lambda g: m.find_blocks(torch.nn.Linear(2, 2)), ["Linear"]),
    "half of the neurons": (lambda g: Stack("layers", ("mlp",), ("attn",), up="mlp.up"), ["up", "down"]),
    "an architecture without layers": (lambda g: m.register_architecture("mine"), ["mine", "Stack"]),
    "an unknown moment": (lambda g: m.capture(g.model, g.blocks, WINDOWS, moments=("inputs",), **QUIET), ["inputs", "input"]),
    "all windows for validation": (lambda g: m.capture(g.model, g.blocks, WINDOWS, validation_windows=8, **QUIET), ["8"]),
    "blocks of another model": (lambda g: m.capture(g.model, g.foreign, WINDOWS, **QUIET), ["another model"]),
    "a block that was not captured": (lambda g: m.fit(g.foreign[0], g.stats, Mean()), ["capture"]),
    "a width of zero": (fitted(NarrowMLP(0)), ["width=0", "48"]),
    "a width beyond the block": (fitted(NarrowMLP(49)), ["width=49", "48"]),
    "a rank of zero": (fitted(LowRank(0)), ["rank=0"]),
    "a rank beyond the block": (fitted(LowRank(33)), ["rank=33", "32"]),
    "an unknown selection": (fitted(NarrowMLP(8), selection="best"), ["best", "energy"]),
    "a negative ridge": (fitted(Linear(), ridge=-1), ["ridge", "-1"]),
    "a ridge that is no number": (fitted(Linear(), ridge=NAN), ["ridge", "nan"]),
    "no family": (fitted([]), ["family"]),
    "a class for a family": (fitted(NarrowMLP), ["NarrowMLP(width"]),
    "nothing for a family": (fitted(None), ["None", "family"]),
    "half a neuron": (lambda g: NarrowMLP(8.5), ["width", "8.5"]),
    "a word for a training": (fitted(Linear(), training="mse"), ["Training(", "mse"]),
    "a model for blocks": (lambda g: m.capture(g.model, g.model, WINDOWS, **QUIET), ["find_blocks", "LlamaForCausalLM"]),
    "a name for a model": (lambda g: m.find_blocks("llama"), ["str", "load_model"]),
    "a word for a number of windows": (lambda g: m.capture(g.model, g.blocks, WINDOWS, validation_windows="2"), ["'2'"]),
    "batches of nothing": (lambda g: m.capture(g.model, g.blocks, WINDOWS, batch_size=0, **QUIET), ["batch_size", "0"]),
    "families of unequal size": (fitted([Mean(), Linear()]), ["equal size"]),
    "unknown samples": (fitted(Mean(), samples=["test"]), ["test", "validation"]),
    "training without pairs": (
        lambda g: m.fit(g.blocks[0], capture_quietly(g.model, WINDOWS, sample_windows=0)[1], Linear(), training=Training()),
        ["sample_windows"],
    ),
    "no epochs": (lambda g: Training(epochs=0), ["epochs", "0"]),
    "a negative rate": (lambda g: Training(learning_rate=-1), ["learning_rate", "-1"]),
    "a warm-up without an end": (lambda g: Tuning(warmup=1), ["warmup", "1"]),
    "an unknown loss": (lambda g: Training(loss="l1"), ["l1", "mse"]),
    "merging one block": (lambda g: merge_mlps(g.blocks[:1]), ["two"]),
    "a layer that is not there": (lambda g: without_layers(g.model, [9]), ["3", "9"]),
    "eight bits twice": (lambda g: quantized(quantized(g.model)), ["nothing to quantize"]),
}
PLANS = {
    "an unknown strategy": (allocated(strategy="best"), ["best", "milp"]),
    "a sparsity of zero": (allocated(0), ["0 < sparsity < 1"]),
    "a sparsity of one": (allocated(1), ["0 < sparsity < 1"]),
    "a sparsity that is no number": (allocated(NAN), ["0 < sparsity < 1"]),
    "a word for a sparsity": (allocated("0.2"), ["0 < sparsity < 1", "'0.2'"]),
    "nothing for a plan": (lambda g: m.splice(g.model, None), ["{block: replacement}", "NoneType"]),
    "modules for replacements": (lambda g: m.splice(g.model, {g.blocks[0]: torch.nn.Linear(2, 2)}), ["replacement", "Linear"]),
    "a list of plans": (lambda g: m.compare(g.model, [g.plan], WINDOWS, **QUIET), ["label", "list"]),
    "a sparsity out of reach": (allocated(0.99), ["0.99"]),
    "joint without windows": (allocated(strategy="joint"), ["joint", "windows"]),
    "joint by damages of single blocks": (
        lambda g: allocated(strategy="joint", candidates=g.candidates, damages=damages(g, 1.0))(g),
        ["joint", "second_order_damage"],
    ),
    "a uniform plan of another family": (allocated(strategy="uniform", family=Linear), ["Linear"]),
    "damages of other candidates": (
        lambda g: allocated(candidates=g.candidates, damages={})(g),
        ["damages", "candidates"],
    ),
    **{
        f"damages that are {value}, {strategy}": (
            lambda g, s=strategy, v=value: allocated(strategy=s, candidates=g.candidates, damages=damages(g, v), windows=WINDOWS)(
                g
            ),
            ["not finite"],
        )
        for strategy in ("greedy", "milp", "search")
        for value in (NAN, math.inf)
    },
    "a plan for another model": (lambda g: m.splice(g.model, g.alien), ["another model"]),
    "a plan of another block": (lambda g: m.splice(g.model, {g.blocks[1]: g.plan[g.blocks[0]]}), ["fitted to"]),
    "comparing a plan for another model": (lambda g: m.compare(g.model, {"": g.alien}, WINDOWS, **QUIET), ["another model"]),
    "healing nothing": (lambda g: m.heal(g.model, {}, WINDOWS, WINDOWS, **QUIET), ["empty"]),
    "tuning without labels": (lambda g: tune(g.model, g.plan, token_batches(WINDOWS), token_batches(WINDOWS)), ["labels"]),
    "an unknown method": (lambda g: calibrate(g.model, WINDOWS, [0.2], methods=["best"]), ["best", "shortgpt"]),
    "a method without its statistics": (lambda g: METHODS["subfit"](g.model, m.methods.Calibration(), 0.2), ["capture"]),
    "a task without a label": (lambda g: evaluate_tasks(g.model, g.tokenizer, label=" "), ["label"]),
    "an unknown task": (lambda g: evaluate_tasks(g.model, g.tokenizer, ["bundled/chess"], label="x"), ["bundled/chess"]),
    "a notebook that is not there": (lambda g: Run("07_more", {}), ["07_more"]),
}


def held_open(g) -> Path:
    (g.place / "there").mkdir()
    (g.place / "there" / "old").touch()
    return g.place / "there"


SAVING = {
    "saving a dense model": (lambda g: m.save(g.model, g.place / "s"), ["nothing to save"]),
    "exporting a dense model": (lambda g: m.export(g.model, g.place / "s"), ["nothing to save"]),
    "saving without a base": (lambda g: m.save(g.spliced, g.place / "s"), ["source", "standalone"]),
    "saving over something": (lambda g: m.save(g.spliced, held_open(g), standalone=True), ["there", "choose another"]),
    "saving what was compiled": (lambda g: m.save(torch.compile(g.spliced), g.place / "s", standalone=True), ["_orig_mod"]),
    "saving what transformers would": (lambda g: g.spliced.save_pretrained(g.place / "s"), ["save", "export"]),
    "saving eight bits as transformers would": (lambda g: quantized(g.model).save_pretrained(g.place / "s"), ["save"]),
    "exporting a linear map": (
        lambda g: m.export(m.splice(g.model, {g.blocks[0]: m.fit(g.blocks[0], g.stats, Linear())}), g.place / "s"),
        ["Linear", "standalone=True"],
    ),
    "loading nothing": (lambda g: m.load(g.place / "nowhere"), ["nowhere", "replacements.json"]),
    "loading a dense folder": (lambda g: m.load(g.folder()), ["replacements.json"]),
    "loading a whole model with a base": (
        lambda g: m.load(m.save(g.spliced, g.place / "s", standalone=True), base=g.model),
        ["without base"],
    ),
}
CASES = LOADING | TEXTS | INPUTS | BLOCKS | PLANS | SAVING
Given.spliced = property(lambda g: m.splice(g.model, g.plan))


@pytest.mark.parametrize(("act", "fragments"), CASES.values(), ids=CASES)
def test_the_error_names_what_was_given_and_what_was_expected(act, fragments, tmp_path, results):
    given = Given(tmp_path / "given")
    given.place.mkdir()
    before = copy.deepcopy(given.model.state_dict())
    with pytest.raises((ValueError, OSError)) as raised:
        act(given)
    said = str(raised.value)
    assert all(fragment.lower() in said.lower() for fragment in fragments), said
    assert len(said) > 25 and said.rstrip()[-1] in ".?)'\"", said
    assert not list(tmp_path.rglob(".writing-*")), "something half-written"
    assert all(torch.equal(before[name], tensor) for name, tensor in given.model.state_dict().items())
