"""Data sets of the hub whose rows are parts of documents: documents are whole, and no two splits share one."""

import re
from collections import defaultdict
from itertools import combinations, pairwise

import pytest
from conftest import word_tokenizer
from written import hub_of, text_of

from mlpreplace import load_windows
from mlpreplace.texts.corpora import documents
from mlpreplace.texts.windows import SPLITS

WIKITEXT, CONFIGURATION = "Salesforce/wikitext", "wikitext-103-raw-v1"
ARTICLES = 60


def article(i: int) -> list[str]:
    """Rows of an article with words of its own in every paragraph, laid out as those of wikitext are.

    A blank row stands before and after each heading, and one more at the end. Sections may be without text, and rows of a table
    or, by a mistake of its authors, a section may look like a title.
    """
    words = iter(f"a{i}w{j}" for j in range(1000))

    def paragraph(n: int = 12) -> str:
        return " " + " ".join(next(words) for _ in range(n)) + " . \n"

    rows = ["", f" = Title {i} = = = \n" if i % 10 == 9 else f" = Title {i} = \n", "", paragraph(), paragraph()]
    rows += ["", " = = Section = = \n", "", "", " = = = Within = = = \n", "", paragraph(), " = of a table = \n", paragraph()]
    if i % 3 == 0:
        rows += ["", " = Not a title = \n", "", paragraph()]
    if i % 4 == 0:
        rows += ["", " = = Without text = = \n", "", "", " = Nor this = \n", "", paragraph()]
    if i % 5 == 0:
        rows += ["", "", " = = Behind a gap = = \n", "", paragraph()]
    if i % 2:
        rows += ["", " = = References = = \n", ""]
    return [*rows, ""]


def wikitext(monkeypatch, articles: int = ARTICLES) -> list[str]:
    rows = [row for i in range(articles) for row in article(i)]
    hub_of(monkeypatch, [{"text": row} for row in rows], WIKITEXT, CONFIGURATION)
    return rows


def articles_in(text: str) -> set[str]:
    return set(re.findall(r"\ba(\d+)w\d+\b", text))


# wikitext


def test_a_document_of_wikitext_is_an_article(monkeypatch):
    rows = wikitext(monkeypatch)
    read = list(documents(f"{WIKITEXT}:{CONFIGURATION}"))
    assert [articles_in(text) for _, text in read] == [{str(i)} for i in range(ARTICLES)]
    for i, (identifier, text) in enumerate(read):
        assert rows[int(identifier)].startswith(f" = Title {i} = ")
        assert text == "\n".join(row.rstrip() for row in article(i)).strip()


def test_no_two_splits_share_an_article(monkeypatch):
    rows = wikitext(monkeypatch)
    tokenizer = word_tokenizer(sorted({word for row in rows for word in row.split()}))
    tokenizer.backend_tokenizer.model.unk_token = "="  # for the blank line between documents
    found = {}
    for split, n_windows in dict(zip(SPLITS, (60, 6, 6), strict=True)).items():
        windows = load_windows(f"{WIKITEXT}:{CONFIGURATION}", tokenizer, split, seq_len=16, n_windows=n_windows, progress=False)
        found[split] = articles_in(tokenizer.decode(windows.flatten()))
        assert len(found[split]) > 2
    assert not any(found[a] & found[b] for a, b in combinations(SPLITS, 2))


@pytest.mark.parametrize("read", [1, 2, 40, 41, 300])
def test_ids_do_not_depend_on_how_many_rows_are_read(read, monkeypatch):
    """An article that is cut at the end keeps its id, and so its split; the rest of it is in none."""
    wikitext(monkeypatch)
    whole = dict(documents(f"{WIKITEXT}:{CONFIGURATION}"))
    monkeypatch.setattr("mlpreplace.texts.corpora.HUB_ROWS", read)
    *first, last = list(documents(f"{WIKITEXT}:{CONFIGURATION}")) or [("1", "")]
    assert first == list(whole.items())[: len(first)]
    assert whole[last[0]].startswith(last[1])


@pytest.mark.parametrize(
    "name", ["wikitext:wikitext-2-raw-v1", "wikitext", "mirror/of-wikitext#headings", "mirror/name:small#headings"]
)
def test_wikitext_by_other_names(name, monkeypatch):
    data_set, _, configuration = name.partition("#")[0].partition(":")
    rows = [{"text": row} for i in range(4) for row in article(i)]
    hub_of(monkeypatch, rows, data_set, configuration or None)
    assert [articles_in(text) for _, text in documents(name)] == [{str(i)} for i in range(4)]


# other data sets


def rows_of(i: int, n: int = 3) -> list[dict]:
    """Parts of a document, each of the length of one."""
    return [{"text": f"{text_of(i)} part {j}", "title": f"title {i}", "number": i} for j in range(n)]


@pytest.mark.parametrize("column", ["title", "number"])
def test_rows_of_one_value_in_a_column_are_a_document(column, monkeypatch):
    hub_of(monkeypatch, [row for i in range(9) for row in rows_of(i, 1 + i % 3)])
    read = dict(documents(f"owner/name:small#{column}"))
    assert read == {str(rows_of(i)[0][column]): "\n".join(row["text"] for row in rows_of(i, 1 + i % 3)) for i in range(9)}


def test_a_value_that_comes_back_is_in_the_same_split(monkeypatch):
    hub_of(monkeypatch, [row for _ in range(2) for i in range(5) for row in rows_of(i)])
    splits = defaultdict(set)
    for identifier, text in documents("owner/name:small#title"):
        splits[identifier].update(re.findall(r"d(\d+)w", text))
    assert splits == {f"title {i}": {str(i)} for i in range(5)}


@pytest.mark.parametrize("value", [None, 1.5, ["a"]])
def test_a_row_that_names_no_document_is_refused(value, monkeypatch):
    hub_of(monkeypatch, [{"text": text_of(0), "page": value}])
    with pytest.raises(ValueError, match=r"owner/name:small, row 0: no document .* 'page'; columns are \['page', 'text'\]"):
        list(documents("owner/name:small#page"))
    with pytest.raises(ValueError, match="'heading'; columns are"):
        list(documents("owner/name:small#heading"))


PARTS = {
    "sentences": ([{"text": f"sentence {i}"} for i in range(40)], "most have fewer than 200 characters"),
    "lines": ([{"text": text_of(i) if i % 5 else ""} for i in range(40)], "more than a tenth are empty"),
    "sections": ([{"text": " = = Section = = " if i == 30 else text_of(i)} for i in range(40)], "some are headings"),
    "passages": ([row for i in range(20) for row in rows_of(i)], "neighbours have the same 'title'"),
    "wikitext": ([{"text": row} for i in range(9) for row in article(i)], "headings.*most.*empty|headings.*empty.*most"),
}


@pytest.mark.parametrize("kind", PARTS)
def test_rows_that_look_like_parts_are_documents_only_where_that_is_said(kind, monkeypatch):
    records, why = PARTS[kind]
    hub_of(monkeypatch, records)
    with pytest.raises(ValueError, match=rf'owner/name:small: .*{why}.*"owner/name:small#rows".*#headings.*\[.*\'text\''):
        list(documents("owner/name:small"))
    assert [text for _, text in documents("owner/name:small#rows")] == [r["text"].strip() for r in records if r["text"].strip()]


def test_documents_of_all_kinds_pass(monkeypatch):
    """A few short or empty ones, a title that comes twice in a row, and values that are nowhere."""
    records = [{"text": text_of(i), "title": f"title {i // 2 if i < 4 else i}", "url": None, "source": "web"} for i in range(40)]
    records[5]["text"], records[20]["text"] = "", "short"
    assert any(a["title"] == b["title"] for a, b in pairwise(records))
    hub_of(monkeypatch, records)
    assert len(list(documents("owner/name:small"))) == 39
