"""A file or a folder is whole or not there."""

import os

import pytest
from forked import SERVER

from mlpreplace.runtime.files import whole_folder, write_atomically


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
    assert path.stat().st_mode & 0o777 == 0o644


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
    assert [path.name for path in (tmp_path / "deeper").rglob("*")] == ["folder", "file"]


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    with pytest.raises(OSError), whole_folder(tmp_path / "folder"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]
