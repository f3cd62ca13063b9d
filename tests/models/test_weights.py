"""What is not a plain weight of a linear layer is refused where blocks are found, by name; what is one is taken."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from conftest import capture_quietly
from tiny_models import INTERMEDIATE, build, random_windows
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from mlpreplace import Linear, NarrowMLP, Stack, find_blocks, fit, register_architecture
from mlpreplace.evaluation.int8 import quantized
from mlpreplace.models.parameters import block_parameters, count_parameters

UP = "model.layers.1.mlp.up_proj"


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class Adapted(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return 2 * self.base_layer(x)


class TwoCopies(nn.Module):
    """As PEFT wraps a module that is trained whole."""

    def __init__(self, module):
        super().__init__()
        self.original_module, self.modules_to_save = module, nn.ModuleDict({"default": copy.deepcopy(module)})

    def forward(self, x):
        return self.modules_to_save["default"](x)


class Packed(nn.Parameter):
    """As bitsandbytes has them."""


class Wrapped(torch.Tensor):
    """As torchao and DTensor have them: of a floating dtype on the outside."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return Wrapped(args[0].held)


class TwoBits(nn.Module):
    """As GPTQ has them: no parameter at all."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(2, 32, dtype=torch.int32))


def scaled(layer):
    return Scaled(layer.in_features, layer.out_features, bias=False)


def with_own_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def with_a_strange_hook(layer):
    class Doubled(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(layer, SequentialHook(AlignDevicesHook(execution_device="cpu"), Doubled()))


def with_weight(make):
    def change(layer):
        layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)

    return change


def in_a_class_of_its_own(layer):
    layer.weight = Packed(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)


NOT_LINEAR = {
    "a class of its own": (scaled, "test_weights Scaled, a linear layer with a forward of its own"),
    "an adapter": (Adapted, "merge_and_unload"),
    "another kind of layer": (lambda layer: nn.Bilinear(1, 1, 1), "Bilinear and no linear layer"),
    "a forward of the instance": (with_own_forward, "forward was replaced"),
    "a hook that computes": (with_a_strange_hook, "forward was replaced"),
    "weight_norm": (weight_norm, "computed from other tensors"),
    "a parametrized weight_norm": (parametrizations.weight_norm, "computed from other tensors"),
    "spectral_norm": (spectral_norm, "computed from other tensors"),
    "a pruning mask": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    "an empty shard": (with_weight(lambda w: w.new_empty(0)), r"shape \[0\]"),
}
NOT_PLAIN = {
    "bytes": (with_weight(lambda w: w.to(torch.int8)), "of int8"),
    "a class for packed bytes": (in_a_class_of_its_own, "a Packed of uint8"),
    "8 bits, floating": (with_weight(lambda w: w.to(torch.float8_e4m3fn)), "of float8_e4m3fn"),
    "a tensor of its own class": (with_weight(Wrapped), "a Wrapped of float32"),
    "packed buffers": (TwoBits, "qweight of a test_weights TwoBits is of int32"),
    "torch.ao": (torch.ao.nn.quantized.dynamic.Linear.from_float, "they are no parameters"),
    "two copies": (TwoCopies, "merge_and_unload"),
}


def changed(change, path=UP):
    model = build("llama")
    layer = model.get_submodule(path)
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig  # for torch.ao
    if isinstance(made := change(layer), nn.Module) and made is not layer:
        model.set_submodule(path, made)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("role", ["up", "gate", "down"])
@pytest.mark.parametrize("change, said", [*NOT_LINEAR.values(), *NOT_PLAIN.values()], ids=[*NOT_LINEAR, *NOT_PLAIN])
def test_a_projection_that_is_no_linear_layer_is_refused_by_name(change, said, role):
    path = UP.replace("up", role)
    with pytest.raises(ValueError, match=said) as error:
        find_blocks(changed(change, path))
    assert path in str(error.value) and any(word in str(error.value) for word in ("Stack", "Load the model", "use the model"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "act", [count_parameters, lambda m: find_blocks(m, "attention"), quantized], ids=["count", "find", "int8"]
)
@pytest.mark.parametrize("change", [change for change, _ in NOT_PLAIN.values()], ids=NOT_PLAIN)
def test_packed_weights_are_neither_counted_nor_found_in_attention(change, act):
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        act(changed(change, "model.layers.1.self_attn.q_proj"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [scaled, Adapted, parametrizations.weight_norm])
def test_attention_is_fitted_by_what_it_gives_whatever_its_layers_are(change):
    blocks, stats = capture_quietly(
        changed(change, "model.layers.1.self_attn.q_proj"), random_windows(), "attention", moments=["input"]
    )
    assert fit(blocks[1], stats, Linear()).report.train.pooled < 0.5


@pytest.mark.parametrize("how", [{"quant_method": "gptq", "bits": 4}, BitsAndBytesConfig(load_in_4bit=True)])
@pytest.mark.parametrize("act", [find_blocks, count_parameters, block_parameters])
def test_a_quantized_configuration_is_refused(act, how, llama):
    llama.config.quantization_config = how
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is quantized \((gptq|bitsandbytes)\).*float32"):
        act(llama)
    llama.config.quantization_config = {"quant_method": "gguf", "dequantize": True}
    assert len(find_blocks(llama)) == 3


def test_accelerate_may_move_what_a_layer_reads(llama):
    add_hook_to_module(llama.get_submodule(UP), AlignDevicesHook(execution_device="cpu"))
    blocks, stats = capture_quietly(llama, random_windows())
    assert fit(blocks[1], stats, NarrowMLP(INTERMEDIATE)).report.validation.pooled < 1e-6


def test_an_activation_with_weights_is_refused(llama):
    llama.model.layers[2].mlp.act_fn = nn.PReLU()
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.act_fn is an activation with weights"):
        find_blocks(llama)


def test_without_neurons_an_mlp_is_fitted_by_what_it_gives(registry):
    """As the error of a scaled layer advises. It holds no experts, and a narrow MLP is a TwoLayerMLP there."""
    register_architecture("llama", Stack("layers", ("mlp",), ("self_attn",)))
    blocks, stats = capture_quietly(changed(scaled), random_windows(), sample_windows=None)
    assert not any(b.has_neurons or b.holds_experts for b in blocks) and all(b.opaque for b in blocks)
    assert type(NarrowMLP.nearest(blocks[1], 1000)).__name__ == "TwoLayerMLP"
    assert fit(blocks[1], stats, NarrowMLP.nearest(blocks[1], 3000)).report.train.pooled < 0.5


def test_classes_of_one_map_are_linear_layers():
    for name, kind in (("gpt2", Conv1D), ("falcon", nn.Linear)):
        assert all(isinstance(b.up, kind) and b.has_neurons for b in find_blocks(build(name)))
