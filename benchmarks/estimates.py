"""What `python -m mlpreplace compress` takes on GPUs, worked out from a configuration: bytes on a GPU and on the host, seconds.

python benchmarks/estimates.py [NAME …] [--gpus 1] [--gpu-gb 80] [--memory-budget 20GB]

The formulas follow the code, step by step; groups are made by the code itself. The rates in rates.py are assumptions. Nothing
was measured on a GPU. Time is that of arithmetic and copies alone, so a run takes longer.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass

from compression import RESERVE, Compression, bytes_of_token
from model_size import size_of
from rates import DISK, DRAWS, FP32, HASH, LINK, eigen_seconds, fit_seconds

from mlpreplace.evaluation.sweep import SCORED_AT_ONCE_GPU
from mlpreplace.methods.registry import CHOICE_WINDOWS
from mlpreplace.runtime.memory import WINDOWS, memory_budget
from mlpreplace.statistics.gradients import WINDOWS as BACKWARD_WINDOWS

TEXTS, HELDOUT_WINDOWS = 2, 8  # that the result is measured on
ROWS = (  # (model, GPUs) of the table in notebooks/profiles/gpu.yaml
    *(("Llama-3.2-1B", 1), ("SmolLM2-1.7B", 1), ("Llama-2-7B", 1), ("Llama-3-8B", 1), ("Llama-3-8B", 2)),
    *(("Llama-3-70B", 6), ("Llama-3-70B", 8)),
)


@dataclass(frozen=True)
class Step:
    """A step of the command: peak bytes, and seconds."""

    name: str
    gpu: float  # on the fullest GPU, beside what is held and what is reserved
    host: float
    seconds: float
    held: float  # on that GPU: its share of the weights and of the plan


def steps(run: Compression) -> list[Step]:
    """What the command does, in order. The choice itself takes nothing worth a line."""
    return [loading(run), effects(run), gradients(run), prices(run), refits(run), measurement(run), saving(run)]


def loading(run: Compression) -> Step:
    """Through the memory of the host onto one GPU; onto several, tensor by tensor."""
    whole = run.of.parameters * run.of.itemsize
    largest = run.of.vocabulary * run.of.mlp.hidden_size * run.of.itemsize
    return Step("load", 0, whole if run.gpus == 1 else largest, whole / DISK + whole / HASH + whole / LINK, run.weights)


def effects(run: Compression) -> Step:
    """A backward pass over the first calibration windows. What is seen of a layer is on the host for a batch."""
    windows = min(CHOICE_WINDOWS, run.windows)
    host = BACKWARD_WINDOWS * run.seq_len * (bytes_of_token(run.of.mlp) + bytes_of_token(run.of.attention))
    seconds = 3 * run.forward(windows, head=True) + windows * run.seq_len * run.of.vocabulary / DRAWS
    return Step("effects", run.backward, host, seconds, run.weights)


def gradients(run: Compression) -> Step:
    """By the outputs of all blocks. What is seen of them goes to disk; one is in memory twice while batches are joined."""
    drawn = 8 * BACKWARD_WINDOWS * run.seq_len * run.of.vocabulary
    statistics = run.group if len(run.groups) == 1 else 0  # of all blocks
    seconds = 3 * run.forward(run.validation, head=True)  # forward, again, and by activations: weights are frozen
    seconds += run.validation * run.seq_len * run.of.vocabulary / DRAWS
    seconds += 3 * sum(run.sensitivities.values()) / DISK  # of each batch written, read to be joined, written
    host = run.walking + max(2 * max(run.sensitivities.values()), drawn)
    return Step("gradients", statistics + run.backward, host, seconds, run.weights)


def prices(run: Compression) -> Step:
    """Capture of a group, and the errors of its candidates on all validation tokens, which are read from disk."""
    host = run.walking + run.felt + max(sum(map(run.sensitivities.get, group)) for group in run.groups)
    if len(run.groups) == 1:  # kept on disk: copies from the GPU, and the file that is made of them
        host = max(host, 2 * run.group)
    seconds = run.pass_seconds + run.of.layers * run.price_seconds + sum(run.sensitivities.values()) / DISK
    return Step("capture, price", run.group + max(run.capturing, run.pricing), host, seconds, run.weights)


def refits(run: Compression) -> Step:
    """Layer by layer: a fit, the dense layer, the compressed one, the regression. The plan's file is made in memory."""
    d, width = run.of.mlp.hidden_size, run.of.mlp.intermediate_size * run.plan / run.of.itemsize / run.of.of_kind("mlp")
    windows = run.windows + run.validation
    states = run.states(windows)
    products = 2 * run.windows * run.seq_len * (width**2 + width * d)
    each = products / FP32 + 2 * fit_seconds(run.of.mlp, width) + eigen_seconds(run.of.mlp) + 8 * states / LINK
    seconds = run.of.layers * each + 2 * run.forward(windows) + run.plan / DISK
    seconds += run.pass_seconds if len(run.groups) > 1 else 0
    gpu = run.group + max(run.capturing, run.fitting, run.refitting)
    host = max(run.walking + 4 * states, 2 * run.plan)
    return Step("fit, refit", gpu, host, seconds, run.weights + run.plan / run.gpus)


def measurement(run: Compression) -> Step:
    gpu = WINDOWS * run.seq_len * run.of.vocabulary * run.of.itemsize + 8 * SCORED_AT_ONCE_GPU
    seconds = 2 * run.forward(TEXTS * HELDOUT_WINDOWS, head=True)
    return Step("measure on held-out text", gpu, 0, seconds, run.weights + run.plan / run.gpus)


def saving(run: Compression) -> Step:
    """All weights are hashed, and the plan is written."""
    whole = run.of.parameters * run.of.itemsize
    seconds = whole / LINK + whole / HASH + run.plan / LINK + run.plan / DISK
    return Step("save", 0, run.plan, seconds, run.weights + run.plan / run.gpus)


def total(step: Step) -> float:
    """Bytes on the fullest GPU."""
    return step.held + step.gpu + RESERVE


def row(run: Compression) -> tuple[float, float, float, float]:
    """(bytes of the model, peak bytes of a GPU, peak bytes of the host, seconds)."""
    found = steps(run)
    model = run.of.parameters * run.of.itemsize
    return model, max(map(total, found)), max(s.host for s in found), sum(s.seconds for s in found)


def show(name: str, run: Compression) -> None:
    """Print the steps."""
    parts = f"{len(run.groups)} groups of statistics, {sum(run.sensitivities.values()) / 1e9:.0f} GB of gradients on disk"
    print(f"\n{name}, {run.gpus} × {run.gpu / 1e9:.0f} GB: {parts}")
    print(f"  {'':<24} {'a GPU':>9} {'host':>9} {'seconds':>9}")
    for step in steps(run):
        print(f"  {step.name:<24} {total(step) / 1e9:6.1f} GB {step.host / 1e9:6.1f} GB {step.seconds:9,.0f}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of published_models.yaml; by default the table of gpu.yaml")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu-gb", type=float, default=80)
    parser.add_argument("--memory-budget", help="as of the command")
    options = parser.parse_args()
    given = memory_budget(options.memory_budget, []) if options.memory_budget else None
    lines = []
    for name, gpus in [(name, options.gpus) for name in options.names] or ROWS:
        run = Compression(size_of(name, Compression.seq_len), gpus, gpu=1e9 * options.gpu_gb, given=given)
        show(name, run)
        model, gpu, host, seconds = row(run)
        sizes = " ".join(f"{n / 1e9:7.0f}" for n in (model, gpu, host))
        lines.append(f"{name:<14} {gpus:4} {sizes} {seconds / 60:7.0f}{'  too large' if gpu > run.gpu else ''}")
    print(f"\n{'MODEL':<14} {'GPUs':>4} {'model':>7} {'a GPU':>7} {'host':>7} {'minutes':>7}", *lines, sep="\n")


if __name__ == "__main__":
    main()
