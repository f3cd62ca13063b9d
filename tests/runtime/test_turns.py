"""Turns: one thread at a time has a model, and a plan that someone keeps in place is waited for by nobody."""

import copy
import gc
import os
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from mlpreplace.runtime import turns
from mlpreplace.runtime.turns import claimed, turn

SOON = 10  # seconds after which something hangs


@pytest.fixture
def model():
    return nn.Linear(2, 2)


@pytest.fixture
def thread():
    """A pool of one thread."""
    with ThreadPoolExecutor(1, "other") as pool:
        yield pool


def taken(model, how=turn) -> bool:
    with how(model):
        return True


@pytest.mark.parametrize("how", [turn, claimed])
def test_another_thread_waits_for_its_turn(how, model, thread):
    with turn(model):
        waiting = thread.submit(taken, model, how)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.05)
    assert waiting.result(SOON)


def test_turns_never_overlap(model):
    inside, most = [], []

    def take(_):
        with turn(model):
            inside.append(None)
            most.append(len(inside))
            threading.Event().wait(1e-3)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(40)))
    assert most == [1] * 40


@pytest.mark.parametrize("inner", [turn, claimed])
@pytest.mark.parametrize("outer", [turn, claimed])
def test_a_thread_may_enter_again_and_has_the_model_until_the_last_end(outer, inner, model, thread):
    with outer(model):
        with inner(model), outer(model):
            pass
        asked = thread.submit(taken, model)
        with pytest.raises(TimeoutError if outer is turn else ValueError):
            asked.result(timeout=0.05 if outer is turn else SOON)
    assert thread.submit(taken, model).result(SOON)


@pytest.mark.parametrize("how", [turn, claimed])
def test_a_claim_refuses_other_threads_at_once_and_says_what_to_do(how, model, thread):
    with claimed(model):
        with pytest.raises(ValueError, match=r"MainThread.*Linear.*splice\(model, plan\)"):
            thread.submit(taken, model, how).result(SOON)
        assert thread.submit(taken, nn.Linear(2, 2)).result(SOON), "a model of its own"
    assert thread.submit(taken, model, how).result(SOON)


def test_one_that_waited_is_refused_when_a_claim_comes_first(model, thread):
    with turn(model):
        waiting = thread.submit(taken, model)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.05)
        found = turns._TURNS[model]
        found.claimed = True  # as if the turn had ended and a claim had begun before the other thread woke up
        with turns._CHANGED:
            turns._CHANGED.notify_all()
        with pytest.raises(ValueError, match="MainThread"):
            waiting.result(SOON)


@pytest.mark.parametrize("how", [turn, claimed])
def test_an_exception_gives_the_model_back(how, model, thread):
    with pytest.raises(KeyboardInterrupt), how(model):
        raise KeyboardInterrupt
    assert thread.submit(taken, model).result(SOON)


@pytest.mark.parametrize("how", [turn, claimed])
def test_a_context_that_is_dropped_gives_the_model_back(how, model, thread):
    left = how(model)
    left.__enter__()
    del left
    gc.collect()
    assert thread.submit(taken, model).result(SOON)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_nobodys_and_models_hold_no_lock(copied, model, thread):
    with claimed(model):
        other = copied(model)
        assert thread.submit(taken, other).result(SOON)
    assert vars(model).keys() == vars(nn.Linear(2, 2)).keys()
    torch.save(model, os.devnull)


def test_a_model_is_not_kept_alive():
    model = nn.Linear(2, 2)
    alive = weakref.ref(model)
    with claimed(model):
        pass
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_waits_for_no_thread_of_its_parent(model, thread):
    entered, done = threading.Event(), threading.Event()

    def hold():
        with turn(model):
            entered.set()
            done.wait(SOON)

    held = thread.submit(hold)
    assert entered.wait(SOON)
    if not (child := os.fork()):
        os._exit(0 if taken(model) else 1)
    try:
        for _ in range(100):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            threading.Event().wait(SOON / 100)
        assert pid and status == 0
    finally:
        if not pid:
            os.kill(child, 9)
        done.set()
        held.result(SOON)
