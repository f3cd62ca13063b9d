"""Jobs in parallel: in this process, or where a ``joblib.parallel_config`` places them, with bitwise equal results.

    with joblib.parallel_config("loky", n_jobs=4):      # processes of this machine
    with joblib.parallel_config("dask"):                # workers of a dask.distributed client, on any machines

A job carries all it needs. Where a worker dies, dask gives its jobs to another one and loky raises TerminatedWorkerError.
What was cached by then is whole, and a rerun continues from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from joblib import Parallel, delayed
from joblib.parallel import get_active_backend


def elsewhere() -> bool:
    """Whether jobs run in other processes, each with a copy of its data."""
    backend, _ = get_active_backend(prefer="threads")  # as in spread, where nothing is configured
    return not getattr(backend, "supports_sharedmem", False)


def spread(
    function: Callable, jobs: Sequence[tuple], *, prepare: Callable[[], object], threads: int, n_jobs: int | None = None
) -> Iterator:
    """``function(*job)`` of every job, in order, each as soon as it and those before it are done.

    Args:
        prepare: called before each job, in the process of the job: registers what that process must know.
        threads: of PyTorch in each job. The last bits of sums depend on it.
        n_jobs: jobs at a time, -1 for as many as there are cores; None takes it from the ``parallel_config``, else -1.
    """
    if n_jobs is None:
        n_jobs = get_active_backend()[1] or -1
    here = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # a job is one tuple: arrays that joblib sees as arguments are sent to one worker only, and die with it
        pool = Parallel(n_jobs=n_jobs, prefer="threads", return_as="generator")
        yield from pool(delayed(_run)(function, job, prepare, threads) for job in jobs)
    finally:
        torch.set_num_threads(here)


def _run(function: Callable, job: tuple, prepare: Callable[[], object], threads: int):
    prepare()
    torch.set_num_threads(threads)
    return function(*job)
