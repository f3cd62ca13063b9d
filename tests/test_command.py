"""python -m mlpreplace: compress a model into a folder, measure what is there."""

import json
import random
import re
import sys

import pytest
import torch
from conftest import BYTES, byte_tokenizer, save_locally
from tiny_models import build
from transformers import AutoModelForCausalLM

import mlpreplace.__main__ as module
from mlpreplace import METHODS, find_blocks, load, load_model, load_windows, perplexity
from mlpreplace.__main__ import main
from mlpreplace.replacements.splice import replacements_of

SEQ_LEN = 32


@pytest.fixture
def given(tmp_path, results):
    """(model folder, text file, the options of both commands, those of compress) of a tiny model."""
    sizes = dict(num_hidden_layers=4, vocab_size=BYTES, max_position_embeddings=2 * SEQ_LEN)
    folder = save_locally(build("llama", **sizes), tmp_path / "tiny", byte_tokenizer())
    words, chance = "the of and in to a is was for as on by with that from at it".split(), random.Random(0)
    lines = [json.dumps({"text": " ".join(chance.choices(words, k=40))}) for _ in range(80)]
    (text := tmp_path / "text.jsonl").write_text("\n".join(lines))
    options = ["--heldout", str(text), "--heldout-windows", "4", "--seq-len", str(SEQ_LEN), "--device", "cpu"]
    return folder, str(text), options, ["--text", str(text), "--windows", "12", "--validation-windows", "2"]


def table(printed: str) -> dict[str, float]:
    """Dense, compressed, ratio … of the only text."""
    header, row = printed.split("interval\n")[1].splitlines()[:2]
    return dict(zip(header.split()[2:], map(float, row.split()[2:]), strict=True))


def test_what_compress_saves_evaluate_measures_alike(given, tmp_path, capsys):
    folder, text, options, calibration = given
    small = tmp_path / "small"
    assert main(["compress", folder, "--sparsity", "0.25", "--out", str(small), *calibration, *options]) == 0
    made = capsys.readouterr().out
    assert float(re.search(r"([\d.]+)% of all attention and MLP", made)[1]) >= 25
    assert main(["evaluate", str(small), *options]) == 0
    again = table(capsys.readouterr().out)
    assert again == table(made)
    model, tokenizer = load_model(folder, device="cpu")
    held = load_windows(text, tokenizer, "heldout", seq_len=SEQ_LEN, n_windows=4)
    assert again["dense"] == pytest.approx(perplexity(model, held, progress=False).value, abs=5e-4)
    assert again["compressed"] == pytest.approx(perplexity(load(small, device="cpu"), held, progress=False).value, abs=5e-4)
    metrics = json.loads((small / "replacements.json").read_text())["metrics"]
    assert metrics["method"] == "recipe" and metrics[f"perplexity ratio on {text}"] == pytest.approx(again["ratio"], abs=5e-4)


def from_files() -> list[range]:
    """Addresses that hold what files hold which nobody else sees."""
    with open("/proc/self/maps") as regions:
        ends = [line.split()[0].split("-") for line in regions if line.rstrip().endswith("(deleted)")]
    return [range(int(first, 16), int(last, 16)) for first, last in ends]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_replaced_is_on_disk_while_the_result_is_measured(given, tmp_path, monkeypatch):
    folder, _, options, calibration = given
    measure, seen = module._perplexities, []

    def measured(model, held):
        away = from_files()
        blocks = seen[0][0] if seen else find_blocks(model) + find_blocks(model, "attention")
        weights = {b.name: [w.data_ptr() for part in b.modules for w in part.parameters()] for b in blocks}
        there = {name for name, places in weights.items() if all(any(p in region for region in away) for p in places)}
        seen.append((blocks, there, replacements_of(model).keys()))
        return measure(model, held)

    monkeypatch.setattr(module, "_perplexities", measured)
    assert main(["compress", folder, "--sparsity", "0.25", "--out", str(tmp_path / "small"), *calibration, *options]) == 0
    (_, before, _), (_, after, replaced) = seen
    assert not before and after == replaced


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"recipe"}))
def test_every_method_of_the_comparison_can_be_asked_for(method, given, tmp_path, capsys):
    folder, _, options, calibration = given
    out = str(tmp_path / method)
    asked = ["--sparsity", "0.25", "--method", method, "--form", "standalone", "--out", out]
    assert main(["compress", folder, *asked, *calibration, *options]) == 0
    assert json.loads((tmp_path / method / "replacements.json").read_text())["sparsity"] > 0.1
    assert load(out, device="cpu")


def test_healing_changes_what_is_saved_and_one_width_is_a_plain_checkpoint(given, tmp_path):
    folder, _, options, calibration = given
    saved = {}
    for steps in ("0", "30"):
        out = tmp_path / f"healed-{steps}"
        asked = ["--sparsity", "0.5", "--method", "uniform_refit", "--form", "plain", "--healing-steps", steps, "--out", str(out)]
        assert main(["compress", folder, *asked, *calibration, *options]) == 0
        saved[steps] = AutoModelForCausalLM.from_pretrained(out)
    weights = [saved[steps].model.layers[0].mlp.down_proj.weight for steps in saved]
    assert weights[0].shape == weights[1].shape and not torch.equal(*weights)


@pytest.mark.parametrize(("steps", "enough"), [(3, True), (3000, False)])
def test_healing_reads_what_the_fits_did_not_see_where_there_is_enough(steps, enough, given, tmp_path, monkeypatch, capsys):
    folder, text, options, calibration = given
    read = []
    monkeypatch.setattr("mlpreplace.__main__.heal", lambda model, plan, ids, *_, **__: read.append(ids) or pytest.fail("enough"))
    asked = ["--sparsity", "0.25", "--method", "uniform", "--healing-steps", str(steps), "--out", str(tmp_path / "out")]
    with pytest.raises(pytest.fail.Exception):
        main(["compress", folder, *asked, *calibration, *options])
    seen = load_windows(text, load_model(folder, device="cpu")[1], seq_len=SEQ_LEN, n_windows=12)
    both = {tuple(window) for window in seen.tolist()} & {tuple(window) for window in read[0].tolist()}
    assert len(both) == (0 if enough else len(seen)) and len(read[0]) == (2 * steps if enough else len(seen))
    assert ("what the fits saw" in capsys.readouterr().err) != enough


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--sparsity", "1.5"], "0 < sparsity < 1, got 1.5"),
        (["--sparsity", "0.25", "--windows", "100000"], "Ask for fewer or shorter windows"),
        (["--sparsity", "0.25", "--seq-len", "80"], "longer than the model's context of 64"),
        (["--sparsity", "0.25", "--method", "subfit", "--form", "plain"], "no form"),
    ],
)
def test_a_request_that_cannot_be_met_says_why_and_leaves_nothing(change, message, given, tmp_path, capsys):
    folder, _, options, calibration = given
    out = tmp_path / "small"
    assert main(["compress", folder, "--out", str(out), *calibration, *options, *change]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not out.exists()


def test_nothing_is_overwritten(given, tmp_path, capsys):
    folder, _, options, calibration = given
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").write_text("mine")
    assert main(["compress", folder, "--sparsity", "0.25", "--out", str(tmp_path / "there"), *calibration, *options]) == 2
    assert "not empty" in (said := capsys.readouterr().err) and "choose another one" in said
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["notes"]
    assert main(["evaluate", str(tmp_path / "there"), *options]) == 2
    assert "expected a folder written by mlpreplace.save or export" in capsys.readouterr().err
