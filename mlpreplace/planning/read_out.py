"""The output weights of a replacement, which are solved again for the inputs that it has in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from ..replacements.families import Family, Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, TwoLayerMLP


@dataclass(frozen=True)
class ReadOut:
    """A module as a linear map of features: g(x) = Σᵢ Wᵢ fᵢ(x) + b."""

    features: Callable[[Tensor], Tensor]  # [..., hidden] → [..., width], all fᵢ side by side
    weights: tuple[nn.Parameter, ...]  # [hidden, width of fᵢ] each
    bias: nn.Parameter | None  # [hidden]


@singledispatch
def read_out(family: Family, body: nn.Module) -> ReadOut | None:
    """The output weights of a family's module; None where the family has none or is not registered."""
    return None


@read_out.register
def _(family: Mean, body: nn.Module) -> ReadOut:
    return ReadOut(lambda x: x[..., :0], (), body.bias)


@read_out.register
def _(family: Linear, body: nn.Module) -> ReadOut:
    return ReadOut(lambda x: x, (body.weight,), body.bias)


@read_out.register
def _(family: LowRank, body: nn.Module) -> ReadOut:
    return ReadOut(body[0], (body[1].weight,), body[1].bias)


@read_out.register(NarrowMLP)
@read_out.register(TwoLayerMLP)
def _(family: Family, body: nn.Module) -> ReadOut:
    return ReadOut(body.neurons, (body.down.weight,), body.down.bias)


@read_out.register
def _(family: NarrowPlusLinear, body: nn.Module) -> ReadOut:
    inward, outward = body.linear
    weights = body.mlp.down.weight, outward.weight
    return ReadOut(lambda x: torch.cat([body.mlp.neurons(x), inward(x)], -1), weights, outward.bias)
