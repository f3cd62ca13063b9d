"""What tests of merging share: inputs of every kind of model, planted copies of an MLP, references in float64."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from tiny_models import batches_for, build

from mlpreplace import find_blocks
from mlpreplace.models.blocks import own_parameters
from mlpreplace.statistics.unit_similarity import capture_units

KINDS = ["llama", "gemma", "gpt2", "opt", "bert", "vit", "marian", "t5"]  # gated, with and without biases, every side


def shuffled(width: int, seed: int) -> torch.Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plant(block, like, order: torch.Tensor) -> None:
    """Give ``block`` the MLP of ``like``, with unit ``order[i]`` of ``like`` in place i."""
    mine, theirs = block.weights(), like.weights()  # views of the parameters
    for name in ("up", "gate", "up_bias", "gate_bias"):
        if getattr(mine, name) is not None:
            getattr(mine, name).copy_(getattr(theirs, name)[order].clone())
    mine.down.copy_(theirs.down[:, order].clone())
    if mine.down_bias is not None:
        mine.down_bias.copy_(theirs.down_bias)


def planted(name: str, first: int = 0, **changes):
    """A float64 model whose MLP ``first`` + 1 is MLP ``first`` with its units shuffled; of both stacks where there are two.

    Layers add little to the stream, as in a trained model: the inputs of two neighbours, and so their units, are alike.

    Returns (model, its pairs of blocks, the orders).
    """
    model = build(name, **changes).double()
    with torch.no_grad():
        for block in find_blocks(model):
            block.down.weight.mul_(0.2)
        for block in find_blocks(model, "attention"):
            for parameter in own_parameters(block.modules):
                parameter.mul_(0.4)
    stacks: dict[str, list] = {}
    for block in find_blocks(model):
        stacks.setdefault(block.stack, []).append(block)
    pairs, orders = [], []
    for seed, blocks in enumerate(stacks.values()):
        a, b = blocks[first : first + 2]
        orders.append(shuffled(a.intermediate_size, seed))
        plant(b, a, orders[-1])
        pairs.append([a, b])
    return model, pairs, orders


def as_doubles(batches):
    """Floating-point inputs in float64, for a model in float64."""
    return [{k: t.double() if t.is_floating_point() else t for k, t in batch.items()} for batch in batches]


def units_of(model, name: str):
    """Units of all MLP blocks on 24 inputs, in the model's precision."""
    batches = batches_for(name, 24)
    wide = next(model.parameters()).dtype == torch.float64
    return capture_units(model, find_blocks(model), as_doubles(batches) if wide else batches, progress=False)


def reference_units(model, block, batches, mask=None) -> torch.Tensor:
    """Hidden units before the activation, gate and up side by side, as the projections themselves give them: [tokens, units]."""
    projections, seen = [p for p in (block.gate, block.up) if p is not None], {}
    with ExitStack() as stack, torch.no_grad():
        for p in projections:
            hook = p.register_forward_hook(lambda module, args, out: seen.setdefault(module, []).append(out.flatten(0, -2)))
            stack.callback(hook.remove)
        for batch in batches:
            model(**batch)
    units = torch.cat([torch.cat(seen[p]) for p in projections], -1).double()
    return units if mask is None else units[mask.flatten()]


def real_tokens(*shape: int) -> torch.Tensor:
    """A mask with padding behind most rows, bool."""
    lengths = torch.arange(shape[0]) % 4 + shape[1] - 3
    return torch.arange(shape[1]) < lengths[:, None]
