"""Linear layers in int8, to measure replacement and quantization together.

Weights are rounded once, per output channel; activations at every call, per token (Yao et al. 2022, ZeroQuant). A scale
per tensor, as in ``torch.ao.quantization.quantize_dynamic``, does not suit language models: one massive activation sets it,
and all other tokens are rounded to nearly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..models.blocks import KINDS, find_blocks
from ..models.weights import Inserted, unlike_linear
from ..replacements.splice import lazy_clone, lazy_copy, refuse_checkpoint

ACTIVATION_LEVELS = 127
WEIGHT_LEVELS = 63  # not 127: x86 without VNNI adds pairs of products in 16 bits, which hold at most 2 · 255 · 64
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
        y = torch._int_mm(quantized, self.weight.t()).float().mul_(scale).mul_(self.scale)  # [tokens, out]
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantized(model: nn.Module) -> nn.Module:
    """A copy of ``model``, dense or spliced, whose attention and MLP blocks (or replacements) compute in int8.

    Every linear layer of a block becomes an :class:`Int8Linear`, a quarter of its float32 size. All else is that of ``model``,
    in memory that is shared until one side writes into it, as in :func:`~mlpreplace.splice`: embeddings, norms, LM head, layers
    with fewer than 16 outputs (routers), and parameters outside of linear layers (the experts of a Mixtral). ``save_pretrained``
    of the result raises.

    The arithmetic is that of torchao's Int8DynamicActivationInt8Weight with one bit less for weights. With 8 bits, products
    overflow silently on a processor without VNNI instructions; with 7, all processors give the same numbers.

    Raises:
        ValueError: a model that is not on a CPU, no linear layer to quantize, blocks that give float32 in half precision (T5).
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"The model is on {device}; the int8 product here is the CPU's: quantize model.to('cpu').")
    blocks = [block for kind in KINDS for block in find_blocks(model, kind)]
    if wide := [block for block in blocks if block.widens]:
        raise ValueError(
            f"{wide[0].name} gives float32 in a half-precision model, where its outputs would overflow, and an int8 layer gives "
            "the precision that it reads: load the model in float32."
        )
    layers = {layer for block in blocks for module in block.modules for layer in module.modules() if _fits(layer)}
    if not layers:
        raise ValueError(f"No linear layer in the blocks of {type(model).__name__}: nothing to quantize, or done already.")
    instead = {layer: Int8Linear(layer) for layer in layers}
    for layer in instead.values():
        layer.bias = None if layer.bias is None else lazy_clone(layer.bias)
    small = lazy_copy(model, instead)
    small.save_pretrained = refuse_checkpoint
    small.source = getattr(model, "source", None)
    return small


def _fits(layer: nn.Module) -> bool:
    if unlike_linear(layer):
        return False
    return layer.weight.shape[1 if isinstance(layer, Conv1D) else 0] >= NARROWEST
