"""A spliced model and the dense one share memory, and nothing that is done to one of them reaches the other."""

import copy
import gc
import pickle

import pytest
import torch
from saved_models import address, logits, narrow_plan
from tiny_models import build, outputs, random_windows
from torch import nn
from torch.nn.utils import prune

from mlpreplace import find_blocks, heal, load, save, splice, spliced
from mlpreplace.evaluation.int8 import quantized
from mlpreplace.models.loading import Source
from mlpreplace.planning import Healing
from mlpreplace.replacements.families import Replacement
from mlpreplace.replacements.splice import lazy_copy, unshared
from mlpreplace.replacements.whole_layers import Removed


def step(optimizer, model) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = optimizer(model.train().parameters(), lr=0.5)
    model(random_windows(), labels=random_windows()).loss.backward()
    optimizer.step()


def in_place(model) -> None:
    with torch.no_grad():
        model.model.norm.weight.add_(1)
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = 7.0


def other_weights(model) -> None:
    model.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()})


def through_a_view(model) -> None:
    model.lm_head.weight.data.T[3:5].fill_(2.0)


def through_numpy(model) -> None:
    model.model.embed_tokens.weight.detach().numpy()[:] = 1.0


def tied(model) -> None:
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.model.embed_tokens.weight.data.mul_(2)


WRITES = {
    "cast": lambda model: model.to(torch.bfloat16),
    "double": nn.Module.double,
    "SGD": lambda model: step(torch.optim.SGD, model),
    "AdamW": lambda model: step(torch.optim.AdamW, model),
    "in place": in_place,
    "load_state_dict": other_weights,
    "more tokens": lambda model: model.resize_token_embeddings(120),
    "fewer tokens": lambda model: model.resize_token_embeddings(50),
    "tie_weights": tied,
    "a view": through_a_view,
    "numpy": through_numpy,
    "buffers": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "pruned": lambda model: prune.l1_unstructured(model.lm_head, "weight", 0.5),
    "shared between processes": nn.Module.share_memory,
    "frozen": lambda model: model.requires_grad_(False),
    "unfrozen": lambda model: model.requires_grad_(True),
}


def content(model) -> dict:
    """Everything about the tensors of ``model``: values, precision, what has a gradient."""
    tensors = dict(model.named_buffers()) | model.state_dict(keep_vars=True)
    return {name: (t.detach().clone(), t.dtype, t.requires_grad, t.grad) for name, t in tensors.items()}


def unchanged(model, before: dict) -> bool:
    now = content(model)
    return now.keys() == before.keys() and all(
        torch.equal(now[name][0], was[0]) and now[name][1:3] == was[1:3] and now[name][3] is None for name, was in before.items()
    )


@pytest.mark.parametrize("written", ["the copy", "the dense model"])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_done_to_one_leaves_the_other_alone(write, written, llama, windows):
    compressed = splice(llama, dict(list(narrow_plan(llama, 24).items())[:2]))
    mine, other = (compressed, llama) if written == "the copy" else (llama, compressed)
    before, answers = content(other), logits(other, windows)
    WRITES[write](mine)
    assert unchanged(other, before) and torch.equal(logits(other, windows), answers)
    assert other.get_input_embeddings().weight.shape[0] == other.config.vocab_size == 101


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "mixtral", "bert", "t5", "vit"])
def test_in_every_architecture(name):
    model = build(name)
    compressed = splice(model, {find_blocks(model)[0]: Replacement(Removed(), find_blocks(model)[0])})
    before, answers = content(model), outputs(model, name)
    with torch.no_grad():
        for tensor in (*compressed.parameters(), *compressed.buffers()):
            tensor.zero_()
    assert unchanged(model, before) and torch.equal(outputs(model, name), answers)


def test_the_plan_is_left_alone_too(llama, windows):
    plan = narrow_plan(llama, 24)
    before = [content(replacement) for replacement in plan.values()]
    step(torch.optim.SGD, splice(llama, plan))
    assert all(unchanged(replacement, was) for replacement, was in zip(plan.values(), before, strict=True))
    compressed = splice(llama, plan)
    held = content(compressed)
    heal(llama, plan, windows, windows[:1], Healing(steps=2), progress=False)
    for replacement in plan.values():
        replacement.body.down.weight.data.zero_()
    assert unchanged(compressed, held)


@pytest.mark.parametrize("standalone", [False, True])
def test_a_loaded_model_leaves_the_base_alone(standalone, llama, tmp_path, windows):
    llama.source = Source.of(llama, "here")
    folder = save(splice(llama, narrow_plan(llama, 24)), tmp_path / "out", standalone=standalone)
    before, answers = content(llama), logits(llama, windows)
    again = load(folder, device="cpu", **({} if standalone else {"base": llama}))
    step(torch.optim.SGD, again.double())
    assert unchanged(llama, before) and torch.equal(logits(llama, windows), answers)


def test_a_quantized_model_stands_alone_too(llama, windows):
    for model in (llama, splice(build("gpt2"), narrow_plan(build("gpt2"), 24))):
        small = quantized(model)
        before, answers = content(model), logits(model, windows)
        with torch.no_grad():
            for tensor in (*small.parameters(), *small.buffers()):
                tensor.zero_()
        assert unchanged(model, before) and torch.equal(logits(model, windows), answers)


@pytest.mark.parametrize("tie", [True, False])
def test_ties_and_flags_are_those_of_the_model(tie):
    model = build("llama", tie_word_embeddings=tie)
    model.model.norm.weight.requires_grad_(False)
    compressed = splice(model, {})
    assert (compressed.lm_head.weight is compressed.model.embed_tokens.weight) == tie
    for (name, own), (other_name, theirs) in zip(model.named_parameters(), compressed.named_parameters(), strict=True):
        assert name == other_name and own is not theirs and own.requires_grad == theirs.requires_grad
        assert type(theirs) is nn.Parameter and own.stride() == theirs.stride()


# memory


def test_only_what_is_written_is_copied(llama, windows):
    compressed = splice(llama, narrow_plan(llama, 24))
    logits(compressed, windows)
    copy.deepcopy(compressed)  # reading shares on
    compressed.model.norm.weight.data.add_(1)
    own, theirs = dict(llama.named_parameters()), dict(compressed.named_parameters())
    apart = {name for name in own.keys() & theirs.keys() if address(own[name]) != address(theirs[name])}
    assert apart == {"model.norm.weight"}


def test_the_last_one_left_is_copied_no_more(llama):
    before = address(llama.lm_head.weight)
    compressed = splice(llama, {})
    del compressed
    gc.collect()
    llama.lm_head.weight.data.add_(1)
    assert address(llama.lm_head.weight) == before


def test_memory_of_others_is_copied_at_once(llama, tmp_path, windows):
    """What is mapped from a file, or comes from numpy, cannot be shared until written."""
    (tmp_path / "weights").write_bytes(llama.lm_head.weight.detach().numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=101 * 32).view(101, 32)
    llama.lm_head.weight = nn.Parameter(mapped)
    llama.model.norm.weight = nn.Parameter(torch.from_numpy(llama.model.norm.weight.detach().numpy().copy()))
    compressed = splice(llama, {})
    assert address(compressed.lm_head.weight) != address(llama.lm_head.weight)
    before, answers = content(llama), logits(llama, windows)
    step(torch.optim.SGD, compressed)
    assert unchanged(llama, before) and torch.equal(logits(llama, windows), answers)


def test_tensors_of_a_class_of_their_own_copy_themselves(llama):
    class Packed(nn.Parameter):
        def __deepcopy__(self, memo):
            memo[id(self)] = made = Packed(self.data.clone(), False)
            made.scale = self.scale
            return made

    llama.lm_head.weight = Packed(llama.lm_head.weight.data, False)
    llama.lm_head.weight.scale = 3
    made = lazy_copy(llama).lm_head.weight
    assert made.scale == 3 and made is not llama.lm_head.weight and torch.equal(made, llama.lm_head.weight)


def test_an_address_is_asked_of_a_copy(llama):
    compressed = splice(llama, {})
    unshared(compressed.lm_head.weight).numpy()
    assert address(compressed.lm_head.weight) == address(llama.lm_head.weight)
    own = torch.ones(3)
    assert address(unshared(own)) == address(own)


def test_a_copy_can_be_copied_and_pickled(llama, windows):
    compressed = splice(llama, narrow_plan(llama, 24))
    answers = logits(compressed, windows)
    for again in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed)), splice(compressed, {})):
        assert torch.equal(logits(again, windows), answers)
        step(torch.optim.SGD, again)
        assert torch.equal(logits(compressed, windows), answers)
    with spliced(llama, {}):
        assert "save_pretrained" not in vars(llama)
