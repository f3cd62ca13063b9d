"""MoDeGPT-type (arXiv 2408.09632): each part of a layer narrowed by a decomposition of its own, no two weights apart.

Written after the paper. Neurons are kept by ridge leverage and the output weights solved by Nyström's formula; dimensions of
queries and keys by the norms of both (CR); values and output projection by an SVD in the metric of what they read. The share that
a layer loses is the softmax of −s/ε over layers, s the cosine distance between what enters and leaves it. What the paper leaves
open is chosen here:

- attention and MLP of a layer lose the same share, queries and keys as much as values where they can be narrowed;
- the output projection is solved for all heads together, which no SVD of a single head can better;
- ε is chosen by the divergence from the dense model on the validation windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..models.attention import attention_weights, key_units
from ..models.blocks import Block
from ..planning.candidates import Choice, fitted_plan
from ..replacements.families import Family, NarrowMLP
from ..replacements.narrow_attention import NarrowAttention
from ..replacements.splice import Plan
from ..statistics.groups import only
from .calibration import Calibration, least_choice, preferred
from .registry import Needs, method

TEMPERATURES = (0.05, 0.1, 0.2, 0.4)  # ε
MOST = 0.9  # of a layer that may go
STEPS = 16_384  # from a layer's share times 10⁻³ to 10¹²: what is removed grows by a five-hundredth at most
NEEDS = Needs(stream=True, moments={"mlp": ["hidden"], "attention": ["input", "hidden"]})


def narrowed(block: Block, kept: float) -> Family | None:
    """The family of ``block`` that keeps the share ``kept`` of its parameters; None for all of them."""
    if block.kind == "mlp":
        width = max(1, round(kept * block.intermediate_size))
        return NarrowMLP(width) if width < block.intermediate_size else None
    weights, units = attention_weights(block), key_units(block)
    heads, groups, dim = len(weights.query), len(weights.key), weights.value.shape[1]
    left = 0 if units is None else max(1, round(kept * len(units)))
    keys = left * units.shape[1] if left and left < len(units) else None
    one, two = (NarrowAttention(heads, groups, r, keys).n_params(block) for r in (1, 2))
    values = min(dim, max(1, 1 + round((kept * block.n_params - one) / (two - one))))
    return None if keys is None and values == dim else NarrowAttention(heads, groups, values, keys)


@method("modegpt", title="MoDeGPT-type", removes="widths of MLPs and heads", paper="2408.09632", needs=NEEDS)
def modegpt(model: nn.Module, calibration: Calibration, sparsity: float, *, temperatures: Sequence[float] = TEMPERATURES) -> Plan:
    """Attention and MLP of every layer narrowed by the layer's share, until ``sparsity`` is removed.

    Args:
        temperatures: ε; of several, the one whose plan diverges least on the validation windows, or the first without any.

    Raises:
        ValueError: a sparsity that cannot be reached, statistics that are missing.
        NotApplicable: blocks whose neurons or heads are not known (experts).
    """
    stats = calibration.of_insides()
    influence = calibration.of_stream(model).distance.diagonal(1)  # [layers]

    def planned(temperature: float) -> Plan:
        shares = torch.softmax(-influence / temperature, 0) * len(influence)

        def choices(n: int) -> Choice:
            lost = (10 ** (15 * n / STEPS - 3) * shares).clamp(max=MOST)
            families = {b: narrowed(b, 1 - float(lost[b.layer])) for b in stats}
            return {b: family for b, family in families.items() if family is not None}

        chosen = least_choice(choices, STEPS, model, sparsity)
        plan: Plan = {}
        for kind, selection in (("mlp", "leverage"), ("attention", "energy")):
            of_kind = {b: family for b, family in chosen.items() if b.kind == kind}
            plan |= fitted_plan(only(stats, list(of_kind)), of_kind, selection=selection, cached=calibration.cached)
        return plan

    return preferred(model, calibration, temperatures, planned)
