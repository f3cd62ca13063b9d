"""The damage that a candidate does when it alone is in place: three estimates, from free to exact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..evaluation.perplexity import compare
from ..fitting.candidate_errors import Candidate, candidate_errors
from ..fitting.heads import HeadFits
from ..fitting.neurons import ClosedForm
from ..models.architectures import known_here
from ..models.blocks import Block
from ..models.inputs import check_windows
from ..replacements.families import Family, Replacement
from ..replacements.narrow_attention import NarrowAttention
from ..runtime.cache import cached
from ..runtime.memory import trim
from ..runtime.parallel import elsewhere, spread
from ..statistics.fisher import Sensitivity, fisher_gradients
from ..statistics.groups import by_group
from ..statistics.moments import BlockStatistics, Statistics
from .candidates import Candidates, check_captured, fitted_to
from .knapsack import Damages

ASK = "Use capture(..., validation_windows=4) or more."


def _with_reports(candidates: Candidates, stats: Statistics | None) -> tuple:
    """What local damages depend on: of fitted candidates their validation errors too, which are no content of their own."""
    reports = [c.report for of_block in candidates.values() for c in of_block if isinstance(c, Replacement)]
    return candidates, stats, [None if report is None else report.validation for report in reports]


@cached("local", key=_with_reports)
def local_damage(candidates: Candidates, stats: Statistics | None = None) -> Damages:
    """Squared validation error relative to the residual stream, per token: no forward pass is needed.

    Of fitted candidates it is the one of their reports. Families are measured on the validation windows of ``stats``.

    Raises ValueError where there is no validation error, or a family and no statistics.
    """
    check_captured(stats, candidates)
    damages = {block: [0.0] * len(of_block) for block, of_block in candidates.items()}
    for group in by_group(stats, candidates):
        for block in group:
            fitted = {i: c for i, c in enumerate(candidates[block]) if isinstance(c, Replacement)}
            families = [c for c in candidates[block] if not isinstance(c, Replacement)]
            if any(r.report is None or r.report.validation is None for r in fitted.values()):
                raise ValueError(f"{block.name}: no validation error to allocate by. {ASK}")
            for i, r in fitted.items():
                damages[block][i] = r.report.validation.damage
            places = [i for i in range(len(candidates[block])) if i not in fitted]
            if families:
                for i, damage in _local(block, families, stats):
                    damages[block][places[i]] = damage
    return damages


def _local(block: Block, families: Sequence[Family], stats: Statistics) -> Iterator[tuple[int, float]]:
    s = stats[block].to(block.device)
    if s.validation is None:
        raise ValueError(f"{block.name}: no validation error to allocate by. {ASK}")
    if scored := next((f for f in families if isinstance(f, NarrowAttention) and f.key_dim is not None), None):
        raise ValueError(
            f"{block.name}: validation samples do not tell what {scored} changes in the scores. Price it by second_order_damage "
            "(windows= of allocate), or leave sizes with key_dim out."
        )
    sample = s.validation.to(block.device)
    with torch.no_grad():
        for i, error in candidate_errors(block, families, s, sample.x, sample.y, h=sample.h):
            yield i, (error.square().sum(-1) / sample.residual_energy)[sample.mask].mean().item()


@dataclass(eq=False)  # that of mappings is used
class SecondOrder(Mapping[Block, list[float]]):
    """Second-order damages: {block: nats per predicted token of each candidate alone}, and of choices in several blocks."""

    felt: dict[Block, Tensor]  # [candidates, windows · seq_len] gᵀe, in float32 on the CPU
    predicted: int  # tokens

    def __getitem__(self, block: Block) -> list[float]:
        return self._mean(self.felt[block]).tolist()

    def __iter__(self) -> Iterator[Block]:
        return iter(self.felt)

    def __len__(self) -> int:
        return len(self.felt)

    def together(self, choice: Mapping[Block, int]) -> float:
        """½ E (Σ gᵀe)² with the candidate of ``choice`` in each of its blocks: their errors may be felt together, or cancel."""
        return self._mean(sum(self.felt[block][i] for block, i in choice.items())).item()

    def _mean(self, felt: Tensor) -> Tensor:
        return 0.5 * felt.double().square().sum(-1) / self.predicted


@cached("second-order")
def second_order_damage(
    model: nn.Module,
    candidates: Candidates,
    windows: Tensor,
    stats: Statistics | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> SecondOrder:
    """KL divergence to the dense model, nats per predicted token, to second order in a candidate's error e: ½ E (gᵀe)².

    g is the gradient of −log p(next tokens) by the block's output, see :func:`~mlpreplace.statistics.fisher_gradients`. Products
    of two tokens' errors are left out. One forward and backward pass over ``windows`` prices every candidate. Families are fitted
    to one block at a time, priced and dropped; those whose sizes share a factorisation are priced without a fit.

    Args:
        stats: what families among ``candidates`` are fitted to.
        seed: of the drawn tokens.
        batch_size: windows in one pass, 2 by default. Where memory runs out, it is halved.
        cached: keep the result on disk and take it from there.

    Raises ValueError for windows the model cannot read or of a single token, candidates for another model, families without
    statistics, a call under torch.inference_mode().
    """
    check_windows(windows, model, least=2)
    check_captured(stats, candidates)
    seen, felt = fisher_gradients(model, candidates, windows, seed=seed, batch_size=batch_size, progress=progress), {}
    for group in by_group(stats, candidates):
        jobs = [(block, candidates[block], _of(stats, block), seen.pop(block)) for block in group]
        found = spread(_felt, jobs, prepare=known_here(), threads=torch.get_num_threads(), n_jobs=_at_a_time())
        felt |= zip(group, found, strict=True)
        del jobs  # and with them statistics, before the next ones are captured
    return SecondOrder({block: felt[block] for block in candidates}, windows.shape[0] * (windows.shape[1] - 1))


def _of(stats: Statistics | None, block: Block) -> BlockStatistics | None:
    return None if stats is None or block not in stats else stats[block]


def _at_a_time() -> int | None:
    """Jobs: as the ``parallel_config`` says where it places them elsewhere, else one, whose sums take all threads."""
    return None if elsewhere() else 1


@torch.no_grad()
def _felt(block: Block, candidates: Sequence[Candidate], s: BlockStatistics | None, seen: Sensitivity) -> Tensor:
    """gᵀe of each candidate, [candidates, windows · seq_len]; zero for a window's last token, which predicts nothing."""
    trim()  # or the heap keeps more with every block
    felt = torch.zeros(len(candidates), seen.x[..., 0].numel(), dtype=torch.float32, device="cpu")
    s = None if s is None else s.to(block.device)
    x, y, g = (t.to(block.device) for t in (seen.x, seen.y, seen.gradient))  # [windows, seq_len, hidden]
    h = None if seen.h is None else seen.h.to(block.device)
    sharing: dict[Candidate, list[int]] = {}  # {candidate: those of its error, but for narrower queries and keys}
    for i, c in enumerate(candidates):
        sharing.setdefault(replace(c, key_dim=None) if isinstance(c, NarrowAttention) else c, []).append(i)
    of_keys, places = _felt_of_keys(block, candidates, s, seen), list(sharing.values())
    for n, error in candidate_errors(block, list(sharing), s, x, y, h=h):
        of_values = (error * g.to(error)).sum(-1).double()
        for i in places[n]:
            felt[i] = (of_values - of_keys.get(i, 0)).flatten()
    return felt


def _felt_of_keys(
    block: Block, candidates: Sequence[Candidate], s: BlockStatistics | None, seen: Sensitivity
) -> dict[int, Tensor]:
    """{position of a candidate with narrower queries and keys: what the loss feels of what it leaves out of them, [windows,
    seq_len]}
    """
    narrower = {i: c for i, c in enumerate(candidates) if isinstance(c, NarrowAttention) and c.key_dim is not None}
    if not narrower or seen.keys is None:  # of heads with norms, whose queries cannot be narrowed: their fit says so
        return {}
    felt = seen.keys.to(block.device, torch.float64)  # [windows, seq_len, groups · units]
    fits = HeadFits(block, s, ClosedForm())
    return {i: felt @ fits.units_left_out(family).flatten().to(felt) for i, family in narrower.items()}


def measured_damage(
    model: nn.Module,
    candidates: Candidates,
    windows: Tensor,
    stats: Statistics | None = None,
    *,
    cached: bool = False,
    progress: bool = True,
) -> Damages:
    """KL divergence to the dense model when a candidate alone is in place, nats per predicted token on ``windows``.

    Costs a pass over the layers from the block on for every candidate. Families are fitted to ``stats``, and held for as many
    blocks as the statistics are.

    Raises ValueError for windows the model cannot read or of a single token, candidates for another model, families without
    statistics.
    """
    check_windows(windows, model, least=2)
    check_captured(stats, candidates)
    damages = {}
    for group in by_group(stats, candidates):
        fitted = fitted_to(stats, {(block, i): c for block in group for i, c in enumerate(candidates[block])})
        plans = {(block, i): {block: r} for (block, i), r in fitted.items()}
        measured = compare(model, plans, windows, cached=cached, progress=progress)
        damages |= {block: [measured[block, i].mean_kl for i in range(len(candidates[block]))] for block in group}
        del fitted, plans  # before others are
    return {block: damages[block] for block in candidates}
