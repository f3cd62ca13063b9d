"""Fit replacements to blocks: in closed form, trained on from there, ranked, many at once."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict

import torch
from tqdm import tqdm

from .blocks import Block
from .cache import Entry, fingerprint
from .capture import BlockStatistics, Statistics
from .closed_form import RIDGE, ClosedForm
from .parallel import spread
from .replacements import Family, Replacement
from .reports import SAMPLES, FitReport, sample_errors
from .starts import solve  # which the hybrids' closed forms have joined
from .train import Training, train

TRAIN_WINDOWS = 8  # measure the error on fitted tokens: as good as all that were sampled, and training samples many
EQUAL = 0.1  # candidates of one ranking may differ by this share of the largest


def fit(
    block: Block,
    stats: Statistics,
    family: Family | Sequence[Family],
    *,
    training: Training | None = None,
    ridge: float = RIDGE,
    selection: str = "energy",
    seed: int = 0,
    samples: Collection[str] = SAMPLES,
    cached: bool = False,
    progress: bool = False,
) -> Replacement | list[Replacement]:
    """Fit ``family`` to ``block`` in closed form and, with ``training``, train it on from there.

    Training ends at its best state on the validation windows. Where that is the start, the closed form is what is
    returned, and ``.report.training.improved`` says so.

    Args:
        stats: from :func:`~mlpreplace.capture.capture`, with the moments the family needs; training uses its samples.
        family: one family, or several of equal size (to a tenth) to be ranked: see ``ladder`` for such candidates.
        training: loss, epochs, learning rate …; None for the closed form alone.
        ridge: λ relative to the mean of the Gram matrix's diagonal; keeps fits with fewer tokens than dimensions defined.
        selection: which neurons a NarrowMLP keeps, see :func:`~mlpreplace.selection.select`.
        seed: of random features, random selection and the order of minibatches.
        samples: which errors to report, "train" (on the first 8 windows that were sampled) and "validation"; measuring them
            costs about as much as a closed form.
        cached: keep the result on disk and take it from there; a training that was interrupted goes on at its last check.

    Returns:
        The replacement, in the block's dtype and on its device, with its errors in ``.report``. For several families a list,
        the lowest ``validation.damage`` first: the error over the residual stream, per token.

    Raises:
        ValueError: a size larger than the block, a moment or a sample that was not captured, a family that cannot take the
            block, candidates of unequal size.
    """
    if block not in stats:
        raise ValueError(f"{block.name} is not in the statistics: capture it first.")
    if unknown := set(samples) - set(SAMPLES):
        raise ValueError(f"Unknown samples {sorted(unknown)}; expected some of {', '.join(SAMPLES)}.")
    how = ClosedForm(ridge, selection, seed)
    if isinstance(family, Family):
        return _fit(block, stats[block], family, how, training, samples, cached, progress)
    if stats[block].validation is None or "validation" not in samples:
        raise ValueError(f"{block.name}: ranking goes by validation error. Use capture(..., validation_windows=4) or more.")
    sizes = {candidate: candidate.n_params(block) for candidate in family}
    if not sizes:
        raise ValueError("There is no family to fit.")
    if min(sizes.values()) < (1 - EQUAL) * max(sizes.values()):
        listed = ", ".join(f"{candidate}: {n:,}" for candidate, n in sizes.items())
        raise ValueError(f"A ranking needs candidates of equal size, these have {listed} parameters: ladder(block, [share]).")
    fitted = [_fit(block, stats[block], candidate, how, training, samples, cached, progress) for candidate in family]
    return sorted(fitted, key=lambda r: r.report.validation.damage)


def _fit(
    block: Block,
    s: BlockStatistics,
    family: Family,
    how: ClosedForm,
    training: Training | None,
    samples: Collection[str],
    cached: bool,
    progress: bool,
) -> Replacement:
    replacement = Replacement(family, block)
    entry = checkpoint = None
    if cached:
        key = fingerprint(block, *block.modules, s, family, type(family), how, training, sorted(samples))
        entry, checkpoint = Entry("fit", "fit", key), Entry("fit", "training", key)
        if (stored := entry.load()) is not None:
            replacement.report = FitReport.from_dict(json.loads(bytes(stored.pop("report").tolist())))
            replacement.body.load_state_dict(stored)
            return replacement

    start = time.perf_counter()
    state = solve(family, block, s.to(block.device), how)
    seconds, trained = time.perf_counter() - start, None
    if training is not None:
        if s.train is None or s.validation is None:
            raise ValueError(f"{block.name}: training needs pairs, capture(..., sample_windows=None, validation_windows=4).")
        if family.looks_back and any((~p.mask[:, :-1] & p.mask[:, 1:]).any() for p in (s.train, s.validation)):
            raise ValueError(f"{block.name}: {family} would read padding before the text: pad calibration windows on the right.")
        # in at least float32, whatever the model is in: small steps would be lost in half precision
        body = family.build(block).to(device=block.device, dtype=torch.promote_types(block.dtype, torch.float32))
        body.load_state_dict(state)
        trained = train(
            body,
            s.train,
            s.validation,
            training,
            whole_windows=family.looks_back,
            seed=how.seed,
            checkpoint=checkpoint,
            progress=progress,
        )
        state = body.state_dict()
    replacement.body.load_state_dict(state)
    pairs = {"train": s.train and s.train.head(TRAIN_WINDOWS), "validation": s.validation}
    errors = {name: sample_errors(replacement, pairs[name]) if name in samples and pairs[name] else None for name in SAMPLES}
    replacement.report = FitReport(s.tokens, seconds, **errors, training=trained)
    if entry is not None:
        report = torch.frombuffer(bytearray(json.dumps(asdict(replacement.report)).encode()), dtype=torch.uint8)
        entry.save({**replacement.body.state_dict(), "report": report})
        checkpoint.path.unlink(missing_ok=True)
    return replacement


def fit_all(
    blocks: Iterable[Block],
    stats: Statistics,
    families: Iterable[Family],
    *,
    n_jobs: int | None = None,
    progress: bool = True,
    **options,
) -> dict[Block, list[Replacement]]:
    """Every family fitted to every block: {block: [replacement of each family]}.

    Fits run side by side, each on one thread, so that the result does not depend on where: threads of this process unless a
    ``joblib.parallel_config`` says otherwise (see :mod:`~mlpreplace.parallel`).

    Args:
        n_jobs: fits at a time, -1 for as many as there are cores; by default what the ``parallel_config`` says, else all cores
            for a CPU and one fit for an accelerator.
        options: those of :func:`fit`.
    """
    blocks, families = list(blocks), list(families)
    if missing := [block.name for block in blocks if block not in stats]:
        raise ValueError(f"Not in the statistics: {', '.join(missing)}. Capture them first.")
    if n_jobs is None and any(block.device.type != "cpu" for block in blocks):
        n_jobs = 1
    jobs = [(block, {block: stats[block]}, family, options) for block in blocks for family in families]
    results = spread(_fit_one, jobs, threads=1, n_jobs=n_jobs)
    fitted = iter(list(tqdm(results, total=len(jobs), desc="fit", unit="fit", disable=not progress, leave=False)))
    return {block: [next(fitted) for _ in families] for block in blocks}


def _fit_one(block: Block, stats: Statistics, family: Family, options: dict) -> Replacement:
    return fit(block, stats, family, **options)
