"""A run that was interrupted anywhere, in any way, ends with the same figures when it is started again."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import BYTES, byte_tokenizer, capture_quietly, save_locally
from forked import SERVER
from tiny_models import build, random_windows

from mlpreplace import LowRank, NarrowMLP, Training, compare
from mlpreplace.fitting import fit_all
from mlpreplace.runtime.files import cache_dir

ROOT = Path(__file__).resolve().parents[1]
TIMED = re.compile(".*seconds|prefill|decode|share_of_ideal")


@pytest.fixture
def start(tmp_path):
    """start(name, only): ``make smoke`` of these notebooks on a tiny model, cache and figures of that name: a process."""
    if not (cache_dir() / "assets" / ".complete").exists():
        pytest.skip("the bundled texts are not there: make setup")
    model = build("llama", num_hidden_layers=6, vocab_size=BYTES, max_position_embeddings=256)
    save_locally(model, tmp_path / "tiny", byte_tokenizer())
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")  # executed copies go beside it

    def start(name: str, only: str) -> subprocess.Popen:
        cache = tmp_path / name / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / "assets").exists():
            (cache / "assets").symlink_to((cache_dir() / "assets").resolve())
        parameters = {"MODEL": tmp_path / "tiny", "DEVICE": "cpu", "FIGURES": tmp_path / name / "figures"}
        command = [sys.executable, tmp_path / "notebooks" / "run.py", "--profile", "smoke", "--only", *only.split()]
        command += [str(part) for item in parameters.items() for part in ("-p", *item)]
        with (tmp_path / name / "log").open("a") as log:
            environment = os.environ | {"MLPREPLACE_CACHE": str(cache)}
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, preexec_fn=heed_interrupts)

    return start


def heed_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def rows(folder: Path) -> dict[str, list[dict]]:
    """{figure: its rows without times}."""
    figures = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if "speed" not in path.stem}
    return {name: [{k: v for k, v in row.items() if not TIMED.match(k)} for row in f["rows"]] for name, f in figures.items()}


def kernel(process: subprocess.Popen) -> list[psutil.Process]:
    """What a runner has started by now."""
    return psutil.Process(process.pid).children(recursive=True)


def kill_all(process: subprocess.Popen) -> None:
    """As a machine that goes down: runner and kernel at once."""
    for victim in [*kernel(process), process]:
        with suppress(psutil.NoSuchProcess):  # it may end by itself just now
            victim.send_signal(signal.SIGKILL)


def kill_kernel(process: subprocess.Popen) -> None:
    """As an operating system out of memory: the process that holds it goes, and the runner says what happened."""
    while not (started := kernel(process)) and process.poll() is None:
        time.sleep(0.01)
    for victim in started:
        with suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)


def interrupt(process: subprocess.Popen) -> None:
    """As Ctrl-C in a terminal, which reaches the runner; the kernel has a session of its own."""
    process.send_signal(signal.SIGINT)


@pytest.mark.notebooks
@pytest.mark.bundled
@pytest.mark.parametrize(
    ("only", "figures", "kills"),
    [
        ("03", 3, [kill_all, kill_kernel, interrupt]),
        pytest.param("01 02 03 04 05 06", 19, [kill_all, kill_kernel, interrupt, kill_all, kill_kernel], marks=pytest.mark.slow),
    ],
)
def test_smoke_killed_at_random_moments_draws_the_same_figures(only, figures, kills, start, tmp_path):
    """A run that is whole before its kill comes starts from nothing again."""

    def figures_of(name: str) -> dict[str, list[dict]]:
        return rows(tmp_path / name / "figures")

    def kept() -> set[str]:
        return {path.name for path in (tmp_path / "disturbed" / "cache" / "results").glob("*.safetensors")}

    begun, beside = time.monotonic(), set((tmp_path / "notebooks").iterdir())
    assert start("undisturbed", only).wait(timeout=1800) == 0, (tmp_path / "undisturbed" / "log").read_text()
    seconds, whole, chance = time.monotonic() - begun, figures_of("undisturbed"), random.Random(0)
    assert len(whole) == figures
    kills = [*kills]
    while kills:
        process, before = start("disturbed", only), kept()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.uniform(0.2, 0.9) * seconds)
        if process.poll() is None:
            kills[0](process)
        if process.wait(timeout=120) == 0:  # it was whole before its kill came, or as it came
            assert figures_of("disturbed") == whole
            shutil.rmtree(tmp_path / "disturbed" / "cache" / "results")
            shutil.rmtree(tmp_path / "disturbed" / "figures")
            continue
        kills.pop(0)
        assert kept() >= before, "what was whole is kept"
    assert start("disturbed", only).wait(timeout=1800) == 0, (tmp_path / "disturbed" / "log").read_text()
    assert figures_of("disturbed") == whole
    assert set((tmp_path / "notebooks").iterdir()) == beside, "a killed kernel leaves nothing among the notebooks"


# a full disk, and two at once


def fits(cache: Path, limit: int = 0, ready: Path | None = None, wait_for: int = 1) -> list:
    """Captures, fits and a sweep, cached in ``cache``: the KL of every plan.

    Args:
        limit: bytes that a file may have, 0 for any number.
        ready: a file to make; the work begins when ``wait_for`` files of its folder are there.
    """
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if ready:
        ready.touch()
        while len(list(ready.parent.iterdir())) < wait_for:
            time.sleep(0.01)
    os.environ["MLPREPLACE_CACHE"] = str(cache)
    model = build("llama")
    blocks, stats = capture_quietly(model, random_windows(40), sample_windows=None, validation_windows=8, cached=True)
    how = Training(epochs=4, batch_tokens=16, check_tokens=64)
    fitted = fit_all(blocks, stats, [NarrowMLP(16), LowRank(4)], training=how, n_jobs=1, cached=True, progress=False)
    plans = {(b.name, i): {b: r} for b, several in fitted.items() for i, r in enumerate(several)}
    measured = compare(model, plans, random_windows(6, seed=5), batch_size=2, cached=True, progress=False)
    return [m.kl.tolist() for m in measured.values()]


@pytest.fixture(scope="module")
def launch():
    """launch(arguments of ``fits``): its result, from a process of its own."""
    pools: list[ProcessPoolExecutor] = []

    def launch(*arguments) -> Future:
        pools.append(ProcessPoolExecutor(1, mp_context=SERVER))
        return pools[-1].submit(fits, *arguments)

    yield launch
    for pool in pools:
        pool.shutdown()


@pytest.fixture(scope="module")
def alone(launch, tmp_path_factory):
    """(result, folder of the cached results) of a run that nothing disturbs."""
    cache = tmp_path_factory.mktemp("alone")
    return launch(cache).result(timeout=300), cache / "results"


def test_two_processes_that_compute_the_same_do_not_disturb_each_other(launch, alone, tmp_path):
    (expected, kept), ready = alone, tmp_path / "ready"
    ready.mkdir()
    both = [launch(tmp_path / "shared", 0, ready / str(i), 2) for i in range(2)]
    assert [process.result(timeout=300) for process in both] == [expected, expected]
    assert launch(tmp_path / "shared").result(timeout=300) == expected
    names = [{path.name for path in folder.iterdir()} for folder in (kept, tmp_path / "shared" / "results")]
    assert names[0] == names[1] and not any(name.startswith((".", "training")) for name in names[0])


def test_on_a_full_disk_a_run_says_so_and_the_next_goes_on(launch, alone, tmp_path):
    """No file may grow beyond a limit: first the capture's, which is the largest, then those of the trainings."""
    expected, kept = alone
    results = tmp_path / "full" / "results"
    capture = max(kept.iterdir(), key=lambda path: path.stat().st_size)
    for limit in (capture.stat().st_size - 1, 2000):
        with pytest.raises(OSError, match="Make room"):
            launch(tmp_path / "full", limit).result(timeout=300)
        assert all((kept / path.name).stat().st_size == path.stat().st_size for path in results.iterdir()), "none is a part"
        shutil.copy(capture, results)
    assert launch(tmp_path / "full").result(timeout=300) == expected
