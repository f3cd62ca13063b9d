"""What a model's loss thinks of each block's output: gradients at the outputs of many blocks, from one backward pass.

A probe is a zero added to what a block gives; the gradient that reaches it is the loss's. To first order, giving ``y + δ``
instead of ``y`` changes the loss by the sum of ``gradient · δ`` over tokens, with all other blocks as they stand, replaced
or not. That is how one pass prices every candidate of every block where a forward pass prices one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Block
from .data import check_windows
from .models import eval_mode
from .splice import Plan, spliced

OBJECTIVES = ("kl", "sampled")


@dataclass
class Probe:
    """One block on one batch of windows, with a plan in place. Nothing here needs a gradient any more."""

    x: Tensor  # [windows, seq_len, hidden] what enters the block
    y: Tensor  # [windows, seq_len, hidden] what leaves it
    gradient: Tensor  # [windows, seq_len, hidden] of the loss in nats, summed over the batch, by y
    residual_energy: Tensor  # [windows, seq_len] squared norm of the residual stream that leaves the layer


def probe(
    model: nn.Module,
    plan: Plan,
    blocks: Iterable[Block],
    windows: Tensor,
    objective: str = "kl",
    *,
    seed: int = 0,
    batch_size: int = 2,
    progress: bool = True,
) -> Iterator[tuple[float, dict[Block, Probe]]]:
    """One batch of ``windows`` after another through ``model`` with ``plan`` in place, forward and backward.

    Args:
        objective: "kl", KL(dense ‖ spliced); or "sampled", the negative log-likelihood of next tokens that are drawn from
            the spliced model itself, the squares of whose gradients average to the Fisher information.
        seed: of the drawn tokens.

    Yields:
        The loss of the batch in nats, summed over predicted tokens, and {block: Probe}. Memory: one batch's.

    Raises:
        ValueError: an unknown objective, windows the model cannot read, a plan for another model.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}.")
    check_windows(windows, model)
    blocks = list(blocks)
    generator = torch.Generator().manual_seed(seed)
    frozen = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        parts = windows.split(batch_size)
        for ids in tqdm(parts, desc="probe", unit="batch", disable=not progress, leave=False):
            ids = ids.to(next(model.parameters()).device)
            found: dict[Block, dict[str, Tensor]] = {block: {} for block in blocks}
            with eval_mode(model), torch.enable_grad():
                log_p = _dense(model, ids) if objective == "kl" else None
                with spliced(model, plan), ExitStack() as hooks:
                    for block in blocks:
                        _attach(model, block, found[block], ids.shape, hooks)
                    logits = model(ids, use_cache=False).logits[:, :-1].float()  # [windows, seq_len - 1, vocab]
                    loss = _objective(logits, log_p, generator)
                    loss.backward()
            probes = {}
            for block, seen in found.items():
                y = seen["y"]
                probes[block] = Probe(seen["x"], y, seen["probe"].grad.view_as(y), seen["r"])
            yield loss.item(), probes
    finally:
        for parameter, before in frozen.items():
            parameter.requires_grad_(before)


@torch.no_grad()
def _dense(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def _objective(logits: Tensor, log_p: Tensor | None, generator: torch.Generator) -> Tensor:
    log_q = logits.log_softmax(-1)
    if log_p is not None:
        return nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    with torch.no_grad():  # drawn on the CPU, so that a seed means the same everywhere
        drawn = torch.multinomial(log_q.exp().flatten(0, 1).cpu(), 1, generator=generator).view(*log_q.shape[:2], 1)
    return -log_q.gather(-1, drawn.to(log_q.device)).sum()


def _attach(model: nn.Module, block: Block, seen: dict[str, Tensor], shape: torch.Size, hooks: ExitStack) -> None:
    """Hooks on whatever stands in the block's place by now."""
    first, last = model.get_submodule(block.paths[0]), model.get_submodule(block.paths[-1])
    host = model.get_submodule(f"{block.stack}.{block.layer}")

    def windows(hidden: Tensor) -> Tensor:
        return hidden.detach().reshape(*shape, hidden.shape[-1])  # [windows, seq_len, hidden], also where layers flatten (OPT)

    def entry(module, args, kwargs):
        seen["x"] = windows(args[0] if args else kwargs["hidden_states"])

    def leave(module, args, output):
        y, *rest = output if isinstance(output, tuple) else (output,)
        seen["y"] = windows(y)
        seen["probe"] = torch.zeros_like(y, requires_grad=True)
        return (y + seen["probe"], *rest) if isinstance(output, tuple) else y + seen["probe"]

    def energy(module, args, output):
        stream = output[0] if isinstance(output, tuple) else output
        seen["r"] = windows(stream).float().square().sum(-1)

    hooks.callback(first.register_forward_pre_hook(entry, with_kwargs=True).remove)
    hooks.callback(last.register_forward_hook(leave).remove)
    hooks.callback(host.register_forward_hook(energy).remove)
