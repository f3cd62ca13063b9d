"""SubFit-style (arXiv 2606.02559): attention and MLP blocks removed wherever they are, each with a fitted residual bypass.

Written after what the paper and descriptions of it say, without its code (github.com/eliacunegatti/SubFit, which was not read).
They say: blocks are scored by how little they change the residual stream, in magnitude and rotation. The lowest go, in no order
of depth, until the sparsity is met net of the bypasses, which add about a tenth of what is removed. Attention gets a low-rank
map and an MLP one of higher rank, in closed form. What they leave open is chosen here:

- the score is magnitude, rotation, or their geometric mean: the best on the validation windows;
- the score is divided by the parameters saved, or nearly all attention would go before any MLP;
- a bypass has a tenth of its block's parameters, so that an MLP's has the higher rank;
- every MLP has an input basis of its own; as a variant all share one, as a description has it (see :func:`share_basis`);
- the ridge is that of all fits;
- scores and bypasses are of the dense model, not of one block after another;
- where the last block would remove too much, smaller ones may go in its place: the sparsity is exceeded as little as possible.

Descriptions that train the bypasses on next tokens go on from here: :func:`~mlpreplace.planning.heal` trains any plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from ..fitting.fit import unfitted
from ..fitting.ridge import RIDGE, add_ridge, centred, leading_eigenvectors, least_squares
from ..models.blocks import Block
from ..planning.candidates import fitted_plan
from ..planning.damage import local_damage
from ..replacements.families import LowRank
from ..replacements.splice import Plan
from ..statistics.groups import by_group
from ..statistics.moments import BlockStatistics, Statistics
from ..statistics.residual_stream import StreamStatistics
from .calibration import Calibration, preferred, target_parameters
from .registry import Needs, method

OF_STREAM = ("both", "magnitude", "rotation")
SCORES = (*OF_STREAM, "bypass")
BYPASS = 0.1  # parameters of a bypass, as a share of its block's
NEEDS = Needs(stream=True, moments={"mlp": ["input"], "attention": ["input"]})


def scores(stream: StreamStatistics, score: str = "both") -> dict[str, float]:
    """{block name: how much it changes the residual stream}.

    "magnitude" is ‖a‖/‖r‖ and "rotation" 1 − cos(r, r + a), means over tokens, a what the block adds to the stream r; "both" is
    their geometric mean, which does not depend on the units of either.
    """
    if score in ("magnitude", "rotation"):
        return dict(getattr(stream, score))
    return {name: math.sqrt(m * max(0.0, stream.rotation[name])) for name, m in stream.magnitude.items()}


def lowest_first(order: Mapping[Block, float], savings: Mapping[Block, int], target: float) -> list[Block]:
    """Blocks of lowest score until ``target`` parameters are saved, of the ways to end that which saves least beyond it.

    Where the next block would save too much, the end is the smallest that saves enough, or first more of those that do not.
    """
    chosen, ends, missing = [], [], target
    left = sorted((block for block in order if savings[block] > 0), key=lambda block: order[block])
    while left:
        enough = [block for block in left if savings[block] >= missing]
        if left[0] in enough or ends:
            ends += [[*chosen, min(enough, key=lambda b: savings[b])]] if enough else []  # min: of equal ones the lowest score
            left = [block for block in left if block not in enough]
        if left:
            chosen.append(left.pop(0))
            missing -= savings[chosen[-1]]
    if not ends:
        raise ValueError(f"All submodules together save {target - missing:,.0f} parameters, {target:,.0f} are asked for.")
    return min(ends, key=lambda end: sum(savings[block] for block in end))


def inverse_root(c: Tensor) -> Tensor:
    """C^{-½}, symmetric, of a positive definite C."""
    values, vectors = torch.linalg.eigh(c)
    return vectors * values.rsqrt() @ vectors.T


def share_basis(stats: Statistics, blocks: Sequence[Block], rank: int, ridge: float = RIDGE) -> Plan:
    """Low-rank maps for ``blocks`` that read their input through one and the same basis: {block: U_b A x + bias_b}.

    A = Vᵀ C̄^{-½}, [rank, hidden]: V are the leading eigenvectors of Σ_b C_b^{-½} C_xy,b C_yx,b C_b^{-½}, C̄ is the mean of the
    C_b, the moments of the inputs. U_b is the ridge regression of the block's output on A x. A counts once, so that a map costs
    (rank + 1)·hidden parameters beside it.
    """
    blocks, total, mean = list(blocks), 0.0, 0.0
    for block in chain(*by_group(stats, blocks)):
        c, xy = _moments(block, stats[block], ridge)
        half = inverse_root(c) @ xy
        total, mean = total + (half @ half.T).cpu(), mean + c.cpu() / len(blocks)
    basis, plan = inverse_root(mean) @ leading_eigenvectors(total, rank), {}  # [hidden, rank]
    for block in chain(*by_group(stats, blocks)):
        (c, xy), s, a = _moments(block, stats[block], ridge), stats[block], basis.to(stats[block].sum_x)
        u = least_squares(block, a.T @ c @ a, a.T @ xy, 0.0)
        plan[block] = unfitted(LowRank(rank), block)
        bias = (s.sum_y - s.sum_x @ a @ u) / s.tokens
        plan[block].body.load_state_dict({"0.weight": a.T, "1.weight": u.T, "1.bias": bias})
    first = plan[blocks[0]].body[0]
    for replacement in plan.values():
        replacement.body[0] = first
    return {block: plan[block] for block in blocks}


def _moments(block: Block, s: BlockStatistics, ridge: float) -> tuple[Tensor, Tensor]:
    """Centred moments of inputs, with ridge, and of inputs with outputs."""
    s.require(block, "input")
    c = add_ridge(block, centred(s.xx, s.sum_x, s.sum_x, s.tokens), ridge)
    return c, centred(s.xy, s.sum_x, s.sum_y, s.tokens)


ABOUT = dict(removes="attention and MLP blocks", paper="2606.02559", needs=NEEDS)


@method("subfit_shared", title="SubFit-style, one basis", shared=True, **ABOUT)
@method("subfit", title="SubFit-style", **ABOUT)
def subfit(
    model: nn.Module, calibration: Calibration, sparsity: float, *, score: str | None = None, shared: bool = False
) -> Plan:
    """Blocks of lowest score per parameter saved, replaced by low-rank bypasses until at least ``sparsity`` is removed.

    Args:
        score: "both", "magnitude" or "rotation" (see :func:`scores`), or "bypass": the bypass's squared error on validation
            windows over the residual stream's energy, which needs no stream. By default the best of the first three on the
            validation windows.
        shared: whether MLPs share the basis through which they read, and have about twice the rank at as many parameters.

    Raises:
        ValueError: an unknown score, a sparsity that cannot be reached, statistics that are missing or of another model.
    """
    if score not in (None, *SCORES):
        raise ValueError(f"Unknown score {score!r}; expected one of {', '.join(SCORES)}.")
    tried = OF_STREAM if score is None else [score]
    return preferred(model, calibration, tried, lambda s: _planned(model, calibration, sparsity, s, shared))


def _planned(model: nn.Module, calibration: Calibration, sparsity: float, score: str, shared: bool) -> Plan:
    target, stats = target_parameters(model, sparsity), calibration.of_kinds("attention", "mlp")
    families = {block: LowRank.nearest(block, BYPASS * block.n_params) for block in stats}
    savings = {block: block.n_params - family.n_params(block) for block, family in families.items()}
    mlps = [block for block in stats if block.kind == "mlp"]
    if shared:
        hidden = mlps[0].hidden_size
        rank = max(1, min(hidden - 1, round(BYPASS * min(block.n_params for block in mlps) / hidden) - 1))
        savings |= {block: block.n_params - (rank + 1) * hidden for block in mlps}
        target += rank * hidden
    if score == "bypass":
        change = {block: damage for block, (damage,) in local_damage({b: [f] for b, f in families.items()}, stats).items()}
    else:
        by_name = scores(calibration.of_stream(model), score)
        if missing := [block.name for block in stats if block.name not in by_name]:
            raise ValueError(f"The stream's statistics do not know {missing[0]}: they are of another model.")
        change = {block: by_name[block.name] for block in stats}
    order = {block: value / savings[block] if savings[block] > 0 else math.inf for block, value in change.items()}
    chosen = lowest_first(order, savings, target)
    of_shared = [block for block in chosen if shared and block.kind == "mlp"]
    plan = fitted_plan(stats, {block: families[block] for block in chosen if block not in of_shared})
    return plan | (share_basis(stats, of_shared, rank) if of_shared else {})
