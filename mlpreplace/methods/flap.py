"""FLAP-type (arXiv 2312.11983): neurons and heads of least fluctuation go, and a bias gives the mean of what they gave.

Written after the paper. A channel's score is the variance of what enters the output projection times the squared norm of its
weights. Scores are standardised within a block, a head's is the mean of its channels', and the lowest of the whole model go. What
is added here: of attention whose heads share keys and values, these go with the last of the heads that read them; and a block
keeps one neuron and one head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..fitting.neurons import fluctuation
from ..fitting.ridge import RIDGE
from ..models.attention import attention_weights
from ..models.blocks import Block
from ..planning.candidates import Choice, fitted_plan
from ..replacements.families import Family
from ..replacements.plus_mean import NarrowAttentionPlusMean, NarrowPlusMean
from ..replacements.splice import Plan
from ..statistics.records import BlockStatistics
from .calibration import Calibration, least_choice
from .registry import Needs, method

NEEDS = Needs(moments={"mlp": ["hidden"], "attention": ["hidden"]})
ABOUT = dict(removes="neurons and heads", paper="2312.11983", needs=NEEDS)


def standardised(block: Block, s: BlockStatistics) -> Tensor:
    """Scores of the neurons of an MLP or the heads of attention, [neurons or heads], the lower the less its output varies."""
    s.require(block, "hidden")
    if block.kind == "mlp":
        of_channels = fluctuation(s, block.weights().down)
        return (of_channels - of_channels.mean()) / of_channels.std()
    output = attention_weights(block).output  # [heads, value_dim, hidden]
    of_channels = fluctuation(s, output.flatten(0, 1).T)
    return ((of_channels - of_channels.mean()) / of_channels.std()).view(len(output), -1).mean(1)


def keeping(block: Block, kept: Tensor) -> Family:
    """The family of ``block`` with the neurons or heads that ``kept`` [neurons or heads] says."""
    if block.kind == "mlp":
        return NarrowPlusMean(int(kept.sum()))
    weights = attention_weights(block)
    groups = weights.group_of.to(kept.device)[kept].unique()
    return NarrowAttentionPlusMean(int(kept.sum()), len(groups), weights.value.shape[1])


@method("flap_refit", title="FLAP-type, refitted", ridge=RIDGE, **ABOUT)
@method("flap", title="FLAP-type", **ABOUT)
def flap(model: nn.Module, calibration: Calibration, sparsity: float, *, ridge: float = math.inf) -> Plan:
    """The neurons and heads of lowest standardised fluctuation removed, until ``sparsity`` is reached.

    Args:
        ridge: ∞ keeps the output weights of what stays, as the paper does; else they are solved again, with the bias.

    Raises:
        ValueError: a sparsity that cannot be reached, statistics that are missing.
        NotApplicable: blocks whose neurons or heads are not known (experts).
    """
    stats = calibration.of_insides()
    scores = {block: standardised(block, stats[block]).cpu() for block in stats}
    order = torch.cat([score.scatter(0, score.argmax(0, keepdim=True), torch.inf) for score in scores.values()])
    lowest = order.argsort(stable=True)  # the best of each block is never reached

    def choices(n: int) -> Choice:
        kept = torch.ones(len(order), dtype=torch.bool)
        kept[lowest[:n]] = False
        parts = zip(stats, kept.split([len(score) for score in scores.values()]), strict=True)
        return {block: keeping(block, of_block) for block, of_block in parts if not of_block.all()}

    chosen = least_choice(choices, len(order) - len(scores), model, sparsity)
    return fitted_plan(stats, chosen, selection="fluctuation", ridge=ridge, cached=calibration.cached)
