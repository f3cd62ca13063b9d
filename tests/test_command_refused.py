"""What python -m mlpreplace cannot do is one line on stderr, found out before the work, and nothing is left behind."""

import json
import os
import resource
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
from conftest import BYTES, byte_tokenizer, save_locally
from forked import SERVER
from safetensors.torch import load_file, save_file
from saved_models import change_record, record_of
from tiny_models import build

import mlpreplace.__main__ as command
from mlpreplace.__main__ import main

SEQ_LEN = 16


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(folder of a tiny model, options of both commands, those of compress)."""
    root = tmp_path_factory.mktemp("given")
    model = build("llama", num_hidden_layers=2, vocab_size=BYTES, max_position_embeddings=2 * SEQ_LEN)
    folder = save_locally(model, root / "tiny", byte_tokenizer())
    lines = [json.dumps({"text": f"{i} the cat sat on the mat and saw {i * i} rats. " * 3}) for i in range(80)]
    (text := root / "text.jsonl").write_text("\n".join(lines))
    options = ["--heldout", str(text), "--heldout-windows", "2", "--seq-len", str(SEQ_LEN), "--device", "cpu"]
    return folder, options, ["--text", str(text), "--windows", "6", "--validation-windows", "2", "--sparsity", "0.25"]


@pytest.fixture
def compress(given, results):
    """compress(out, *more options): its status."""
    folder, options, calibration = given
    uniform = ["--method", "uniform"]
    return lambda out, *more: main(["compress", folder, "--out", str(out), *calibration, *options, *uniform, *more])


@pytest.fixture
def no_work(monkeypatch):
    def work(*args, **how):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(command, "load_model", work)


def one_line(said: str) -> str:
    """The last line, which alone is an error; before it are the names of steps and their progress."""
    *before, last = said.splitlines()
    assert last.startswith("error: ") and not any("error" in line or "Traceback" in line for line in before), said
    return last


def under_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "out"


def a_file(folder):
    (folder / "out").touch()
    return folder / "out"


def a_dangling_link(folder):
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out"


def a_link_to_itself(folder):
    (folder / "out").symlink_to(folder / "out")
    return folder / "out"


def not_empty(folder):
    (folder / "out").mkdir()
    (folder / "out" / "hidden").touch()
    return folder / "out"


def too_long(folder):
    return folder / ("x" * 300)


def a_zero_byte(folder):
    return f"{folder}/a\0b"


def among_processes(folder):
    return "/proc/out"


def read_only(folder):
    (folder / "locked").mkdir(mode=0o555)
    return folder / "locked" / "out"


PLACES = [under_a_file, a_file, a_dangling_link, a_link_to_itself, not_empty, too_long, a_zero_byte, among_processes, read_only]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_place_that_cannot_be_written_is_found_out_first(place, compress, no_work, tmp_path, capsys):
    if place is read_only and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    out = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert compress(out) == 2
    said = one_line(capsys.readouterr().err)
    assert "cannot be a new folder" in said or place is a_zero_byte
    assert sorted(tmp_path.rglob("*")) == before


SIZES = [
    ("--sparsity", "0", "0 < sparsity < 1, got 0"),
    ("--sparsity", "1", "0 < sparsity < 1, got 1"),
    ("--sparsity", "-0.2", "0 < sparsity < 1"),
    ("--sparsity", "nan", "0 < sparsity < 1, got nan"),
    ("--sparsity", "inf", "0 < sparsity < 1, got inf"),
    ("--windows", "0", "--windows should be 1 or more, got 0"),
    ("--validation-windows", "-1", "--validation-windows should be 1 or more, got -1"),
    ("--heldout-windows", "0", "--heldout-windows should be 1 or more"),
    ("--healing-steps", "-1", "--healing-steps should be 0 or more"),
    ("--seq-len", "1", "--seq-len should be 2 or more"),
]


@pytest.mark.parametrize(("option", "value", "said"), SIZES)
def test_a_number_that_cannot_be_is_found_out_first(option, value, said, compress, no_work, tmp_path, capsys):
    assert compress(tmp_path / "out", option, value) == 2
    assert said in one_line(capsys.readouterr().err) and not (tmp_path / "out").exists()


LATE = [
    (["--text", "/no/such/file.txt"], "/no/such/file.txt"),
    (["--heldout", "/no/such/file.txt"], "/no/such/file.txt"),
    (["--text", "bundled/nothing"], "bundled/nothing"),
    (["--windows", "100000"], "fewer or shorter windows"),
    (["--seq-len", "40"], "longer than the model's context"),
    (["--method", "subfit", "--form", "plain"], "no form"),
    (["--device", "cuda:7"], "cuda:7"),
    (["--device", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("more", "said"), LATE)
def test_what_cannot_be_met_leaves_nothing(more, said, compress, tmp_path, capsys):
    assert compress(tmp_path / "out", *more) == 2
    assert said in one_line(capsys.readouterr().err) and not (tmp_path / "out").exists()


FAILURES = [
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB."), 2, "out of memory"),
    (MemoryError(), 2, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 2, "out of memory"),
    (OSError(28, "No space left on device"), 2, "No space left"),
    (ValueError("two\nlines | and a bar"), 2, "two lines | and a bar"),
]


@pytest.mark.parametrize(("error", "status", "said"), FAILURES, ids=[type(error).__name__ for error, *_ in FAILURES])
@pytest.mark.parametrize("where", ["load_model", "calibrate", "compare", "save"])
def test_a_failure_at_any_time_leaves_nothing(where, error, status, said, compress, tmp_path, capsys, monkeypatch):
    def fail(*args, **how):
        raise error

    monkeypatch.setattr(command, where, fail)
    assert compress(tmp_path / "out") == status
    assert said in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing-*"))


def on_a_full_disk(arguments: list[str], cache) -> tuple[int, str]:
    torch.set_num_threads(1)
    os.environ["MLPREPLACE_CACHE"] = str(cache)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    with redirect_stderr(StringIO()) as said:
        return main(arguments), said.getvalue()


def test_a_full_disk_is_one_line(given, results, tmp_path):
    folder, options, calibration = given
    arguments = ["compress", folder, "--out", str(tmp_path / "out"), *calibration, *options, "--method", "uniform"]
    with ProcessPoolExecutor(1, mp_context=SERVER) as pool:
        run = pool.submit(on_a_full_disk, [*arguments, "--form", "standalone"], tmp_path / "other")
        status, said = run.result(timeout=120)
    assert status == 2 and "Make room" in one_line(said) and not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled_and_home_is_a_place(compress, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out").mkdir()
    assert compress("~/out") == 0
    assert {"replacements.json", "SHA256SUMS"} <= {file.name for file in (tmp_path / "out").iterdir()}


# evaluate


@pytest.fixture(scope="module")
def small(given, tmp_path_factory):
    """{form: folder} of what compress saved."""
    folder, options, calibration = given
    root = tmp_path_factory.mktemp("small")
    for form in ("delta", "standalone", "plain"):
        out = ["--out", str(root / form), "--form", form, "--method", "uniform"]
        assert main(["compress", folder, *calibration, *options, *out]) == 0
    return root


@pytest.mark.parametrize("form", ["delta", "standalone", "plain"])
def test_evaluate_refuses_a_base_with_other_weights(form, given, small, tmp_path, capsys):
    folder, options, _ = given
    other = shutil.copytree(folder, tmp_path / "other")
    saved = shutil.copytree(small / form, tmp_path / "saved")
    change_record(saved, lambda record: record["base"].update(id=str(other)))
    assert main(["evaluate", str(saved), *options]) == 0
    capsys.readouterr()
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert main(["evaluate", str(saved), *options]) == 2
    assert "base model differs" in one_line(capsys.readouterr().err)


def test_evaluate_refuses_what_is_no_saved_model(given, small, tmp_path, capsys):
    folder, options, _ = given
    nameless = shutil.copytree(small / "standalone", tmp_path / "nameless")
    change_record(nameless, lambda record: record.update(base=None))
    flipped = shutil.copytree(small / "delta", tmp_path / "flipped")
    (flipped / "replacements.safetensors").write_bytes(bytes(10))
    moved = shutil.copytree(small / "delta", tmp_path / "moved")
    change_record(moved, lambda record: record["base"].update(id=str(tmp_path / "gone")))
    refused = {folder: "save or export", "/no/such/folder": "save or export", __file__: "save or export", nameless: "which model"}
    refused |= {flipped: "not what was written", moved: "gone"}
    for place, said in refused.items():
        assert main(["evaluate", str(place), *options]) == 2
        assert said in one_line(capsys.readouterr().err)
    assert main(["evaluate", str(small / "delta"), "--limit", "0", *options]) == 2
    assert "--limit should be 1 or more" in one_line(capsys.readouterr().err)


def test_a_relative_base_is_found_from_elsewhere(given, tmp_path, monkeypatch, capsys, results):
    folder, options, calibration = given
    monkeypatch.chdir(os.path.dirname(folder))
    out = ["--out", str(tmp_path / "out"), "--method", "uniform"]
    assert main(["compress", os.path.basename(folder), *calibration, *options, *out]) == 0
    assert record_of(tmp_path / "out")["base"]["id"] == os.path.realpath(folder)
    monkeypatch.chdir("/")
    assert main(["evaluate", str(tmp_path / "out"), *options]) == 0


def test_no_copy_of_the_model_is_made(compress, tmp_path, monkeypatch):
    """It is measured and saved in place."""
    monkeypatch.setattr(sys.modules["mlpreplace.replacements.splice"], "lazy_copy", None)
    assert compress(tmp_path / "out") == 0
