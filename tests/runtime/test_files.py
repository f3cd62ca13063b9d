"""A file or a folder is whole or not there."""

import json
import os
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from forked import SERVER

from mlpreplace.runtime import files
from mlpreplace.runtime.files import (
    ROOT,
    SUMS,
    cache_dir,
    check_folder,
    new_folder,
    read_checked,
    strict_json,
    whole_folder,
    write_atomically,
)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_no_other(error, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted(scratch):
        scratch.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    for content in ("first", "second"):
        write_atomically(path, lambda scratch, content=content: scratch.write_text(content))
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def killed_while_writing(path) -> None:
    write_atomically(path, lambda scratch: scratch.touch() or os._exit(9))


def test_what_a_killed_process_was_writing_is_not_taken_for_a_file(tmp_path):
    """By its ending: figures are found by theirs."""
    process = SERVER.Process(target=killed_while_writing, args=(tmp_path / "rows.json",))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 9
    assert list(tmp_path.rglob("rows.json")) and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_that_failed_is_not_there(error, tmp_path):
    with pytest.raises(error), whole_folder(tmp_path / "deeper" / "folder") as folder:
        (folder / "half").touch()
        raise error
    assert not any((tmp_path / "deeper").iterdir())
    with whole_folder(tmp_path / "deeper" / "folder") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "deeper" / "folder").exists()
    assert sorted(path.name for path in (tmp_path / "deeper").rglob("*")) == sorted(["folder", "file", SUMS])


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(OSError), whole_folder(tmp_path / "folder"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]


def private(path: Path) -> None:
    """As safetensors writes."""
    path.write_text("content")
    path.chmod(0o600)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_for_whom_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", private)
        with whole_folder(tmp_path / "folder") as folder:
            (folder / "deeper").mkdir()
            private(folder / "deeper" / "file")
    finally:
        os.umask(before)
    for name in ("file", "folder/deeper/file", f"folder/{SUMS}"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


# folders that were being written


def killed_in_a_folder(path) -> None:
    with whole_folder(path) as folder:
        (folder / "half").touch()
        os._exit(9)


@pytest.mark.parametrize(
    "next_run", [lambda p: write_atomically(p / "b", Path.touch), lambda p: whole_folder(p / "b").__enter__()]
)
def test_what_killed_processes_left_is_removed_when_it_is_old(next_run, tmp_path):
    process = SERVER.Process(target=killed_in_a_folder, args=(tmp_path / "a",))
    process.start()
    process.join(timeout=60)
    (left,) = tmp_path.iterdir()
    write_atomically(tmp_path / "b", Path.touch)
    assert left.exists()  # it may be another run's that has just begun
    (tmp_path / "b").unlink()
    os.utime(left, (time.time() - 3600,) * 2)
    next_run(tmp_path)
    assert not left.exists()


def test_what_another_process_is_writing_is_left_alone_however_old(tmp_path):
    with whole_folder(tmp_path / "a") as folder:
        (folder / "file").touch()
        os.utime(folder.parent, (time.time() - 3600,) * 2)
        write_atomically(tmp_path / "b", Path.touch)
        assert (folder / "file").exists()
    assert (tmp_path / "a" / "file").exists()


@pytest.mark.parametrize("name", [".writing", "writing-1", ".written-2"])
def test_nothing_else_is_removed(name, tmp_path):
    (tmp_path / name).mkdir()
    os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    write_atomically(tmp_path / "b", Path.touch)
    assert (tmp_path / name).exists()


# checksums


@pytest.fixture
def written(tmp_path) -> Path:
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "deeper").mkdir()
        for name in ("a.bin", "deeper/b.bin", "README.md"):
            (folder / name).write_bytes(name.encode() * 100)
    return tmp_path / "folder"


def test_a_folder_has_checksums_that_sha256sum_reads(written):
    check_folder(written)
    assert read_checked(written / "a.bin") == b"a.bin" * 100
    assert subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=written, capture_output=True).returncode == 0


@pytest.mark.parametrize("damage", ["a bit", "a zeroed tail", "cut", "gone"])
@pytest.mark.parametrize("name", ["a.bin", "deeper/b.bin"])
def test_a_file_that_changed_is_named(name, damage, written):
    path = written / name
    content = path.read_bytes()
    changed = {"a bit": bytes([content[0] ^ 1]) + content[1:], "a zeroed tail": content[:-9] + bytes(9), "cut": content[:-1]}
    path.unlink()
    if damage != "gone":
        path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=name):
        check_folder(written)
    if "/" not in name:
        with pytest.raises(ValueError, match=name):
            read_checked(path)


def test_a_model_card_may_be_edited(written):
    (written / "README.md").write_text("mine")
    check_folder(written)


def test_a_folder_without_checksums_is_not_whole(written):
    (written / SUMS).unlink()
    for check in (lambda: check_folder(written), lambda: read_checked(written / "a.bin")):
        with pytest.raises(ValueError, match=SUMS):
            check()


# new folders


def long_name(place: Path) -> Path:
    return place / ("x" * 300)


def under_a_file(place: Path) -> Path:
    (place / "file").touch()
    return place / "file" / "folder"


def a_file(place: Path) -> Path:
    (place / "file").touch()
    return place / "file"


def a_dangling_link(place: Path) -> Path:
    (place / "link").symlink_to(place / "nowhere")
    return place / "link"


def not_empty(place: Path) -> Path:
    (place / "folder").mkdir()
    (place / "folder" / "old").touch()
    return place / "folder"


@pytest.mark.parametrize("place", [long_name, under_a_file, a_file, a_dangling_link, not_empty])
def test_a_place_that_cannot_be_a_new_folder_is_refused_at_once(place, tmp_path):
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="choose another"), new_folder(path):
        pytest.fail("the work began")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_claimed_folder_is_given_back_where_the_work_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "deeper" / "folder"):
        raise ZeroDivisionError
    assert not (tmp_path / "deeper").exists()
    (tmp_path / "own").mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "own"):
        raise ZeroDivisionError
    assert (tmp_path / "own").exists()


def test_a_claimed_folder_is_filled_at_once(tmp_path):
    with new_folder(tmp_path / "folder") as claimed, whole_folder(claimed) as folder:
        (folder / "file").touch()
    assert sorted(p.name for p in claimed.iterdir()) == sorted(["file", SUMS])


def test_of_two_that_write_one_folder_one_is_whole_and_the_other_told(tmp_path):
    with pytest.raises(FileExistsError, match="meanwhile"), new_folder(tmp_path / "folder") as claimed:
        with whole_folder(claimed) as slow:
            (slow / "slow").touch()
            with new_folder(tmp_path / "folder") as same, whole_folder(same) as fast:
                (fast / "fast").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["folder", "fast", SUMS])


# json and the cache folder


def test_what_is_not_finite_is_null_in_json():
    value = {"a": [float("nan"), np.float32("inf"), 1.5, np.int64(3)], "b": (None, "NaN", True), "c": {"d": -float("inf")}}
    assert json.loads(strict_json(value), parse_constant=pytest.fail) == {
        "a": [None, None, 1.5, 3],
        "b": [None, "NaN", True],
        "c": {"d": None},
    }


CACHES = {
    "unset": (None, ROOT / ".cache"),
    "empty": ("", ROOT / ".cache"),
    "relative": ("results of mine", ROOT / "results of mine"),
    "above": ("../elsewhere", ROOT / "../elsewhere"),
    "absolute": ("/somewhere/else", Path("/somewhere/else")),
    "home": ("~/cache", Path("/somebody/cache")),
}


@pytest.mark.parametrize(("named", "expected"), CACHES.values(), ids=CACHES)
def test_where_the_cache_is(named, expected, monkeypatch, tmp_path):
    """The same wherever the process stands: notebooks run in their own folder."""
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLPREPLACE_CACHE", raising=False)
    if named is not None:
        monkeypatch.setenv("MLPREPLACE_CACHE", named)
    assert cache_dir() == expected


@pytest.mark.parametrize(("xdg", "expected"), [("/xdg", "/xdg/mlpreplace"), ("", "/somebody/.cache/mlpreplace")])
def test_an_installed_wheel_keeps_nothing_among_the_packages(xdg, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.delenv("MLPREPLACE_CACHE", raising=False)
    assert cache_dir() == Path(expected)
