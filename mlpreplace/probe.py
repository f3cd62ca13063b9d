"""What a model's loss thinks of each block's output: gradients at the outputs of many blocks, from one backward pass.

A probe is a zero added to what a block gives; the gradient that reaches it is the loss's. To first order, giving ``y + δ``
instead of ``y`` changes the loss by the sum of ``gradient · δ`` over tokens, with all other blocks as they stand, replaced
or not. That is how one pass prices every candidate of every block where a forward pass prices one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import Block
from .capture import _tensor
from .models import check_windows, eval_mode, input_device
from .splice import Plan, spliced

OBJECTIVES = ("kl", "sampled")


@dataclass
class Probe:
    """One block on one batch of windows, with a plan in place. Nothing here needs a gradient any more."""

    x: Tensor  # [windows, seq_len, hidden] what enters the block
    y: Tensor  # [windows, seq_len, hidden] what leaves it
    gradient: Tensor  # [windows, seq_len, hidden] of the loss in nats, summed over the batch, by y
    residual_energy: Tensor  # [windows, seq_len] squared norm of the residual stream that leaves the layer
    beside: tuple[tuple, dict]  # what the block is called with beside x: masks and positions, for an attention block

    @torch.no_grad()
    def dense(self, block: Block) -> Tensor:
        """What ``block`` itself gives for x, whatever stands in its place, [windows, seq_len, hidden]."""
        args, kwargs = self.beside
        output = _tensor(block.modules[0](self.x, *args, **kwargs))
        for module in block.modules[1:]:
            output = module(output)
        return output


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

    Returns:
        An iterator over batches: the loss in nats, summed over predicted tokens, and {block: Probe}. Between two batches
        the model is as it was, so it need not be gone through to its end. Memory: one batch's.

    Raises:
        ValueError: an unknown objective, windows the model cannot read, no blocks, blocks or a plan of another model.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}.")
    check_windows(windows, model)
    blocks = list(blocks)
    if not blocks:
        raise ValueError("There is no block to probe.")
    for path in (path for block in blocks for path in block.paths):
        try:
            model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"{type(model).__name__} has no module {path}: the blocks are of another model.") from None
    generator = torch.Generator().manual_seed(seed)
    batches = tqdm(windows.split(batch_size), desc="probe", unit="batch", disable=not progress, leave=False)
    return (_pass(model, plan, blocks, ids, objective, generator) for ids in batches)


def _pass(
    model: nn.Module, plan: Plan, blocks: list[Block], ids: Tensor, objective: str, generator: torch.Generator
) -> tuple[float, dict[Block, Probe]]:
    ids = ids.to(input_device(model))
    seen: dict[Block, dict] = {block: {} for block in blocks}
    with eval_mode(model), torch.enable_grad():
        log_p = _dense(model, ids) if objective == "kl" else None
        with spliced(model, plan), _frozen(model), ExitStack() as hooks:
            for block in blocks:
                _attach(model, block, seen[block], ids.shape, hooks)
            loss = _objective(_logits(model, ids), log_p, generator)
            loss.backward()
    for found in seen.values():
        found["gradient"] = found.pop("added").grad.view_as(found["y"])
    return loss.item(), {block: Probe(**found) for block, found in seen.items()}


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for any parameter, and afterwards for those that had one before."""
    before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the tokens that are predicted, in at least float32: [windows, seq_len - 1, vocab]."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _dense(model: nn.Module, ids: Tensor) -> Tensor:
    return _logits(model, ids).log_softmax(-1)


def _objective(logits: Tensor, log_p: Tensor | None, generator: torch.Generator) -> Tensor:
    log_q = logits.log_softmax(-1)
    if log_p is not None:
        return nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    with torch.no_grad():  # drawn on the CPU, so that a seed means the same everywhere
        drawn = torch.multinomial(log_q.exp().flatten(0, 1).cpu(), 1, generator=generator).view(*log_q.shape[:2], 1)
    return -log_q.gather(-1, drawn.to(log_q.device)).sum()


def _attach(model: nn.Module, block: Block, seen: dict, shape: torch.Size, hooks: ExitStack) -> None:
    """Hooks on whatever stands in the block's place by now; ``seen`` receives what a Probe is made of."""
    first, last = model.get_submodule(block.paths[0]), model.get_submodule(block.paths[-1])
    host = model.get_submodule(f"{block.stack}.{block.layer}")

    def windows(hidden: Tensor) -> Tensor:
        return hidden.detach().reshape(*shape, hidden.shape[-1])  # [windows, seq_len, hidden], also where layers flatten (OPT)

    def entry(module, args, kwargs):
        x, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        seen["x"] = windows(x).clone()  # the layer is free to write into its own
        seen["beside"] = args, {name: value for name, value in kwargs.items() if name != "hidden_states"}

    def leave(module, args, output):
        y = _tensor(output)
        seen["y"] = windows(y)
        seen["added"] = torch.zeros_like(y, requires_grad=True)
        return (y + seen["added"], *output[1:]) if isinstance(output, tuple) else y + seen["added"]

    def energy(module, args, output):
        seen["residual_energy"] = windows(_tensor(output)).float().square().sum(-1)

    hooks.callback(first.register_forward_pre_hook(entry, with_kwargs=True).remove)
    hooks.callback(last.register_forward_hook(leave).remove)
    hooks.callback(host.register_forward_hook(energy).remove)
