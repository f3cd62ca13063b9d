"""A second device that needs no hardware: "fake", whose tensors live in CPU memory and refuse to meet a CPU tensor.

An operation on fake tensors runs on the CPU tensors behind them and gives fake ones. With a tensor of another device among
its inputs it raises RuntimeError, as a GPU does, but for what a GPU takes: scalars, and indices.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}  # that take tensors of two devices
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}  # by indices of the CPU, too
FACTORIES = (
    *("empty.memory_format", "empty_strided", "zeros", "ones", "full", "eye", "eye.m", "scalar_tensor", "linspace"),
    *("arange", "arange.start", "arange.start_step", "tril_indices", "triu_indices"),
)


class FakeTensor(torch.Tensor):
    """A tensor on the device "fake"; ``held`` is the CPU tensor behind it."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        like = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device("fake", 0), **like)

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return FakeTensor(inner["held"])

    def __repr__(self):
        return f"fake({self.held})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = FakeTensor(self.held.detach().clone())
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (composed := op.decompose(*args, **kwargs)) is not NotImplemented:  # which inference mode leaves whole
            same = any(composed is given for given in args) and not op._schema.name.endswith("_")
            return FakeTensor(composed.held) if same else composed  # an inference tensor cannot be handed back as it came
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        others = [t for t in tensors if not isinstance(t, FakeTensor) and t.dim()]
        if others and op not in MOVES and not (op in INDEXED and isinstance(args[0], FakeTensor)):
            raise RuntimeError(f"{op}: expected all tensors on one device, found fake:0 and {others[0].device}")
        device = kwargs.pop("device", None)
        held_args, held_kwargs = tree_map_only(FakeTensor, lambda t: t.held, (args, kwargs))
        result = op(*held_args, **held_kwargs)
        if torch.Tag.inplace_view in op.tags:  # the shape outside follows the one within
            with no_dispatch():
                op(*args, **kwargs)
        if op is aten.copy_.default or op._schema.name.endswith("_") or "out" in kwargs:
            return kwargs.get("out", args[0])
        if device is not None and torch.device(device).type != "fake":
            return result
        return tree_map_only(torch.Tensor, FakeTensor, result)


def _factory(op):
    def make(*args, **kwargs):
        return FakeTensor(op(*args, **{**kwargs, "device": "cpu", "pin_memory": None}))

    return make


def _fill(source, to, non_blocking=False):
    """What torch.tensor(…, device="fake") does to the empty tensor it was given."""
    to.held.copy_(source)
    return to


def register() -> torch.device:
    """Make "fake" known to PyTorch, for the rest of the process."""
    if not hasattr(torch, "fake"):
        backend_registration._setup_privateuseone_for_python_backend("fake")
        torch.fake.set_device = lambda device: None
        register.library = torch.library.Library("aten", "IMPL")  # its registrations live as long as it does
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels there are already
            for name in FACTORIES:
                packet, _, overload = name.partition(".")
                register.library.impl(name, _factory(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
        register.library.impl("_copy_from", _fill, "PrivateUse1")
    return torch.device("fake", 0)
