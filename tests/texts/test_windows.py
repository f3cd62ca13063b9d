"""Token windows: which documents they come from, in which order, and what is said when there are too few."""

from itertools import combinations

import pytest
import torch
from conftest import word_tokenizer
from written import DOCUMENTS, WORDS, text_of, write_jsonl

from mlpreplace import load_windows
from mlpreplace.texts.corpora import BUNDLED, documents
from mlpreplace.texts.windows import MIXTURES, SPLITS, text_name


@pytest.fixture(scope="module")
def tokenizer():
    """Word j of document i is token i · WORDS + j + 1, so that a token tells its document."""
    return word_tokenizer(f"d{i}w{j}" for i in range(DOCUMENTS) for j in range(WORDS))


def sources(windows: torch.Tensor) -> list[list[int]]:
    """Documents of each window, in order of appearance."""
    return [list(dict.fromkeys(((row - 1) // WORDS).tolist())) for row in windows]


@pytest.fixture
def jsonl(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", (text_of(i) for i in range(DOCUMENTS)))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts" / "deeper").mkdir(parents=True)
    for i in range(DOCUMENTS):
        (tmp_path / "texts" / ("deeper" if i % 2 else "") / f"{i}.txt").write_text(text_of(i))
    (tmp_path / "texts" / "README.md").write_text("not a text")
    return str(tmp_path / "texts")


@pytest.fixture(params=["jsonl", "folder"])
def text(request):
    return request.getfixturevalue(request.param)


def test_windows_are_token_ids(text, tokenizer):
    windows = load_windows(text, tokenizer, seq_len=16, n_windows=5)
    assert windows.shape == (5, 16)
    assert windows.dtype == torch.int64
    assert 1 <= windows.min() and windows.max() <= DOCUMENTS * WORDS


def test_no_document_is_in_two_splits(text, tokenizer):
    found = {}
    for split in SPLITS:
        windows = load_windows(text, tokenizer, split, seq_len=10, n_windows=12)
        found[split] = {i for row in sources(windows) for i in row}
    for a, b in combinations(SPLITS, 2):
        assert not found[a] & found[b]


def test_the_size_asked_for_moves_no_document(jsonl, tokenizer):
    """All of calibration, however it is cut, stays out of all of held-out."""
    heldout = {i for row in sources(load_windows(jsonl, tokenizer, "heldout", seq_len=4, n_windows=40)) for i in row}
    for seq_len, n_windows in ((5, 300), (60, 50), (30, 1)):
        calibration = load_windows(jsonl, tokenizer, "calibration", seq_len=seq_len, n_windows=n_windows)
        assert not heldout & {i for row in sources(calibration) for i in row}


def test_the_order_is_not_that_of_the_source(jsonl, tokenizer):
    """Neither forwards nor backwards: a few windows see documents from everywhere."""
    order = [row[0] for row in sources(load_windows(jsonl, tokenizer, seq_len=30, n_windows=20))]
    rising = sum(a < b for a, b in zip(order, order[1:], strict=False))
    assert 4 < rising < 15


@pytest.mark.parametrize("seq_len", [8, 30, 64])
def test_fewer_windows_are_a_prefix_of_more(seq_len, text, tokenizer):
    few, many = (load_windows(text, tokenizer, seq_len=seq_len, n_windows=n) for n in (4, 8))
    assert torch.equal(few, many[:4])
    assert len(torch.unique(many, dim=0)) == 8


def test_windows_depend_on_the_documents_alone(tmp_path, tokenizer):
    """Not on the order that the file system or the process gives."""
    (tmp_path / "texts").mkdir()
    for i in reversed(range(DOCUMENTS)):
        (tmp_path / "texts" / f"{i}.txt").write_text(text_of(i))
    first = load_windows(str(tmp_path / "texts"), tokenizer, seq_len=64, n_windows=20)
    assert torch.equal(first, load_windows(str(tmp_path / "texts"), tokenizer, seq_len=64, n_windows=20))


def test_short_documents_are_joined(jsonl, tokenizer):
    windows = load_windows(jsonl, tokenizer, seq_len=100, n_windows=10)
    assert all(len(row) >= 3 for row in sources(windows))
    flat = windows.flatten()
    starts = flat[(flat - 1) % WORDS == 0]
    assert len(starts) == len(set(starts.tolist()))  # no document twice


def test_a_few_windows_see_many_long_documents(tmp_path, tokenizer):
    """Twenty documents of ten windows each: one window of each comes before the second of any, and at no fixed place."""
    text = write_jsonl(tmp_path / "long.jsonl", (text_of(i) for i in range(20)))
    windows = load_windows(text, tokenizer, seq_len=4, n_windows=100)
    first = [row[0] for row in sources(windows)]
    chosen = len(set(first))
    assert chosen >= 12
    assert len(set(first[:chosen])) == chosen
    assert len(set(((windows[:chosen, 0] - 1) % WORDS).tolist())) > 3
    assert len(torch.unique(windows, dim=0)) == 100


def test_a_single_txt_file_is_one_document(tmp_path, tokenizer):
    (tmp_path / "one.txt").write_text(text_of(0, 400))
    assert len(list(documents(str(tmp_path / "one.txt")))) == 1
    found = 0
    for split in SPLITS:
        try:
            found += len(load_windows(str(tmp_path / "one.txt"), tokenizer, split, seq_len=10, n_windows=40))
        except ValueError as error:
            assert "in 0 documents" in str(error)
    assert found == 40


def test_too_few_tokens_are_counted(jsonl, tokenizer):
    with pytest.raises(ValueError, match=r"has \d+ heldout windows of 64 tokens in \d+ documents, 1000 were asked"):
        load_windows(jsonl, tokenizer, "heldout", seq_len=64, n_windows=1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "'test'.*calibration"),
        ({"split": ["heldout"]}, "heldout.*calibration"),
        ({"seq_len": 1}, "seq_len ≥ 2"),
        ({"seq_len": 16.0}, "seq_len ≥ 2, got 16.0"),
        ({"n_windows": 0}, "n_windows ≥ 1"),
        ({"n_windows": True}, "n_windows ≥ 1, got True"),
        ({"text": "bundled/novels"}, "'bundled/novels'.*bundled/wiki"),
    ],
)
def test_a_request_that_cannot_be_right(options, message, jsonl, tokenizer):
    with pytest.raises(ValueError, match=message):
        load_windows(**{"text": jsonl, "tokenizer": tokenizer, "n_windows": 2, "seq_len": 8} | options)


# mixtures


@pytest.fixture
def three(tmp_path):
    """Names of three texts of 40 documents each; a token tells the text it is from."""
    return [write_jsonl(tmp_path / f"{k}.jsonl", (text_of(40 * k + i) for i in range(40))) for k in range(3)]


def texts_of(windows: torch.Tensor) -> list[int]:
    """Which of the three texts each window is from."""
    of_token = (windows - 1) // (40 * WORDS)
    assert (of_token == of_token[:, :1]).all()
    return of_token[:, 0].tolist()


@pytest.mark.parametrize("shares", [(1, 1, 1), (0.5, 0.3, 0.2), (0.1, 0.2, 0.7), (3, 1, 0.01)])
def test_every_prefix_has_the_shares(shares, three, tokenizer):
    order = texts_of(load_windows(dict(zip(three, shares, strict=True)), tokenizer, seq_len=8, n_windows=60))
    for n in range(1, 61):
        for k, share in enumerate(shares):
            assert abs(order[:n].count(k) - n * share / sum(shares)) < 1


def test_a_mixture_takes_the_windows_of_its_texts_in_their_order(three, tokenizer):
    mixed = load_windows({three[0]: 0.75, three[2]: 0.25}, tokenizer, "heldout", seq_len=8, n_windows=8)
    order = texts_of(mixed)
    assert order.count(0) == 6 and order.count(2) == 2
    for k in (0, 2):
        rows = mixed[[i for i, source in enumerate(order) if source == k]]
        assert torch.equal(rows, load_windows(three[k], tokenizer, "heldout", seq_len=8, n_windows=len(rows)))


def test_fewer_windows_of_a_mixture_are_a_prefix_of_more(three, tokenizer):
    mixture = dict(zip(three, (0.6, 0.1, 0.3), strict=True))
    many = load_windows(mixture, tokenizer, seq_len=8, n_windows=40)
    for n in (1, 2, 3, 17):
        assert torch.equal(load_windows(mixture, tokenizer, seq_len=8, n_windows=n), many[:n])


def test_shares_are_relative(three, tokenizer):
    sizes = {"seq_len": 8, "n_windows": 20}
    first = load_windows({three[0]: 0.1, three[1]: 0.2}, tokenizer, **sizes)
    assert torch.equal(first, load_windows({three[0]: 3, three[1]: 6}, tokenizer, **sizes))
    assert torch.equal(load_windows({three[0]: 7}, tokenizer, **sizes), load_windows(three[0], tokenizer, **sizes))


@pytest.mark.parametrize("shares", [{}, {"a": 0}, {"a": 1, "b": -0.5}, {"a": float("nan")}, {"a": float("inf")}, {"a": "half"}])
def test_shares_that_cannot_be(shares, tokenizer):
    with pytest.raises(ValueError, match=r"\{name: share\} with positive shares, got \{"):
        load_windows(shares, tokenizer)


def test_a_mixture_names_the_text_that_is_unknown_or_too_short(three, tokenizer):
    with pytest.raises(ValueError, match="'bundled/novels'.*bundled/wiki"):
        load_windows({three[0]: 1, "bundled/novels": 1e-9}, tokenizer, n_windows=1)
    with pytest.raises(ValueError, match=r"1\.jsonl has \d+ calibration windows of 8 tokens .* 900 were asked"):
        load_windows({three[0]: 0.1, three[1]: 0.9}, tokenizer, seq_len=8, n_windows=1000)


def test_what_a_text_is_called():
    assert text_name("bundled/wiki") == "bundled/wiki"
    assert text_name({"bundled/wiki": 0.5, "bundled/passages": 0.5}) == "bundled/wiki 50 %, bundled/passages 50 %"
    assert text_name({"a": 2, "b": 1}) == "a 66.7 %, b 33.3 %"


@pytest.mark.parametrize("name", MIXTURES)
def test_a_named_mixture_is_its_shares_and_spares_the_domain_tested_on(name, three, tokenizer, monkeypatch):
    assert set(MIXTURES[name]) <= set(BUNDLED) - {"bundled/speeches"}
    monkeypatch.setitem(MIXTURES, name, {three[0]: 2, three[1]: 1})
    windows = load_windows(name, tokenizer, seq_len=8, n_windows=9)
    assert torch.equal(windows, load_windows({three[0]: 2, three[1]: 1}, tokenizer, seq_len=8, n_windows=9))
    assert text_name(name) == name
