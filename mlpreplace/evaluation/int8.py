"""Linear layers in int8, to measure replacement and quantization together.

Weights are rounded once, per output channel; activations at every call, per token (Yao et al. 2022, ZeroQuant). A scale
per tensor, as in ``torch.ao.quantization.quantize_dynamic``, does not suit language models: one massive activation sets it,
and all other tokens are rounded to nearly zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from ..models.blocks import KINDS, NotApplicable, find_blocks
from ..models.weights import Inserted, unlike_linear
from ..replacements.splice import lazy_clone, lazy_copy, refuse_checkpoint

ACTIVATION_LEVELS = 127
WEIGHT_LEVELS = 63  # not 127: products of older kernels on x86 without VNNI are added in pairs of 16 bits, at most 2 · 255 · 64
FEWEST, STEP = 17, 8  # of a CUDA product: rows at least, and what both widths are multiples of
EXACT = 1024  # products of two int8 numbers, whose sum float32 holds exactly: 1024 · 2¹⁴ = 2²⁴
NARROWEST = 16  # outputs; smaller layers are left out: they gain nothing, and the router of a mixture stays exact


class Int8Linear(Inserted):
    """y = s_x s_w (X̂ Ŵᵀ) + b with X̂ = round(x / s_x) and Ŵ = round(W / s_w) in int8 and their product in int32.

    The scales are max|·| ÷ levels: s_w per output channel, s_x per token.
    """

    def __init__(self, layer: nn.Linear | Conv1D):
        super().__init__()
        weight = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().float()  # [out, in]
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / WEIGHT_LEVELS
        quantized = (weight / scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(quantized, requires_grad=False)  # counted with the parameters
        self.register_buffer("scale", scale)  # [out]
        self.bias = layer.bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]"""
        tokens = x.reshape(-1, self.in_features).float()  # [tokens, in]
        scale = tokens.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(ACTIVATION_LEVELS)  # [tokens, 1]
        quantized = tokens.div(scale).round_().to(torch.int8)
        y = int8_product(quantized, self.weight).float().mul_(scale).mul_(self.scale)  # [tokens, out]
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """X Wᵀ in int32, [tokens, out], of int8 ``x`` [tokens, in] and ``weight`` [out, in].

    On a processor without VNNI instructions PyTorch's own product is a plain loop, some thirty times as slow as one in float32.
    There the product is made in float32, of so many columns at a time that it is exact.

    cuBLAS takes 17 rows or more, and widths that are multiples of 8. Off the CPU both are filled up with zeros.
    """
    (tokens, width), outputs = x.shape, len(weight)
    if x.device.type == "cpu" and not torch.cpu._is_vnni_supported():
        parts = zip(x.split(EXACT, 1), weight.split(EXACT, 1), strict=True)
        return sum((some.float() @ of_weight.float().T).int() for some, of_weight in parts)
    if x.device.type != "cpu":
        x = _filled(x, max(tokens, FEWEST), width + -width % STEP)
        weight = _filled(weight, outputs + -outputs % STEP, width + -width % STEP)
    return torch._int_mm(x, weight.t())[:tokens, :outputs]


def _filled(t: Tensor, rows: int, columns: int) -> Tensor:
    """``t`` with zeros below and to the right of it, [rows, columns]."""
    return t if t.shape == (rows, columns) else pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]))


def has_product(device: torch.device) -> bool:
    """Whether PyTorch has an int8 product for ``device``: for CPUs, and for NVIDIA's GPUs from Turing (7.5) on."""
    return device.type == "cpu" or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 5)


def quantized(model: nn.Module) -> nn.Module:
    """A copy of ``model``, dense or spliced, whose attention and MLP blocks (or replacements) compute in int8.

    Every linear layer of a block becomes an :class:`Int8Linear`, a quarter of its float32 size. All else is that of ``model``,
    in memory that is shared until one side writes into it, as in :func:`~mlpreplace.splice`: embeddings, norms, LM head, layers
    with fewer than 16 outputs (routers), and parameters outside of linear layers (the experts of a Mixtral). ``save_pretrained``
    of the result raises.

    The arithmetic is that of torchao's Int8DynamicActivationInt8Weight with one bit less for weights. With 8 bits, kernels that
    add products in pairs of 16 bits overflow silently; with 7, all processors give the same numbers, and GPUs too.

    Raises:
        NotApplicable: a model on a device for which PyTorch has no int8 product.
        ValueError: no linear layer to quantize, blocks that give float32 in half precision (T5).
    """
    if without := [device for device in {p.device: None for p in model.parameters()} if not has_product(device)]:
        raise NotApplicable(f"The model is on {without[0]}, which has no int8 product in PyTorch: quantize model.to('cpu').")
    blocks = [block for kind in KINDS for block in find_blocks(model, kind)]
    if wide := [block for block in blocks if block.widens]:
        raise ValueError(
            f"{wide[0].name} gives float32 in a half-precision model, where its outputs would overflow, and an int8 layer gives "
            "the precision that it reads: load the model in float32."
        )
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"No linear layer in the blocks of {type(model).__name__}: nothing to quantize, or done already.")
    instead = {layer: Int8Linear(layer) for layer in layers}
    for layer in instead.values():
        layer.bias = None if layer.bias is None else lazy_clone(layer.bias)
    return with_layers(model, instead)


def with_layers(model: nn.Module, instead: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of ``model`` with other layers, {layer: what takes its place}, of which no checkpoint is written."""
    changed = lazy_copy(model, instead)
    changed.save_pretrained = refuse_checkpoint
    changed.source = getattr(model, "source", None)
    return changed


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """Layers of attention and MLP blocks, or of what replaces them, that compute x Wᵀ + b with 16 outputs or more."""
    modules = (module for kind in KINDS for block in find_blocks(model, kind) for module in block.modules)
    return [layer for layer in dict.fromkeys(inner for module in modules for inner in module.modules()) if _fits(layer)]


def _fits(layer: nn.Module) -> bool:
    if unlike_linear(layer):
        return False
    return layer.weight.shape[1 if isinstance(layer, Conv1D) else 0] >= NARROWEST
