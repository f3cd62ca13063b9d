"""Rounded weights are the nearest of their group's levels, cost what is said, and leave the model they are of alone."""

import pytest
import torch
from tiny_models import CAUSAL, build, random_windows
from torch import nn

from mlpreplace.evaluation.int8 import linear_layers, quantized
from mlpreplace.evaluation.perplexity import perplexity
from mlpreplace.evaluation.rounding import _nearest, rounded, rounded_bytes
from mlpreplace.evaluation.speed import flops, size_bytes
from mlpreplace.models.blocks import find_blocks
from mlpreplace.models.parameters import block_parameters
from mlpreplace.replacements.families import NarrowMLP, Replacement
from mlpreplace.replacements.splice import splice


def logits(model, windows):
    with torch.no_grad():
        return model(windows).logits


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [64, 70, 20])  # the last group of 70 has 6 members; one group of 20
def test_every_group_has_so_many_levels_and_the_nearest_is_taken(bits, width):
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    weight[1] += 5  # all on one side of 0
    weight[2] *= 1000
    found = _nearest(weight, 2**bits - 1, 32)
    for part, of_found in zip(weight.split(32, 1), found.split(32, 1), strict=True):
        step = (part.amax(1) - part.amin(1)) / (2**bits - 1)
        assert ((of_found - part).abs().amax(1) <= 0.51 * step + 1e-3 * part.abs().amax(1)).all()  # float16: 11 bits
        assert all(len(row.unique()) <= 2**bits for row in of_found)
        if bits < 8:  # fine levels may begin above a least value that was rounded down
            assert torch.equal(of_found.amin(1).half().float(), of_found.amin(1))  # as it is stored


@pytest.mark.parametrize("weight", [torch.zeros(2, 32), torch.full((2, 32), 0.3), torch.full((2, 32), 1e-7)])
def test_a_group_without_spread_stays_what_it_is(weight):
    assert torch.allclose(_nearest(weight, 15, 32), weight, rtol=1e-3, atol=1e-7)


def test_what_is_on_the_levels_stays_there(llama):
    """A model that was read from a package of as many bits and groups loses nothing."""
    once = rounded(llama)
    assert all(torch.equal(a, b) for a, b in zip(rounded(once).parameters(), once.parameters(), strict=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_more_bits_are_nearer_and_the_model_is_as_it_was(name):
    model, windows = build(name), random_windows(2)
    dense = logits(model, windows)
    errors = [(logits(rounded(model, bits), windows) - dense).norm() / dense.norm() for bits in (2, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > 0 and errors[2] < 0.03
    assert torch.equal(logits(model, windows), dense)


def test_counts_are_as_before_and_bytes_those_of_packed_weights(llama):
    plan = {block: Replacement(NarrowMLP(33), block) for block in find_blocks(llama)}  # an odd width
    for model in (llama, splice(llama, plan)):
        small, layers = rounded(model, 3), linear_layers(model)
        assert block_parameters(small) == block_parameters(model) and flops(small, 12) == flops(model, 12)
        packed = 0
        for layer in layers:
            rows, columns = layer.weight.shape
            packed += rows * len(bytes((3 * columns + 7) // 8)) + rows * len(range(0, columns, 32)) * 2 * torch.half.itemsize
        weights = sum(layer.weight.nbytes for layer in layers)
        assert rounded_bytes(model, 3) == size_bytes(model) - weights + packed


def test_perplexity_is_measured_and_no_checkpoint_written(llama, tmp_path):
    small, windows = rounded(llama), random_windows(4)
    assert perplexity(small, windows, progress=False).value != perplexity(llama, windows, progress=False).value
    with pytest.raises(ValueError, match="save"):
        small.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"bits": 1}, "bits.*2 to 8.*1"), ({"bits": 9}, "9"), ({"bits": 4.0}, "4.0"), ({"group": 1}, "group.*from 2.*1")],
)
@pytest.mark.parametrize("function", [rounded, rounded_bytes])
def test_other_bits_and_groups_are_refused(function, options, named, llama):
    with pytest.raises(ValueError, match=named):
        function(llama, **options)


def test_nothing_to_round_is_an_error(llama):
    with pytest.raises(ValueError, match="in int8 already"):
        rounded(quantized(llama))
    assert isinstance(linear_layers(rounded(llama))[0], nn.Linear)
