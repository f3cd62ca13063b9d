"""What it takes to serve a model: bytes on disk, seconds until it is loaded, and memory on the way to its first answer.

Each is measured in a process of its own, which loads the saved model as a server would, and reads one prompt:
``python -m mlpreplace.storage.serving FOLDER`` reads token ids as JSON and writes what it took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..models.checkpoints import pretrained
from ..models.inputs import check_windows
from ..models.weights import Inserted
from ..runtime.files import ROOT
from ..runtime.usage import peak_memory_mb
from .record import RECORD
from .save import load, save


@dataclass(frozen=True)
class ServingCost:
    """What one model took. Models that are compared took turns."""

    file_mb: float  # of all files of the saved model, 10⁶ bytes
    load_seconds: np.ndarray  # [rounds]
    peak_memory_mb: np.ndarray  # [rounds] 2²⁰ bytes at most while it is loaded and reads the prompt, beyond the program's own


def serving_cost(models: Mapping[Hashable, nn.Module], windows: Tensor, *, rounds: int = 5) -> dict[Hashable, ServingCost]:
    """Save each model as it would be served, all weights in one folder, and load it in fresh processes on the CPU, in turn.

    Args:
        models: {label: causal language model}, spliced, quantized or neither.
        windows: token ids [windows, seq_len]; the first one is read.
        rounds: loads of each model that count. One more comes first, after which all files are in the memory of the system.

    Raises:
        ValueError: windows that a model cannot read, fewer than one round, what :func:`~mlpreplace.storage.save` refuses.
        RuntimeError: a process failed; it says why.
    """
    if rounds < 1:
        raise ValueError(f"Expected rounds ≥ 1, got {rounds}.")
    for model in models.values():
        check_windows(windows, model)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {label: Path(scratch) / str(i) for i, label in enumerate(models)}
        for label, model in models.items():
            _save_whole(model, folders[label])
        sizes = {label: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for label, folder in folders.items()}
        took: dict[Hashable, list[dict]] = {label: [] for label in models}
        for turn in range(rounds + 1):
            for label, folder in folders.items():
                found = _in_a_process(folder, windows[:1])
                if turn:
                    took[label].append(found)
    return {
        label: ServingCost(sizes[label] / 1e6, *(np.array([t[name] for t in took[label]]) for name in ("seconds", "peak_mb")))
        for label in models
    }


def _save_whole(model: nn.Module, folder: Path) -> None:
    if any(isinstance(module, Inserted) for module in model.modules()):
        save(model, folder, standalone=True)
    else:
        model.save_pretrained(folder)


def _in_a_process(folder: Path, ids: Tensor) -> dict[str, float]:
    command = [sys.executable, "-m", "mlpreplace.storage.serving", str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, input=json.dumps(ids.tolist()), capture_output=True, encoding="utf-8", cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"Serving {folder} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def _serve(folder: Path, ids: Tensor) -> dict[str, float]:
    before, start = peak_memory_mb(), time.perf_counter()
    model = load(folder) if (folder / RECORD).exists() else pretrained(AutoModelForCausalLM, folder).eval()
    seconds = time.perf_counter() - start
    model(ids)
    return {"seconds": seconds, "peak_mb": peak_memory_mb() - before}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(_serve(Path(sys.argv[1]), torch.tensor(json.load(sys.stdin)))))
