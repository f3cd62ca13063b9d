"""MLPs whose gate and up are one projection (Phi-3, GLM): neurons that can be kept, and a plain checkpoint of those kept."""

import pytest
import torch
from conftest import activations, captured_whole
from saved_models import narrow_plan
from tiny_models import HIDDEN, INTERMEDIATE, build, outputs, random_windows
from torch import nn
from torch.testing import assert_close

from mlpreplace import (
    MixtureOfExperts,
    NarrowMLP,
    NarrowPlusLinear,
    Stack,
    export,
    find_blocks,
    fit,
    load,
    register_architecture,
    save,
    splice,
)
from mlpreplace.evaluation.int8 import Int8Linear, quantized
from mlpreplace.methods.merging import merge_mlps
from mlpreplace.models.inputs import token_batches
from mlpreplace.planning.candidates import narrow_widths
from mlpreplace.replacements.nested import NestedMLP
from mlpreplace.statistics.unit_similarity import capture_units

FUSED = pytest.mark.parametrize("name", ["phi3", "glm", "glm4"])


@FUSED
def test_gate_is_the_first_half(name):
    model, ids = build(name), random_windows()
    for block in find_blocks(model):
        w, seen = block.weights(), activations(model, block, ids)
        whole = block.modules[0].gate_up_proj.weight
        assert torch.equal(torch.cat([w.gate, w.up]), whole) and whole.shape == (2 * INTERMEDIATE, HIDDEN)
        h = nn.functional.silu(seen["x"] @ w.gate.double().T) * (seen["x"] @ w.up.double().T)
        assert_close(h, seen["h"], rtol=1e-4, atol=1e-4)
        assert_close(h @ w.down.double().T, seen["y"], rtol=1e-4, atol=1e-4)
        assert [family.width for family in narrow_widths(block, 3)] == [16, 32] and not block.holds_experts


@FUSED
def test_full_width_is_the_block_and_every_form_saves_and_loads(name, tmp_path):
    model = build(name)
    blocks, stats = captured_whole(model, random_windows(20))
    for block in blocks:
        x, whole = stats[block].train.x[:1], fit(block, stats, NarrowMLP(INTERMEDIATE))
        assert torch.equal(whole(x), block.modules[0](x)) and whole.n_params == block.n_params
    nested, families = NestedMLP(((0.1, 48), (0.2, 24))), [NarrowPlusLinear(16, 4), MixtureOfExperts(12, 2)]
    plan = {b: fit(b, stats, f) for b, f in zip(blocks, [nested, *families], strict=True)}
    x = stats[blocks[0]].train.x[:1]
    assert_close(plan[blocks[0]](x), blocks[0].modules[0](x), rtol=1e-5, atol=1e-5)
    for i, small in enumerate((splice(model, plan), quantized(splice(model, plan)))):
        again = load(save(small, tmp_path / f"out{i}", standalone=True), device="cpu")
        assert torch.equal(outputs(again, name), outputs(small, name))


@pytest.mark.parametrize("widths", [(24,), (24, 16, 24)], ids=["one width", "several"])
@FUSED
def test_a_plain_checkpoint_has_one_narrower_projection(name, widths, tmp_path):
    model = build(name)
    small = splice(model, narrow_plan(model, *widths))
    folder = export(small, tmp_path / "out")
    again = load(folder, device="cpu")
    layers = again.get_submodule(find_blocks(model)[0].stack)
    assert [layer.mlp.gate_up_proj.weight.shape[0] for layer in layers] == [
        2 * width for width in (*widths, *widths, *widths)[:3]
    ]
    assert torch.equal(outputs(again, name), outputs(small, name))
    if len(widths) == 1:
        plain = type(model).from_pretrained(folder).eval()
        assert plain.config.intermediate_size == 24
        assert_close(outputs(plain, name), outputs(small, name), rtol=1e-5, atol=1e-5)


def test_int8_is_of_the_one_projection():
    small = quantized(build("phi3"))
    mlp = small.model.layers[0].mlp
    assert isinstance(mlp.gate_up_proj, Int8Linear) and mlp.gate_up_proj.out_features == 2 * INTERMEDIATE
    dense = outputs(build("phi3"), "phi3")
    assert (outputs(small, "phi3") - dense).norm() < 0.1 * dense.norm()


def test_units_are_matched_and_merged():
    """Of a model whose second MLP is the first with its units in another order, the two merge without loss."""
    model = build("phi3")
    a, b = (layer.mlp for layer in model.model.layers[:2])
    order = torch.randperm(INTERMEDIATE, generator=torch.Generator().manual_seed(1))
    b.gate_up_proj.weight.data = torch.cat([half[order] for half in a.gate_up_proj.weight.data.chunk(2)])
    b.down_proj.weight.data = a.down_proj.weight.data[:, order]
    blocks = find_blocks(model)[:2]
    units = capture_units(model, blocks, token_batches(random_windows(40)), progress=False)
    assert units.correlations(*blocks).shape == (2, INTERMEDIATE, INTERMEDIATE)
    merged, dense = splice(model, merge_mlps(blocks, units)), outputs(model, "phi3")
    assert_close(outputs(merged, "phi3"), dense, rtol=1e-4, atol=1e-4)
    assert (outputs(splice(model, merge_mlps(blocks)), "phi3") - dense).abs().max() > 0.1


class Biased(nn.Module):
    """Fused, with biases and names that say nothing; ``first`` tells which half is the gate."""

    def __init__(self, first: bool = True):
        super().__init__()
        self.a, self.b, self.c, self.first = nn.Linear(32, 96), nn.Linear(48, 32), nn.GELU(), first

    def forward(self, x):
        gate, up = self.a(x).chunk(2, -1) if self.first else reversed(self.a(x).chunk(2, -1))
        return self.b(self.c(gate) * up)


def biased(**options):
    model = build("llama")
    model.config.model_type = "nobody"
    for layer in model.model.layers:
        layer.mlp = Biased(**options)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*is no registered architecture")
def test_one_projection_is_guessed_and_its_bias_is_split(registry):
    model = biased()
    blocks, stats = captured_whole(model, random_windows(20))
    assert blocks[0].gate is blocks[0].up is model.model.layers[0].mlp.a
    w = blocks[0].weights()
    assert torch.equal(torch.cat([w.gate_bias, w.up_bias]), model.model.layers[0].mlp.a.bias)
    small = fit(blocks[0], stats, NarrowMLP(INTERMEDIATE))
    assert small.report.validation.pooled < 1e-8 and small.n_params == blocks[0].n_params
    assert NarrowMLP(10).n_params(blocks[0]) == fit(blocks[0], stats, NarrowMLP(10)).n_params


@pytest.mark.filterwarnings("ignore:.*is no registered architecture")
def test_with_the_gate_last_there_are_no_neurons(registry):
    assert not any(b.has_neurons or b.holds_experts for b in find_blocks(biased(first=False)))
    register_architecture("nobody", Stack("layers", ("mlp",), ("self_attn",), "mlp.a", "mlp.b", "mlp.a", "mlp.c"))
    with pytest.raises(ValueError, match="not what it computes"):
        captured_whole(biased(first=False), random_windows())
