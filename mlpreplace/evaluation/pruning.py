"""Single weights set to zero, to measure replacement and unstructured pruning together.

A weight's score is |W_ij|·‖x_j‖, x_j what it reads on calibration text, compared within its row (Wanda, arXiv 2306.11695). Zeros
save neither memory nor time here: hardware that skips them in patterns such as 2:4 does.
"""

from __future__ import annotations

import copy
import re
from contextlib import ExitStack
from numbers import Real

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..models.forward import eval_mode, run_layers, token_rows
from ..models.inputs import check_batch_size, check_windows, on_device, token_batches
from .int8 import linear_layers, with_layers

WINDOWS = 4  # in one forward pass


def pruned(
    model: nn.Module, windows: Tensor, pattern: str | float = "2:4", *, batch_size: int | None = None, progress: bool = True
) -> nn.Module:
    """A copy of ``model``, dense or spliced, whose attention and MLP blocks (or replacements) have zeros among their weights.

    Pruned are the layers that :func:`~mlpreplace.evaluation.quantized` rounds, by what they read in ``model`` as it is: not, as
    in the paper, by what they read once the layers before are pruned. All else is that of ``model``, in memory that is shared
    until one side writes into it. ``save_pretrained`` of the result raises.

    Args:
        windows: token ids [windows, seq_len] of calibration text.
        pattern: "2:4" keeps the 2 highest of every 4 neighbours in a row, and what is left over at its end; 0.5 removes that
            share of each row.

    Raises ValueError for another pattern, windows that the model cannot read, and where there is no layer to prune.
    """
    choose = _rule(pattern)
    check_windows(windows, model)
    check_batch_size(batch_size)
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"No linear layer in the blocks of {type(model).__name__}: nothing to prune.")
    norms, instead = _norms(model, layers, windows, batch_size or WINDOWS, progress), {}
    for layer in layers:
        instead[layer] = own = copy.deepcopy(layer)
        weight = own.weight.data.T if isinstance(layer, Conv1D) else own.weight.data  # [out, in]
        weight.mul_(choose(weight.abs() * norms[layer].to(weight)))
    return with_layers(model, instead)


def _rule(pattern: str | float):
    """Scores [out, in] → which weights stay, [out, in]."""
    if isinstance(pattern, str) and (found := re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)):
        kept, of = map(int, found.groups())
        if kept < of:
            return lambda scores: _of_neighbours(scores, kept, of)
    elif isinstance(pattern, Real) and not isinstance(pattern, bool) and 0 < pattern < 1:
        return lambda scores: _highest(scores, scores.shape[-1] - round(pattern * scores.shape[-1]))
    raise ValueError(f'Expected a pattern such as "2:4", or a share between 0 and 1 to remove; got {pattern!r}.')


def _highest(scores: Tensor, n: int) -> Tensor:
    """1 for the ``n`` highest along the last axis, 0 for the others."""
    return torch.zeros_like(scores).scatter_(-1, scores.topk(n, -1).indices, 1)


def _of_neighbours(scores: Tensor, kept: int, of: int) -> Tensor:
    whole = scores.shape[1] // of * of
    stay = torch.ones_like(scores)
    stay[:, :whole] = _highest(scores[:, :whole].unflatten(1, (-1, of)), kept).flatten(1)
    return stay


@torch.no_grad()
def _norms(
    model: nn.Module, layers: list[nn.Module], windows: Tensor, batch_size: int, progress: bool
) -> dict[nn.Module, Tensor]:
    """‖x_j‖ of every input of every layer, [in]; 0 for a layer that no token reaches."""
    squares = {layer: torch.zeros(_inputs(layer), dtype=torch.float64, device=layer.weight.device) for layer in layers}

    def add(layer: nn.Module, args: tuple) -> None:
        squares[layer] += token_rows(args[0]).square().sum(0)

    batches = token_batches(windows, batch_size=batch_size)
    with ExitStack() as hooks, eval_mode(model):
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(add).remove)
        for batch in tqdm(batches, desc="norms", unit="batch", disable=not progress, leave=False):
            run_layers(model, on_device(batch, model))
    return {layer: total.sqrt() for layer, total in squares.items()}


def _inputs(layer: nn.Linear | Conv1D) -> int:
    return layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
