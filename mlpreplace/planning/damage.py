"""The damage that a candidate does when it alone is in place: three estimates, from free to exact."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..evaluation.perplexity import compare
from ..models.blocks import Block
from ..models.forward import eval_mode
from ..models.inputs import check_windows
from ..replacements.families import Replacement
from ..runtime.cache import cached
from ..statistics.gradients import probe
from .knapsack import Damages

Candidates = Mapping[Block, Sequence[Replacement]]


def local_damage(candidates: Candidates) -> Damages:
    """Squared validation error relative to the residual stream, per token, from the fit reports: no forward pass is needed.

    Raises ValueError where the statistics had no validation windows.
    """
    for block, fitted in candidates.items():
        if any(r.report is None or r.report.validation is None for r in fitted):
            raise ValueError(f"{block.name}: no validation error to allocate by. Use capture(..., validation_windows=4) or more.")
    return {block: [r.report.validation.damage for r in fitted] for block, fitted in candidates.items()}


@cached("second-order")
def second_order_damage(
    model: nn.Module,
    candidates: Candidates,
    windows: Tensor,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Damages:
    """KL divergence to the dense model, nats per predicted token, to second order in a candidate's error e: ½ E (gᵀe)².

    g is the gradient of −log p(next tokens) by the block's output, the tokens drawn from the model itself, so that E ggᵀ is
    the Fisher information, the Hessian of KL (Martens 2020, arXiv 1412.1193). Products of two tokens' errors are left out. One
    forward and backward pass over ``windows`` prices every candidate.

    Args:
        seed: of the drawn tokens.
        batch_size: windows in one pass, 2 by default.
        cached: keep the result on disk and take it from there.

    Raises ValueError for windows the model cannot read or of a single token, candidates for another model, a call under
    torch.inference_mode().
    """
    totals = {block: [0.0] * len(fitted) for block, fitted in candidates.items()}
    batches = probe(model, {}, candidates, windows, "sampled", seed=seed, batch_size=batch_size, progress=progress)
    with eval_mode(model):  # also while candidates run, which another thread may put in place
        for _, probes in batches:
            while probes:  # each is freed before the next batch runs
                block, p = probes.popitem()
                for i, replacement in enumerate(candidates[block]):
                    with torch.no_grad():
                        along = ((replacement(p.x).float() - p.y.float()) * p.gradient).sum(-1)  # [windows, seq_len]
                    totals[block][i] += 0.5 * along.double().square().sum().item()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return {block: [total / tokens for total in of_block] for block, of_block in totals.items()}


def measured_damage(
    model: nn.Module, candidates: Candidates, windows: Tensor, *, cached: bool = False, progress: bool = True
) -> Damages:
    """KL divergence to the dense model when a candidate alone is in place, nats per predicted token on ``windows``.

    Costs a pass over the layers from the block on for every candidate.

    Raises ValueError for windows the model cannot read or of a single token, candidates for another model.
    """
    check_windows(windows, model, least=2)
    plans = {(block, i): {block: r} for block, fitted in candidates.items() for i, r in enumerate(fitted)}
    measured = compare(model, plans, windows, cached=cached, progress=progress)
    return {block: [measured[block, i].mean_kl for i in range(len(fitted))] for block, fitted in candidates.items()}


def check_kl(kls: Iterable[float]) -> None:
    """Raise ValueError unless all of ``kls``, by which plans are chosen, are finite."""
    if not all(map(math.isfinite, kls)):
        raise ValueError(
            "The KL divergence of a plan is not finite: check the model and the replacements (a half-precision overflow?)."
        )
