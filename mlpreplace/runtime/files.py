"""Where files are kept, and how they are written: whole or not at all, with a checksum, readable by whom the umask lets."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SUMS = "SHA256SUMS"  # of a folder that was written here; `sha256sum -c SHA256SUMS` reads it
UNCHECKED = ("README.md",)  # in such a folder: a model card is for people to edit
WRITING = ".writing-"  # how the name of a folder begins whose files are not whole yet
STALE = 60  # seconds after which such a folder without a living process is removed


def is_checkout() -> bool:
    """Whether the package runs from a checkout of its repository; an installed wheel has no notebooks, assets and pins."""
    return (ROOT / "pyproject.toml").exists()


def cache_dir() -> Path:
    """The folder of downloads, converted models and results.

    $MLPREPLACE_CACHE, in which ~ is the home folder and a relative path starts at the checkout. Where it is unset or empty:
    .cache in the checkout; for an installed wheel, mlpreplace in the cache folder of the user.
    """
    if named := os.environ.get("MLPREPLACE_CACHE", ""):
        return (ROOT if is_checkout() else Path.cwd()) / Path(named).expanduser()
    if is_checkout():
        return ROOT / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlpreplace"


def strict_json(value: object, **options) -> str:
    """``value`` as json that any reader takes: NaN and infinity are null. ``options`` as for json.dumps."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: object):
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Checksums


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sums(folder: Path) -> dict[str, str]:
    """{file: sha256} as SHA256SUMS of ``folder`` says. Raises ValueError where there is none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {SUMS}, so its files cannot be checked: was it copied whole?") from None
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def check_folder(folder: Path) -> None:
    """Raise ValueError, with the first file that differs, unless all files of ``folder`` are those that were written."""
    for name, expected in _sums(folder).items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has lost {name}: copy the folder again, or save the model anew.")
        _check(folder / name, sha256(folder / name), expected)


def read_checked(path: Path) -> bytes:
    """The content of a file in a folder that was written here, read once. Raises ValueError where it is not what was written."""
    sums = _sums(path.parent)
    if path.name not in sums or not path.is_file():
        raise ValueError(f"{path.parent} has lost {path.name}: copy the folder again, or save the model anew.")
    content = path.read_bytes()
    _check(path, hashlib.sha256(content).hexdigest(), sums[path.name])
    return content


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(
            f"{path} is not what was written: its sha256 is {found[:12]}…, {SUMS} says {expected[:12]}…. Copy the folder again "
            f"or save the model anew; if you changed the file yourself, put its sha256 into {SUMS}."
        )


# Writing


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Make ``folder`` before the work whose result it is for, so that a place that cannot be written is found out first.

    An empty folder may be there already. What was made here and is still empty is removed when the ``with`` block raises.

    Raises:
        FileExistsError: ``folder`` is a file, a dangling link or a folder that is not empty.
        OSError: it cannot be made: under a file, in a place without permission, a name that is too long.
    """
    folder = Path(folder).expanduser().absolute()
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError("it exists and is not empty")
        if not all(os.access(place, os.W_OK | os.X_OK) for place in (folder, folder.parent)):  # the parent for the rename
            raise PermissionError("it, or the folder it is in, is not writable")
    except OSError as error:
        kind = FileExistsError if isinstance(error, FileExistsError) else OSError
        raise kind(f"{folder} cannot be a new folder ({error.strerror or error}); choose another one.") from error
    try:
        yield folder
    except BaseException:
        with suppress(OSError):  # it holds something by now
            for place in made:
                place.rmdir()
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that is renamed to ``path`` when the ``with`` block succeeds, and is deleted when it raises.

    Its files are on disk before the name is, and SHA256SUMS has their checksums. ``path`` may be an empty folder.

    Raises FileExistsError where ``path`` is there by then and not empty.
    """
    with _scratch(path.parent) as scratch:
        whole = scratch / "whole"
        whole.mkdir()
        yield whole
        files = sorted(file for file in whole.rglob("*") if file.is_file())
        names = [file.relative_to(whole).as_posix() for file in files]
        lines = [f"{sha256(file)}  {name}\n" for file, name in zip(files, names, strict=True) if name not in UNCHECKED]
        (whole / SUMS).write_text("".join(lines), encoding="utf-8")
        for file in (*files, whole / SUMS):
            _settle(file)
        try:
            os.rename(whole, path)
        except OSError as error:
            if not (path.is_dir() and any(path.iterdir())):
                raise
            raise FileExistsError(f"{path} was written by something else meanwhile; choose another folder.") from error
        _sync(path.parent)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)`` and rename: ``path`` is the old file or the whole new one, never a part."""
    # in a folder of its own: files are found by their endings, and a killed process may leave a part of one here
    with _scratch(path.parent) as folder:
        scratch = folder / path.name
        write(scratch)
        _settle(scratch)
        os.replace(scratch, path)
        _sync(path.parent)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """A folder in ``parent`` for files that are not whole yet, which is deleted. Those of killed processes go as well."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=WRITING) as folder:
        held = os.open(folder, os.O_RDONLY)
        try:
            _lock(held)  # as long as this process lives
            yield Path(folder)
        finally:
            os.close(held)


def _lock(descriptor: int) -> bool:
    """Whether the lock could be taken: False where another process holds it, and where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(f"{WRITING}*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # another process was faster
            continue
        try:
            if time.time() - os.fstat(descriptor).st_mtime > STALE and _lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _settle(file: Path) -> None:
    """Give ``file`` the mode that the umask allows (safetensors makes it private) and wait until its content is on disk."""
    (like := file.with_name(".mode")).touch()  # the umask cannot be read without setting it
    file.chmod(like.stat().st_mode & 0o777)
    like.unlink()
    _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
