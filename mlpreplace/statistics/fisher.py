"""What the loss of the dense model feels of its blocks, token by token, neuron by neuron and head by head: Fisher information.

:func:`fisher_gradients` keeps what candidates are priced by, :func:`fisher_effects` what neurons and heads are chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.architectures import layer_lists
from ..models.attention import attention_weights, key_units, query_columns
from ..models.blocks import Block, block_neurons, listed
from ..models.forward import State, check_gradients, checkpointed, eval_mode, hidden_states, place_of, watching
from ..models.inputs import check_batch_size, check_windows, input_device
from ..runtime.cache import cached
from ..runtime.memory import halving, on_disk, trim
from .gradients import WINDOWS, frozen, log_probabilities, loss_of


@dataclass
class Sensitivity:
    """What a block did on some windows, and how the loss felt it. On the CPU, in the block's precision."""

    x: Tensor  # [windows, seq_len, hidden] what enters the block
    gradient: Tensor  # [windows, seq_len, hidden] of −log p(next tokens) by y, in nats
    y: Tensor | None = None  # [windows, seq_len, hidden] what leaves it; None for effects, which do not need it
    h: Tensor | None = None  # [windows, seq_len, inner] outputs of heads, as they enter the output projection; None for an MLP
    keys: Tensor | None = None  # [windows, seq_len, groups · units] qᵀ∂/∂q of each unit of queries and keys, summed over heads

    @classmethod
    def joined(cls, batches: Sequence[Sensitivity]) -> Sensitivity:
        """Of all windows, on disk, from those of each batch."""
        parts = {f.name: [getattr(batch, f.name) for batch in batches] for f in fields(cls)}
        return cls(**{name: None if of[0] is None else on_disk(torch.cat(of)) for name, of in parts.items()})


def fisher_gradients(
    model: nn.Module,
    blocks: Iterable[Block],
    windows: Tensor,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[Block, Sensitivity]:
    """Gradients of −log p(next tokens) of the dense ``model`` by the outputs of ``blocks``, the tokens drawn from the model.

    Their mean outer product is the Fisher information, the Hessian of KL (Martens 2020, arXiv 1412.1193). A backward pass holds
    the hidden states of all layers and the inside of one. What it saw is left on disk, where it takes no memory until it is read.

    Args:
        seed: of the drawn tokens.
        batch_size: windows in one pass, 2 by default. Where memory runs out, all starts again with half as many.

    Raises:
        ValueError: windows the model cannot read or of a single token, blocks of another model or of a kind that cannot be
            replaced, a model that gives NaN, a call under torch.inference_mode().
    """
    blocks = listed(blocks)

    def run(size: int) -> dict[Block, Sensitivity]:
        found: dict[Block, list[Sensitivity]] = {block: [] for block in blocks}
        _each_batch(model, blocks, windows.split(size), seed, lambda block, seen: found[block].append(seen), False, progress)
        return {block: Sensitivity.joined(found.pop(block)) for block in blocks}

    _check(model, windows, batch_size)
    return halving(run, batch_size or WINDOWS) if blocks else {}


@cached("effects")
def fisher_effects(
    model: nn.Module,
    blocks: Iterable[Block],
    windows: Tensor,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> dict[Block, Tensor]:
    """What the loss feels of each neuron and each head: twice the KL divergence, to second order, of leaving it out.

    With g as in :func:`fisher_gradients`, neuron j of an MLP has the effect Σ_t (g_tᵀ w_j h_tj)², [intermediate]. For heads i
    and j of attention, with outputs o_ti that add up to the block's, it is Σ_t (g_tᵀ o_ti)(g_tᵀ o_tj): leaving out a set of
    heads costs the sum over its pairs. Behind the heads stand the units of queries and keys of each group (see
    :func:`~mlpreplace.models.key_units`), with q_tᵀ∂/∂q_t of a unit in the place of g_tᵀo_ti: what the loss feels, to first
    order, of the unit's part in the scores. So effects of attention are [heads + groups · units, the same]. Memory: one batch.

    Arguments and errors are those of :func:`fisher_gradients`.
        cached: keep the result on disk and take it from there.

    Returns:
        {block: effects} of blocks that have neurons or heads, in nats, summed over tokens, in float64 on the block's device.
    """
    blocks = [block for block in listed(blocks) if block.has_neurons or block.heads is not None]

    def run(size: int) -> dict[Block, Tensor]:
        found: dict[Block, Tensor] = {}

        def tell(block: Block, seen: Sensitivity) -> None:
            found[block] = found.get(block, 0) + _effects(block, seen).double()

        _each_batch(model, blocks, windows.split(size), seed, tell, True, progress)
        return {block: found[block] for block in blocks}

    _check(model, windows, batch_size)
    return halving(run, batch_size or WINDOWS) if blocks else {}


@torch.no_grad()
def _effects(block: Block, seen: Sensitivity) -> Tensor:
    precision = torch.promote_types(seen.x.dtype, torch.float32)
    g = seen.gradient.flatten(0, 1).to(block.device, precision)  # [tokens, hidden]
    if block.has_neurons:
        h = block_neurons(block, seen.x.flatten(0, 1).to(g))
        return (h * (g @ block.weights().down.to(g))).square().sum(0)
    output = attention_weights(block).output.to(g)  # [heads, value_dim, hidden]
    h = seen.h.flatten(0, 1).to(g).unflatten(-1, output.shape[:2])  # [tokens, heads, value_dim]
    felt = (h * (g @ output.flatten(0, 1).T).view_as(h)).sum(-1)  # [tokens, heads]
    if seen.keys is not None:
        felt = torch.cat([felt, seen.keys.flatten(0, 1).to(felt)], 1)
    return felt.T @ felt


def _check(model: nn.Module, windows: Tensor, batch_size: int | None) -> None:
    check_windows(windows, model, least=2)
    check_batch_size(batch_size)
    check_gradients(model)


def _each_batch(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Tensor],
    seed: int,
    tell: Callable[[Block, Sensitivity], None],
    again: bool,
    progress: bool,
) -> None:
    """Run ``batches`` forward and backward, and call ``tell`` for each block of each batch once its gradient is known."""
    generator = torch.Generator().manual_seed(seed)
    for ids in tqdm(batches, desc="gradients", unit="batch", disable=not progress, leave=False):
        _backward(model, blocks, ids, generator, tell, again)
        trim()  # and of the logits


def _backward(
    model: nn.Module,
    blocks: Sequence[Block],
    ids: Tensor,
    generator: torch.Generator,
    tell: Callable[[Block, Sensitivity], None],
    again: bool,
) -> None:
    ids, layers = ids.to(input_device(model)), [layer for _, _, of_stack in layer_lists(model) for layer in of_stack]

    def enter(x: Tensor, *_) -> None:
        trim()  # or the heap keeps more of every layer, and of its second run
        if not x.requires_grad:
            x.requires_grad_()  # the first of a stack is given what no gradient would reach, since all weights are frozen

    with eval_mode(model), torch.enable_grad(), frozen(model), checkpointed(layers), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(watching(layer, enter=enter))
        for block in blocks:
            _see(model, block, ids.shape, partial(tell, block), hooks, again)
        loss_of(log_probabilities(model, ids), None, generator).backward()


def _see(
    model: nn.Module,
    block: Block,
    shape: torch.Size,
    tell: Callable[[Sensitivity], None],
    hooks: ExitStack,
    again: bool,
) -> None:
    """Watch a block in the forward pass, and leave on disk what waits there for the gradient; or, with ``again``, watch it in the
    second run of its layer, which comes in the backward pass and need not reach the block's output. Either way what was seen of
    one layer is in memory at a time.
    """
    first, last, _ = place_of(model, block)  # raises for blocks of another model
    units = None if block.heads is None else key_units(block)
    seen: dict[str, Tensor] = {}
    awaited = {"x", "gradient"} | ({"h"} if block.heads is not None else set()) | ({"keys"} if units is not None else set())
    awaited |= set() if again else {"y"}
    runs, queries = [], []

    def found(name: str, hidden: Tensor) -> None:
        hidden = hidden.detach().reshape(*shape, -1)
        seen[name] = hidden.to("cpu", copy=True) if again else on_disk(hidden.to("cpu"))  # what waits for a gradient
        awaited.discard(name)
        if not awaited:
            tell(Sensitivity(**seen))
            seen.clear()  # or this function holds it until the batch ends

    def keep(name: str, hidden: Tensor, *_) -> None:
        if name in awaited and len(runs) == 1 + again:
            found(name, hidden)

    def enter(x: Tensor, *_) -> None:
        runs.append(len(runs))
        keep("x", x)

    def leave(output: State) -> None:
        keep("y", y := hidden_states(output))
        if len(runs) == 1:
            y.register_hook(partial(found, "gradient"))

    def project(output: Tensor) -> None:
        queries[:] = [output.detach()]
        if len(runs) == 1:
            output.register_hook(lambda gradient: found("keys", _felt_by_units(block, units, queries.pop(), gradient)))
            queries.clear()  # the second run of the layer, which comes before the gradient, gives them again

    hooks.enter_context(watching(first, last, enter=enter, leave=leave))
    if block.heads is not None:
        hooks.enter_context(watching(block.output_projection, enter=partial(keep, "h")))
    if units is not None:
        hooks.enter_context(watching(block.host.get_submodule(block.heads.query), leave=project))


def _felt_by_units(block: Block, units: Tensor, output: Tensor, gradient: Tensor) -> Tensor:
    """qᵀ∂/∂q of each unit, summed over the heads of a group, [..., groups · units], in at least float32. Turning q leaves it."""
    columns, weights = query_columns(block).to(output.device), attention_weights(block)
    felt = output[..., columns].to(torch.promote_types(output.dtype, torch.float32)) * gradient[..., columns]
    by_unit = felt.unflatten(-1, weights.query.shape[:2])[..., units.to(felt.device)].sum(-1)  # [..., heads, units]
    members = torch.nn.functional.one_hot(weights.group_of.to(felt.device)).to(felt)  # [heads, groups]
    return torch.einsum("...hu,hg->...gu", by_unit, members).flatten(-2)
