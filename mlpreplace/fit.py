"""Closed-form fits: statistics in, replacement out.

Every solver minimises the squared output error over the calibration tokens with a relative ridge λ·mean(diag), in
float64. Ridge means: NarrowMLP is pulled towards the block's own output weights (so full width returns the block
exactly), Linear and LowRank towards the mean output.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from functools import singledispatch

import torch
from torch import Tensor
from tqdm import tqdm

from .blocks import Block
from .capture import BlockStatistics, Sample, Statistics
from .replacements import Errors, Family, FitReport, Linear, LowRank, Mean, NarrowMLP, Replacement

RIDGE = 1e-2
SAMPLES = ("train", "heldout")


def _ridged(c: Tensor, ridge: float) -> Tensor:
    """C + λ·mean(diag C)·I, positive definite for λ > 0 however few the tokens. Raises ValueError for C = 0."""
    scale = c.diagonal().mean()
    if scale <= 0:
        raise ValueError("The activations are all zero: there is nothing to fit.")
    return c + ridge * scale * torch.eye(len(c), dtype=c.dtype, device=c.device)


def _centred(second: Tensor, left: Tensor, right: Tensor, tokens: int) -> Tensor:
    """AᵀB − n·āᵀb̄ from the uncentred moment and the sums."""
    return second - torch.outer(left, right) / tokens


def _linear_map(s: BlockStatistics, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression on centred moments: A [hidden_in, hidden_out], b [hidden], and C = XᵀX + λI."""
    s.require("input")
    c = _ridged(_centred(s.xx, s.sum_x, s.sum_x, s.tokens), ridge)
    a = torch.cholesky_solve(_centred(s.xy, s.sum_x, s.sum_y, s.tokens), torch.linalg.cholesky(c))
    return a, (s.sum_y - s.sum_x @ a) / s.tokens, c


@singledispatch
def solve(family: Family, block: Block, s: BlockStatistics, ridge: float) -> dict[str, Tensor]:
    """The closed-form parameters of a family: a state dict for the module that ``family.build(block)`` makes."""
    raise ValueError(f"{family} has no closed form.")


@solve.register
def _(family: Mean, block: Block, s: BlockStatistics, ridge: float) -> dict[str, Tensor]:
    if s.tokens < 1:
        raise ValueError(f"The statistics of {block.name} hold no token.")
    return {"bias": s.sum_y / s.tokens}


@solve.register
def _(family: Linear, block: Block, s: BlockStatistics, ridge: float) -> dict[str, Tensor]:
    a, b, _ = _linear_map(s, ridge)
    return {"weight": a.T, "bias": b}


@solve.register
def _(family: LowRank, block: Block, s: BlockStatistics, ridge: float) -> dict[str, Tensor]:
    """Reduced-rank regression (Izenman 1975): the best rank r in output error projects the ridge solution A on the
    leading eigenvectors of AᵀCA, which are the right singular vectors of C^{1/2}A; an SVD of A alone would not see C.
    """
    a, _, c = _linear_map(s, ridge)
    _, vectors = torch.linalg.eigh(a.T @ c @ a)  # ascending
    leading = vectors[:, -family.rank :]  # [hidden, rank]
    down = a @ leading  # [hidden, rank]
    bias = (s.sum_y - s.sum_x @ down @ leading.T) / s.tokens
    return {"0.weight": down.T, "1.weight": leading, "1.bias": bias}


def neuron_scores(block: Block, s: BlockStatistics) -> Tensor:
    """Output energy ‖h_j‖²·‖W_down,j‖² of each neuron, [intermediate]: what it adds to the output on its own."""
    s.require("hidden")
    return s.hh.diagonal() * block.weights().down.to(s.hh).square().sum(0)


@solve.register
def _(family: NarrowMLP, block: Block, s: BlockStatistics, ridge: float) -> dict[str, Tensor]:
    """Keep the neurons P of largest output energy, then give the kept ones the work of the dropped ones Q:
    W' = W_P + (C_PP + λI)⁻¹ C_PQ W_Q with C = HᵀH, centred where the block has an output bias to take up the mean.
    """
    weights = block.weights()
    kept = neuron_scores(block, s).topk(family.width).indices.sort().values
    dropped = torch.ones(block.intermediate_size, dtype=torch.bool, device=kept.device)
    dropped[kept] = False

    down = weights.down.to(s.hh).T  # [intermediate, hidden]
    mean = s.sum_h / s.tokens
    c = s.hh if weights.down_bias is None else _centred(s.hh, s.sum_h, s.sum_h, s.tokens)
    solved = down[kept].clone()
    if dropped.any():
        c_pp, c_pq = c[kept][:, kept], c[kept][:, dropped]
        solved += torch.cholesky_solve(c_pq @ down[dropped], torch.linalg.cholesky(_ridged(c_pp, ridge)))

    state = {"up.weight": weights.up[kept], "down.weight": solved.T}
    if weights.gate is not None:
        state["gate.weight"] = weights.gate[kept]
    if weights.up_bias is not None:
        state["up.bias"] = weights.up_bias[kept]
    if weights.gate_bias is not None:
        state["gate.bias"] = weights.gate_bias[kept]
    if weights.down_bias is not None:
        state["down.bias"] = weights.down_bias.to(mean) + mean @ down - mean[kept] @ solved
    return state


def sample_errors(module: torch.nn.Module, sample: Sample | None) -> Errors | None:
    """Errors of a replacement on the real tokens of a sample."""
    if sample is None:
        return None
    with torch.inference_mode():
        error = (module(sample.x) - sample.y).float().square().sum(-1)[sample.mask]  # [tokens]
    energy = sample.y.float().square().sum(-1)[sample.mask].clamp_min(torch.finfo(torch.float32).tiny)
    relative = error / energy
    q25, median, q75 = relative.quantile(torch.tensor([0.25, 0.5, 0.75], device=relative.device)).tolist()
    return Errors(
        mean=relative.mean().item(),
        median=median,
        q25=q25,
        q75=q75,
        pooled=(error.sum() / energy.sum()).item(),
        damage=(error / sample.residual_energy[sample.mask]).mean().item(),
    )


def fit(
    block: Block, stats: Statistics, family: Family, *, ridge: float = RIDGE, samples: Collection[str] = SAMPLES
) -> Replacement:
    """Fit ``family`` to ``block`` in closed form.

    Args:
        stats: from :func:`~mlpreplace.capture.capture`, with the moments the family needs.
        ridge: λ relative to the mean of the Gram matrix's diagonal; keeps fits with fewer tokens than dimensions defined.
        samples: which errors to report, "train" and "heldout"; measuring them costs about as much as the fit.

    Returns:
        The replacement, in the block's dtype and on its device; ``.report`` holds its errors on the samples.

    Raises:
        ValueError: a size larger than the block, a moment that was not captured, a family that cannot take the block.
    """
    if block not in stats:
        raise ValueError(f"{block.name} is not in the statistics: capture it first.")
    start = time.perf_counter()
    replacement = Replacement(family, block)
    replacement.body.load_state_dict(solve(family, block, stats[block], ridge))
    seconds = time.perf_counter() - start
    errors = {name: sample_errors(replacement, getattr(stats[block], name)) if name in samples else None for name in SAMPLES}
    replacement.report = FitReport(stats[block].tokens, seconds, **errors)
    return replacement


def fit_all(
    blocks: Iterable[Block],
    stats: Statistics,
    families: Iterable[Family],
    *,
    ridge: float = RIDGE,
    samples: Collection[str] = SAMPLES,
    progress: bool = True,
) -> dict[Block, list[Replacement]]:
    """Every family fitted to every block: {block: [replacement of each family]}."""
    blocks, families = list(blocks), list(families)
    bar = tqdm(total=len(blocks) * len(families), desc="fit", unit="fit", disable=not progress, leave=False)
    fitted: dict[Block, list[Replacement]] = {}
    with bar:
        for block in blocks:
            fitted[block] = []
            for family in families:
                fitted[block].append(fit(block, stats, family, ridge=ridge, samples=samples))
                bar.update()
    return fitted


def report_rows(fitted: Mapping[Block, Iterable[Replacement]]) -> list[dict]:
    """The fit reports as tidy records, one per block, replacement and sample ("train", "heldout")."""
    rows = []
    for block, replacements in fitted.items():
        for r in replacements:
            about = {
                "layer": block.layer,
                "family": type(r.family).__name__,
                "label": str(r.family),
                "n_params": r.n_params,
                "share_of_block": r.n_params / block.n_params,
                "tokens": r.report.tokens,
                "fit_seconds": r.report.seconds,
            }
            for split in SAMPLES:
                if (errors := getattr(r.report, split)) is not None:
                    rows.append({**about, "split": split, **asdict(errors)})
    return rows
