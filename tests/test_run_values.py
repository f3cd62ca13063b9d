"""Values of the command line and of profiles: of the kind that the notebook has, or refused in one line."""

from __future__ import annotations

import pytest
from running import FOLDER, NOTEBOOKS, parameters, run, what_is_refused, what_runs  # noqa: F401


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("LEARNING_RATE", "1e-3", 0.001),
        ("LEARNING_RATE", "2", 2),
        ("SEED", "3", 3),
        ("SEED", "-3", -3),
        ("EPOCHS", " 4 ", 4),
        *(("MODEL", name, name) for name in ("no", "yes", "null", "1e3", "123", "0x10", "2024-01-01", "a: b", "[x]", "{x: 1}")),
        ("DEVICE", "cuda:0", "cuda:0"),
        ("SIZES", "[1e-3, .5, 1]", [0.001, 0.5, 1]),
        ("SIZES", "[]", []),
        ("TOKEN_COUNTS", "[16, 32]", [16, 32]),
        ("TEXT", "on", "on"),
        ("TEXT", "{bundled/wiki: 1, no: 2e-1}", {"bundled/wiki": 1, "no": 0.2}),
    ],
)
def test_a_value_is_of_the_kind_that_the_notebook_has(name, text, value, seen):
    assert run.main(["--only", "02", "-p", name, text]) == 0
    found = seen[0][1][name]
    assert found == value and type(found) is type(value)
    if isinstance(value, list):
        assert list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(("SEED", text, "expected a whole number") for text in ("1.5", "true", "one", "1e3", "[1]", "", "null", "0x10")),
        *(("LEARNING_RATE", text, "expected a number") for text in ("fast", "nan", "inf", ".inf", "[1]", "", "true", "1/3")),
        *(("SIZES", text, "expected a list") for text in ("0.5", "half", "{a: 1}", "", "null")),
        ("SIZES", "[0.5, big]", "expected a number"),
        ("SIZES", "[[0.5]]", "expected a number"),
        ("TOKEN_COUNTS", "[16, 1.5]", "expected a whole number"),
        ("TOKEN_COUNTS", "[16, true]", "expected a whole number"),
        *(("SIZES", text, "no YAML") for text in ("[1, 2", "[1\x00]", "[" * 5000, "&a [*b]", "[1]: [", "\t- 1")),
        ("TEXT", "{bundled/wiki: 1", "no YAML"),
        ("TEXT", "{bundled/wiki: much}", "expected a number"),
        ("TEXT", "{}", "expected a name"),
        ("MODEL", "  ", "expected a name"),
    ],
)
def test_a_value_of_another_kind_is_refused(name, text, message, refused):
    said = refused(["--only", "02", "-p", name, text])
    assert message in said and f"{name} of 02_single_block" in said


def test_strings_in_a_list_are_read_as_they_are_written(seen):
    assert run.main(["--only", "05", "-p", "COMPARED", "[uniform, no, 1e3]"]) == 0
    assert seen[0][1]["COMPARED"] == ["uniform", "no", "1e3"]


# profiles


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """write(change): the smoke profile as text, changed."""
    monkeypatch.setattr(parameters, "PROFILES", tmp_path)

    def write(change) -> None:
        text = change((FOLDER / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))
        (tmp_path / "smoke.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("02_single_block:", "02_single_block:\n  TOKENS: 1"), "unknown parameters ['TOKENS']"),
        (lambda text: text.replace("common:", "common:\n  TOKENS: 1"), "unknown parameters ['TOKENS']"),
        (lambda text: text.replace("02_single_block:", "02_single_blocks:"), "02_single_blocks"),
        (lambda text: text.replace("01_parameter_share: {}", ""), "no section '01_parameter_share'"),
        (lambda text: text.replace("SEQ_LEN: 32", "SEQ_LEN: 32.5"), "expected a whole number as 512, got '32.5'"),
        (lambda text: text.replace("SEQ_LEN: 32", "SEQ_LEN: yes"), "expected a whole number"),
        (lambda text: text.replace("SIZES: [0.125, 0.5]", "SIZES: 0.5"), "SIZES of 02_single_block: expected a list"),
        (lambda text: text.replace("SEQ_LEN: 32", "SEQ_LEN:"), "expected a whole number as 512, got ''"),
        (lambda text: text + "[", "no YAML"),
        (lambda text: text + "\tA: 1", "no YAML"),
        (lambda text: "- a\n- b\n", "expected sections"),
        (lambda text: "common: 3\n", "expected sections"),
        (lambda text: "", "expected sections"),
        (lambda text: ("# é\n" + text).encode("latin-1"), "utf-8"),
    ],
)
def test_a_wrong_profile_is_one_line(change, message, profile, refused):
    profile(change)
    assert message in refused(["--profile", "smoke"])


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("5", 5)])
def test_values_of_a_profile_are_of_the_kind_that_the_notebook_has(text, value, profile, seen):
    profile(lambda old: old.replace("02_single_block:", f"02_single_block:\n  LEARNING_RATE: {text}\n  DEVICE: no  # cuda"))
    assert run.main(["--profile", "smoke", "--only", "02"]) == 0
    assert seen[0][1]["LEARNING_RATE"] == value and seen[0][1]["DEVICE"] == "no"


@pytest.mark.parametrize("profile", ["smoke", "gpu"])
def test_profiles_name_real_parameters(profile, seen):
    assert run.main(["--profile", profile]) == run.main(["--profile", profile, "--studies"]) == 0
    assert len(seen) == len(NOTEBOOKS)
    assert all(given["PROFILE"] == profile and given["FIGURES"] != "figures" for _, given, _ in seen)
