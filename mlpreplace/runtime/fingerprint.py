"""Hashes by content: of values, of modules, and of the code that computes with them."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache, partial
from importlib import import_module
from inspect import isfunction, unwrap
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

PACKAGE = Path(__file__).resolve().parents[1]
OF_ANY_MODULE = frozenset(vars(nn.Module()))  # attributes that torch gives every module
WITHOUT_EFFECT = {  # attributes that change no output: where a model is from, how it is saved, drawn from, trained and spread
    *("source", "name_or_path", "save_pretrained", "generation_config", "gradient_checkpointing", "warnings_issued"),
    *("_is_hf_initialized", "_weight_conversions", "hf_device_map", "_hf_hook", "_old_forward", "to", "cuda"),
    "config",  # of which all modules have the same: it is in the key once
}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_PARSING = threading.Lock()  # Python 3.11 counts the depth of ast.parse for all threads together, and fails (gh-106905)


@cache
def code_hash(module_path: str) -> str:
    """Hash of a module of this package and of every module of the package it imports, directly or not.

    Comments and docstrings are left out, since they change no result.

    Args:
        module_path: in the package, "statistics/moments".

    Raises:
        ValueError: there is no such module. A key that covers no code would let results go stale.
    """
    if _path(module_path) is None:
        raise ValueError(f"{PACKAGE.name} has no module {module_path!r}: expected a path in it, such as 'statistics/moments'.")
    todo, seen = [module_path], {}
    while todo:
        name = todo.pop()
        if name in seen or (path := _path(name)) is None:
            continue
        with _PARSING:
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = path.relative_to(PACKAGE).parents[node.level - 1]  # the folder that the dots stand for
                modules = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
                todo += [(above / m).as_posix() for m in modules]
            body = getattr(node, "body", None)
            if isinstance(body, list):  # a docstring is an expression that is a constant, and does nothing
                node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        seen[name] = ast.dump(tree)
    return xxhash.xxh3_128_hexdigest("\0".join(seen[name] for name in sorted(seen)).encode())


def _path(module_path: str) -> Path | None:
    found = (path for path in (PACKAGE / f"{module_path}.py", PACKAGE / module_path / "__init__.py") if path.exists())
    return next(found, None)


# What computes


def _behaviour(kind: type) -> Iterator:
    """What objects of a class do: the code of its module for a class of this package, else the class's own functions."""
    for base in kind.__mro__:
        package, _, module = base.__module__.partition(".")
        if package == PACKAGE.name:
            yield code_hash(module.replace(".", "/"))
        elif base.__module__ != "builtins":
            for name, value in sorted(vars(base).items()):
                value = getattr(value, "__func__", getattr(value, "fget", value))  # of a class method, of a property
                if isfunction(value):
                    yield name, _function(value)
                elif isinstance(value, PLAIN) and not name.startswith("__"):
                    yield name, value


def _function(function: FunctionType) -> list:
    """Its instructions, and the plain values that they take from defaults, from around it and from its module."""
    function = unwrap(function)
    cells = {name: cell for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)}
    used = {name: function.__globals__.get(name, function) for name in function.__code__.co_names}
    used |= {name: cell.cell_contents for name, cell in cells.items() if cell != CellType()}  # an empty one has no content
    used |= dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
    return [_instructions(function.__code__), {name: value for name, value in used.items() if isinstance(value, PLAIN)}]


@cache
def _instructions(code: CodeType) -> tuple:
    return code.co_code.hex(), code.co_names, tuple(map(_constant, code.co_consts))


def _constant(value) -> tuple | str:
    if isinstance(value, CodeType):
        return _instructions(value)
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)  # the order of a set is not fixed


def _attributes(name: str, module: nn.Module) -> Iterator:
    """What ``module`` computes with beside its tensors. Raises TypeError for a hook, and for a function that no name tells."""
    for hook in (hook for kind in HOOKS for hook in getattr(module, kind).values()):
        if not hook.__module__.startswith(f"{PACKAGE.name}."):
            raise TypeError(f"{name or type(module).__name__} has a hook, {hook!r}, which may change what it computes.")
        yield getattr(hook, "__self__", None)
    placed = type(getattr(module, "_hf_hook", None)).__name__ == "AlignDevicesHook"  # of accelerate, with a forward of its own
    for key, value in sorted(vars(module).items()):
        if key not in OF_ANY_MODULE and key not in WITHOUT_EFFECT and not (placed and key == "forward"):
            yield key, _attribute(f"{name}.{key}", value)


def _attribute(where: str, value):
    """``value`` in a form that has a fingerprint, where it has one. Raises TypeError for a function that no name tells."""
    if isinstance(value, (FunctionType, MethodType)) and not _is_named(value):
        raise TypeError(f"{where} is {value!r}, which may change what its module computes.")
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value.__module__, value.__qualname__
    if isinstance(value, partial):
        return [_attribute(where, part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, Mapping):
        return {key: _attribute(where, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_attribute(where, item) for item in value]
    if hasattr(value, "to_dict"):  # a configuration
        return {key: item for key, item in value.to_dict().items() if key != "_name_or_path"}  # where it was read from
    return value


def _is_named(function: Callable) -> bool:
    """Whether its module has the function under its name, so that name and version of the library tell what it does."""
    found = None if function.__module__ == "__main__" else import_module(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def _computing(root: nn.Module) -> Iterator:
    """Classes and attributes of all modules in ``root``; what many of them hold, such as the configuration, once."""
    if _global_forward_hooks or _global_forward_pre_hooks:
        raise TypeError("PyTorch has hooks on all modules (register_module_forward_hook), which may change what they compute.")
    numbers: dict[object, int] = {}  # of classes, and of configurations by identity
    for name, module in root.named_modules():
        yield name, numbers.setdefault(type(module), len(numbers))
        if (config := getattr(module, "config", None)) is not None and id(config) not in numbers:
            numbers[id(config)] = len(numbers)
            yield _attribute(f"{name}.config", config), getattr(config, "_attn_implementation", None)
        if hasattr(module, "cache_key"):
            yield module.cache_key()
        else:
            yield from _attributes(name, module)
    yield [kind for kind in numbers if isinstance(kind, type)]


def fingerprint(*values) -> str:
    """Hash of values by content: numbers, strings, containers, tensors, dataclasses and modules.

    A module is its parameters and buffers, the devices they are on, and of every module within the class, the code of the class
    and the attributes, or the ``cache_key`` in their place where there is one.

    Raises:
        TypeError: a value of another kind, which has no content to hash; a module with a hook, or with a function in place of one
            of its own, that no name tells.
    """
    digest = xxhash.xxh3_128()
    for value in values:
        _update(digest, value)
    return digest.hexdigest()


def _update(digest, value) -> None:
    digest.update(f"{type(value).__name__}:".encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if type(value) in (Tensor, nn.Parameter) and torch._C._is_cow_tensor(value):
            value = value.clone()  # for now: asked for its address, a tensor in shared memory would be copied for good
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value))
    elif isinstance(value, nn.Module):
        for name, tensor in (dict(value.named_buffers()) | value.state_dict(keep_vars=True)).items():
            digest.update(f"{name}@{tensor.device}".encode())  # whose sums differ in order
            _update(digest, tensor)
        for content in _computing(value):
            _update(digest, content)
    elif isinstance(value, type):
        _update(digest, (value.__qualname__, list(_behaviour(value))))
    elif hasattr(value, "cache_key"):
        _update(digest, value.cache_key())
    elif is_dataclass(value):
        _update(digest, {f.name: getattr(value, f.name) for f in fields(value)})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _update(digest, key)
            _update(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(digest, item)
    elif isinstance(value, (set, frozenset)):
        _update(digest, sorted(value))
    elif isinstance(value, (*PLAIN, Enum)):
        digest.update(repr(value).encode())
    else:
        raise TypeError(f"No fingerprint for a {type(value).__name__}.")
    digest.update(b";")
