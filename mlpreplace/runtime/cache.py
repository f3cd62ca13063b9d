"""Results that cost minutes are kept on disk, in safetensors files named by everything the result depends on.

A key covers the arguments (weights and tokens by content), the code that computes (a function's module and what it imports
from the package), the versions of the libraries and settings of PyTorch. So an entry that is found is the result. Files appear
whole or not at all, with a checksum, and the folder may be deleted at any time.

Why not joblib.Memory: it hashes the source of one function, so a change in a module which that function calls goes unnoticed.
And it pickles; here tensors are safetensors and everything else is json in their metadata.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import numpy as np
import scipy
import torch
import transformers
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import cache_dir, write_atomically
from .fingerprint import PACKAGE, code_hash, fingerprint
from .turns import turn

NOT_IN_KEY = ("progress", "checkpoint", "memory_budget")  # parameters that change no result
CHECKSUM = b'"checksum":"'  # in the header of a file, before the hash of the file with UNSET in its place
UNSET = b"0" * 32
AT_ONCE = 2**24  # bytes that are read to be hashed


class Entry:
    """One cached result: a file named by its key.

    Results are None, numbers, strings, tensors, arrays; and dataclasses and named tuples of the package, dicts, lists and
    tuples of these. ``known`` are objects that the caller has when it loads a result, such as blocks: a result refers to them
    by their position, and may use them as keys of a dict.
    """

    def __init__(self, name: str, module_path: str, *key):
        """``module_path`` is where the result is computed, "statistics/moments"; ValueError where there is no such module."""
        versions = [library.__version__ for library in (np, scipy, torch, transformers)]
        hashed = fingerprint(code_hash(module_path), versions, _settings(), *key)
        self.path = cache_dir() / "results" / f"{name}-{hashed}.safetensors"

    def load(self, known: Sequence = ()) -> object:
        """The stored result, or None where there is none that is whole. ``known`` as it was given to :meth:`save`."""
        try:
            with self.path.open("rb") as file:
                whole = _is_whole(file)
            if not whole:
                return None
            with safe_open(self.path, "pt", backend="pread") as file:  # into memory one by one: results may be gigabytes
                return _decode(json.loads(file.metadata()["record"]), file.get_tensor, known)
        except FileNotFoundError:
            return None

    def save(self, result: object, known: Sequence = ()) -> None:
        """Store ``result``.

        Raises:
            TypeError: a result, or a part of one, that is none of the above.
            OSError: the file could not be written. Nothing is left behind.
        """
        tensors: dict[str, Tensor] = {}
        record = json.dumps(_encode(result, tensors, {item: i for i, item in enumerate(known)}), allow_nan=False)
        try:
            write_atomically(self.path, lambda path: _write(path, _unshared(tensors), record))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"A result could not be kept in {self.path.parent} ({error}). Make room (make clean empties it) or name another "
                "folder by MLPREPLACE_CACHE, and run again: what is there already is taken from there."
            ) from error


def _settings() -> list:
    """Settings of PyTorch that change results."""
    kinds = ("cpu", "cuda")
    autocast = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds]
    return [torch.get_default_dtype(), torch.get_float32_matmul_precision(), *autocast]


def _checksum(file: BinaryIO) -> tuple[int, bytes]:
    """Where in a file its checksum starts, and the hash of the file with UNSET in that place.

    Raises ValueError where there is no checksum.
    """
    file.seek(0)
    length = file.read(8)
    header = file.read(min(int.from_bytes(length, "little"), os.fstat(file.fileno()).st_size))
    at = header.index(CHECKSUM) + len(CHECKSUM)
    digest = xxhash.xxh3_128(length + header[:at] + UNSET + header[at + len(UNSET) :])
    while part := file.read(AT_ONCE):
        digest.update(part)
    return len(length) + at, digest.hexdigest().encode()


def _is_whole(file: BinaryIO) -> bool:
    """Whether a file is, byte for byte, what was written."""
    try:
        at, expected = _checksum(file)
    except ValueError:
        return False
    file.seek(at)
    return file.read(len(expected)) == expected


def _write(path: Path, tensors: Mapping[str, Tensor], record: str) -> None:
    """Write a file with its checksum. It is never in memory as a whole."""
    save_file(tensors, path, {"record": record, "checksum": UNSET.decode()})
    with path.open("r+b") as file:
        at, checksum = _checksum(file)
        file.seek(at)
        file.write(checksum)


def cached(name: str, *, key: Callable | None = None, fills: str | None = None) -> Callable[[Callable], Callable]:
    """Give a function the keyword ``cached``: with True, its result is kept on disk and taken from there.

    The key is the content of all arguments but ``progress``. A function with a parameter ``checkpoint`` is given an
    :class:`Entry` for unfinished work when it is cached, else None. The checkpoint is deleted when the result is stored.

    Args:
        name: how the files begin.
        key: takes the arguments (those in the key) by name and returns what the result depends on. For functions whose result
            does not depend on the content of all arguments. Blocks and replacements in the result must be in what it returns.
        fills: the parameter that names a module whose weights the function sets. They are stored with the result, and a hit
            sets them.

    Raises (when the function is called):
        ValueError: an argument without content to make a key of, a function for instance.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        module_path = function.__module__.removeprefix(f"{PACKAGE.name}.").replace(".", "/")

        @wraps(function)
        def wrapper(*args, cached: bool = False, **kwargs):
            if not cached:
                return function(*args, **kwargs)
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            arguments = call.arguments
            for parameter, value in arguments.items():
                if isinstance(value, Iterator):  # the key would use it up
                    arguments[parameter] = list(value)
            with ExitStack() as turns:
                for model in (value for value in arguments.values() if isinstance(value, nn.Module)):
                    turns.enter_context(turn(model))  # the key is that of the model that runs
                in_key = {p: value for p, value in arguments.items() if p not in NOT_IN_KEY}
                content = key(**in_key) if key else in_key
                hashed, known = key_of(function.__name__, content), list(_references(content))
                entry = Entry(name, module_path, hashed)
                if (stored := entry.load(known)) is not None:
                    if fills:
                        arguments[fills].load_state_dict(stored["weights"])
                    return stored["result"]
                checkpoint = Entry(f"{name}-checkpoint", module_path, hashed)
                if "checkpoint" in signature.parameters:
                    arguments["checkpoint"] = checkpoint
                result = function(*call.args, **call.kwargs)
                weights = dict(arguments[fills].state_dict()) if fills else None
                entry.save({"result": result, "weights": weights}, known)
                checkpoint.path.unlink(missing_ok=True)
                return result

        shown = [p for p in signature.parameters.values() if p.name != "checkpoint"]
        extra = inspect.Parameter("cached", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool")
        wrapper.__signature__ = signature.replace(parameters=[*shown, extra])
        return wrapper

    return decorate


def key_of(function: str, *content) -> str:
    """The fingerprint of what a result of ``function`` depends on. Raises ValueError for what has none."""
    try:
        return fingerprint(function, *content)
    except TypeError as error:
        raise ValueError(
            f"{function}(..., cached=True) is kept by the content of its arguments. {error} Use cached=False."
        ) from None


def _references(content) -> Iterator:
    """Blocks and replacements in what a key is made of, in a fixed order: equal keys have equal references."""
    if hasattr(content, "cache_key"):
        yield content
    elif isinstance(content, Mapping):
        for pair in content.items():
            yield from _references(pair)
    elif isinstance(content, (list, tuple)):
        for item in content:
            yield from _references(item)


def _encode(value: object, tensors: dict[str, Tensor], known: Mapping[object, int]):
    """``value`` as json. Its tensors are added to ``tensors``."""

    def inner(item):
        return _encode(item, tensors, known)

    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, np.ndarray):
        return {"array": inner(torch.from_numpy(np.array(value, order="C")))}
    if isinstance(value, Tensor):
        tensors[slot := str(len(tensors))] = value.detach().contiguous()
        return {"tensor": slot, "device": str(value.device)}
    if hasattr(value, "cache_key"):
        if value not in known:
            raise TypeError(f"{value!r} cannot be kept: it is not among the objects the result may refer to.")
        return {"known": known[value]}
    package, _, where = f"{type(value).__module__}.{type(value).__qualname__}".partition(".")
    if package == PACKAGE.name and (is_dataclass(value) or hasattr(value, "_fields")):  # _fields: of a named tuple
        names = getattr(value, "_fields", None) or [f.name for f in fields(value)]
        return {"class": where, "fields": {name: inner(getattr(value, name)) for name in names}}
    if isinstance(value, Mapping):
        return {"items": [[inner(k), inner(v)] for k, v in value.items()]}
    if type(value) is tuple:
        return {"tuple": [inner(item) for item in value]}
    if isinstance(value, list):
        return [inner(item) for item in value]
    raise TypeError(f"A {type(value).__name__} cannot be kept.")


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors that share memory (tied weights, views), which safetensors refuses; all others as they are."""
    uses = Counter(t.untyped_storage().data_ptr() for t in tensors.values())
    return {slot: t.clone() if uses[t.untyped_storage().data_ptr()] > 1 else t for slot, t in tensors.items()}


def _decode(record, tensor: Callable[[str], Tensor], known: Sequence) -> object:
    """The inverse of :func:`_encode`; ``tensor`` reads one by its name in the file."""

    def inner(item):
        return _decode(item, tensor, known)

    if isinstance(record, list):
        return [inner(item) for item in record]
    match record:
        case {"float": text}:
            return float(text)
        case {"array": of}:
            return inner(of).numpy()
        case {"tensor": slot, "device": device}:
            return tensor(slot).to(device, copy=True)  # aligned in memory, on which the last bits of products depend
        case {"known": position}:
            return known[position]
        case {"class": where, "fields": items}:
            module, _, name = where.rpartition(".")
            kind = getattr(import_module(f"{PACKAGE.name}.{module}"), name)
            return kind(**{field: inner(item) for field, item in items.items()})
        case {"items": pairs}:
            return {inner(k): inner(v) for k, v in pairs}
        case {"tuple": items}:
            return tuple(inner(item) for item in items)
    return record
