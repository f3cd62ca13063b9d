"""``save_pretrained`` of a compressed model raises: what it wrote would load with random weights. Other models keep theirs."""

import copy
import pickle

import pytest
import torch
import transformers.utils.hub as hub
from conftest import save_locally
from saved_models import logits, narrow_plan
from tiny_models import build
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mlpreplace import export, load, load_model, save, splice, spliced
from mlpreplace.evaluation.int8 import quantized
from mlpreplace.replacements.whole_layers import without_layers

REFUSED = pytest.raises(ValueError, match=r"random weights.*mlpreplace\.save.*mlpreplace\.export")


def reloaded(folder, **how):
    model = load_model(save_locally(build("llama"), folder / "base"), device="cpu")[0]
    return load(save(splice(model, narrow_plan(model, 24)), folder / "out", **how), device="cpu")


COMPRESSED = {
    "spliced": lambda folder: splice(build("llama"), narrow_plan(build("llama"), 24)),
    "without layers": lambda folder: splice(build("gpt2"), without_layers(build("gpt2"), [1])),
    "a copy": lambda folder: copy.deepcopy(COMPRESSED["spliced"](folder)),
    "unpickled": lambda folder: pickle.loads(pickle.dumps(COMPRESSED["spliced"](folder))),
    "spliced twice": lambda folder: splice(COMPRESSED["spliced"](folder), {}),
    "cast": lambda folder: COMPRESSED["spliced"](folder).to(torch.bfloat16),
    "int8": lambda folder: quantized(build("llama")),
    "spliced, in int8": lambda folder: quantized(COMPRESSED["spliced"](folder)),
    "loaded": lambda folder: reloaded(folder),
    "loaded without a base": lambda folder: reloaded(folder, standalone=True),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_compressed_model_is_not_written_as_a_checkpoint(name, tmp_path):
    model = COMPRESSED[name](tmp_path)
    with REFUSED:
        model.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_neither_by_a_trainer_nor_to_the_hub(tmp_path, monkeypatch):
    model = COMPRESSED["spliced"](tmp_path)
    trainer = Trainer(model, TrainingArguments(tmp_path / "trained", report_to=[], use_cpu=True))
    with REFUSED:
        trainer.save_model()
    pushed = []

    class Hub:
        def create_repo(self, name, **how):
            return type("Repository", (), {"repo_id": name})

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **how: None)
    monkeypatch.setattr(type(model), "_upload_modified_files", lambda *args, **how: pushed.append(args))
    with REFUSED:
        model.push_to_hub("somebody/something")
    assert not pushed


def test_the_dense_model_keeps_its_own(llama, tmp_path, windows):
    plan = narrow_plan(llama, 24)
    splice(llama, plan)
    with spliced(llama, plan):
        with REFUSED:
            llama.save_pretrained(tmp_path / "inside")
        with spliced(llama, dict(list(plan.items())[:1])):
            pass
        with REFUSED:
            llama.save_pretrained(tmp_path / "inside")
    with pytest.raises(KeyError), spliced(llama, plan):
        raise KeyError
    assert not (tmp_path / "inside").exists()
    llama.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, windows), logits(llama, windows))
    llama.save_pretrained = "set by somebody else"
    with spliced(llama, plan):
        pass
    assert llama.save_pretrained == "set by somebody else"


def test_an_exported_model_is_dense_again(llama, tmp_path, windows):
    again = load(export(splice(llama, narrow_plan(llama, 24)), tmp_path / "out"), device="cpu")
    again.save_pretrained(tmp_path / "checkpoint")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint"), windows), logits(again, windows))
