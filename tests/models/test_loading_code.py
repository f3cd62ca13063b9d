"""Checkpoints with files that cannot be read, weights that are codes, or code of their own, which is never run."""

import builtins
import json
from pathlib import Path

import pytest
from checkpoint_files import checkpoint, edit_json, refused
from transformers import LlamaForCausalLM

from mlpreplace import load_model
from mlpreplace.models import checkpoints
from mlpreplace.models.checkpoints import pretrained

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def folder(tmp_path):
    return checkpoint(tmp_path)


FILES = {
    "a pointer of git-lfs": ("model.safetensors", lambda old: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a tokenizer that is a pointer": (
        "tokenizer.json",
        lambda old: b"version https://git-lfs.github.com/spec/v1\n",
        "git lfs pull",
    ),
    "cut weights": ("model.safetensors", lambda old: old[:-9], "no whole safetensors file"),
    "no weights": ("model.safetensors", lambda old: b"", "no whole safetensors file"),
    "a pickle": ("model.safetensors", lambda old: b"\x80\x04K\x2a.", "no whole safetensors file"),
    "a configuration that is no json": ("config.json", lambda old: b"{'a'", "config.json.*JSONDecodeError"),
    "a configuration in another encoding": (
        "config.json",
        lambda old: old.decode().encode("utf-16"),
        "config.json.*UnicodeDecodeError",
    ),
    "a configuration that is a list": ("config.json", lambda old: b"[]", "config.json holds a json list"),
    "a tokenizer that is no json": ("tokenizer.json", lambda old: b"{", "JSONDecodeError"),
    "a tokenizer_config that is no json": ("tokenizer_config.json", lambda old: old[:-5], "JSONDecodeError"),
}


@pytest.mark.parametrize(("file", "content", "message"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_read_is_named(file, content, message, folder):
    (folder / file).write_bytes(content((folder / file).read_bytes()))
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="unheard-of"), "unheard-of"),
        (dict(hidden_size="many"), "hidden_size"),
        (dict(num_attention_heads=5), "heads"),
        (dict(model_type="vit"), "ViTConfig"),
        (dict(transformers_weights="adapter_model.bin"), r"holds no \.safetensors weights"),
    ],
)
def test_a_configuration_that_cannot_be_met_says_why(changes, message, folder):
    edit_json(folder / "config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "fp8", "torchao", "compressed-tensors"])
def test_a_quantized_checkpoint_is_refused_before_its_library_is_asked_for(method, folder):
    (folder / "model.safetensors").write_bytes(b"never read")
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(folder, rf"quantized \({method}\).*dequantized")


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name", "peft_type": "LORA"}))
    refused(folder, "adapter.*merge")


# code of their own

CODE = "raise SystemExit('code of the checkpoint ran')\n"
OWN = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
BROUGHT = {
    "a model that transformers does not have": ("config.json", dict(model_type="own", auto_map=OWN), "own.Config"),
    "another model of a kind that it has": ("config.json", dict(auto_map=OWN), "own.Config"),
    "code of another repository": ("config.json", dict(auto_map={"AutoModelForCausalLM": "a/b--own.Model"}), "a/b--own.Model"),
    "code that is a list": ("config.json", dict(auto_map=["own.Config"]), "own.Config"),
    "a tokenizer": ("tokenizer_config.json", dict(auto_map={"AutoTokenizer": ["own.Tokenizer", None]}), "own.Tokenizer"),
    "a fast tokenizer": ("tokenizer_config.json", dict(auto_map={"AutoTokenizer": [None, "own.Fast"]}), "own.Fast"),
    "a tokenizer in the old form": ("tokenizer_config.json", dict(auto_map=["own.Tokenizer", None]), "own.Tokenizer"),
    "attention from the hub": ("config.json", dict(attn_implementation="somebody/kernel"), "somebody/kernel"),
    "attention from the hub, by its other name": ("config.json", dict(_attn_implementation="somebody/kernel"), "somebody/kernel"),
}


@pytest.mark.parametrize(("file", "changes", "message"), BROUGHT.values(), ids=BROUGHT)
def test_code_of_a_checkpoint_is_never_run_or_asked_about(file, changes, message, folder, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("asked on stdin"))
    (folder / "own.py").write_text(CODE)
    edit_json(folder / file, **changes)
    refused(folder, f"code of its own.*{message}.*never run")


def test_code_that_transformers_has_by_now_is_not_missed(folder):
    (folder / "own.py").write_text(CODE)
    own = {"AutoConfig": "own.LlamaConfig", "AutoModelForCausalLM": "a/b--own.LLaMAForCausalLM"}
    edit_json(folder / "config.json", auto_map=own)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.PreTrainedTokenizerFast", None]})
    assert type(load_model(folder, device="cpu")[0]) is LlamaForCausalLM


def test_the_one_place_that_reads_models_lets_no_one_allow_code(folder):
    for option in ("trust_remote_code", "ignore_mismatched_sizes", "output_loading_info"):
        with pytest.raises(ValueError, match=option):
            pretrained(LlamaForCausalLM, folder, **{option: True})
    source = Path(checkpoints.__file__).read_text(encoding="utf-8")
    assert source.count(".from_pretrained(") == source.count("trust_remote_code=False") == 2  # of models, and of tokenizers
