"""Weights rounded to few bits, to measure replacement and weight-only quantization together.

Neighbours in a row are a group, which shares a step and a least value, both in float16. Rounding is to the nearest: the baseline
of GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from .int8 import linear_layers, with_layers
from .speed import size_bytes

BITS, GROUP = 4, 32
OF_GROUP = 4  # bytes: its step and its least value
MOST_BITS = 8


def rounded(model: nn.Module, bits: int = BITS, *, group: int = GROUP) -> nn.Module:
    """A copy of ``model``, dense or spliced, whose attention and MLP blocks (or replacements) have weights of ``bits`` bits.

    Rounded are the layers that :func:`~mlpreplace.evaluation.quantized` rounds; activations stay as they are. The copy computes
    with the rounded weights in the precision of ``model``, as kernels do that unpack weights on their way, so it takes no less
    memory: :func:`rounded_bytes` counts what packed weights take. All else is that of ``model``, in memory that is shared until
    one side writes into it. ``save_pretrained`` of the result raises.

    Args:
        group: neighbours in a row that share a step; what is left over at its end is a group, too.

    Raises ValueError for bits outside 2 to 8, a group of less than 2, and where there is no layer to round.
    """
    _check(bits, group)
    instead = {}
    for layer in _layers(model):
        instead[layer] = own = copy.deepcopy(layer)
        weight = own.weight.data.T if isinstance(layer, Conv1D) else own.weight.data  # [out, in]
        weight.copy_(_nearest(weight.float(), 2**bits - 1, group))
    return with_layers(model, instead)


def rounded_bytes(model: nn.Module, bits: int = BITS, *, group: int = GROUP) -> int:
    """Bytes of the parameters and persistent buffers of ``model`` once :func:`rounded` weights are packed.

    A row takes whole bytes. Arguments and errors are those of :func:`rounded`.
    """
    _check(bits, group)
    saved = 0
    for weight in {id(layer.weight): layer.weight for layer in _layers(model)}.values():
        rows, columns = weight.shape
        saved += weight.nbytes - rows * (-(-columns * bits // 8) + -(-columns // group) * OF_GROUP)
    return size_bytes(model) - saved


def _check(bits: int, group: int) -> None:
    for name, value, least, most in (("bits", bits, 2, MOST_BITS), ("group", group, 2, None)):
        if not isinstance(value, int) or value < least or (most and value > most):
            raise ValueError(f"Expected {name} to be a whole number from {least}{f' to {most}' if most else ''}, got {value!r}.")


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"No linear layer in the blocks of {type(model).__name__}: nothing to round, or in int8 already.")
    return layers


def _nearest(weight: Tensor, levels: int, group: int) -> Tensor:
    """The nearest of ``levels`` + 1 values between the least and the largest of each group, [out, in] in float32."""
    out, width = weight.shape
    filled = pad(weight[None], (0, -width % group), mode="replicate")[0]  # what is repeated moves no end of a group
    groups = filled.reshape(out, -1, group)
    least, largest = groups.aminmax(dim=-1, keepdim=True)
    least = least.half().float()
    step = ((largest - least) / levels).half().float().clamp(min=torch.finfo(torch.half).smallest_normal)
    codes = ((groups - least) / step).round().clamp(0, levels)
    return (codes * step + least).reshape(out, -1)[:, :width]
