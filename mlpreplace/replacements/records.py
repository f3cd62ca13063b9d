"""Records of a fit: the errors of its output on a sample, its training curves, and its report."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLES = ("train", "validation")


@dataclass(frozen=True)
class Errors:
    """Output errors of a replacement on a sample. All but ``cosine`` are ratios of squared norms.

    Errors are computed for each token and then summarised, so that a few tokens with massive activations do not hide all others.
    """

    mean: float  # of ‖g(x) − y‖² / ‖y‖² over tokens
    median: float
    q25: float
    q75: float
    pooled: float  # Σ‖g(x) − y‖² / Σ‖y‖² = 1 − (uncentred) R², which massive activations dominate
    damage: float  # mean of ‖g(x) − y‖² / ‖r‖², r the residual stream that leaves the layer
    cosine: float  # mean of 1 − cos(g(x), y)


@dataclass(frozen=True)
class TrainingReport:
    """Course of a training. The curves have one value per check; the first is that of the closed form, before any step."""

    loss: str  # "mse", "cosine" or "both"; "kl" for healing; the name of the loss for tuning
    curve_tokens: list[int]  # tokens seen so far, in all epochs; for tuning, items of batches
    train_curve: list[float]  # mean objective since the last check; the first is over as many tokens at the start
    validation_curve: list[float]
    steps: int
    seconds: float
    stopped: str  # "finished", "early" (no new best for several checks) or "diverged" (the loss is not finite)

    @property
    def best_check(self) -> int:
        """The check whose parameters were kept; 0 is the closed form."""
        return min(range(len(self.validation_curve)), key=self.validation_curve.__getitem__)

    @property
    def improved(self) -> bool:
        """Whether training beat its start on the validation windows. Otherwise the start was returned."""
        return self.best_check > 0


@dataclass(frozen=True)
class FitReport:
    """Result of a fit. ``train`` errors are on sampled tokens that are in the moments. ``validation`` errors are on tokens in no
    moment and no gradient; a training chose its best check by them.
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
