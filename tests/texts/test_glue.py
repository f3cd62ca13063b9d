"""Labelled sentences from files: what is read, what is refused."""

import hashlib

import pytest

from mlpreplace.texts import glue

LINES = "a fine film \t1\nnot so fine\t0\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("sst2_train_part", "sst2_validation", "cola_train", "cola_in_domain_dev"):
        head = "sentence\tlabel\n" if name.startswith("sst2") else ""
        (tmp_path / f"{name}.tsv").write_text(head + LINES.replace("film", name))
    return tmp_path


@pytest.mark.parametrize("task", ["sst2", "cola"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_sentences_and_labels_are_those_of_the_file(task, split, folder):
    found = glue(task, split, folder)
    (file,) = (f for f in folder.iterdir() if f.name.startswith(f"{task}_") and ("train" in f.name) == (split == "train"))
    assert found.sentences == (f"a fine {file.stem}", "not so fine") and found.labels == (1, 0)
    assert found.source == {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def test_a_smaller_draw_is_part_of_a_larger_one(folder):
    (folder / "cola_train.tsv").write_text("".join(f"sentence {i}\t{i % 2}\n" for i in range(50)))
    all_of = glue("cola", "train", folder)
    draws = [all_of.some(n) for n in (5, 20, 50, 99)]
    for small, large in zip(draws, draws[1:], strict=False):
        assert set(small.sentences) <= set(large.sentences)
    assert [len(d.labels) for d in draws] == [5, 20, 50, 50] and draws[-1] == all_of
    assert all(int(s.split()[1]) % 2 == label for d in draws for s, label in zip(d.sentences, d.labels, strict=True))
    assert all_of.some(20, seed=1) != draws[1]


@pytest.mark.parametrize("line", ["no label", "\t1", "two\t1\t0", "a word\t2", "sentence\tlabel"])
def test_a_line_of_another_form_is_named(line, folder):
    file = folder / "cola_train.tsv"
    file.write_text(LINES + line + "\n")
    with pytest.raises(ValueError, match=rf"{file.name}, line 3: expected a sentence, a tab and a label of 0 or 1"):
        glue("cola", "train", folder)


def test_what_is_not_there_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="Unknown task 'mnli'; expected one of sst2, cola"):
        glue("mnli", "train", folder)
    with pytest.raises(ValueError, match="Unknown split 'test'; expected one of train, validation"):
        glue("cola", "test", folder)
    with pytest.raises(ValueError, match="no folder"):
        glue("cola", "train", tmp_path / "nowhere")
    (folder / "cola_train_2.tsv").write_text(LINES)
    with pytest.raises(ValueError, match=r"expected one file cola_…train….tsv, found cola_train.tsv, cola_train_2.tsv"):
        glue("cola", "train", folder)
    for file in folder.glob("cola*"):
        file.write_text("")
    with pytest.raises(ValueError, match="holds no sentence"):
        glue("cola", "validation", folder)
