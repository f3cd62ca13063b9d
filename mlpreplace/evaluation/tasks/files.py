"""SST-2 and CoLA for lm-eval, with its own prompts and sentences from files."""

from __future__ import annotations

from pathlib import Path

import yaml

from ...texts.glue import glue


def task_of_files(task: str, folder: str | Path) -> dict:
    """What lm-eval makes a task of: the prompts of ``task``, and its validation sentences in ``folder``."""
    asked = yaml.safe_load(Path(__file__).with_name(f"{task}.yaml").read_text(encoding="utf-8"))
    return asked | {"custom_dataset": sentences, "dataset_kwargs": {"task": task, "folder": str(folder)}}


def sentences(*, task: str, folder: str, **metadata) -> dict:
    """{"validation": items} with a sentence and a label each."""
    from datasets import Dataset

    found = glue(task, "validation", folder)
    pairs = zip(found.sentences, found.labels, strict=True)
    return {"validation": Dataset.from_list([{"sentence": sentence, "label": label} for sentence, label in pairs])}
