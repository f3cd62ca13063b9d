"""Jobs on a real cluster of two worker processes: the bits of this process, whatever happens to a worker."""

import os
import signal
import threading
import time
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import capture_quietly
from joblib import parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tiny_models import build, random_windows

from mlpreplace import ConvMLP, LowRank, Mean, NarrowMLP, Training, capture, compare, find_blocks, fit, register_architecture
from mlpreplace.fitting.fit import fit_all
from mlpreplace.models.architectures import ARCHITECTURES, known_here
from mlpreplace.planning import second_order_damage
from mlpreplace.runtime.parallel import elsewhere, spread
from mlpreplace.statistics.groups import InGroups

SLOW = Training(epochs=20, batch_tokens=16, check_tokens=64, patience=10**6)  # seconds, with a checkpoint every few milliseconds

CHECKPOINTS = "fit-checkpoint-*.safetensors"
HERE = os.environ.setdefault("MLPREPLACE_TEST_PROCESS", str(os.getpid()))  # which workers read from their environment


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The cache of all workers."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def cluster(shared):
    """A client of two worker processes of this machine, of one thread each; one that dies is replaced."""
    distributed = pytest.importorskip("distributed", reason="needs the extra: pip install -e '.[cluster]'")
    options = {"dashboard_address": None, "worker_dashboard_address": None, "host": "127.0.0.1"}
    options["env"] = {"MLPREPLACE_CACHE": str(shared)}  # which a worker that comes later has as well
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, **options) as workers:
        with distributed.Client(workers) as client:
            yield client


@pytest.fixture
def pairs():
    """(model, blocks, statistics) of the tiny Llama with every window sampled."""
    model = build("llama")
    return model, *capture_quietly(model, random_windows(40), sample_windows=None, validation_windows=8)


def same(one, other) -> bool:
    """Whether two plans, {block: [replacement]}, hold the same bits and the same errors."""
    a, b = ([r for fitted in found.values() for r in fitted] for found in (one, other))
    equal = (
        x.body.state_dict().keys() == y.body.state_dict().keys()
        and all(map(torch.equal, x.body.state_dict().values(), y.body.state_dict().values()))
        and x.report.validation == y.report.validation
        for x, y in zip(a, b, strict=True)
    )
    return all(equal)


def stand_for_nothing(*_):
    """A job for workers that says who they are."""
    return os.getpid(), torch.get_num_threads()


def die_once(flag: str, value):
    """A job that kills the first worker that runs it; two may begin at once, and one of them makes the file."""
    if str(os.getpid()) == HERE:  # where one worker is left, joblib runs jobs in this process
        raise AssertionError("the jobs were to run elsewhere")
    try:
        open(flag, "x").close()
    except FileExistsError:
        return value
    os.kill(os.getpid(), signal.SIGKILL)


class DiesOnce(torch.nn.Module):
    """A replacement's body that kills the first worker in which it is run."""

    def __init__(self, flag: str, body: torch.nn.Module):
        super().__init__()
        self.flag, self.body = flag, body

    def forward(self, x):
        return die_once(self.flag, self.body(x))


def where_blocks_are(model) -> tuple:
    from mlpreplace import find_blocks

    return tuple(block.name for block in find_blocks(model))


def test_without_a_configuration_jobs_run_here():
    assert {pid for pid, _ in spread(stand_for_nothing, [()] * 4, prepare=stand_for_nothing, threads=1)} == {os.getpid()}
    with parallel_config("threading", n_jobs=2):
        assert not elsewhere()
        assert {pid for pid, _ in spread(stand_for_nothing, [()] * 4, prepare=stand_for_nothing, threads=1)} == {os.getpid()}


@pytest.mark.parametrize("threads", [1, 3])
def test_jobs_have_the_threads_they_were_given_and_the_caller_keeps_its_own(threads):
    with parallel_config("loky", n_jobs=2):
        assert elsewhere()
        found = list(spread(stand_for_nothing, [()] * 4, prepare=stand_for_nothing, threads=threads))
    assert os.getpid() not in {pid for pid, _ in found}
    assert {n for _, n in found} == {threads}
    assert torch.get_num_threads() == 1


def test_two_workers_have_part_in_it(cluster):
    with parallel_config("dask"):
        pids = {pid for pid, _ in spread(stand_for_nothing, [(i,) for i in range(40)], prepare=stand_for_nothing, threads=1)}
    assert os.getpid() not in pids and pids <= set(cluster.run(os.getpid).values())
    assert len(cluster.run(os.getpid)) == 2


@pytest.fixture(params=["dask", "loky"])
def backend(request):
    """A place for jobs that is not this process."""
    if request.param == "dask":
        request.getfixturevalue("cluster")
    return request.param


def test_fits_elsewhere_are_those_of_this_process(backend, pairs):
    _, blocks, stats = pairs
    families, options = [NarrowMLP(16), LowRank(4), ConvMLP(8)], dict(training=Training(epochs=2), progress=False)
    here = fit_all(blocks, stats, families, **options)
    with parallel_config(backend, n_jobs=2):
        there = fit_all(blocks, stats, families, **options)
    assert same(here, there)


def test_sweeps_elsewhere_are_those_of_this_process(backend, pairs):
    model, blocks, stats = pairs
    plans = {(b.name, f): {b: fit(b, stats, f)} for b in blocks for f in (NarrowMLP(16), ConvMLP(8))} | {"dense": {}}
    held = random_windows(7, seed=5)
    here = compare(model, plans, held, batch_size=2, progress=False)
    with parallel_config(backend, n_jobs=2):
        there = compare(model, plans, held, batch_size=2, progress=False)
    assert list(there) == list(here)
    for label, measured in here.items():
        assert np.array_equal(measured.nll, there[label].nll) and np.array_equal(measured.kl, there[label].kl)


def test_a_registered_architecture_reaches_the_workers(cluster, registry, pairs):
    """Workers that know nothing of a type sweep plans for it as well, without a guess of their own."""
    model, *_ = pairs
    model.config.model_type = "mine"
    register_architecture("mine", *ARCHITECTURES["llama"])
    blocks, stats = capture_quietly(model, random_windows())
    plans, held = {"one": {blocks[1]: fit(blocks[1], stats, NarrowMLP(16))}}, random_windows(4, seed=5)
    here = compare(model, plans, held, batch_size=2, progress=False)
    with parallel_config("dask"):
        assert set(spread(where_blocks_are, [(model,)] * 4, prepare=known_here(), threads=1)) == {tuple(b.name for b in blocks)}
        there = compare(model, plans, held, batch_size=2, progress=False)
    assert np.array_equal(here["one"].kl, there["one"].kl)


def test_prices_of_groups_elsewhere_are_those_of_this_process(backend, pairs):
    model, *_ = pairs
    windows = random_windows(12)
    blocks = find_blocks(model)
    stats = capture(model, blocks, windows, validation_windows=4, memory_budget=0, progress=False)
    assert isinstance(stats, InGroups)
    families = {block: [NarrowMLP(16), LowRank(4), Mean()] for block in blocks}
    here = second_order_damage(model, families, windows[8:], stats, progress=False)
    with parallel_config(backend, n_jobs=2):
        there = second_order_damage(model, families, windows[8:], stats, progress=False)
    assert here == there


# a worker is killed


def test_a_worker_that_dies_in_the_middle_of_a_group_changes_no_price(cluster, pairs, tmp_path):
    model, blocks, stats = pairs
    windows, plain = random_windows(4, seed=5), fit(blocks[1], stats, Mean())
    fatal = deepcopy(plain)
    fatal.body = DiesOnce(str(tmp_path / "flag"), plain.body)
    families = {block: [NarrowMLP(16), LowRank(4)] for block in blocks}
    cluster.wait_for_workers(2, timeout=60)  # an earlier test may have killed one
    here = second_order_damage(model, families | {blocks[1]: [plain, LowRank(4)]}, windows, stats, progress=False)
    with parallel_config("dask"):
        there = second_order_damage(model, families | {blocks[1]: [fatal, LowRank(4)]}, windows, stats, progress=False)
    assert (tmp_path / "flag").exists()
    assert here == there


def test_a_killed_worker_of_a_cluster_loses_no_job(cluster, tmp_path):
    """Large jobs, too: what they carry must not have been with the dead worker alone."""
    jobs = [(str(tmp_path / "flag"), torch.full((100_000,), i)) for i in range(20)]
    cluster.wait_for_workers(2, timeout=60)
    with parallel_config("dask"):
        found = list(spread(die_once, jobs, prepare=stand_for_nothing, threads=1))
    assert (tmp_path / "flag").exists()
    assert [int(value[0]) for value in found] == list(range(20))


def test_a_killed_worker_of_this_machine_is_an_error_and_a_rerun_is_whole(tmp_path):
    jobs = [(str(tmp_path / "flag"), i) for i in range(8)]
    with parallel_config("loky", n_jobs=2):
        with pytest.raises(TerminatedWorkerError, match="SIGKILL"):
            list(spread(die_once, jobs, prepare=stand_for_nothing, threads=1))
        assert list(spread(die_once, jobs, prepare=stand_for_nothing, threads=1)) == list(range(8))


def test_trainings_survive_the_death_of_both_workers(cluster, shared, pairs, monkeypatch):
    """Killed one after the other, in the middle of trainings that leave checkpoints: the bits of a run that nobody disturbed."""
    _, blocks, stats = pairs
    options = dict(training=SLOW, progress=False)
    whole = fit_all(blocks, stats, [NarrowMLP(16), LowRank(8)], **options)
    monkeypatch.setenv("MLPREPLACE_CACHE", str(shared))
    cluster.wait_for_workers(2, timeout=60)  # an earlier test may have killed one
    results, doomed, killed = shared / "results", list(cluster.run(os.getpid).values()), []

    def kill():
        for pid in doomed:
            seen = checkpoints(results)
            while checkpoints(results) <= seen:
                time.sleep(0.005)
            killed.append((pid, set(results.glob("fit-*")) - set(results.glob(CHECKPOINTS))))
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with parallel_config("dask"):
        found = fit_all(blocks, stats, [NarrowMLP(16), LowRank(8)], cached=True, **options)
    killer.join(timeout=10)
    assert len(killed) == 2 and len(killed[0][1]) < 2 * len(blocks), "they were to be killed in the middle"
    assert same(whole, found)
    here = fit_all(blocks, stats, [NarrowMLP(16), LowRank(8)], cached=True, **options)
    assert same(whole, here)


def checkpoints(results) -> int:
    """When the last checkpoint was written."""
    found = []
    for path in results.glob(CHECKPOINTS):
        try:
            found.append(path.stat().st_mtime_ns)
        except FileNotFoundError:  # a training that ended since
            pass
    return max(found, default=0)
