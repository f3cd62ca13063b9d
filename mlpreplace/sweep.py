"""Run many plans over the same windows, and no layer twice where plans agree.

What stands at layer 0, at layer 1, … makes plans the leaves of a tree, which is walked depth first: a plan resumes from
the hidden states that enter the first layer where it differs from the plan before. The dense model is the empty plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .memory import halving
from .models import eval_mode, input_device
from .parallel import elsewhere, spread
from .splice import Plan, spliced
from .structure import layer_lists

SCORED_AT_ONCE = 2**19  # logits: 2 MB, which stay in a core's cache from the softmax to the sums
SCORED_AT_ONCE_GPU = 2**26  # 256 MB: few and large pieces

States = MutableMapping[int, Tensor | tuple]  # {layer: what enters it, as the layer before hands it on}


@dataclass(frozen=True)
class Step:
    """One plan in the order of a sweep."""

    plan: Plan
    start: int  # the first layer to run: where the plan differs from the one before
    keep: frozenset[int]  # layers whose inputs, on this plan's path, a later step starts from


def schedule(plans: Sequence[Plan], share: bool = True) -> list[Step]:
    """The distinct ``plans`` in an order in which every step but the first resumes as deep as any order allows.

    Plans agree at a block where they hold the same replacement object. The empty plan comes first.

    Args:
        share: False runs every plan from the first layer.
    """
    distinct = {standing(plan): plan for plan in plans}
    order = [distinct[key] for key in sorted(distinct)]
    starts = [0, *(_first_difference(a, b) if share else 0 for a, b in pairwise(order))]
    steps, keep = [], frozenset()
    for plan, start in zip(reversed(order), reversed(starts), strict=True):
        steps.append(Step(plan, start, keep))
        keep = frozenset(layer for layer in (start, *keep) if 0 < layer <= start)
    return steps[::-1]


def standing(plan: Plan) -> tuple:
    """What stands where in ``plan``. Sorted by this, the plans that agree up to a layer are neighbours, for every layer:
    of two plans the one that first leaves the other's path deeper down comes first.
    """
    found = sorted((block.layer, block.name, id(replacement)) for block, replacement in plan.items())
    return tuple((-layer, *rest) for layer, *rest in found)


def _first_difference(a: Plan, b: Plan) -> int:
    return min(block.layer for block, _ in a.items() ^ b.items())


def sweep(
    model: nn.Module, batches: Sequence[tuple[Tensor, Sequence[Plan]]], *, kl: bool, progress: bool
) -> Iterator[list[np.ndarray]]:
    """Negative log-likelihood and KL(dense ‖ plan) in nats, summed per window: of each batch, as soon as it has run, an array
    [2, windows] in float64 for each of its plans.

    Without ``kl`` the latter is 0. Held at a time, beside one batch of logits: for KL the dense probabilities
    [batch, seq_len, vocab] in float32, and at most layers − 1 hidden states [batch, seq_len, hidden], each until the last
    plan that starts from it has run. A ``joblib.parallel_config`` of other processes runs batches side by side.

    Args:
        batches: (token ids [windows, seq_len], plans) of each.
    """
    share = len(layer_lists(model)) == 1  # an encoder-decoder has no single prefix to share
    runs = [(ids, plans, schedule([*plans, *([{}] if kl else [])], share)) for ids, plans in batches]
    for plan in {standing(step.plan): step.plan for _, _, steps in runs for step in steps}.values():
        with spliced(model, plan):  # a plan for another model is refused before hours have gone into the others
            pass
    total, apart = sum(len(steps) for _, _, steps in runs), elsewhere()
    with tqdm(total=total, desc="evaluate", unit="batch", disable=not progress, leave=False) as bar:
        if not apart:  # one at a time: what stands in the model is for all threads the same
            yield from (_run_in_parts(model, *run, kl, bar.update) for run in runs)
            return
        results = spread(_run_in_parts, [(model, *run, kl) for run in runs], threads=torch.get_num_threads())
        for (_, _, steps), measured in zip(runs, results, strict=True):
            bar.update(len(steps))
            yield measured


def _run_in_parts(
    model: nn.Module,
    ids: Tensor,
    plans: Sequence[Plan],
    steps: Sequence[Step],
    kl: bool,
    ran: Callable[[], object] = lambda: None,
) -> list[np.ndarray]:
    """One batch of :func:`sweep`, in parts of fewer windows where the device has no room for all; ``ran`` after each step."""

    def run(windows: int) -> list[np.ndarray]:
        parts = ids.split(windows)
        measured = [_run(model, part, plans, steps, kl, ran if part is parts[-1] else lambda: None) for part in parts]
        return [np.concatenate(of_plan, axis=1) for of_plan in zip(*measured, strict=True)]

    return halving(run, len(ids))


def _run(
    model: nn.Module,
    ids: Tensor,
    plans: Sequence[Plan],
    steps: Sequence[Step],
    kl: bool,
    ran: Callable[[], object],
) -> list[np.ndarray]:
    """Some windows of a batch; calls ``ran`` after each step."""
    stacks = layer_lists(model)
    layers = stacks[0][2] if len(stacks) == 1 else None
    ids = ids.to(input_device(model))
    states: States = {}
    dense, rows = None, {}
    with eval_mode(model), torch.inference_mode():
        for step in steps:
            with spliced(model, step.plan), _resumed(layers, step.start, states), _recorded(layers, step, states):
                logits = model(ids, use_cache=False).logits
            for layer in states.keys() - step.keep:
                del states[layer]
            if kl and dense is None:  # the empty plan comes first
                dense = Dense(logits)
            rows[standing(step.plan)] = score(logits, ids, dense).cpu().numpy()
            del logits  # or they would be held while the next ones are made
            ran()
    return [rows[standing(plan)] for plan in plans]


def _log_probabilities(logits: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """(window, tokens, log-probabilities [tokens, vocab]) of a few tokens at a time, but for each window's last token."""
    at_once = SCORED_AT_ONCE if logits.device.type == "cpu" else SCORED_AT_ONCE_GPU
    n = max(1, at_once // logits.shape[-1])
    for window, rows in enumerate(logits[:, :-1]):
        for first in range(0, len(rows), n):
            tokens = slice(first, first + n)
            yield window, tokens, rows[tokens].float().log_softmax(-1)


class Dense:
    """What KL(p ‖ q) needs of the dense model: p [windows, seq_len - 1, vocab] and Σ p log p [windows, seq_len - 1]."""

    def __init__(self, logits: Tensor):
        windows, seq_len, vocab = logits.shape
        self.p = torch.empty(windows, seq_len - 1, vocab, device=logits.device)
        self.p_log_p = torch.empty(windows, seq_len - 1, device=logits.device)
        for window, tokens, log_p in _log_probabilities(logits):
            torch.exp(log_p, out=self.p[window, tokens])
            self.p_log_p[window, tokens] = self.expected(log_p, window, tokens)

    def expected(self, log_q: Tensor, window: int, tokens: slice) -> Tensor:
        """Σ p log q, [tokens]; overwrites ``log_q``."""
        return log_q.mul_(self.p[window, tokens]).sum(-1)


def score(logits: Tensor, ids: Tensor, dense: Dense | None = None) -> Tensor:
    """Negative log-likelihood and KL(dense ‖ model), summed over each window's predicted tokens: [2, windows], float64."""
    sums = torch.zeros(2, len(ids), dtype=torch.float64, device=logits.device)
    following = ids[:, 1:].to(logits.device)
    for window, tokens, log_q in _log_probabilities(logits):
        sums[0, window] -= log_q.gather(-1, following[window, tokens, None]).double().sum()
        if dense is not None:
            sums[1, window] += (dense.p_log_p[window, tokens] - dense.expected(log_q, window, tokens)).double().sum()
    return sums


def _copy(state: Tensor | tuple) -> Tensor | tuple:
    """What a layer hands on is a tensor or a tuple that starts with one (Falcon); copied, since layers may write into it."""
    return (state[0].clone(), *state[1:]) if isinstance(state, tuple) else state.clone()


@contextmanager
def _recorded(layers: nn.ModuleList | None, step: Step, states: States) -> Iterator[None]:
    """Add to ``states`` what enters the layers that a step keeps and does not find there."""

    def keep(layer: int):
        return lambda module, args, output: states.__setitem__(layer, _copy(output))

    handles = [layers[layer - 1].register_forward_hook(keep(layer)) for layer in step.keep if layer > step.start]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _resumed(layers: nn.ModuleList | None, start: int, states: States) -> Iterator[None]:
    """Let the layers before ``start`` hand on the hidden states held for it instead of computing them."""
    if not start:
        yield
        return
    state = _copy(states[start])
    own = {layer: vars(layer).get("forward") for layer in layers[:start]}  # where a device-placement library has set one
    for layer in own:
        layer.forward = lambda *args, **kwargs: state  # the instance's, so that the layer keeps attributes and class forward
    try:
        yield
    finally:
        for layer, forward in own.items():
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
