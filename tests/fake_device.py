"""A second device that needs no hardware: "fake", whose tensors live in CPU memory and refuse to meet a CPU tensor.

An operation on fake tensors runs on the CPU tensors behind them and gives fake ones. With a tensor of another device among
its inputs it raises RuntimeError, as a GPU does, but for what a GPU takes: scalars, and indices. As a GPU it takes no random
generator of a CPU and no product of integers, and products of int8 of the sizes alone that CUDA takes.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}  # that take tensors of two devices
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}  # by indices of the CPU, too: argument 1
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default, aten.dot.default}
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

    def untyped_storage(self):
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (composed := op.decompose(*args, **kwargs)) is not NotImplemented:  # which inference mode leaves whole
            same = any(composed is given for given in args) and not op._schema.name.endswith("_")
            return FakeTensor(composed.held) if same else composed  # an inference tensor cannot be handed back as it came
        _check(op, args, kwargs)
        device = kwargs.pop("device", None)
        held = {name: _each(FakeTensor, lambda t: t.held, value) for name, value in kwargs.items()}
        result = op(*_each(FakeTensor, lambda t: t.held, args), **held)
        if torch.Tag.inplace_view in op.tags:  # the shape outside follows the one within
            with no_dispatch():
                op(*args, **kwargs)
        if op is aten.copy_.default or op._schema.name.endswith("_") or "out" in kwargs:
            return kwargs.get("out", args[0])
        if device is not None and torch.device(device).type != "fake":
            return result
        return _each(torch.Tensor, FakeTensor, result)


def _each(kind: type, change, value):
    """``value`` with ``change`` of everything in it that is of a ``kind``; torch's own does this ten times as slowly."""
    if isinstance(value, kind):
        return change(value)
    return type(value)(_each(kind, change, item) for item in value) if isinstance(value, (list, tuple)) else value


def _leaves(value) -> list:
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, (list, tuple)) else [value]


def _check(op, args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError for what a GPU would not take."""
    of_any_device = (1,) if op in INDEXED and isinstance(args[0], FakeTensor) else ()
    given = _leaves([[a for i, a in enumerate(args) if i not in of_any_device], *kwargs.values()])
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    others = [t for t in tensors if not isinstance(t, FakeTensor) and t.dim()]
    if others and op not in MOVES:
        raise RuntimeError(f"{op}: expected all tensors on one device, found fake:0 and {others[0].device}")
    if any(isinstance(item, torch.Generator) for item in given):
        raise RuntimeError(f"{op}: expected a generator of fake:0, found one of the CPU")
    if op in PRODUCTS and not tensors[0].is_floating_point():
        raise RuntimeError(f"{op} is not implemented for {tensors[0].dtype} on fake:0")
    if op is aten._int_mm.default and (args[0].shape[0] <= 16 or any(n % 8 for n in (*args[0].shape[1:], *args[1].shape))):
        raise RuntimeError(f"{op}: expected more than 16 rows and multiples of 8, found {args[0].shape} and {args[1].shape}")


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
        torch.fake.get_rng_state = lambda device: torch.get_rng_state()  # its random numbers are the CPU's
        torch.fake.set_rng_state = lambda state, device: None
        torch.fake.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        register.library = torch.library.Library("aten", "IMPL")  # its registrations live as long as it does
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels there are already
            for name in FACTORIES:
                packet, _, overload = name.partition(".")
                register.library.impl(name, _factory(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
        register.library.impl("_copy_from", _fill, "PrivateUse1")
    return torch.device("fake", 0)


def _enter_without_gradients(mode: torch.inference_mode) -> None:
    """Also where it decorates: a device in Python cannot make views of inference tensors."""
    mode.instead = torch.no_grad()
    mode.instead.__enter__()


def _leave_without_gradients(mode: torch.inference_mode, *error) -> None:
    mode.instead.__exit__(*error)


def without_hardware() -> None:
    """Let this process run on "fake" what would run on a GPU."""
    register()
    torch.inference_mode.__enter__, torch.inference_mode.__exit__ = _enter_without_gradients, _leave_without_gradients
