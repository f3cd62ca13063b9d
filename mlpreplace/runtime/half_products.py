"""Products of half-precision matrices on a CPU without instructions for them.

PyTorch then multiplies in plain loops. On a CPU with AVX2, a weight of 8,192 × 2,048 in bfloat16 gives 8 GFLOPS forward and 0.3
backward, where float32 gives 25. Here such products are computed in float32, one at a time, and rounded once. The loops do no
more: they sum in float32, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HALF = (torch.bfloat16, torch.float16)
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
PRODUCTS = {
    *(torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default),
    *(torch.ops.aten.mv.default, torch.ops.aten.addmv.default),
    *(torch.ops.aten.linear.default, torch.ops.aten.matmul.default),  # as they are under torch.inference_mode()
    *(_ATTENTION.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default),
    torch.ops.aten.scaled_dot_product_attention.default,
}


@contextmanager
def quick_products(weights: Iterable[Tensor]) -> Iterator[None]:
    """Where one of ``weights`` is on a CPU that cannot multiply its precision, such products are in float32 in this thread."""
    if any(w.device.type == "cpu" and w.dtype in HALF and not has_instructions(w.dtype) for w in weights):
        with _InFloat32():
            yield
    else:
        yield


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in ``dtype``, one of HALF."""
    if not torch.backends.mkldnn.is_available():
        return False
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_supported")()


class _InFloat32(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtype = next((a.dtype for a in args if _is_half(a)), None) if func in PRODUCTS else None
        if dtype is None:
            return func(*args, **kwargs)
        found = func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        if func is _ATTENTION.default:  # the sums of exponentials, behind the output, are in float32 in any precision
            return found[0].to(dtype), *found[1:]
        return tuple(t.to(dtype) for t in found) if isinstance(found, tuple) else found.to(dtype)


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.dtype in HALF


def _widened(value: object) -> object:
    return value.float() if _is_half(value) else value
