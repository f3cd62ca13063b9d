"""Fit replacements to blocks: in closed form, trained from there on, ranked by validation error, many at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ..models.architectures import known_here
from ..models.blocks import Block
from ..models.forward import check_gradients
from ..replacements.families import Family, Replacement
from ..replacements.narrow_attention import NarrowAttention
from ..replacements.records import SAMPLES, FitReport
from ..runtime.cache import Entry, cached
from ..runtime.parallel import spread
from ..statistics.groups import by_group
from ..statistics.moments import BlockStatistics, Statistics
from .closed_form import solve
from .errors import sample_errors
from .heads import HeadFits
from .neurons import ClosedForm
from .ridge import RIDGE
from .training import Training, train

TRAIN_WINDOWS = 8  # on which the training error is measured; more change it little, and training samples many
EQUAL = 0.1  # sizes of candidates in one ranking may differ by this share of the largest


def fit(
    block: Block,
    stats: Statistics,
    family: Family | Sequence[Family],
    *,
    training: Training | None = None,
    ridge: float = RIDGE,
    selection: str = "auto",
    seed: int = 0,
    samples: Collection[str] = SAMPLES,
    cached: bool = False,
    progress: bool = True,
) -> Replacement | list[Replacement]:
    """Fit ``family`` to ``block`` in closed form and, with ``training``, train it from there on.

    Training ends at its best state on the validation windows. Where that is the start, the closed form is returned, and
    ``.report.training.improved`` says so.

    Args:
        stats: from :func:`~mlpreplace.statistics.capture`, with the moments the family needs; training uses its samples.
        family: one family, or several of equal size (to a tenth) to be ranked, as ``ladder(block, [share])`` lists them.
        training: loss, epochs, learning rate …; None for the closed form alone.
        ridge: λ relative to the mean of the Gram matrix's diagonal; keeps fits with fewer tokens than dimensions defined.
        selection: which neurons and heads are kept, see :class:`~mlpreplace.fitting.neurons.ClosedForm`.
        seed: of random features, random selection and the order of minibatches.
        samples: which errors to report, "train" (on the first 8 windows that were sampled) and "validation". Measuring them
            costs about as much as a closed form.
        cached: keep the result on disk and take it from there; an interrupted training goes on at its last checkpoint.

    Returns:
        The replacement, in the block's dtype and on its device, with its errors in ``.report``. For several families a list,
        lowest ``validation.damage`` first (the error relative to the residual stream, per token).

    Raises:
        ValueError: a size larger than the block, a moment or a sample that was not captured, a family that cannot take the
            block, candidates of unequal size, training under torch.inference_mode().
    """
    if training is not None:
        check_gradients()
    if block not in stats:
        raise ValueError(f"{block.name} is not in the statistics: capture it first.")
    if unknown := set(samples) - set(SAMPLES):
        raise ValueError(f"Unknown samples {sorted(unknown)}; expected some of {', '.join(SAMPLES)}.")
    if training is not None and not isinstance(training, Training):
        raise ValueError(f"Expected training=Training(loss=…, epochs=…) or None, got {training!r}.")
    wanted = [family] if isinstance(family, Family) or not isinstance(family, Iterable) else list(family)
    if not all(isinstance(one, Family) for one in wanted):
        raise ValueError(f"Expected a family at a size, such as NarrowMLP(width=512), or a list of such, got {family!r}.")
    options = dict(how=ClosedForm(ridge, selection, seed), training=training, samples=sorted(samples), progress=progress)
    if isinstance(family, Family):
        return _fit(block, stats[block], family, cached, **options)
    if stats[block].validation is None or "validation" not in samples:
        raise ValueError(f"{block.name}: ranking goes by validation error. Use capture(..., validation_windows=4) or more.")
    sizes = {candidate: candidate.n_params(block) for candidate in wanted}
    if not sizes:
        raise ValueError("There is no family to fit.")
    if min(sizes.values()) < (1 - EQUAL) * max(sizes.values()):
        listed = ", ".join(f"{candidate}: {n:,}" for candidate, n in sizes.items())
        raise ValueError(f"A ranking needs candidates of equal size, these have {listed} parameters: ladder(block, [share]).")
    fitted = [_fit(block, stats[block], candidate, cached, **options) for candidate in wanted]
    return sorted(fitted, key=lambda r: r.report.validation.damage)


def _fit(block: Block, s: BlockStatistics, family: Family, cached: bool, **options) -> Replacement:
    with _no_other_default():
        replacement = unfitted(family, block)
        replacement.report = _fill(replacement.body, block, s, family, cached=cached, **options)
    return replacement


def unfitted(family: Family, block: Block) -> Replacement:
    """A replacement whose weights are not set yet: they are what was in memory. No random number is drawn."""
    with _no_other_default(), _WithoutInitialisation(None if family.keeps_precision else block.dtype):
        return Replacement(family, block)


def _no_other_default() -> AbstractContextManager:
    """The CPU as default device: a caller's default is no block's."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


class _WithoutInitialisation(TorchFunctionMode):
    """Modules that are made within leave their weights as the memory was: a fit sets all of them. No random number is drawn.

    Args:
        dtype: of the weights. Made in another one and converted, they would be written, and a whole plan would be in memory
            before its first fit.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if function is torch.empty and kwargs.get("dtype") is None:
            kwargs = kwargs | {"dtype": self.dtype}
        return function(*args, **kwargs)


def _content(body: nn.Module, block: Block, s: BlockStatistics, family: Family, **options) -> tuple:
    """What a fit depends on: not ``body``, whose parameters are not set yet."""
    return block, block.modules, s, family, type(family), options


@cached("fit", key=_content, fills="body")
def _fill(
    body: nn.Module,
    block: Block,
    s: BlockStatistics,
    family: Family,
    *,
    how: ClosedForm,
    training: Training | None,
    samples: Collection[str],
    checkpoint: Entry | None = None,
    progress: bool,
) -> FitReport:
    """Set the parameters of ``body``, the module of a replacement."""
    start = time.perf_counter()
    state = solve(family, block, s.to(block.device), how)
    seconds, trained = time.perf_counter() - start, None
    if training is not None:
        if family.attends:
            raise ValueError(f"{block.name}: {family} reads positions, and pairs hold none: fit it, then heal it.")
        if s.train is None or s.validation is None:
            raise ValueError(f"{block.name}: training needs pairs, capture(..., sample_windows=None, validation_windows=4).")
        if family.looks_back and (s.train.left_padded or s.validation.left_padded):
            raise ValueError(f"{block.name}: {family} would read padding before the text: pad calibration windows on the right.")
        # in at least float32, whatever the model is in: small steps would be lost in half precision
        with _WithoutInitialisation():
            learner = family.build(block)
        learner = learner.to(device=block.device, dtype=torch.promote_types(block.dtype, torch.float32))
        learner.load_state_dict(state)
        options = dict(whole_windows=family.looks_back, seed=how.seed, checkpoint=checkpoint, progress=progress)
        trained = train(learner, s.train, s.validation, training, **options)
        state = learner.state_dict()
    body.load_state_dict(state)
    pairs = {"train": s.train and s.train.head(TRAIN_WINDOWS), "validation": s.validation}
    measured = partial(sample_errors, body)
    if isinstance(family, NarrowAttention):
        measured = partial(HeadFits(block, s.to(block.device), how).errors, family)
    elif family.attends:  # positions, which pairs do not hold
        samples = ()
    errors = {name: measured(pairs[name]) if name in samples and pairs[name] else None for name in SAMPLES}
    return FitReport(s.tokens, seconds, **errors, training=trained)


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

    Fits run side by side, each on one thread, so that the result does not depend on where they run: in threads of this process,
    unless a ``joblib.parallel_config`` says otherwise (see :mod:`~mlpreplace.runtime.parallel`).

    Args:
        n_jobs: fits at a time, -1 for one a core. By default what the ``parallel_config`` says, else one a core on a CPU and one
            on an accelerator.
        options: those of :func:`fit`.

    Raises:
        ValueError: as :func:`fit`.
    """
    if options.get("training") is not None:
        check_gradients()  # here, since the threads of the fits are not in the caller's mode
    blocks, families = list(blocks), list(families)
    if missing := [block.name for block in blocks if block not in stats]:
        raise ValueError(f"Not in the statistics: {', '.join(missing)}. Capture them first.")
    if n_jobs is None and any(block.device.type != "cpu" for block in blocks):
        n_jobs = 1
    bar, found = tqdm(total=len(blocks) * len(families), desc="fit", unit="fit", disable=not progress, leave=False), {}
    for group in by_group(stats, blocks):
        jobs = [(block, {block: stats[block]}, family, options) for block in group for family in families]
        asked = [block for block in group for _ in families]
        for block, fitted in zip(asked, spread(_fit_one, jobs, prepare=known_here(), threads=1, n_jobs=n_jobs), strict=True):
            found.setdefault(block, []).append(fitted)
            bar.update()
        del jobs  # and with them statistics, before the next ones are captured
    bar.close()
    return {block: found.get(block, []) for block in blocks}


def _fit_one(block: Block, stats: Statistics, family: Family, options: dict) -> Replacement:
    return fit(block, stats, family, **{"progress": False} | options)
