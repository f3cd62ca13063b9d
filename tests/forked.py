"""Processes forked from a server that has imported the package: they start in milliseconds, new interpreters in seconds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

SERVER = get_context("forkserver")  # one for each process that runs tests; it starts with the first fork
SERVER.set_forkserver_preload(["ipykernel.kernelapp", "matplotlib.backends.backend_pdf", "mlpreplace.reporting.plots"])


class Kernel:
    """A forked Jupyter kernel with what jupyter_client uses of a ``subprocess.Popen``."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess):
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def launch_kernel(command: list[str], *, env: dict[str, str], prepare: Callable[[], object] | None = None, **_) -> Kernel:
    """In place of jupyter_client's: the arguments of ``python -m ipykernel_launcher`` go to a forked process.

    Args:
        prepare: called in the process before its kernel starts.
    """
    process = SERVER.Process(target=_serve, args=(command[command.index("-f") :], os.getcwd(), env, prepare))
    process.start()
    while os.getpgid(process.pid) != process.pid:  # or its signals would reach the tests
        time.sleep(0.001)
    return Kernel(process)


def _serve(arguments: list[str], cwd: str, env: dict[str, str], prepare: Callable[[], object] | None) -> None:
    from ipykernel.kernelapp import launch_new_instance

    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if prepare is not None:
        prepare()
    launch_new_instance(argv=[*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])  # it ends with the server
