"""Compress a model and measure the result, from the command line.

python -m mlpreplace compress bundled/smollm2-135m --sparsity 0.25 --out small
python -m mlpreplace evaluate small
"""

from __future__ import annotations

import json
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from .evaluation import compare, evaluate_tasks, perplexity_ratio, task_rows
from .methods import METHODS, calibrate
from .models import find_blocks, load_model
from .planning import Healing, allocate, fit_candidates, heal, refit
from .replacements import Plan, sparsity_of, splice
from .statistics import capture
from .storage import export, load, save
from .texts import load_windows

OURS = ("allocated", "uniform")  # whose plans are of fitted MLPs, which a refit improves
FORMS = {"delta": "what was replaced", "standalone": "the whole model", "plain": "a checkpoint that transformers loads"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 2 for a request that cannot be met, with the reason on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compress(options: Namespace) -> None:
    """Plan, splice, measure, save."""
    if Path(options.out).exists():  # before the work, whose result could not be saved
        raise FileExistsError(f"{options.out} exists; choose a new folder.")
    model, tokenizer = load_model(options.model, device=options.device)
    held = _heldout(options, tokenizer)
    windows, validation = (
        load_windows(options.text, tokenizer, split, seq_len=options.seq_len, n_windows=n, progress=True)
        for split, n in (("calibration", options.windows), ("validation", options.validation_windows))
    )
    plan = _plan(model, windows, validation, options.method, options.sparsity)
    if options.method in OURS:
        _say("refit, front to back")
        plan = refit(model, plan, windows, cached=True).plan
    if options.healing_steps:
        _say(f"heal, {options.healing_steps} steps")
        plan, report = heal(model, plan, windows, validation, Healing(steps=options.healing_steps), cached=True)
        if not report.improved:
            print("Healing did not lower the validation KL: the plan stays as it was.", file=sys.stderr)
    compressed = splice(model, plan)
    measured = _measured(model, compressed, held)
    made = {name: vars(options)[name] for name in ("method", "text", "windows", "seq_len", "healing_steps")}
    metrics = made | {f"perplexity ratio on {row['text']}": row["ratio"] for row in measured.to_dict("records")}
    if options.form == "plain":
        export(compressed, options.out, metrics=metrics, tokenizer=tokenizer)
    else:
        save(compressed, options.out, standalone=options.form == "standalone", metrics=metrics, tokenizer=tokenizer)
    _show(measured)
    print(f"{sparsity_of(model, plan):.1%} of all attention and MLP parameters removed, in {len(plan)} blocks.")
    print(f"{model.num_parameters():,} parameters became {compressed.num_parameters():,}. Saved in {options.out}.")


def evaluate(options: Namespace) -> None:
    """Measure a saved model beside the one it was made from."""
    compressed = load(options.folder, device=options.device)
    record = json.loads((Path(options.folder) / "replacements.json").read_text())
    if not record["base"]:
        raise ValueError(f"{options.folder} does not say which model it was made from, so there is nothing to compare it with.")
    base = record["base"]
    dtype = getattr(torch, record["dtype"])
    model, tokenizer = load_model(base["id"], device=options.device, revision=base["revision"], dtype=dtype)
    _show(_measured(model, compressed, _heldout(options, tokenizer)))
    if options.tasks:
        results = [
            result
            for label, which in (("dense", model), ("compressed", compressed))
            for result in evaluate_tasks(which, tokenizer, options.tasks, label=label, limit=options.limit, cached=True)
        ]
        print(pd.DataFrame(task_rows(results, dense_label="dense")).to_string(index=False))


def _plan(model: nn.Module, windows: Tensor, validation: Tensor, method: str, share: float) -> Plan:
    """By name: one of METHODS. "allocated" chooses among candidates for every block."""
    both, last = torch.cat([windows, validation]), dict(validation_windows=len(validation), cached=True)
    if method != "allocated":
        return METHODS[method](model, calibrate(model, both, [share], methods=[method], **last), share)
    mlps, attentions = find_blocks(model), find_blocks(model, "attention")
    _say(f"capture, {len(mlps)} MLP and {len(attentions)} attention blocks")
    stats = capture(model, mlps + attentions, both, moments=("input", "hidden", "cross"), **last)
    _say("fit candidates")
    candidates = fit_candidates(stats)
    _say(f"allocate, {sum(map(len, candidates.values())):,} candidates")
    return allocate(model, stats, share, "joint", candidates=candidates, windows=validation)


def _heldout(options: Namespace, tokenizer) -> dict[str, Tensor]:
    sizes = dict(seq_len=options.seq_len, n_windows=options.heldout_windows)
    return {text: load_windows(text, tokenizer, "heldout", **sizes) for text in options.heldout}


def _measured(model: nn.Module, compressed: nn.Module, held: Mapping[str, Tensor]) -> pd.DataFrame:
    """A row for every text: perplexity of both, their ratio with its 95 % interval."""
    rows = []
    for text, ids in held.items():
        _say(f"measure on {text}")
        dense, small = (compare(m, {"": {}}, ids, kl=False)[""] for m in (model, compressed))
        ratio = perplexity_ratio(small, dense)
        rows.append((text, ratio.tokens, dense.perplexity, small.perplexity, ratio.value, ratio.low, ratio.high))
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
    c.add_argument("--out", required=True, help="folder to save in, which must not exist")
    c.add_argument("--method", choices=METHODS, default="allocated", help="what is removed, and what stands in for it")
    c.add_argument("--healing-steps", type=int, default=0, help="of distillation on the calibration text, on top")
    c.add_argument("--text", default="bundled/mixture", help="to calibrate on: a bundled text, a file or folder, or a data set")
    c.add_argument("--windows", type=int, default=64, help="of calibration")
    c.add_argument("--validation-windows", type=int, default=8, help="of other documents, which the allocation goes by")
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
