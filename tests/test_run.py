"""notebooks/run.py: what is asked for is run, in folders of its own, or one line says why not, before anything runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
import papermill
import pytest
from running import NOTEBOOKS, parameters, run, what_is_refused, what_runs  # noqa: F401


@pytest.mark.parametrize("path", NOTEBOOKS, ids=run.name_of)
def test_parameters_are_those_that_papermill_finds(path):
    assert set(parameters.defaults(path)) == set(papermill.inspect_notebook(str(path)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "huge"], "Unknown profile 'huge'; known are cpu, gpu, smoke"),
        (["--profile", "../profiles/smoke"], "Unknown profile"),
        (["--profile", ""], "Unknown profile ''"),
        (["--only", "77"], "No notebook matches '77'"),
        (["--only", "02", "77"], "No notebook matches '77'"),
        (["--only", ""], "No notebook matches ''"),
        (["--only", "06_language"], "With or without --studies there is 06_language"),
        (["--figure", "77_none"], "No figure '77_none'; there are 01_parameter_share, "),
        (["--figure", "../figures/04_pareto"], "No figure '../figures/04_pareto'"),
        (["--figure", "04_pareto", "--only", "02"], "leave --only out"),
        (["-p", "SEEED", "1"], "unknown parameters ['SEEED']"),
        (["--only", "02", "-p", "TESTED", "3"], "TESTED belongs to 03_layer_sensitivity, not to 02_single_block"),
        (["-p", "TASK_ITEMS", "3"], "TASK_ITEMS belongs to studies/04_healing, studies/05_healing"),
        (["--figure", "03_additivity", "-p", "SPARSITY", ".5"], "SPARSITY belongs to 05_subfit"),
        (["-p", "SEED", "1", "-p", "SEED", "2"], "each name once"),
        (["-p", "PROFILE", "cpu"], "follows from --profile"),
        (["--publish", "-p", "SEED", "1"], "unchanged cpu profile only"),
        (["--publish", "--profile", "smoke"], "unchanged cpu profile only"),
    ],
)
def test_bad_requests_run_nothing(arguments, message, refused):
    assert message in refused(arguments)


@pytest.mark.parametrize("arguments", [["--only"], ["-p", "SEED"], ["--figure"], ["--wrong"]])
def test_an_option_without_its_value_runs_nothing(arguments, seen, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2 and not seen
    assert "usage:" in capsys.readouterr().err


# figures


@pytest.mark.parametrize(("figure", "notebook"), [("04_pareto", "04_full_replacement"), ("04_ablation", "studies/04_ablation")])
def test_a_figure_alone_is_drawn_by_its_notebook_or_study(figure, notebook, seen):
    assert run.main(["--figure", figure]) == 0
    assert [name for name, *_ in seen] == [notebook]


@pytest.mark.parametrize(
    "record",
    ["{", "[]", "null", '{"provenance": {}}', '{"provenance": null}', '{"provenance": {"notebook": "09_gone"}}', "é"],
)
def test_a_figure_whose_record_leads_nowhere_is_refused(record, tmp_path, monkeypatch, refused):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "09_lost.json").write_bytes(record.encode("latin-1"))
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert "figures/09_lost.json" in refused(["--figure", "09_lost"])


# places


@pytest.fixture
def standing(tmp_path, monkeypatch) -> Path:
    """The folder in which the user stands, who is at home there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["my-model", "./my-model", "~/my-model", "a/../my-model", "my-model/"])
def test_a_local_model_may_be_named_from_where_the_user_stands(name, standing, seen):
    for folder in ("my-model", "a"):
        (standing / folder).mkdir()
    assert run.main(["-p", "MODEL", name, "-p", "SEED", "3"]) == 0
    assert {given["MODEL"] for _, given, _ in seen} == {str(standing / "my-model")}
    assert {given["SEED"] for _, given, _ in seen} == {3}
    (drawn,) = {given["FIGURES"] for _, given, _ in seen}
    assert drawn.startswith("figures/my-model-")


def test_texts_may_be_named_from_where_the_user_stands(standing, seen):
    (standing / "my text.txt").touch()
    assert (
        run.main(["--only", "04", "-p", "CALIBRATION_TEXT", "{~/my text.txt: 1, bundled/wiki: 1}", "-p", "TEXT", "my text.txt"])
        == 0
    )
    assert seen[0][1]["TEXT"] == str(standing / "my text.txt")
    assert seen[0][1]["CALIBRATION_TEXT"] == {str(standing / "my text.txt"): 1, "bundled/wiki": 1}


def test_what_is_no_place_is_not_looked_up(standing, seen):
    """A folder that happens to have the name of a device, a method or a bundled model changes nothing."""
    for name in ("cuda", "uniform", "bundled/smollm2-135m", "small", "figures"):
        (standing / name).mkdir(parents=True)
    given = {"DEVICE": "cuda", "MODEL": "bundled/smollm2-135m", "VISION_MODEL": "small", "FIGURES": "figures"}
    assert run.main(["--only", "06", *(part for item in given.items() for part in ("-p", *item))]) == 0
    assert given.items() <= seen.pop()[1].items()
    assert run.main(["--only", "01", "-p", "CONTEXT", "1024"]) == 0  # no text
    assert seen.pop()[1]["CONTEXT"] == 1024


def test_every_parameter_may_be_given_as_the_notebook_has_it(seen):
    for path in NOTEBOOKS:
        known = {name: value for name, value in parameters.defaults(path).items() if name != "PROFILE"}
        arguments = [part for name, value in known.items() for part in ("-p", name, str(value))]
        assert run.main(["--only", path.stem, *(["--studies"] if path.parent != parameters.HERE else []), *arguments]) == 0
        assert seen.pop()[1] == known


@pytest.mark.parametrize(
    "name", ["./gone", "../gone", "~/gone", "~nobody/gone", "/gone", "a/b/c", "gone/", "a\\b", "gone.gguf", "gone.txt"]
)
def test_a_place_that_is_not_there_is_refused_at_once(name, standing, refused):
    for parameter in ("MODEL", "TEXT"):
        assert f"{name!r} is not there" in refused(["--only", "04", "-p", parameter, name])


def test_figures_are_drawn_where_it_was_asked_for(standing, seen):
    for name, place in {"new": "new", "~/new": str(standing / "new"), "/x/y": "/x/y"}.items():
        assert run.main(["--only", "02", "-p", "FIGURES", name]) == 0
        assert seen.pop()[1]["FIGURES"] == place


def test_a_changed_run_never_draws_over_committed_figures():
    assert run.figures_folder("cpu", "", changed=False) is None
    assert run.figures_folder("cpu", "owner/name", changed=True) == "figures/owner--name"
    assert run.figures_folder("cpu", "", changed=True) == "executed/cpu/figures"
    assert run.figures_folder("gpu", "", changed=False) == "figures/gpu"
    assert run.figures_folder("gpu", "owner/name", changed=True) == "figures/gpu/owner--name"
    assert run.figures_folder("smoke", "", changed=False) == "executed/smoke/figures"
    assert run.figures_folder("smoke", "owner/name", changed=True) == "executed/smoke/owner--name/figures"
    assert run.copies_folder("cpu", "") == "executed/cpu"


def test_two_models_never_share_a_folder():
    models = [
        "owner1/x",
        "owner2/x",
        "x",
        "/a/x",
        "/b/x",
        "/a/x/",
        "/a/b/x",
        "bundled/x",
        "/a/x y",
        "/a/x-y",
        "/",
        "/a/..x",
        "/a/é",
    ]
    for profile in ("cpu", "smoke", "gpu"):
        copies = {run.copies_folder(profile, model) for model in models}
        figures = {run.figures_folder(profile, model, changed=True) for model in models}
        assert len(copies) == len(figures) == len(models)
        assert all(".." not in Path(place).parts and len(Path(place).parts) <= 4 for place in copies | figures)
    assert len({run.figures_folder(profile, "x", changed=True) for profile in ("cpu", "smoke", "gpu")}) == 3
    assert len(parameters.folder_name("/" + "x" * 300)) < 200


# kernels


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Path:
    """A notebook of one cell, in a repository of its own."""
    (folder := tmp_path / "notebooks").mkdir()
    for module in (run, parameters):
        monkeypatch.setattr(module, "HERE", folder)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    cell = nbformat.v4.new_code_cell("X = 1", metadata={"tags": ["parameters"]})
    cells, about = (
        [cell, nbformat.v4.new_code_cell("import time; time.sleep(1)\nprint(X)")],
        {"language_info": {"name": "python"}},
    )
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=about), folder / "01_x.ipynb")
    return folder / "01_x.ipynb"


def test_a_long_folder_for_temporary_files_is_no_obstacle(notebook, tmp_path, monkeypatch):
    """The name of a socket has at most 107 bytes."""
    (long := tmp_path / ("é" * 60)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    copy, by_cell = run.execute(notebook, {"X": 3}, "executed/cpu")
    assert by_cell.startswith("[3] "), "the slow one; the second holds the parameters"
    assert nbformat.read(copy, as_version=4).cells[-1].outputs[0].text == "3\n"
    assert (tmp_path / "executed" / run.MARK).is_file() and not list(long.iterdir())


def test_without_a_short_folder_the_kernel_is_not_started(notebook, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 90)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(run.os, "access", lambda *a: False)
    with pytest.raises(run.Refused, match="set TMPDIR"):
        run.execute(notebook, {}, "executed/cpu")


def test_a_copy_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "executed").write_text("a file")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.main(["--only", "02"]) == 1
    assert "could not be written" in capsys.readouterr().err


def test_behind_a_notebook_that_failed_the_others_run(monkeypatch, capsys):
    def execute(notebook, parameters, folder):
        if notebook.stem.startswith("01"):
            raise papermill.exceptions.PapermillExecutionError(2, 3, "x", "ValueError", "no hub", [])
        return notebook, "all of its cells"

    monkeypatch.setattr(run, "execute", execute)
    assert run.main(["--only", "01", "02"]) == 1
    said = capsys.readouterr()
    assert "02_single_block done" in said.out and "01_parameter_share, cell 3: ValueError: no hub" in said.err
    monkeypatch.setattr(run, "execute", lambda notebook, *of: (notebook, ""))
    assert run.main(["--only", "01", "02"]) == 0
