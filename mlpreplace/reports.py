"""What a fit is judged by: the errors of its output on a sample, and the record of how it went."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .blocks import Block
from .capture import Sample

if TYPE_CHECKING:
    from .replacements import Replacement

SAMPLES = ("train", "validation")


@dataclass(frozen=True)
class Errors:
    """Output errors of a replacement on a sample, per token first and then summarised, so that the few tokens with massive
    activations cannot hide all others. All but ``cosine`` are ratios of squared norms.
    """

    mean: float  # of ‖g(x) − y‖² / ‖y‖² over tokens
    median: float
    q25: float
    q75: float
    pooled: float  # Σ‖g(x) − y‖² / Σ‖y‖², that is 1 − (uncentred) R²: massive activations decide it
    damage: float  # mean of ‖g(x) − y‖² / ‖r‖², r the residual stream that leaves the layer
    cosine: float  # mean of 1 − cos(g(x), y)


@dataclass(frozen=True)
class TrainingReport:
    """How a training went. The curves hold one value a check and begin at the closed form, before the first step."""

    loss: str  # "mse", "cosine" or "both"; "kl" of a healing, of a tuning the name of its loss
    curve_tokens: list[int]  # tokens that had passed, each epoch counted; of a tuning the items of its batches
    train_curve: list[float]  # mean objective since the check before; the first is of as many tokens at the start
    validation_curve: list[float]
    steps: int
    seconds: float
    stopped: str  # "finished", "early" (no new best for a while) or "diverged" (a loss that is not finite)

    @property
    def best_check(self) -> int:
        """The check whose parameters were kept; 0 is the closed form the training started from."""
        return min(range(len(self.validation_curve)), key=self.validation_curve.__getitem__)

    @property
    def improved(self) -> bool:
        """Whether training beat its start on the validation windows; where it did not, the start is what was returned."""
        return self.best_check > 0


@dataclass(frozen=True)
class FitReport:
    """How a fit went. ``train`` is on sampled tokens that are in the moments, ``validation`` on tokens that no moment and no
    gradient saw; where there was a training, they chose its best check.
    """

    tokens: int  # in the moments
    seconds: float  # of the closed form
    train: Errors | None
    validation: Errors | None
    training: TrainingReport | None = None

    @staticmethod
    def from_dict(record: dict) -> FitReport:
        """The inverse of dataclasses.asdict."""
        errors = {name: Errors(**record[name]) if record[name] else None for name in SAMPLES}
        training = TrainingReport(**record["training"]) if record["training"] else None
        return FitReport(record["tokens"], record["seconds"], **errors, training=training)


def sample_errors(module: nn.Module, sample: Sample) -> Errors:
    """Errors of a replacement on the real tokens of a sample."""
    sample = sample.to(next((p.device for p in module.parameters()), sample.x.device))
    with torch.inference_mode():
        g, y = module(sample.x)[sample.mask].float(), sample.y[sample.mask].float()  # [tokens, hidden]
    error = (g - y).square().sum(-1)  # [tokens]
    energy = y.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    relative = error / energy
    q25, median, q75 = relative.quantile(torch.tensor([0.25, 0.5, 0.75], device=relative.device)).tolist()
    return Errors(
        mean=relative.mean().item(),
        median=median,
        q25=q25,
        q75=q75,
        pooled=(error.sum() / energy.sum()).item(),
        damage=(error / sample.residual_energy[sample.mask]).mean().item(),
        cosine=1 - torch.cosine_similarity(g, y, dim=-1).mean().item(),
    )


def report_rows(fitted: Mapping[Block, Iterable[Replacement]], **samples: Mapping[Block, Sample]) -> list[dict]:
    """The fit reports as tidy records, one per block, replacement and split ("train", "validation").

    Args:
        samples: further splits to measure and their samples, as in ``heldout=sample(model, blocks, windows)``.
    """
    rows = []
    for block, replacements in fitted.items():
        for r in replacements:
            training = r.report.training
            about = {
                "layer": block.layer,
                "family": type(r.family).__name__,
                "label": str(r.family),
                "n_params": r.n_params,
                "share_of_block": r.n_params / block.n_params,
                "active_share_of_block": r.n_active_params / block.n_params,
                "tokens": r.report.tokens,
                "trained": training.loss if training else None,
                "improved": training.improved if training else None,
                "fit_seconds": r.report.seconds + (training.seconds if training else 0),
            }
            reported = {name: getattr(r.report, name) for name in SAMPLES}
            measured = {name: sample_errors(r, by_block[block]) for name, by_block in samples.items()}
            rows += [{**about, "split": name, **asdict(e)} for name, e in {**reported, **measured}.items() if e is not None]
    return rows


def loss_rows(fitted: Mapping[Block, Iterable[Replacement]]) -> list[dict]:
    """The loss curves of trained replacements as tidy records, one per block, replacement and check."""
    rows = []
    for block, replacements in fitted.items():
        for r in replacements:
            if (training := r.report.training) is None:
                continue
            about = {"layer": block.layer, "family": type(r.family).__name__, "label": str(r.family), "loss": training.loss}
            curves = zip(training.curve_tokens, training.train_curve, training.validation_curve, strict=True)
            names = "curve_tokens", "train_loss", "validation_loss"
            rows += [{**about, **dict(zip(names, check, strict=True))} for check in curves]
    return rows
