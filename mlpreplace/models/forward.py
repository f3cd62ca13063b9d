"""Run a model whole, one layer at a time, or from a layer on, and see the inputs and outputs of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..runtime.half_products import quick_products
from ..runtime.turns import turn
from .blocks import Block
from .inputs import Batch, is_seq2seq

State = Tensor | tuple  # what a module returns: hidden states, or a tuple that starts with them (attention, layers of Falcon)
Beside = tuple[tuple, dict]  # positional and keyword arguments of a call other than the hidden states


@contextmanager
def eval_mode(model: nn.Module, *, as_it_is: bool = False) -> Iterator[None]:
    """``model`` in eval mode; afterwards every submodule is in its former mode. Other threads wait for their turn.

    Products are quick in half precision, too (see :mod:`~mlpreplace.runtime.half_products`), unless ``as_it_is``, for a clock.

    Raises ValueError where another thread has claimed the model (see :mod:`~mlpreplace.runtime.turns`).
    """
    with turn(model):
        before = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with nullcontext() if as_it_is else quick_products(model.parameters()):
                yield
        finally:
            for module, mode in before.items():
                module.training = mode


def check_gradients(*models: nn.Module) -> None:
    """Raise ValueError where gradients cannot be taken: under torch.inference_mode(), and through weights that were made there.

    ``torch.no_grad()`` is no obstacle.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("There are no gradients under torch.inference_mode(), which cannot be lifted inside: leave it first.")
    for model in models:
        if made := next((name for name, p in model.named_parameters() if p.is_inference()), None):
            raise ValueError(
                f"{made} of {type(model).__name__} was made under torch.inference_mode(), so that no gradient goes through it: "
                "load, fit or copy.deepcopy(model) outside of it."
            )


def run_layers(model: nn.Module, batch: Batch) -> None:
    """Run a batch through all layers. The head runs in an encoder-decoder only, which makes decoder inputs of labels."""
    forward, unread = (model, ()) if is_seq2seq(model) else (getattr(model, "base_model", model), ("labels",))
    options = {"use_cache": False} if getattr(model.config.get_text_config(), "use_cache", None) is not None else {}
    forward(**options, **{name: t for name, t in batch.items() if name not in unread})


def hidden_states(output: State) -> Tensor:
    """The hidden states of what a module returns."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden_states(output: State, hidden: Tensor) -> State:
    """``output`` with other hidden states in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def token_rows(hidden: Tensor, keep: Tensor | None = None) -> Tensor:
    """[..., width] → [tokens, width] in at least float32; only tokens where ``keep`` [...] is true, if given."""
    rows = hidden.flatten(0, -2) if keep is None else hidden[keep.to(hidden.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


# Hooks


@contextmanager
def watching(
    first: nn.Module,
    last: nn.Module | None = None,
    *,
    enter: Callable[[Tensor, Beside], object] | None = None,
    leave: Callable[[State], State | None] | None = None,
    follow: Callable[[nn.Module], object] | None = None,
    within: nn.Module | None = None,
) -> Iterator[None]:
    """While in the context, call back with the input of ``first`` and the output of ``last`` (the same module by default).

    The tensors are the model's own. Copy what is kept, since a layer may write into them.

    Args:
        enter: called with the hidden states and the other arguments of ``first``.
        leave: called with what ``last`` returns, which is replaced by what the callback returns, unless that is None.
        follow: called with the module of ``within`` whose input is the very output of ``last``, if there is one: a norm between
            the block and the residual stream (Gemma 2).
        within: the layer around the modules, for ``follow``.
    """
    last = last or first
    left: list[Tensor] = []  # the last output, until it is followed

    def on_enter(module, args, kwargs) -> None:
        x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        enter(x, (rest, {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    def on_leave(module, args, output):
        replaced = leave(output) if leave is not None else None
        if follow is not None:
            left[:] = [hidden_states(output if replaced is None else replaced)]
        return replaced

    def on_follow(module, args) -> None:
        if left and args and args[0] is left[0]:
            follow(module)
            left.clear()

    with ExitStack() as hooks:
        if enter is not None:
            hooks.callback(first.register_forward_pre_hook(on_enter, with_kwargs=True).remove)
        if leave is not None or follow is not None:
            hooks.callback(last.register_forward_hook(on_leave).remove)
        if follow is not None:
            inside = {within, *first.modules(), *last.modules()}
            for module in within.modules():
                if module not in inside and not isinstance(module, nn.Dropout):  # the identity in eval mode
                    hooks.callback(module.register_forward_pre_hook(on_follow).remove)
        yield


def place_of(model: nn.Module, block: Block) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The modules that are in a block's place now: the first, the last, and the layer around them.

    Raises ValueError where the model has no such modules.
    """
    try:
        first, last = (model.get_submodule(block.paths[i]) for i in (0, -1))
        return first, last, model.get_submodule(f"{block.stack}.{block.layer}")
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {block.name}: the blocks are of another model.") from None


# Running a part of the layers


def copied_state(state: State, device: torch.device | str | None = None) -> State:
    """A copy, on ``device`` if given. Layers may write into their input, so it is a copy also on the same device."""
    hidden = hidden_states(state)
    return with_hidden_states(state, hidden.to(device or hidden.device, copy=True))


@contextmanager
def handing_on(layers: Iterable[nn.Module], state: Callable[[], State]) -> Iterator[None]:
    """Let ``layers`` return ``state()`` instead of computing."""
    own = {layer: vars(layer).get("forward") for layer in layers}  # set on the instance by a device-placement library
    for layer in own:
        layer.forward = lambda *args, **kwargs: state()  # on the instance: attributes and hooks of the layer stay in use
    try:
        yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


@contextmanager
def recording(layers: Sequence[nn.Module], depths: Iterable[int], states: MutableMapping[int, State]) -> Iterator[None]:
    """Add to ``states`` a copy of what enters each layer of ``depths`` (1 and deeper), {layer: state}."""
    with ExitStack() as hooks:
        for depth in depths:

            def keep(output: State, depth: int = depth) -> None:
                states[depth] = copied_state(output)

            hooks.enter_context(watching(layers[depth - 1], leave=keep))
        yield


@contextmanager
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Let ``layers`` keep their inputs alone for the backward pass, which computes their insides again, one layer at a time.

    Memory then holds the hidden states of all layers and the inside of one; a step takes about a third longer. Losses and
    gradients are the same. The backward pass may come after the context, as long as the layers are as they were. Layers must
    draw no random numbers, as in eval mode.

    Hooks of the layers and of modules inside them run again in the backward pass, in the same order, up to the last tensor that
    it needs. A hook that records must thus expect a second call, and one that replaces an output must do so both times.
    """
    own = {layer: type(layer) for layer in layers}
    for layer, kind in own.items():
        # the whole call, not ``forward`` alone: hooks of a layer may set what modules inside it need
        layer.__class__ = type(kind.__name__, (kind,), {"__call__": _checkpointed_call, "__module__": kind.__module__})
    try:
        yield
    finally:
        for layer, kind in own.items():
            layer.__class__ = kind


def _checkpointed_call(layer: nn.Module, *args, **kwargs) -> State:
    (kind,) = type(layer).__bases__
    return checkpoint(kind.__call__, layer, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
