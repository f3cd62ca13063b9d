"""Compress a model and measure the result, from the command line.

python -m mlpreplace compress bundled/smollm2-135m --sparsity 0.25 --out small
python -m mlpreplace evaluate small
"""

from __future__ import annotations

import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from .evaluation import Measurement, compare, evaluate_tasks, perplexity_ratio, task_rows
from .methods import METHODS, calibrate
from .models import load_model
from .planning import Healing, heal
from .replacements import Plan, sparsity_of, spliced
from .runtime.files import new_folder
from .runtime.memory import is_full, put_away
from .storage import export, load, save
from .storage.card import DELTA, PLAIN, STANDALONE
from .storage.record import check_base, read_record
from .texts import load_windows

FORMS = {DELTA: "what was replaced", STANDALONE: "the whole model", PLAIN: "a checkpoint that transformers loads"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 2 for a request that cannot be met, with the reason in one line on stderr; 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        _check_sizes(options)
        options.command(options)
    except (MemoryError, RuntimeError) as error:
        if not is_full(error):
            raise
        return _failed(f"out of memory ({error}). Ask for fewer or shorter windows, or for another --device.", 2)
    except (ValueError, OSError) as error:
        return _failed(str(error), 2)
    except KeyboardInterrupt:
        return _failed("interrupted, nothing was saved.", 130)
    return 0


def _failed(why: str, status: int) -> int:
    print("error:", " ".join(why.split()), file=sys.stderr)
    return status


def _check_sizes(options: Namespace) -> None:
    """Raise ValueError for numbers that no command can work with, before there is work."""
    for name, least in {
        "windows": 1,
        "validation_windows": 1,
        "heldout_windows": 1,
        "limit": 1,
        "seq_len": 2,
        "healing_steps": 0,
    }.items():
        if (given := getattr(options, name, least)) < least:
            raise ValueError(f"--{name.replace('_', '-')} should be {least} or more, got {given}.")
    if not 0 < getattr(options, "sparsity", 0.5) < 1:
        raise ValueError(f"Expected 0 < sparsity < 1, got {options.sparsity}.")


def compress(options: Namespace) -> None:
    """Plan, splice, measure, save."""
    with new_folder(options.out) as out:  # before the work, whose result could not be saved
        _compress(options, out)


def _compress(options: Namespace, out: Path) -> None:
    model, tokenizer = load_model(options.model, device=options.device)
    held = _heldout(options, tokenizer)
    windows, validation = (
        load_windows(options.text, tokenizer, split, seq_len=options.seq_len, n_windows=n, progress=True)
        for split, n in (("calibration", options.windows), ("validation", options.validation_windows))
    )
    plan = _planned(model, windows, validation, options)
    if options.healing_steps:
        how = Healing(steps=options.healing_steps)
        unseen = _unseen(options, tokenizer, options.healing_steps * how.batch_windows)
        _say(f"heal, {options.healing_steps} steps")
        plan, report = heal(model, plan, windows if unseen is None else unseen, validation, how, cached=True)
        if not report.improved:
            print("Healing did not lower the validation KL: the plan stays as it was.", file=sys.stderr)
    before, dense = model.num_parameters(), _perplexities(model, held)
    put_away(nn.ModuleList(module for block in plan for module in block.modules))  # which nobody reads any more
    with spliced(model, plan):  # a copy would take the memory of another model
        measured = _compared(dense, _perplexities(model, held))
        made = {name: vars(options)[name] for name in ("method", "text", "windows", "seq_len", "healing_steps")}
        metrics = made | {f"perplexity ratio on {row['text']}": row["ratio"] for row in measured.to_dict("records")}
        if options.form == PLAIN:
            export(model, out, metrics=metrics, tokenizer=tokenizer)
        else:
            save(model, out, standalone=options.form == STANDALONE, metrics=metrics, tokenizer=tokenizer)
        after = model.num_parameters()
    _show(measured)
    print(f"{sparsity_of(model, plan):.1%} of all attention and MLP parameters removed, in {len(plan)} blocks.")
    print(f"{before:,} parameters became {after:,}. Saved in {out}.")


def evaluate(options: Namespace) -> None:
    """Measure a saved model beside the one it was made from."""
    folder = Path(options.folder).expanduser()
    record = read_record(folder)
    if not (base := record["base"]):
        raise ValueError(f"{folder} does not say which model it was made from, so there is nothing to compare it with.")
    dtype = getattr(torch, record["dtype"])
    model, tokenizer = load_model(base["id"], device=options.device, revision=base["revision"], dtype=dtype)
    if record["form"] == DELTA:
        compressed = load(folder, base=model)
    else:
        _check_base(record, model, folder)
        compressed = load(folder, device=options.device)
    held = _heldout(options, tokenizer)
    _show(_compared(_perplexities(model, held), _perplexities(compressed, held)))
    if options.tasks:
        results = [
            result
            for label, which in (("dense", model), ("compressed", compressed))
            for result in evaluate_tasks(which, tokenizer, options.tasks, label=label, limit=options.limit, cached=True)
        ]
        print(pd.DataFrame(task_rows(results, dense_label="dense")).to_string(index=False))


def _unseen(options: Namespace, tokenizer, number: int) -> Tensor | None:
    """Calibration windows behind those that the fits saw, which teach more; None where the text has too few."""
    sizes = dict(seq_len=options.seq_len, n_windows=options.windows + number)
    try:
        return load_windows(options.text, tokenizer, "calibration", **sizes, progress=False)[options.windows :]
    except ValueError as error:
        print(f"Healing reads what the fits saw: {error}", file=sys.stderr)
        return None


def _planned(model: nn.Module, windows: Tensor, validation: Tensor, options: Namespace) -> Plan:
    """By name: one of METHODS."""
    _say(f"calibrate for {options.method}")
    how = dict(validation_windows=len(validation), memory_budget=options.memory_budget, cached=True)
    both = torch.cat([windows, validation])
    calibration = calibrate(model, both, [options.sparsity], methods=[options.method], **how)
    _say("plan")
    return METHODS[options.method](model, calibration, options.sparsity)


def _heldout(options: Namespace, tokenizer) -> dict[str, Tensor]:
    sizes = dict(seq_len=options.seq_len, n_windows=options.heldout_windows)
    return {text: load_windows(text, tokenizer, "heldout", **sizes) for text in options.heldout}


def _check_base(record: dict, model: nn.Module, folder: Path) -> None:
    """Raise ValueError where the dense model in hand is not the one that a whole model was made from."""
    if record["base"]["weights"] is None:
        print(f"{folder} does not say which weights it was made from: they were not compared.", file=sys.stderr)
    else:
        check_base(record, model.source.weights, folder)


def _perplexities(model: nn.Module, held: dict[str, Tensor]) -> dict[str, Measurement]:
    measured = {}
    for text, ids in held.items():
        _say(f"measure on {text}")
        measured[text] = compare(model, {"": {}}, ids, kl=False)[""]
    return measured


def _compared(dense: dict[str, Measurement], small: dict[str, Measurement]) -> pd.DataFrame:
    """A row for every text: perplexity of both, their ratio with its 95 % interval."""
    rows = []
    for text, own in dense.items():
        ratio = perplexity_ratio(small[text], own)
        rows.append((text, ratio.tokens, own.perplexity, small[text].perplexity, ratio.value, ratio.low, ratio.high))
    return pd.DataFrame(rows, columns=["text", "tokens", "dense", "compressed", "ratio", "low", "high"])


def _show(measured: pd.DataFrame) -> None:
    print("\nPerplexity on held-out text; ratio with its 95 % interval")
    print(measured.to_string(index=False, float_format="{:.3f}".format))


def _say(step: str) -> None:
    print(f"{step} …", file=sys.stderr, flush=True)


def _parser() -> ArgumentParser:
    how = dict(formatter_class=ArgumentDefaultsHelpFormatter, argument_default=SUPPRESS)
    parser = ArgumentParser(prog="python -m mlpreplace", description="Compress a language model by replacing its MLP blocks.")
    commands = parser.add_subparsers(required=True, metavar="compress | evaluate")

    c = commands.add_parser("compress", help="replace blocks by smaller fitted ones, save the model", **how)
    c.set_defaults(command=compress)
    c.add_argument("model", help="bundled/smollm2-135m, a hub id, or a folder")
    c.add_argument("--sparsity", type=float, required=True, help="share of all attention and MLP parameters to remove")
    c.add_argument("--out", required=True, help="folder to save in: a new one, or an empty one")
    c.add_argument("--method", choices=METHODS, default="recipe", help="what is removed, and what stands in for it")
    c.add_argument("--healing-steps", type=int, default=0, help="of distillation on the calibration text, on top")
    c.add_argument("--text", default="bundled/mixture", help="to calibrate on: a bundled text, a file or folder, or a data set")
    c.add_argument("--windows", type=int, default=64, help="of calibration")
    c.add_argument("--validation-windows", type=int, default=8, help="of other documents, which the allocation goes by")
    c.add_argument(
        "--memory-budget", default=None, help="of statistics beside the model, such as 2GB; less, more groups of layers"
    )
    forms = "; ".join(f"{form}: {what}" for form, what in FORMS.items())
    c.add_argument("--form", choices=FORMS, default="delta", help=forms)

    e = commands.add_parser("evaluate", help="measure a saved model beside its dense one", **how)
    e.set_defaults(command=evaluate)
    e.add_argument("folder", help="what compress, save or export wrote")
    e.add_argument("--tasks", nargs="+", default=[], help="bundled/piqa …, or any name that lm-eval knows")
    e.add_argument("--limit", type=int, default=100, help="items of a task")

    for command in (c, e):
        command.add_argument("--heldout", nargs="+", default=["bundled/wiki", "bundled/speeches"], help="texts to measure on")
        command.add_argument("--heldout-windows", type=int, default=8, help="of each")
        command.add_argument("--seq-len", type=int, default=512, help="tokens in a window")
        command.add_argument("--device", default="auto", help="cpu, cuda …; auto takes the GPU where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
