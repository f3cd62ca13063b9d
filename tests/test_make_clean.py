"""make clean and distclean: what was made here is removed, and nothing of anybody else."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from checkouts import a_checkout, a_ready_checkout, kept, make_py  # noqa: F401


def test_clean_removes_what_was_made_here(ready):
    cache = Path(ready.environment["MLPREPLACE_CACHE"])
    shutil.rmtree(cache / "assets")
    ready.make("setup")
    for folder, mark in {**make_py.MARKS, str(cache / "results"): make_py.MARK}.items():
        kept(ready.root / folder)
        (ready.root / folder / mark).touch()
    ready.make("clean")
    assert not any((ready.root / folder).exists() for folder in make_py.MARKS)
    assert os.listdir(cache / "results") == [make_py.MARK]  # empty, and to be removed the next time
    kept(cache / "results")
    ready.make("distclean")
    assert not os.listdir(cache) and not (ready.root / ".venv").exists()


def test_nothing_else_is_removed(ready, tmp_path):
    """Folders with the names of ours that somebody else made, links, and every part of a name with blanks."""
    cache, home = tmp_path / "my cache", Path(ready.environment["HOME"])
    own = [kept(place) for place in (tmp_path / "my", home, cache, ready.root / "cache", tmp_path / "linked", ready.root / "env")]
    for name in ("results", "assets", "models"):
        own.append(kept(cache / name))
    for name in ("executed", "site", ".pytest_cache", ".ruff_cache"):
        own.append(kept(ready.root / name))
    for target in ("clean", "distclean"):
        said = ready.make(target, "VENV=env", MLPREPLACE_CACHE=str(cache))
        assert "executed has no file .mlpreplace in it" in said and f"{cache}/results has no file" in said
    assert "env is yours" in said and all(path.exists() for path in own)
    shutil.rmtree(cache / "results")
    (tmp_path / "linked" / make_py.MARK).touch()
    (cache / "results").symlink_to(tmp_path / "linked")
    assert "is a link: not removed" in ready.make("clean", MLPREPLACE_CACHE=str(cache))
    assert (tmp_path / "linked" / "mine.txt").exists() and (cache / "results").is_symlink()


@pytest.mark.parametrize("named", ["", "/", ".", "~", "..", " ", "*", "a b"])
def test_no_name_of_a_cache_makes_clean_dangerous(named, ready):
    own = [kept(ready.root.parent / place) for place in ("home", "results", "it's my checkout", "it's my checkout/results")]
    ready.make("clean", MLPREPLACE_CACHE=named)
    assert all(path.exists() for path in own)


def test_links_in_what_is_removed_are_not_followed(ready, tmp_path):
    (results := Path(ready.environment["MLPREPLACE_CACHE"]) / "results").mkdir()
    (results / make_py.MARK).touch()
    path = kept(tmp_path / "elsewhere")
    (results / "link").symlink_to(path.parent)
    ready.make("clean")
    assert path.exists() and not (results / "link").exists()


def test_a_folder_that_was_there_is_not_claimed(checkout):
    """A thesis may have its results where the cache is to be."""
    path = kept(Path(checkout.environment["MLPREPLACE_CACHE"]) / "results")
    checkout.make("setup")
    checkout.make("clean")
    assert path.exists()


def test_without_an_environment_clean_works_all_the_same(ready):
    shutil.rmtree(ready.root / ".venv")
    (site := kept(ready.root / "site").parent).joinpath(".mlpreplace-site").touch()
    ready.make("distclean", f"PYTHON={sys.executable}")
    assert not site.exists()


@pytest.mark.parametrize("arguments", [[], ["all"], ["clean", "site"], ["environment"], ["distclean", "a", "b"]])
def test_a_task_that_there_is_not(arguments, capsys):
    assert make_py.main(arguments) == 2
    assert "python make.py clean" in capsys.readouterr().err
