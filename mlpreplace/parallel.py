"""Jobs side by side: in this process, or where a ``joblib.parallel_config`` places them, with the same results to the bit.

    with joblib.parallel_config("loky", n_jobs=4):      # processes of this machine
    with joblib.parallel_config("dask"):                # workers of a dask.distributed client, on any machines

A job carries all it needs, so a worker that dies takes nothing along: dask gives its jobs to another one, loky raises
TerminatedWorkerError. What was cached by then is whole, and a rerun goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from joblib import Parallel, delayed
from joblib.parallel import get_active_backend

from .architectures import ARCHITECTURES, Architecture


def elsewhere() -> bool:
    """Whether jobs are placed in other processes, each with a copy of what it works on."""
    backend, _ = get_active_backend(prefer="threads")  # which is what an empty configuration comes to
    return not getattr(backend, "supports_sharedmem", False)


def spread(function: Callable, jobs: Sequence[tuple], *, threads: int, n_jobs: int | None = None) -> Iterator:
    """``function(*job)`` of every job, in order, each as soon as it and those before it are done.

    Args:
        threads: of PyTorch in each job: sums depend on it in their last bits.
        n_jobs: jobs at a time, -1 for as many as there are cores; None for what the ``parallel_config`` says, else -1.
    """
    if n_jobs is None:
        n_jobs = get_active_backend()[1] or -1
    known = dict(ARCHITECTURES)  # with those that were registered or guessed here
    here = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # a job is one tuple: what joblib sees of it as an array of its own, it leaves with a single worker of the cluster
        pool = Parallel(n_jobs=n_jobs, prefer="threads", return_as="generator")
        yield from pool(delayed(_run)(function, job, threads, known) for job in jobs)
    finally:
        torch.set_num_threads(here)


def _run(function: Callable, job: tuple, threads: int, known: dict[str, Architecture | Callable]):
    ARCHITECTURES.update(known)
    torch.set_num_threads(threads)
    return function(*job)
