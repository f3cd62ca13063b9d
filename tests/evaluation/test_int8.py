"""Eight bits change a model a little, make its blocks a quarter of their size, and leave the dense model alone."""

import pytest
import torch
from saved_models import address
from tiny_models import CAUSAL, HIDDEN, INTERMEDIATE, build, random_windows
from torch import nn
from torch.nn.utils import prune
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from mlpreplace.evaluation.int8 import NARROWEST, WEIGHT_LEVELS, Int8Linear, int8_product, quantized
from mlpreplace.evaluation.perplexity import perplexity
from mlpreplace.evaluation.speed import flops, latency, size_bytes
from mlpreplace.models.blocks import KINDS, find_blocks
from mlpreplace.models.parameters import block_parameters
from mlpreplace.replacements.families import LowRank, Mean, NarrowMLP, Replacement
from mlpreplace.replacements.hybrids import ConvMLP, MixtureOfExperts
from mlpreplace.replacements.splice import replacements_of, splice


def spliced_with(model, family=None):
    """Every MLP narrowed to its first neurons, or replaced by a random module: a fit is no matter here."""
    torch.manual_seed(0)
    plan = {block: Replacement(family or NarrowMLP(32), block) for block in find_blocks(model)}
    for replacement in plan.values():
        for p in replacement.parameters():
            p.data = torch.randn_like(p) / p.shape[-1] ** 0.5
    return splice(model, plan)


def logits(model, windows) -> torch.Tensor:
    with torch.no_grad():
        return model(windows).logits


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y - reference).norm() / reference.norm()).item()


def linear(inputs: int = 33, outputs: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 50 * self.weight, self.bias)


def halved_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: Scaled(HIDDEN, HIDDEN, bias=False),
        halved_forward,
        nn.utils.parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["a class of its own", "a forward of the instance", "weight_norm", "a pruning mask"],
)
def test_a_layer_that_does_more_than_its_weight_says_stays_as_it_is(change, llama, windows):
    """In attention, where such layers may be."""
    path = "model.layers.1.self_attn.o_proj"
    llama.requires_grad_(False)  # a pruned layer cannot be copied otherwise
    if isinstance(made := change(llama.get_submodule(path)), Scaled):
        llama.set_submodule(path, made)
    small = quantized(llama)
    assert type(small.get_submodule(path)) is type(llama.get_submodule(path))
    assert isinstance(small.get_submodule("model.layers.0.self_attn.o_proj"), Int8Linear)
    assert relative_error(logits(small, windows), logits(llama, windows)) < 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(33,), (1, 33), (5, 33), (2, 3, 33), (0, 33)])
def test_the_product_is_that_of_the_rounded_numbers(shape, bias):
    """The integer product is exact, on every processor: without VNNI, full 8-bit weights would overflow."""
    layer, x = linear(bias=bias), torch.randn(shape) * 10
    int8 = Int8Linear(layer)
    scale = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / scale).round() * scale
    weight = int8.weight.double() * int8.scale.double()[:, None]
    expected = nn.functional.linear(rounded.double(), weight, None if layer.bias is None else layer.bias.double())
    assert_close(int8(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_largest_products_do_not_overflow():
    """All weights and activations at the end of their range, with one sign: the most that can be added up."""
    layer = linear(1536, 16, bias=False)
    layer.weight.data.fill_(1.0)
    x = torch.ones(3, 1536) * torch.tensor([[1.0], [-1.0], [100.0]])
    assert_close(Int8Linear(layer)(x), x.sum(1, keepdim=True).expand(3, 16), rtol=1e-5, atol=0)


@pytest.mark.parametrize("vnni", [True, False])
def test_a_product_is_exact_with_and_without_instructions_for_it(vnni, monkeypatch):
    """All 8 bits, and more columns than float32 can add up exactly at once."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-128, 128, (n, 4099), generator=generator).to(torch.int8) for n in (5, 7))
    x[0], weight[0] = -128, -128
    x[0, 1], weight[0, 1] = 127, 1
    found = int8_product(x, weight)
    assert found.dtype == torch.int32 and torch.equal(found.long(), x.long() @ weight.long().T)


def test_weights_are_rounded_within_half_a_step_per_channel():
    layer = linear()
    layer.weight.data[3] *= 1000
    int8 = Int8Linear(layer)
    assert int8.weight.dtype == torch.int8 and int8.weight.abs().max() == WEIGHT_LEVELS
    error = (int8.weight.float() * int8.scale[:, None] - layer.weight).abs().amax(1)
    assert (error <= 0.5001 * layer.weight.abs().amax(1) / WEIGHT_LEVELS).all()


def test_a_massive_token_costs_the_others_nothing():
    int8, x = Int8Linear(linear()), torch.randn(4, 33)
    massive = x.clone()
    massive[0, 0] = 1e4
    assert torch.equal(int8(massive)[1:], int8(x)[1:])


def test_a_zero_token_gives_the_bias():
    layer = linear()
    assert torch.equal(Int8Linear(layer)(torch.zeros(2, 33)), layer.bias.expand(2, -1))
    layer.weight.data[5] = 0  # and a dead channel
    assert_close(Int8Linear(layer)(torch.ones(33))[5], layer.bias[5])


def test_a_conv1d_is_a_transposed_linear():
    conv, layer, x = Conv1D(24, 33), linear(), torch.randn(2, 33)
    conv.weight.data, conv.bias = layer.weight.data.T.contiguous(), layer.bias
    assert torch.equal(Int8Linear(conv)(x), Int8Linear(layer)(x))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_was(precision):
    layer, x = linear().to(precision), torch.randn(2, 33, dtype=precision)
    assert Int8Linear(layer)(x).dtype == precision
    assert relative_error(Int8Linear(layer)(x).float(), layer(x).float()) < 0.03


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_close_and_the_dense_model_is_as_it_was(name):
    model, windows = build(name), random_windows(2)
    dense, modules = logits(model, windows), dict(model.named_modules())
    error = relative_error(logits(quantized(model), windows), dense)
    assert 1e-4 < error < 0.15  # two roundings in each of 3 random layers, which amplify them; a wrong scale would give ~1
    assert torch.equal(logits(model, windows), dense)
    assert all(modules[path] is module for path, module in model.named_modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("family", [None, LowRank(16), ConvMLP(32)])
def test_a_spliced_model_too(name, family):
    """Replacements are quantized, and neither the dense model nor the spliced one, which share weights, changes."""
    model, windows = build(name), random_windows(2)
    dense, small = logits(model, windows), spliced_with(model, family)
    before = logits(small, windows)
    int8 = quantized(small)
    assert all(
        isinstance(m, Int8Linear) for r in replacements_of(int8).values() for m in r.modules() if hasattr(m, "in_features")
    )
    assert 1e-4 < relative_error(logits(int8, windows), before) < 0.15
    assert torch.equal(logits(small, windows), before)
    assert torch.equal(logits(model, windows), dense)


def test_the_blocks_become_a_quarter(llama):
    """A byte a weight and four a channel; everything else as it was."""
    channels = 3 * (4 * HIDDEN + 2 * INTERMEDIATE + HIDDEN)
    assert size_bytes(llama) - size_bytes(quantized(llama)) == 3 * block_parameters(llama) - 4 * channels


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_parameters_are_counted_as_before(name):
    model = build(name)
    assert block_parameters(quantized(model)) == block_parameters(model)
    assert flops(quantized(model), 12) == flops(model, 12)


def test_what_is_not_quantized_is_shared(llama):
    int8 = quantized(llama)
    own, theirs = dict(llama.named_parameters()), dict(int8.named_parameters())
    assert own.keys() == theirs.keys()
    blocks = tuple(path for kind in KINDS for block in find_blocks(llama, kind) for path in block.paths)
    for name, parameter in theirs.items():
        assert parameter is not own[name] and (address(parameter) == address(own[name])) != name.startswith(blocks), name
        assert (parameter.dtype == torch.int8) == name.startswith(blocks), name


def test_the_router_of_a_mixture_stays_exact(llama):
    int8 = quantized(spliced_with(llama, MixtureOfExperts(16, experts=4)))
    mixture = next(iter(replacements_of(int8).values())).body
    assert type(mixture.router) is nn.Linear and mixture.router.out_features < NARROWEST
    assert isinstance(mixture.experts[0].up, Int8Linear)


def test_perplexity_speed_and_generation_work_on_it(llama):
    windows, int8 = random_windows(4), quantized(llama)
    change = perplexity(int8, windows, progress=False).value / perplexity(llama, windows, progress=False).value
    assert change != 1 and abs(change - 1) < 0.1
    assert set(latency({"dense": llama, "int8": int8}, windows, decode_tokens=1, rounds=1)) == {"dense", "int8"}
    assert int8.generate(windows[:1], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0).shape == (1, 15)


def test_nothing_to_quantize_is_an_error(llama):
    with pytest.raises(ValueError, match="done already"):
        quantized(quantized(llama))
    bare = build("llama")
    for layer in bare.model.layers:
        layer.self_attn = nn.Identity()
    bare = splice(bare, {block: Replacement(Mean(), block) for block in find_blocks(bare)})
    with pytest.raises(ValueError, match="No linear layer in the blocks of LlamaForCausalLM"):
        quantized(bare)


def test_only_on_a_cpu():
    with pytest.raises(ValueError, match=r"on meta.*model\.to\('cpu'\)"):
        quantized(build("llama").to("meta"))


@pytest.mark.bundled
def test_the_bundled_model_keeps_its_perplexity(bundled):
    """A scale per tensor instead of one per token makes it more than twice as large."""
    from mlpreplace import load_windows

    model, tokenizer = bundled
    held = load_windows("bundled/wiki", tokenizer, split="heldout", seq_len=128, n_windows=4)
    change = perplexity(quantized(model), held, progress=False).value / perplexity(model, held, progress=False).value
    assert 0.97 < change < 1.1 and change != 1
