"""What the record of a run tells apart, and what it lets change."""

import json
import random
import subprocess

import numpy as np
import pytest
import torch
from conftest import notebook_text
from tiny_models import build, random_windows

from mlpreplace import LowRank, NarrowMLP, find_blocks
from mlpreplace.models.loading import Source, weight_hashes
from mlpreplace.reporting import record as provenance
from mlpreplace.reporting.record import Run, code_cells_hash, git_state, seed_everything
from mlpreplace.runtime.fingerprint import fingerprint

CELLS = ("x = 1\ny = 2", "print(x)")


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder with the notebook 09_test, outside any repository."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "09_test.ipynb").write_text(notebook_text(*CELLS))
    monkeypatch.setattr(provenance, "NOTEBOOKS", folder)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return folder


@pytest.fixture
def repository(notebooks, tmp_path):
    """That folder and a package, committed."""
    for name in ("mlpreplace/module.py", "figures/09.json", "assets.txt", "notebooks/profiles/smoke.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("content\n")
    author = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def markdown_and(text: str) -> str:
    notebook = json.loads(text)
    notebook["cells"].insert(0, {"cell_type": "markdown", "source": ["# Title"], "metadata": {}})
    return json.dumps(notebook)


@pytest.mark.parametrize(
    "other",
    [
        notebook_text(*CELLS, outputs=3),
        notebook_text("SEED = 3", *CELLS, tags={0: ["injected-parameters"]}),
        notebook_text(*CELLS, tags={0: ["parameters"]}),
        markdown_and(notebook_text(*CELLS)),
        notebook_text("import json\nfrom a import (\n    b as c,\n    d,\n)\n\nimport e; import f\n\n" + CELLS[0], CELLS[1]),
        notebook_text("import json", *CELLS),
        notebook_text("x = 1\nimport é\ny = 2", CELLS[1]),
    ],
    ids=["outputs", "injected", "tags", "markdown", "imports", "a cell of imports", "an import below"],
)
def test_the_hash_of_the_code_is_of_the_code_alone(other):
    assert code_cells_hash(other) == code_cells_hash(notebook_text(*CELLS))


@pytest.mark.parametrize(
    "other",
    [
        ("x = 1\ny = 3", "print(x)"),
        ("print(x)", "x = 1\ny = 2"),
        ("x = 1\ny = 2",),
        ("x = 1", "y = 2", "print(x)"),
        ("import a\nx = 1\ny = 3", "print(x)"),
        ("import a; x = 1\ny = 2; z = 3", "print(x)"),
        ("x = 1  # one\ny = 2", "print(x)"),
    ],
    ids=["changed", "reordered", "shortened", "split", "beside imports", "in their line", "comment"],
)
def test_changed_code_has_another_hash(other):
    assert code_cells_hash(notebook_text(*other)) != code_cells_hash(notebook_text(*CELLS))


@pytest.mark.parametrize(
    ("cell", "other", "equal"),
    [
        ("import é; x = 1", "import a, b; x = 1", True),
        ("import é; x = 1", "import é; x = 2", False),
        ("x = 'éééééééééé'; import a; y = 1", "x = 'éééééééééé'; import b; y = 1", True),
        ("x = 'éééééééééé'; import a; y = 1", "x = 'éééééééééé'; import a; y = 2", False),
        ("if x:\n    import a", "if x:\n    import b", False),
    ],
)
def test_of_a_line_only_the_import_is_left_out(cell, other, equal):
    assert (code_cells_hash(notebook_text(cell)) == code_cells_hash(notebook_text(other))) is equal


def test_a_cell_that_is_not_python_alone_counts_as_it_is():
    magic = "%time x\nimport a"
    assert code_cells_hash(notebook_text(magic)) == code_cells_hash(notebook_text(magic, outputs=1))
    assert code_cells_hash(notebook_text(magic)) != code_cells_hash(notebook_text("%time x\nimport b"))


def test_outside_a_repository_there_is_no_commit(notebooks):
    assert git_state("09_test") == {"commit": None, "dirty": None}


def test_the_commit_is_of_no_other_repository(repository, monkeypatch):
    """As where an archive of this one is unpacked within a repository."""
    (inner := repository / "unpacked" / "notebooks").mkdir(parents=True)
    (inner / "09_test.ipynb").write_text(notebook_text(*CELLS))
    assert git_state("09_test")["commit"]
    monkeypatch.setattr(provenance, "NOTEBOOKS", inner)
    monkeypatch.setattr(provenance, "ROOT", inner.parent)
    assert git_state("09_test") == {"commit": None, "dirty": None}


def test_a_checkout_may_be_reached_by_a_link(repository, tmp_path_factory, monkeypatch):
    (link := tmp_path_factory.mktemp("links") / "link").symlink_to(repository)
    monkeypatch.setattr(provenance, "ROOT", link)
    assert git_state("09_test")["dirty"] is False


@pytest.mark.parametrize(
    ("path", "content", "dirty"),
    [
        (None, None, False),
        ("figures/09.json", "new", False),
        ("notebooks/09_test.ipynb", notebook_text(*CELLS, outputs=1), False),
        ("notebooks/09_test.ipynb", notebook_text("x = 2"), True),
        ("notebooks/09_test.ipynb", notebook_text("import a\n" + CELLS[0], CELLS[1]), True),
        ("mlpreplace/module.py", "new", True),
        ("mlpreplace/new.py", "new", True),
        ("assets.txt", "new", True),
        ("notebooks/profiles/smoke.yaml", "new", True),
    ],
)
def test_a_commit_is_dirty_when_code_differs_from_it(path, content, dirty, repository):
    if path:
        (repository / path).write_text(content)
    state = git_state("09_test")
    assert len(state["commit"]) == 40
    assert state["dirty"] is dirty


def test_a_notebook_that_is_not_committed_is_dirty(repository):
    (repository / "notebooks" / "10_new.ipynb").write_text(notebook_text(*CELLS))
    assert git_state("10_new")["dirty"]


def test_a_run_of_no_notebook(notebooks):
    with pytest.raises(FileNotFoundError, match="'08_none'"):
        Run("08_none", {})


def test_the_record_holds_what_is_needed_to_repeat_the_run(notebooks):
    run = Run("09_test", {"SEED": 1, "PROFILE": "smoke"})
    model, windows = build("llama").to(torch.bfloat16), random_windows()
    model.source = Source("owner/name", revision="abc")
    run.uses(model, calibration=("bundled/wiki", windows))
    run.uses(heldout=("bundled/speeches", windows[:2]))
    record = json.loads(json.dumps(run.record()))
    assert record["notebook"] == "09_test"
    assert record["code_cells_sha256"] == code_cells_hash(notebook_text(*CELLS))
    assert record["parameters"] == {"SEED": 1, "PROFILE": "smoke"}
    assert record["model"] == model.source.as_dict() | {"weights": fingerprint(weight_hashes(model))}
    assert (record["model"]["id"], record["model"]["revision"]) == ("owner/name", "abc")
    assert (record["device"], record["dtype"]) == ("cpu", "bfloat16")
    cal, held = record["texts"]["calibration"], record["texts"]["heldout"]
    assert (cal["text"], cal["windows"], cal["sequence_length"], cal["tokens"]) == ("bundled/wiki", 8, 12, 96)
    assert (held["text"], held["windows"], held["tokens"]) == ("bundled/speeches", 2, 24)
    assert cal["hash"] != held["hash"]
    assert record["packages"]["torch"] == torch.__version__
    assert {"git", "python", "machine", "wall_seconds"} <= record.keys()


@pytest.mark.parametrize("change", ["a weight", "a bias", "a buffer", "the precision", "the head"])
def test_the_record_says_which_weights_were_used(change, notebooks):
    """Not which were loaded: of a model that something has changed since, the source does not know."""
    model, run = build("gpt_neox", tie_word_embeddings=False), Run("09_test", {})
    model.register_buffer("scale", torch.ones(3))
    model.source = Source.of(model, "owner/name")
    used = []
    for _ in range(2):
        run.uses(model)
        used.append(run.record()["model"])
        with torch.no_grad():
            if change == "a weight":
                model.gpt_neox.layers[1].mlp.dense_h_to_4h.weight[0, 0] += 1e-6
            elif change == "a bias":
                model.gpt_neox.layers[0].mlp.dense_h_to_4h.bias[-1] += 1e-6
            elif change == "a buffer":
                model.scale[1] = 2
            elif change == "the precision":
                model.bfloat16()
            else:
                model.lm_head.weight[3] += 1
    assert used[0]["weights"] != used[1]["weights"]
    assert used[0] | {"weights": None} == used[1] | {"weights": None}


def test_a_run_in_two_precisions_says_so(notebooks):
    run, model = Run("09_test", {}), build("llama")
    model.lm_head.bfloat16()
    model.source = Source("owner/name")
    run.uses(model)
    assert run.record()["dtype"] == "float32, bfloat16"


@pytest.mark.parametrize(
    ("name", "known", "first", "bos"),
    [
        ("llama", 7, 7, 7),
        ("gpt2", 0, 0, 0),
        ("llama", 7, None, None),
        ("llama", 7, 8, None),  # all texts may begin alike
        ("llama", None, 7, None),
        ("bart", 7, 7, 7),
    ],
)
def test_the_record_says_which_token_windows_begin_with(name, known, first, bos, notebooks):
    run, model, windows = Run("09_test", {}), build(name, bos_token_id=known), random_windows()
    model.source, windows[1, 0] = Source("owner/name"), windows[0, 0] + 1
    if first is not None:
        windows[:, 0] = first
    run.uses(model, calibration=("bundled/wiki", windows))
    run.uses(heldout=("bundled/wiki", windows[:1]))
    texts = run.record()["texts"]
    assert texts["calibration"]["bos"] == bos and texts["heldout"]["bos"] == bos


def test_what_a_model_is_not_made_for_is_left_out_and_named(notebooks, capsys):
    run, block = Run("09_test", {}), find_blocks(build("mixtral"))[0]
    with run.where_applicable("widths"):
        assert NarrowMLP(3).n_params(block) == "not reached"
    with run.where_applicable("maps"):
        done = LowRank(3).n_params(block)
    assert done == 2 * 3 * block.hidden_size + block.hidden_size
    (name, why), *others = run.record()["left_out"].items()
    assert name == "widths" and "its neurons cannot be selected" in why and not others
    assert capsys.readouterr().out == f"Left out: widths. {why}\n"


def test_only_what_does_not_apply_is_left_out(notebooks):
    """Any other error, a size that is too large too, is still an error."""
    run, block = Run("09_test", {}), find_blocks(build("llama"))[0]
    with pytest.raises(ValueError, match="width=1000 does not fit"), run.where_applicable("widths"):
        NarrowMLP(1000).n_params(block)
    assert run.record()["left_out"] == {}


@pytest.mark.parametrize(("name", "experts"), [("llama", 0), ("mixtral", 3), ("qwen3_moe", 2)])
def test_a_run_says_where_mlps_have_no_neurons(name, experts, notebooks, capsys):
    run, model = Run("09_test", {}), build(name)
    model.source = Source("owner/name")
    run.uses(model)
    printed = capsys.readouterr().out
    assert bool(printed) == bool(run.record()["left_out"]) == bool(experts)
    assert not experts or f"NarrowPlusLinear. {experts} of its MLP blocks have no neurons" in printed


def test_a_seed_covers_python_numpy_and_torch():
    def draw():
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = draw()
    assert first == draw()
    seed_everything(4)
    assert first != (random.random(), np.random.rand(), torch.rand(1).item())
