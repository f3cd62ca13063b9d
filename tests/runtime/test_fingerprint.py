"""A fingerprint tells apart what differs and nothing else."""

import importlib
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import capture_quietly
from tiny_models import build, random_windows
from transformers import AutoModelForCausalLM

from mlpreplace import LowRank, Mean, NarrowMLP, find_blocks, fit, splice
from mlpreplace.runtime.fingerprint import code_hash, fingerprint

hashes = importlib.import_module("mlpreplace.runtime.fingerprint")  # the room has a function of this name


@dataclass
class Point:
    x: int
    y: int


@dataclass
class Vector:
    x: int
    y: int


DIFFERENT = {
    "type of number": (1, 1.0),
    "number and its text": (1, "1"),
    "nothing and zero": (None, 0),
    "true and one": (True, 1),
    "order of a list": ([1, 2], [2, 1]),
    "list and tuple": ([1], (1,)),
    "borders of strings": (["ab", "c"], ["a", "bc"]),
    "nesting": ([[1], 2], [[1, 2]]),
    "value in a dict": ({"a": 1}, {"a": 2}),
    "key of a dict": ({"a": 1}, {"b": 1}),
    "key and value": ({"a": "b"}, {"b": "a"}),
    "set": ({"a"}, {"a", "b"}),
    "dtype": (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
    "dtype of equal bytes": (torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.bfloat16)),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "empty shape": (torch.zeros(0, 3), torch.zeros(3, 0)),
    "scalar": (torch.tensor(1.0), torch.tensor(2.0)),
    "scalar and vector": (torch.tensor(1.0), torch.tensor([1.0])),
    "transposed": (torch.arange(4).view(2, 2), torch.arange(4).view(2, 2).T),
    "value of an array": (np.zeros(3), np.array([0, 0, 1.0])),
    "dtype of an array": (np.zeros(2, np.float32), np.zeros(2, np.int32)),
    "field of a dataclass": (Point(1, 2), Point(2, 1)),
    "class of a dataclass": (Point(1, 2), Vector(1, 2)),
    "dtype object": (torch.float16, torch.bfloat16),
    "family": (LowRank(4), NarrowMLP(4)),
}


@pytest.mark.parametrize(("a", "b"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_has_another_fingerprint(a, b):
    assert fingerprint(a) != fingerprint(b)


EQUAL = {
    "order of a set": (set("abcdef"), set("fedcba")),
    "memory layout": (torch.arange(4).view(2, 2).T, torch.tensor([[0, 2], [1, 3]])),
    "copy": (torch.ones(3), torch.ones(3)),
    "array layout": (np.arange(4).reshape(2, 2).T, np.array([[0, 2], [1, 3]])),
    "part": (torch.arange(6)[::2], torch.tensor([0, 2, 4])),
    "dataclass": (Point(1, 2), Point(1, 2)),
}


@pytest.mark.parametrize(("a", "b"), EQUAL.values(), ids=EQUAL)
def test_what_is_equal_has_the_same_fingerprint(a, b):
    assert fingerprint(a) == fingerprint(b)


def test_several_values_are_not_one():
    assert fingerprint(1, 2) != fingerprint([1, 2]) != fingerprint(2, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_a_model_is_its_weights_and_configuration(name):
    model = build(name)
    before = fingerprint(model)
    assert before == fingerprint(build(name))
    for parameter in (next(model.parameters()), list(model.parameters())[-1]):
        parameter.data.view(-1)[-1] += 1
        assert fingerprint(model) != before
        parameter.data.view(-1)[-1] -= 1
    model.config.layer_norm_epsilon = model.config.rms_norm_eps = 0.1
    assert fingerprint(model) != before


def test_where_a_model_lies_is_not_what_it_is(tmp_path):
    """Another checkout, or a folder that was moved, finds what was computed before."""
    build("llama").save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (AutoModelForCausalLM.from_pretrained(tmp_path / place) for place in ("here", "there"))
    assert here.config.name_or_path != there.config.name_or_path
    assert fingerprint(here) == fingerprint(there)


def test_a_model_with_a_scalar_buffer_has_a_fingerprint():
    module = torch.nn.BatchNorm1d(3)  # counts its batches in a scalar
    before = fingerprint(module)
    module.num_batches_tracked += 1
    assert fingerprint(module) != before


def test_a_plan_is_its_blocks_and_replacements(captured):
    _, blocks, stats = captured
    plans = [{b: fit(b, stats, family)} for b in blocks[:2] for family in (Mean(), NarrowMLP(8), NarrowMLP(9))]
    assert len({fingerprint(plan) for plan in plans}) == len(plans)
    reloaded, again = capture_quietly(build("llama"), random_windows())
    assert fingerprint({reloaded[0]: fit(reloaded[0], again, Mean())}) == fingerprint(plans[0])


def test_a_replacement_is_also_its_family_and_the_code_of_that(captured, monkeypatch):
    """Two families may hold the same tensors and do something else with them."""
    _, blocks, stats = captured
    plan = {blocks[0]: fit(blocks[0], stats, LowRank(4))}
    before = fingerprint(plan)
    plan[blocks[0]].family = LowRank(5)
    assert fingerprint(plan) != before
    plan[blocks[0]].family = LowRank(4)
    assert fingerprint(plan) == before
    monkeypatch.setattr(hashes, "code_hash", lambda module_path: f"{module_path}, another version")
    assert fingerprint(plan) != before


def test_a_model_with_replacements_is_told_by_them(captured):
    model, blocks, stats = captured
    small = fit(blocks[0], stats, LowRank(4))
    compressed = splice(model, {blocks[0]: small})
    before = fingerprint(compressed)
    compressed.get_submodule(blocks[0].name).family = LowRank(5)
    assert fingerprint(compressed) != before


def test_a_module_is_also_the_classes_within(llama):
    """Another activation has no weights to tell."""
    before = fingerprint(llama)
    llama.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    assert fingerprint(llama) != before


def test_a_class_from_elsewhere_is_its_functions():
    """Of a notebook, say, whose source cannot be read."""

    def family(body: str) -> type:
        scope: dict = {}
        exec(f"class Mine:\n    size = 3\n    def build(self, block):\n        return {body}\n", {"__name__": "__main__"}, scope)
        return scope["Mine"]

    assert fingerprint(family("block + 1")) == fingerprint(family("block + 1"))
    assert (
        len({fingerprint(family(body)) for body in ("block + 1", "block + 2", "block - 1", "other + 1", "[b for b in 'x']")}) == 5
    )


def test_a_block_is_also_what_its_architecture_says_of_it(llama, registry):
    before = fingerprint(find_blocks(llama))
    assert fingerprint(find_blocks(llama)) == before
    (stack,) = registry["llama"]
    registry["llama"] = (replace(stack, up=stack.gate, gate=stack.up),)
    assert fingerprint(find_blocks(llama)) != before


def test_what_has_no_fingerprint_is_named():
    with pytest.raises(TypeError, match="No fingerprint for a object"):
        fingerprint([object()])


# code


@pytest.fixture
def package(tmp_path, monkeypatch, fresh_assets):
    """a imports b, b imports c in another spelling, nothing imports d."""
    files = {"a": "from .b import f\n", "b": "import os\nfrom . import c\n", "c": "x = 1\n", "d": "y = 1\n"}
    for name, source in files.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(hashes, "PACKAGE", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("module", "matters"), [("a", True), ("b", True), ("c", True), ("d", False)])
def test_the_code_is_a_module_and_what_it_imports(module, matters, package):
    before = code_hash("a")
    (package / f"{module}.py").write_text((package / f"{module}.py").read_text() + "z = 3\n")
    code_hash.cache_clear()
    assert (code_hash("a") != before) == matters


@pytest.mark.parametrize(
    ("source", "matters"),
    [
        ('"""Another docstring."""\n\nx = 1  # why\n', False),
        ('x = 1\n\n\ndef f():\n    """Documented."""\n', True),
        ("x = '1'\n", True),
    ],
    ids=["words", "a function", "a value"],
)
def test_comments_and_docstrings_are_not_code(source, matters, package):
    before = code_hash("a")
    (package / "c.py").write_text(source)
    code_hash.cache_clear()
    assert (code_hash("a") != before) == matters


def test_modules_of_folders_are_code_as_well(package):
    """The folder is its __init__, inner/e and inner/f import from above by two dots."""
    (package / "inner").mkdir()
    for name, source in {"__init__": "from .e import g\n", "e": "from ..c import x\n", "f": "from .. import d\n"}.items():
        (package / "inner" / f"{name}.py").write_text(source)
    (package / "a.py").write_text("from .inner import g\n")
    before = {name: code_hash(name) for name in ("a", "inner/e", "inner/f")}
    for module, matters in (("c", {"a", "inner/e"}), ("d", {"inner/f"}), ("inner/e", {"a", "inner/e"})):
        path = package / f"{module}.py"
        content = path.read_text()
        path.write_text(content + "z = 3\n")
        code_hash.cache_clear()
        assert {name for name in before if code_hash(name) != before[name]} == matters, module
        path.write_text(content)
        code_hash.cache_clear()


def test_a_module_that_is_not_there_is_an_error():
    """Else a key would cover no code, and its results would go stale."""
    assert code_hash("runtime")  # a room is its __init__
    for typo in ("typo", "runtime/typo", "runtime.cache"):
        with pytest.raises(ValueError, match=f"no module '{typo}'.*'statistics/moments'"):
            code_hash(typo)


def test_modules_may_import_each_other(package):
    (package / "c.py").write_text("from .a import f\n")
    assert code_hash("a") == code_hash("b") == code_hash("c") != code_hash("d")
