"""Threads that share a model use it one at a time.

Hooks, a plan in place and the training mode belong to the model, not to a thread: two threads that use one model at once would
see each other's. What runs a model takes a :func:`turn`, and other threads wait for it. A plan that the caller puts in place
stays for as long as the caller likes, so nobody can wait for that: see :func:`claimed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, Thread, current_thread
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class _Turn:
    thread: Thread | None = None  # that has the model
    entered: int = 0  # times
    claimed: bool = False  # for a block of the caller's own


_TURNS: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()  # beside the models, whose copies are nobody's
_CHANGED = Condition()


def _forget() -> None:
    """In a forked process, where no other thread is left."""
    global _CHANGED
    _CHANGED = Condition()
    _TURNS.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def turn(model: nn.Module) -> Iterator[None]:
    """No other thread uses ``model`` meanwhile; waits for one that does. A thread may enter again.

    Raises ValueError where another thread has claimed the model.
    """
    with _held(model, claim=False):
        yield


@contextmanager
def claimed(model: nn.Module) -> Iterator[None]:
    """As :func:`turn`, and other threads that want ``model`` are refused instead of waiting.

    For what lasts as long as the caller likes. A thread that has the model already goes on as it was.

    Raises ValueError where another thread has claimed the model.
    """
    with _held(model, claim=True):
        yield


@contextmanager
def _held(model: nn.Module, *, claim: bool) -> Iterator[None]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"Expected a model, got a {type(model).__name__}: load_model(name) loads one.")
    own = current_thread()
    with _CHANGED:
        found = _TURNS.setdefault(model, _Turn())
        while found.thread not in (None, own):
            if found.claimed:
                raise ValueError(
                    f"Thread {found.thread.name!r} has put a plan in the place of blocks of this {type(model).__name__} "
                    "(with spliced(model, plan)), so that no other thread can use it: use the model in that thread, or give "
                    "each thread a model of its own, splice(model, plan)."
                )
            _CHANGED.wait()
        if not found.entered:
            found.thread, found.claimed = own, claim
        found.entered += 1
    try:
        yield
    finally:
        with _CHANGED:
            found.entered -= 1
            if not found.entered:
                found.thread, found.claimed = None, False
                _CHANGED.notify_all()
