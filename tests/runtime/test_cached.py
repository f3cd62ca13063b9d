"""A function with the keyword ``cached`` runs once for the same arguments, and a hit is the very result."""

import inspect
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import build
from torch import nn

from mlpreplace import LowRank, Mean, find_blocks
from mlpreplace.models.loading import Source
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.records import Errors, FitReport
from mlpreplace.replacements.splice import Improved
from mlpreplace.runtime.cache import cached


class Spy:
    """``made`` as a function of the package, under ``cached``; ``calls`` are the arguments it ran with."""

    def __init__(self, made, **options):
        self.calls = []

        def function(*args, **kwargs):
            self.calls.append((args, kwargs))
            return made(*args, **kwargs)

        function.__signature__, function.__name__ = inspect.signature(made), "function"
        function.__module__ = "mlpreplace.planning.damage"
        self.function = cached("spied", **options)(function)

    def __call__(self, *args, **kwargs):
        return self.function(*args, cached=True, **kwargs)


def same(a, b) -> bool:
    """Whether two results are equal in value and type, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


BLOCK, OTHER = find_blocks(build("llama"))[:2]
PLAN = {OTHER: Replacement(Mean(), OTHER), BLOCK: Replacement(LowRank(4), BLOCK)}
BASE = torch.arange(12.0).view(3, 4)
RESULTS = {
    "nothing": None,
    "numbers": [True, 0, -1, 2.5, 1e-320, "text", ""],
    "not finite": [math.nan, math.inf, -math.inf],
    "tuples and lists": ((1, [2, (3,)]), [], ()),
    "a dict": {"b": 1, "a": None, 3: {"float": "nan"}},
    "a dict that looks like a record": {"tensor": "0", "device": "cpu"},
    "tuples as keys": {("a", 1): 1.0, ("b", 2): 2.0},
    "tensors": [torch.arange(3), BASE.T, torch.zeros(0, 2), torch.tensor(1.5), torch.ones(2, dtype=torch.bfloat16)],
    "tensors that share memory": [BASE, BASE, BASE[1], BASE[:, :2]],
    "arrays": [np.arange(3.0), np.array([math.nan, 1]), np.arange(6).reshape(2, 3).T, np.arange(4)[::-1], np.array(2.5)],
    "a dataclass": FitReport(7, 0.5, train=Errors(0.1, 0.2, 0.3, 0.4, 0.5, math.inf, 0.7), validation=None),
    "a frozen dataclass": Source("name", revision="abc"),
    "a dict by blocks": {OTHER: torch.ones(2), BLOCK: 1},
    "a named tuple of a plan": Improved(PLAN, [0.5]),
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_a_hit_is_the_very_result(result, results):
    spy = Spy(lambda plan, blocks: result)
    for _ in range(2):
        found = spy(PLAN, [BLOCK, OTHER])
        assert same(found, result)
    assert len(spy.calls) == 1


def test_blocks_and_replacements_of_a_hit_are_those_of_the_call(results):
    """Of a model that was loaded again, say."""
    spy = Spy(lambda plan: Improved(dict(reversed(plan.items())), 0))
    spy(PLAN)
    again = find_blocks(build("llama"))
    plan = {again[1]: Replacement(Mean(), again[1]), again[0]: Replacement(LowRank(4), again[0])}
    for block, replacement in PLAN.items():
        plan[block].load_state_dict(replacement.state_dict())
    found = spy(plan).plan
    assert len(spy.calls) == 1
    assert [(id(b), id(r)) for b, r in found.items()] == [(id(b), id(r)) for b, r in reversed(plan.items())]


def test_references_are_those_of_the_key(results):
    """What the key leaves out may come in another order in another call."""
    spy = Spy(lambda others, blocks: {block: 1 for block in blocks}, key=lambda others, blocks: blocks)
    for others in ([OTHER], [], [BLOCK, OTHER]):
        assert list(spy(others, [BLOCK])) == [BLOCK]
    assert len(spy.calls) == 1


@dataclass
class Stranger:
    """Of no module that the package could load it from."""

    x: int = 1


@pytest.mark.parametrize("result", [object(), Stranger(), {1, 2}, {"a": torch.nn.Linear(1, 1)}, BLOCK, lambda: 0])
def test_what_cannot_be_kept_is_named(result, results):
    with pytest.raises(TypeError, match="cannot be kept"):
        Spy(lambda: result)()
    assert not results.exists()


def dressed(a, b=2, *, progress=True, seed=0, checkpoint=None):
    return [a, b, seed]


CALLS = {  # arguments of two calls, and whether the second is a hit after the first
    "defaults given": (((1,), {}), ((1, 2), {"seed": 0}), True),
    "by name": (((1, 3), {}), ((), {"b": 3, "a": 1}), True),
    "progress": (((1,), {"progress": True}), ((1,), {"progress": False}), True),
    "first": (((1,), {}), ((2,), {}), False),
    "a default": (((1,), {}), ((1, 3), {}), False),
    "a keyword": (((1,), {}), ((1,), {"seed": 1}), False),
    "swapped": (((1, 2), {}), ((2, 1), {}), False),
    "a type": (((1,), {}), ((1.0,), {}), False),
    "content of a tensor": (((torch.zeros(2),), {}), ((torch.ones(2),), {}), False),
    "an equal tensor": (((torch.zeros(2),), {}), ((torch.zeros(2),), {}), True),
}


@pytest.mark.parametrize(("first", "second", "hit"), CALLS.values(), ids=CALLS)
def test_the_key_is_every_argument_but_progress(first, second, hit, results):
    spy = Spy(dressed)
    for args, kwargs in (first, second):
        assert same(spy(*args, **kwargs), dressed(*args, **kwargs))
    assert len(spy.calls) == 2 - hit


def test_two_functions_of_a_module_do_not_share_results(results):
    def another(a):
        return 2

    another.__module__ = "mlpreplace.planning.damage"
    assert (Spy(lambda a: 1)(0), cached("spied")(another)(0, cached=True)) == (1, 2)


def test_without_cached_nothing_is_kept(results):
    spy = Spy(dressed)
    assert spy.function(1) == spy.function(1) == [1, 2, 0]
    assert len(spy.calls) == 2 and not results.exists()


def test_a_cached_function_shows_the_keyword_and_hides_the_checkpoint():
    shown = inspect.signature(Spy(dressed).function).parameters
    assert list(shown) == ["a", "b", "progress", "seed", "cached"]
    assert shown["cached"].default is False and shown["cached"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("argument", [len, partial(len), object(), [lambda: 0], {"a": (i for i in range(2))}])
def test_an_argument_without_content_is_an_error(argument, results):
    spy = Spy(dressed)
    with pytest.raises(ValueError, match=r"function\(\.\.\., cached=True\).*No fingerprint for a \w+.*cached=False"):
        spy(argument)
    assert not spy.calls
    assert spy.function(argument)[0] is argument


def test_an_iterator_is_read_once(results):
    spy = Spy(lambda items: [i * i for i in items])
    assert spy(i for i in range(4)) == spy(iter(range(4))) == spy([0, 1, 2, 3]) == [0, 1, 4, 9]
    assert len(spy.calls) == 1


def test_a_key_of_ones_own_is_all_that_matters(results):
    spy = Spy(lambda a, b, progress=True: [a, b], key=lambda a, b: a)
    assert spy(1, 2) == spy(1, len, progress=False) == [1, 2]
    assert spy(2, 2) == [2, 2]
    assert len(spy.calls) == 2


def test_weights_that_a_function_sets_are_part_of_the_result(results):
    def fill(body, value):
        body[0].weight.data.fill_(value)
        body.counter += 1
        return 2 * value

    def empty():
        body = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3))
        body.register_buffer("counter", torch.tensor(0))
        body[1].weight = body[0].weight  # tied
        return body

    spy, kept = Spy(fill, fills="body", key=lambda body, value: value), []
    for _ in range(2):
        body = empty()
        assert spy(body, 5.0) == 10.0
        assert body[1].weight is body[0].weight
        kept.append(body.state_dict())
    assert len(spy.calls) == 1
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0]) and kept[1]["counter"] == 1


# unfinished work


def counted(until, stop, *, checkpoint=None, progress=True):
    """Counts to ``until`` and leaves every number behind; ``stop`` interrupts the first time."""
    done = [] if checkpoint is None else checkpoint.load() or []
    while len(done) < until:
        done.append(len(done) + (0 if done else stop[0]))
        if checkpoint is not None:
            checkpoint.save(done)
        if len(done) == stop[0]:
            raise KeyboardInterrupt
    return done


def test_an_interrupted_call_goes_on_from_its_checkpoint(results):
    spy = Spy(counted, key=lambda until, stop: until)
    with pytest.raises(KeyboardInterrupt):
        spy(5, [3])
    (left,) = results.iterdir()
    assert left.name.startswith("spied-checkpoint-")
    with pytest.raises(KeyboardInterrupt):  # another call has a checkpoint of its own
        spy(6, [2])
    assert len(list(results.iterdir())) == 2
    assert spy(5, [0]) == [3, 1, 2, 3, 4]  # 3: of the call that was interrupted
    assert not left.exists() and len(list(results.iterdir())) == 2
    assert spy(5, [0]) == [3, 1, 2, 3, 4]
    assert len(spy.calls) == 3


def test_a_call_that_is_not_cached_has_no_checkpoint(results):
    spy = Spy(counted, key=lambda until, stop: until)
    with pytest.raises(KeyboardInterrupt):
        spy.function(5, [3])
    assert spy.calls[0][1].get("checkpoint") is None and not results.exists()
    assert spy.function(5, [0]) == [0, 1, 2, 3, 4]
