"""Documents of files, folders and data sets: read as UTF-8 and whole, or refused with the place named."""

import json
import locale
import os
import sys
from pathlib import Path

import pytest
from written import DOCUMENTS, hub_of, text_of, write_jsonl

from mlpreplace.texts.corpora import documents


def texts(name) -> list[str]:
    return [content for _, content in documents(name)]


@pytest.fixture(params=["jsonl", "folder"])
def text(request, tmp_path):
    if request.param == "jsonl":
        return write_jsonl(tmp_path / "texts.jsonl", (text_of(i) for i in range(DOCUMENTS)))
    for i in range(DOCUMENTS):
        path = tmp_path / "texts" / ("deeper" if i % 2 else "") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_of(i))
    (tmp_path / "texts" / "README.md").write_text("not a text")
    return str(tmp_path / "texts")


def test_documents_have_ids_of_their_own(text):
    read = list(documents(text))
    assert len(read) == len({identifier for identifier, _ in read}) == DOCUMENTS
    assert sorted(content for _, content in read) == sorted(text_of(i) for i in range(DOCUMENTS))


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x0c"])
def test_a_line_separator_inside_a_json_string_ends_no_line(character, tmp_path):
    text = write_jsonl(tmp_path / "texts.jsonl", [f"one{character}two", "three"])
    assert texts(text) == [f"one{character}two", "three"]


def test_what_holds_no_character_is_no_document(tmp_path):
    (path := tmp_path / "texts.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": " \\n"}\n{"text": "two"}\n\n')
    assert texts(path) == ["one", "two"]
    for name, content in {"empty": "", "blank": "\n\t ", "full": "three"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    assert sorted(texts(tmp_path)) == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "x"}', "found the keys"),
        ("not json", "Expecting value"),
        ('"a text"', "found a str"),
        ("[1, 2]", "found a list"),
        ('{"text": 1}', "found a int"),
        ('{"text": null}', "found a NoneType"),
        ('{"text": ["a", "b"]}', "found a list"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "recursion"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_line_without_text_is_named(line, message, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"texts\.jsonl, line 2: .*{message}"):
        texts(path)


# characters


@pytest.fixture
def ascii_locale():
    """What ``open`` takes for the encoding of a file is ASCII."""
    if sys.flags.utf8_mode:
        pytest.skip("Python is in its UTF-8 mode")
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    assert locale.getencoding() != "UTF-8"
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.usefixtures("ascii_locale")
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
@pytest.mark.parametrize(("name", "form"), [("a.txt", "{}"), ("a.jsonl", '{{"text": "{}"}}')])
def test_files_are_utf_8_whatever_the_locale(name, form, mark, tmp_path):
    (tmp_path / name).write_bytes(mark + form.format("Zürich, 東京 🙂").encode())
    assert texts(tmp_path / name) == ["Zürich, 東京 🙂"]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "gb18030"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_in_another_encoding_is_named(name, encoding, tmp_path):
    for content in ("né à Zürich", "plain") if encoding.startswith("utf") else ("né à Zürich",):
        (tmp_path / name).write_bytes(f'{{"text": "{content}"}}'.encode(encoding))
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8.*iconv"):
            texts(tmp_path / name)


def test_lines_may_end_as_on_any_system(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"three\r\nfour")
    assert texts(tmp_path) == ["one", "two", "three\nfour"]


# names


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["", " ", "\n", None, 3, b"a.txt", ["a.txt"], True])
def test_what_is_no_name_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("of the working directory")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Expected the name of a text"):
        texts(name)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "name",
    [
        *("missing.txt", "missing.jsonl", "data.JSON", "folder/data.parquet", "owner/script.py", "./missing", "../missing"),
        *("/missing", "~/missing", "~nobody/missing", "a/b/c", "folder/", "C:\\texts", "folder\\texts", "two words", "C:/texts"),
        *(
            "https://example.org/a",
            "owner/né",
            "-name",
            "owner/name:",
            "owner/name#",
            "a.jsonl#rows",
            "owner/name:a#b/c",
            Path("missing"),
            Path("owner/name"),
        ),
    ],
    ids=str,
)
def test_a_path_with_nothing_there_is_refused_without_asking_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no file or folder") as refused:
        texts(name)
    assert repr(os.fspath(name)) in str(refused.value)


@pytest.mark.usefixtures("no_hub")
def test_a_place_may_be_named_in_any_way_with_the_same_documents(tmp_path, monkeypatch):
    """And so in the same splits, which go by the ids."""
    folder = tmp_path / "home" / "my texts"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    expected = list(documents(str(folder)))
    assert [identifier for identifier, _ in expected] == ["my texts/a.txt", "my texts/b.txt"]
    for name in (folder, ".", "../my texts", "~/my texts", Path("~/my texts"), Path(), f"{folder}/"):
        assert list(documents(name)) == expected, name
    (tmp_path / "home" / "owner" / "name").mkdir(parents=True)
    (tmp_path / "home" / "owner" / "name" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "home")
    assert texts("owner/name") == ["mine"]  # what is here comes before what may be on the hub


def test_a_folder_without_texts(tmp_path):
    (tmp_path / "notes.txt").mkdir()
    with pytest.raises(ValueError, match="holds no .txt or .jsonl"):
        texts(tmp_path)


# the hub


def offline(*args, **options):
    raise ConnectionError("no route to host\n\n  at all")


def breaking():
    yield {"text": "one", "title": "a"}
    offline()


@pytest.mark.parametrize("load", [offline, lambda *args, **options: breaking()], ids=["at once", "later"])
@pytest.mark.parametrize("name", ["owner/name", "name", "owner/name:config/with-slash", "owner/name#title", "name:config#rows"])
def test_an_unreachable_data_set_is_one_error(name, load, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(ValueError, match=rf"'{name.partition('#')[0]}'.*bundled/wiki.*no route to host at all"):
        texts(name)


def test_a_data_set_is_read_by_its_configuration(monkeypatch):
    records = [{"text": text_of(i), "other": i} for i in range(18)] + [{"text": " ", "other": 0}, {"text": None, "other": 0}]
    hub_of(monkeypatch, records)
    assert list(documents("owner/name:small")) == [(str(i), text_of(i)) for i in range(18)]  # the others are empty


def test_only_the_first_rows_of_a_data_set_are_read(monkeypatch):
    hub_of(monkeypatch, [{"text": text_of(i)} for i in range(20)])
    monkeypatch.setattr("mlpreplace.texts.corpora.HUB_ROWS", 7)
    assert texts("owner/name:small") == [text_of(i) for i in range(7)]


@pytest.mark.parametrize(
    ("records", "message"),
    [([{"content": "x"}], r"expected a column \"text\", found \['content'\]"), ([{"text": [1]}], "row 0: .* found a list")],
)
def test_a_data_set_without_text_says_what_it_has(records, message, monkeypatch):
    hub_of(monkeypatch, records)
    with pytest.raises(ValueError, match=f"owner/name:small.*{message}"):
        texts("owner/name:small")


def test_a_data_set_that_brings_code_is_refused(tmp_path, monkeypatch):
    """By the library: what stands for the hub is a folder that holds a script, as data sets once did."""
    import datasets

    (folder := tmp_path / "name").mkdir()
    (folder / "name.py").write_text(f"open({json.dumps(str(tmp_path / 'ran'))}, 'w')")
    load = datasets.load_dataset
    monkeypatch.setattr("datasets.load_dataset", lambda name, *args, **options: load(str(folder), *args, **options))
    with pytest.raises(ValueError, match="'owner/name'.*scripts are no longer supported"):
        texts("owner/name")
    assert not (tmp_path / "ran").exists()
