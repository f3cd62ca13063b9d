"""Weights set to zero: which ones, in which pattern, and that nothing else changes."""

import pytest
import torch
from conftest import capture_quietly
from decoding import logits
from tiny_models import build, random_windows
from transformers.pytorch_utils import Conv1D

from mlpreplace import NarrowMLP, find_blocks, fit, splice
from mlpreplace.evaluation import pruned, quantized
from mlpreplace.evaluation.int8 import linear_layers


def rows(layer) -> torch.Tensor:
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def pairs(model, small):
    """Layers of a model and their copies."""
    return list(zip(linear_layers(model), linear_layers(small), strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mixtral"])
@pytest.mark.parametrize("pattern, kept", [("2:4", 1 / 2), ("1:4", 1 / 4), (0.25, 3 / 4)])
def test_the_pattern_holds_in_every_row_and_what_stays_is_as_it_was(name, pattern, kept):
    model = build(name)
    small = pruned(model, random_windows(4, 12), pattern, progress=False)
    for own, layer in pairs(model, small):
        before, after = rows(own), rows(layer)
        assert torch.equal(after[after != 0], before[after != 0])
        if isinstance(pattern, str):
            of = after[:, : after.shape[1] // 4 * 4].unflatten(1, (-1, 4))
            assert ((of != 0).sum(-1) == 4 * kept).all()
        else:
            assert ((after != 0).sum(1) == after.shape[1] - round(pattern * after.shape[1])).all()


def test_the_lowest_products_of_weight_and_input_go(llama):
    windows, block = random_windows(4, 12), find_blocks(llama)[0]
    seen = []
    handle = block.down.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
    logits(llama, windows)
    handle.remove()
    norm = torch.cat(seen).double().flatten(0, 1).square().sum(0).sqrt()
    score = block.down.weight.detach().abs() * norm
    after = find_blocks(pruned(llama, windows, 0.5, progress=False))[0].down.weight
    for of_row, kept in zip(score, after != 0, strict=True):
        assert of_row[kept].min() >= of_row[~kept].max()


def test_a_pattern_leaves_what_is_over_at_the_end_of_a_row(llama):
    blocks, stats = capture_quietly(llama, random_windows())
    spliced = splice(llama, {b: fit(b, stats, NarrowMLP(22)) for b in blocks})
    small = pruned(spliced, random_windows(4, 12), progress=False)
    down = [layer for layer in linear_layers(small) if layer.in_features == 22]
    assert len(down) == len(blocks) and all((layer.weight[:, 20:] != 0).all() for layer in down)


def test_nothing_else_changes_and_eight_bits_go_on_top(llama):
    windows, before = random_windows(4, 12), logits(llama, random_windows(2, 9))
    small = pruned(llama, windows, progress=False)
    assert torch.equal(logits(llama, random_windows(2, 9)), before)
    changed = {id(layer) for layer in linear_layers(small)}
    for (name, own), (_, module) in zip(llama.named_modules(), small.named_modules(), strict=True):
        if id(module) not in changed:
            assert all(torch.equal(a, b) for a, b in zip(own.parameters(False), module.parameters(False), strict=True)), name
    rounded = dict(quantized(small).named_modules())
    of_blocks = [(name, module) for name, module in small.named_modules() if id(module) in changed]
    assert of_blocks and all((rounded[name].weight[layer.weight == 0] == 0).all() for name, layer in of_blocks)
    with pytest.raises(ValueError, match="random weights"):
        small.save_pretrained("anywhere")


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "half", 0, 1, 1.5, True, None])
def test_another_pattern_is_refused(pattern, llama):
    with pytest.raises(ValueError, match='Expected a pattern such as "2:4"'):
        pruned(llama, random_windows(), pattern)


def test_nothing_to_prune_is_an_error(llama):
    with pytest.raises(ValueError, match="nothing to prune"):
        pruned(quantized(llama), random_windows())
