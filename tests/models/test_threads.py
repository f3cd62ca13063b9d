"""Threads that share a model: each result is what it is alone, and a plan that one of them put in place is no other's."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from conftest import capture_quietly, word_tokenizer
from tiny_models import VOCABULARY, build, random_windows

from mlpreplace import NarrowMLP, capture, compare, find_blocks, fit, heal, perplexity, splice, spliced
from mlpreplace.evaluation import sweep
from mlpreplace.evaluation.speed import latency
from mlpreplace.models.generation import generate_windows
from mlpreplace.models.inputs import token_batches
from mlpreplace.planning.damage import second_order_damage
from mlpreplace.planning.distil import Healing, losses, with_rest
from mlpreplace.planning.refit import refit
from mlpreplace.planning.search import search
from mlpreplace.replacements.splice import replacements_of, sparsity_of
from mlpreplace.statistics import Span, capture_spans, capture_stream, capture_units, gradients

SOON = 60  # seconds after which something hangs
WINDOWS = random_windows(12)


@pytest.fixture(scope="module")
def case():
    """(model in training mode, with dropout; plan)."""
    model = build("gpt2")
    blocks, stats = capture_quietly(model, WINDOWS)
    return model.train(), {b: fit(b, stats, NarrowMLP(24)) for b in blocks}


@pytest.fixture(autouse=True)
def often():
    """Threads take turns a thousand times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def numbers(value) -> list[torch.Tensor]:
    """All numbers in a result."""
    if isinstance(value, (torch.Tensor, float, int)):
        return [torch.as_tensor(value)]
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(value)]
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, (list, tuple)):
        return [n for item in value for n in numbers(item)]
    if isinstance(value, torch.nn.Module):
        return numbers(value.state_dict())
    return numbers(vars(value)) if hasattr(value, "__dict__") else []


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))


TOKENIZER = word_tokenizer(f"w{i}" for i in range(1, VOCABULARY))
HOW = Healing(steps=4, learning_rate=1e-3, check_steps=2)
USES = {  # everything that runs a model
    "capture": lambda m, plan: capture(m, find_blocks(m), WINDOWS, batch_size=2, validation_windows=2, progress=False),
    "stream": lambda m, plan: capture_stream(m, WINDOWS, batch_size=2, progress=False),
    "spans": lambda m, plan: capture_spans(m, [Span(1, 3)], WINDOWS, batch_size=2, progress=False),
    "units": lambda m, plan: capture_units(m, list(plan), token_batches(WINDOWS), progress=False),
    "perplexity": lambda m, plan: perplexity(m, WINDOWS, batch_size=2, progress=False),
    "compare": lambda m, plan: compare(m, {"a": plan, "b": {}}, WINDOWS, batch_size=2, progress=False),
    "losses": lambda m, plan: losses(m, {"a": plan, "b": {}}, token_batches(WINDOWS, labels=True)),
    "generate": lambda m, plan: generate_windows(m, TOKENIZER, n_windows=4, seq_len=12, progress=False),
    "damage": lambda m, plan: second_order_damage(m, {b: [r] for b, r in plan.items()}, WINDOWS, progress=False),
    "search": lambda m, plan: search(m, plan, {b: [r] for b, r in plan.items()}, WINDOWS, progress=False),
    "refit": lambda m, plan: refit(m, plan, WINDOWS, progress=False),
    "heal": lambda m, plan: heal(m, plan, WINDOWS, WINDOWS[:4], HOW, progress=False).plan,
}


@pytest.mark.parametrize("name", USES)
def test_two_threads_find_what_one_finds(name, case):
    alone = USES[name](*case)
    with ThreadPoolExecutor(2) as pool:
        found = [job.result(SOON) for job in [pool.submit(USES[name], *case) for _ in range(2)]]
    assert equal(found[0], alone) and equal(found[1], alone)


def test_everything_at_once_finds_what_each_finds_alone(case):
    blocks = find_blocks(case[0])
    uses = USES | {"capture": lambda m, plan: capture(m, blocks, WINDOWS, validation_windows=2, progress=False)}
    alone = {name: use(*case) for name, use in uses.items()}
    weights = copy.deepcopy(case[0].state_dict())
    with ThreadPoolExecutor(4) as pool:
        jobs = [(name, pool.submit(use, *case)) for _ in range(2) for name, use in uses.items()]
        found = [(name, job.result(SOON)) for name, job in jobs]
    assert not [name for name, result in found if not equal(result, alone[name])]
    assert case[0].training and all(p.requires_grad for p in case[0].parameters())
    assert equal(weights, case[0].state_dict()) and find_blocks(case[0]) == blocks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case[0].modules())


@pytest.mark.parametrize("name", USES)
def test_a_plan_in_place_is_that_of_its_thread(name, case):
    """A pool that is started inside the block does not hang, and does not measure the plan for the dense model."""
    model, plan = case
    alone, dense = USES[name](*case), perplexity(model, WINDOWS, progress=False).value
    with spliced(model, plan), ThreadPoolExecutor(2) as pool:
        with pytest.raises(ValueError, match=r"MainThread.*splice\(model, plan\)"):
            pool.submit(USES[name], model, plan).result(SOON)
        assert perplexity(model, WINDOWS, progress=False).value != dense, "the thread itself goes on"
    with ThreadPoolExecutor(1) as pool:
        assert equal(pool.submit(USES[name], *case).result(SOON), alone)


def test_two_plans_in_two_threads_are_refused_and_two_models_are_not(case):
    model, plan = case
    block = next(iter(plan))

    def spliced_perplexity(m) -> float:
        with spliced(m, plan if m is model else {}):
            return perplexity(m, WINDOWS, progress=False).value

    own = splice(model, {block: plan[block]})
    with spliced(model, {block: plan[block]}), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="put a plan in the place"):
            pool.submit(spliced_perplexity, model).result(SOON)
        assert pool.submit(spliced_perplexity, own).result(SOON) == perplexity(model, WINDOWS, progress=False).value


@pytest.fixture
def measuring(case, monkeypatch):
    """A measurement in another thread, with its plan in place; it ends when the event is set."""
    entered, go, resumed = Event(), Event(), sweep._resumed

    def hold(*args):
        entered.set()
        go.wait(SOON)
        return resumed(*args)

    monkeypatch.setattr(sweep, "_resumed", hold)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(compare, *(case[0], {"": case[1]}, WINDOWS), kl=False, progress=False)
        assert entered.wait(SOON)
        yield found, go
        go.set()


COPIES = {"heal": USES["heal"], "refit": lambda m, plan: refit(m, plan, WINDOWS, progress=False).plan, "rest": with_rest}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_plan_takes_no_hook_of_another_thread_along(name, case, monkeypatch):
    model, plan = case
    entered, go, objective = Event(), Event(), gradients.loss_of

    def hold(*args):
        entered.set()
        go.wait(SOON)
        return objective(*args)

    monkeypatch.setattr(gradients, "loss_of", hold)
    with ThreadPoolExecutor(2) as pool:
        probing = pool.submit(list, gradients.probe(model, plan, plan, WINDOWS, progress=False))
        assert entered.wait(SOON)
        copying = pool.submit(COPIES[name], model, {} if name == "rest" else plan)
        with pytest.raises(TimeoutError):
            copying.result(timeout=0.05)
        go.set()
        copied = copying.result(SOON)
        assert probing.result(SOON)
    assert copied and not any(m._forward_hooks or m._forward_pre_hooks for r in copied.values() for m in r.modules())


FINDS = {
    "perplexity": lambda m, plan: perplexity(m, WINDOWS, progress=False),
    "blocks": lambda m, plan: [b.modules for b in find_blocks(m)],
    "parameters": lambda m, plan: sparsity_of(m, plan),
    "replacements": lambda m, plan: list(replacements_of(m)),
    "kept": lambda m, plan: capture_stream(m, WINDOWS, cached=True, progress=False),
}


@pytest.mark.parametrize("name", FINDS)
def test_while_a_plan_is_measured_others_wait_for_the_dense_model(name, case, measuring, results):
    found, go = measuring
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(FINDS[name], *case)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.05)
        go.set()
        got, dense = waiting.result(SOON), FINDS[name](*case)
    assert equal(got, dense) if name == "kept" else got == dense
    assert found.result(SOON)[""].perplexity != perplexity(case[0], WINDOWS, progress=False).value
    assert len(list(results.glob("*"))) == (name == "kept"), "one entry, of the dense model"


def test_threads_that_use_two_models_do_not_wait_for_each_other_forever(case):
    first, second = build("llama"), build("llama", seed=1)
    pairs = [{"a": first, "b": second}, {"a": second, "b": first}] * 4
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(latency, pair, WINDOWS[:, :4], decode_tokens=1, rounds=1) for pair in pairs]
        assert all(job.result(SOON) for job in jobs)
