"""Run many plans over the same windows, without running a layer twice where plans agree.

Plans are the leaves of a tree whose levels are the layers. The tree is walked depth first: a plan resumes from the hidden
states that enter the first layer where it differs from the plan before. The dense model is the empty plan.
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

from ..models.architectures import known_here, layer_lists
from ..models.forward import State, copied_state, eval_mode, handing_on, recording
from ..models.inputs import input_device
from ..replacements.splice import Plan, check_plan, spliced
from ..runtime.memory import halving
from ..runtime.parallel import elsewhere, spread

SCORED_AT_ONCE = 2**19  # logits, 2 MB: they stay in a core's cache from the softmax to the sums
SCORED_AT_ONCE_GPU = 2**26  # 256 MB: a GPU is faster with few large pieces


@dataclass(frozen=True)
class Step:
    """One plan of a sweep."""

    plan: Plan
    start: int  # the first layer to run, where the plan differs from the one before
    keep: frozenset[int]  # layers whose inputs under this plan are kept for a later step to start from


def schedule(plans: Sequence[Plan], share: bool = True) -> list[Step]:
    """The distinct ``plans``, in the order in which all of them together run the fewest layers. The empty plan comes first.

    Plans agree at a block where they hold the same replacement object.

    Args:
        share: False runs every plan from the first layer.
    """
    distinct = {plan_key(plan): plan for plan in plans}
    order = [distinct[key] for key in sorted(distinct)]
    starts = [0, *(_first_difference(a, b) if share else 0 for a, b in pairwise(order))]
    steps, keep = [], frozenset()
    for plan, start in zip(reversed(order), reversed(starts), strict=True):
        steps.append(Step(plan, start, keep))
        keep = frozenset(layer for layer in (start, *keep) if 0 < layer <= start)
    return steps[::-1]


def plan_key(plan: Plan) -> tuple:
    """Equal for plans with the same replacements at the same blocks. Sorted by it, plans that agree up to a layer are
    neighbours, for every layer: where two paths part, the one that is dense for longer comes first.
    """
    found = sorted((block.layer, block.name, id(replacement)) for block, replacement in plan.items())
    return tuple((-layer, *rest) for layer, *rest in found)


def _first_difference(a: Plan, b: Plan) -> int:
    return min(block.layer for block, _ in a.items() ^ b.items())


def sweep(
    model: nn.Module, batches: Sequence[tuple[Tensor, Sequence[Plan]]], *, kl: bool, progress: bool
) -> Iterator[list[np.ndarray]]:
    """Losses of each batch, as soon as it has run: for each of its plans an array [2, windows] in float64.

    The rows are the negative log-likelihood and KL(dense ‖ plan), in nats and summed per window. Without ``kl`` the second is 0.
    Memory beside one batch of logits: for KL the dense probabilities [batch, seq_len, vocab] in float32, and at most
    layers − 1 hidden states [batch, seq_len, hidden]. Under a ``joblib.parallel_config`` of other processes, batches run in
    parallel.

    Args:
        batches: (token ids [windows, seq_len], plans) of each.

    Raises:
        ValueError: a plan for another model; before anything runs.
    """
    share = len(layer_lists(model)) == 1  # an encoder-decoder has no single prefix to share
    runs = [(ids, plans, schedule([*plans, *([{}] if kl else [])], share)) for ids, plans in batches]
    for plan in {plan_key(step.plan): step.plan for _, _, steps in runs for step in steps}.values():
        check_plan(model, plan)
    total, parallel = sum(len(steps) for _, _, steps in runs), elsewhere()
    with tqdm(total=total, desc="evaluate", unit="batch", disable=not progress, leave=False) as bar:
        if not parallel:  # one at a time: threads share the model, and with it the plan that is in place
            yield from (_run_in_parts(model, *run, kl, bar.update) for run in runs)
            return
        results = spread(
            _run_in_parts, [(model, *run, kl) for run in runs], prepare=known_here(), threads=torch.get_num_threads()
        )
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
    """One batch of :func:`sweep`, in smaller parts where memory runs out. ``ran`` is called after each step."""

    def run(windows: int) -> list[np.ndarray]:
        parts = ids.split(windows)
        measured = [_run(model, part, plans, steps, kl, ran if part is parts[-1] else lambda: None) for part in parts]
        return [np.concatenate(of_plan, axis=1) for of_plan in zip(*measured, strict=True)]

    return halving(run, len(ids))


def _run(
    model: nn.Module, ids: Tensor, plans: Sequence[Plan], steps: Sequence[Step], kl: bool, ran: Callable[[], object]
) -> list[np.ndarray]:
    stacks = layer_lists(model)
    layers = stacks[0][2] if len(stacks) == 1 else None
    ids = ids.to(input_device(model))
    states: dict[int, State] = {}  # {layer: its input}
    dense, losses = None, {}
    with eval_mode(model), torch.inference_mode():
        for step in steps:
            with spliced(model, step.plan), _resumed(layers, step, states):
                logits = model(ids, use_cache=False).logits
            for layer in states.keys() - step.keep:
                del states[layer]
            if kl and dense is None:  # the empty plan comes first
                dense = Dense(logits)
            losses[plan_key(step.plan)] = score(logits, ids, dense).cpu().numpy()
            del logits  # before the next ones are made
            ran()
    return [losses[plan_key(plan)] for plan in plans]


def _log_probabilities(logits: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """(window, tokens, log-probabilities [tokens, vocab]) of a few tokens at a time, without each window's last token."""
    at_once = SCORED_AT_ONCE if logits.device.type == "cpu" else SCORED_AT_ONCE_GPU
    n = max(1, at_once // logits.shape[-1])
    for window, rows in enumerate(logits[:, :-1]):
        for first in range(0, len(rows), n):
            tokens = slice(first, first + n)
            yield window, tokens, rows[tokens].float().log_softmax(-1)


class Dense:
    """Probabilities p of the dense model, [windows, seq_len - 1, vocab], and Σ p log p, [windows, seq_len - 1]."""

    def __init__(self, logits: Tensor):
        windows, seq_len, vocab = logits.shape
        single = dict(dtype=torch.float32, device=logits.device)
        self.p = torch.empty(windows, seq_len - 1, vocab, **single)
        self.p_log_p = torch.empty(windows, seq_len - 1, **single)
        for window, tokens, log_p in _log_probabilities(logits):
            torch.exp(log_p, out=self.p[window, tokens])
            self.p_log_p[window, tokens] = self.expected(log_p, window, tokens)

    def expected(self, log_q: Tensor, window: int, tokens: slice) -> Tensor:
        """Σ p log q, [tokens]; overwrites ``log_q``."""
        return log_q.mul_(self.p[window, tokens]).sum(-1)


def score(logits: Tensor, ids: Tensor, dense: Dense | None = None) -> Tensor:
    """Negative log-likelihood and KL(dense ‖ model), summed over each window's predicted tokens, [2, windows] in float64."""
    sums = torch.zeros(2, len(ids), dtype=torch.float64, device=logits.device)
    following = ids[:, 1:].to(logits.device)
    for window, tokens, log_q in _log_probabilities(logits):
        sums[0, window] -= log_q.gather(-1, following[window, tokens, None]).double().sum()
        if dense is not None:
            sums[1, window] += (dense.p_log_p[window, tokens] - dense.expected(log_q, window, tokens)).double().sum()
    return sums


@contextmanager
def _resumed(layers: nn.ModuleList | None, step: Step, states: MutableMapping[int, State]) -> Iterator[None]:
    """Start at the first layer of ``step``, with its input from ``states``, and add to them the inputs that the step keeps."""
    if layers is None:  # an encoder-decoder runs whole
        yield
        return
    state = copied_state(states[step.start]) if step.start else ()
    deeper = [layer for layer in step.keep if layer > step.start]
    with handing_on(layers[: step.start], lambda: state), recording(layers, deeper, states):
        yield
