"""Gradients of a model's loss by the outputs of many blocks, from one backward pass.

A probe is a zero tensor added to a block's output y; its gradient is that of the loss by y. To first order, an output of
``y + δ`` changes the loss by the sum of ``gradient · δ`` over tokens, with all other blocks as they are, replaced or not. One
backward pass thus prices every candidate of every block; a forward pass prices one.

"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.blocks import Block
from ..models.forward import (
    Beside,
    State,
    check_gradients,
    eval_mode,
    hidden_states,
    place_of,
    watching,
    with_hidden_states,
)
from ..models.inputs import check_batch_size, check_windows, input_device
from ..replacements.families import Replacement
from ..replacements.splice import AttentionStandIn, Plan, spliced

OBJECTIVES = ("kl", "sampled")
WINDOWS = 2  # at a time: a backward pass holds the activations of all layers


@dataclass
class Probe:
    """One block on one batch of windows, with a plan in place. No tensor requires a gradient."""

    x: Tensor  # [windows, seq_len, hidden] what enters the block
    y: Tensor  # [windows, seq_len, hidden] what leaves it
    gradient: Tensor  # [windows, seq_len, hidden] by y, of the loss in nats summed over the batch
    residual_energy: Tensor  # [windows, seq_len] squared norm of the residual stream that leaves the layer
    beside: Beside  # other arguments of the block: masks and positions, for attention

    @torch.no_grad()
    def dense(self, block: Block) -> Tensor:
        """The output of the dense ``block`` for x, also where it is replaced, [windows, seq_len, hidden]."""
        args, kwargs = self.beside
        output = hidden_states(block.modules[0](self.x, *args, **kwargs))
        for module in block.modules[1:]:
            output = module(output)
        return output

    @torch.no_grad()
    def replaced(self, block: Block, replacement: Replacement) -> Tensor:
        """The output of ``replacement`` for x, [windows, seq_len, hidden]."""
        if not replacement.family.attends:
            return replacement(self.x)
        args, kwargs = self.beside
        return AttentionStandIn(replacement, type(block.modules[0]), block.layer)(self.x, *args, **kwargs)[0]


def probe(
    model: nn.Module,
    plan: Plan,
    blocks: Iterable[Block],
    windows: Tensor,
    objective: str = "kl",
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[float, dict[Block, Probe]]]:
    """Run ``windows`` through ``model`` with ``plan`` in place, forward and backward, one batch after another.

    Args:
        objective: "kl" is KL(dense ‖ spliced). "sampled" is the negative log-likelihood of next tokens drawn from the spliced
            model; the mean square of its gradients is the Fisher information.
        seed: of the drawn tokens.
        batch_size: windows in one pass, 2 by default.

    Returns:
        An iterator over batches: (loss in nats, summed over predicted tokens; {block: Probe}). Between two batches the model is
        as it was, so the iterator may be left early. Memory: one batch.

    Raises:
        ValueError: an unknown objective, windows the model cannot read or of a single token, no blocks, blocks or a plan of
            another model, a call under torch.inference_mode(). The iterator: a model or a plan that gives NaN.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}.")
    check_windows(windows, model, least=2)
    check_batch_size(batch_size)
    check_gradients(model)
    blocks = list(blocks)
    if not blocks:
        raise ValueError("There is no block to probe.")
    for block in blocks:
        place_of(model, block)  # raises for blocks of another model
    generator = torch.Generator().manual_seed(seed)
    batches = tqdm(windows.split(batch_size or WINDOWS), desc="probe", unit="batch", disable=not progress, leave=False)
    return (_pass(model, plan, blocks, ids, objective, generator) for ids in batches)


def _pass(
    model: nn.Module, plan: Plan, blocks: list[Block], ids: Tensor, objective: str, generator: torch.Generator
) -> tuple[float, dict[Block, Probe]]:
    ids = ids.to(input_device(model))
    seen: dict[Block, dict] = {block: {} for block in blocks}
    with eval_mode(model), torch.enable_grad():
        with torch.no_grad():
            log_p = log_probabilities(model, ids) if objective == "kl" else None
        with spliced(model, plan), frozen(model), ExitStack() as hooks:
            for block in blocks:
                _attach(model, block, seen[block], ids.shape, hooks)
            loss = loss_of(log_probabilities(model, ids), log_p, generator)
            loss.backward()
    for found in seen.values():
        found["gradient"] = found.pop("added").grad.view_as(found["y"])
    return loss.item(), {block: Probe(**found) for block, found in seen.items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient; afterwards those do that did before."""
    before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Of next tokens, in at least float32: [windows, seq_len - 1, vocab]."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    found = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    if bool(found.isnan().any()):
        raise ValueError("The probabilities are not finite: check the model and the plan in it (a half-precision overflow?).")
    return found


def loss_of(log_q: Tensor, log_p: Tensor | None, generator: torch.Generator) -> Tensor:
    """The loss of the spliced model's ``log_q``; "sampled" where there is no ``log_p`` of the dense model."""
    if log_p is not None:
        return nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    with torch.no_grad():  # drawn on the CPU, so that a seed means the same everywhere
        drawn = torch.multinomial(log_q.exp().flatten(0, 1).cpu(), 1, generator=generator).view(*log_q.shape[:2], 1)
    return -log_q.gather(-1, drawn.to(log_q.device)).sum()


def _attach(model: nn.Module, block: Block, seen: dict, shape: torch.Size, hooks: ExitStack) -> None:
    """Watch the block or what replaces it; ``seen`` receives what a Probe is made of."""
    first, last, host = place_of(model, block)

    def windows(hidden: Tensor) -> Tensor:
        return hidden.detach().reshape(*shape, hidden.shape[-1])  # [windows, seq_len, hidden], also where layers flatten (OPT)

    def enter(x: Tensor, beside: Beside) -> None:
        seen["x"], seen["beside"] = windows(x).clone(), beside  # copied: the layer is free to write into it

    def leave(output: State) -> State:
        y = hidden_states(output)
        seen["y"], seen["added"] = windows(y), torch.zeros_like(y, requires_grad=True)
        return with_hidden_states(output, y + seen["added"])

    def energy(output: State) -> None:
        seen["residual_energy"] = windows(hidden_states(output)).float().square().sum(-1)

    hooks.enter_context(watching(first, last, enter=enter, leave=leave))
    hooks.enter_context(watching(host, leave=energy))
