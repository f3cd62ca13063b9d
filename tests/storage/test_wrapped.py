"""A model that is wrapped, adapted or none of transformers is not saved; the error says what to give instead."""

import pytest
import torch
from saved_models import logits, narrow_plan
from tiny_models import build
from torch import nn

from mlpreplace import export, load, save, splice
from mlpreplace.models.loading import Source


def standalone(model, folder):
    return save(model, folder, standalone=True)


WRITE = pytest.mark.parametrize("write", [save, standalone, export])


@pytest.fixture
def compressed(llama):
    return splice(llama, narrow_plan(llama, 24))


class LoraModel(nn.Module):
    """Stands for what PEFT puts around a model or one of its layers."""

    __module__ = "peft.tuners.lora.model"

    def __init__(self, model):
        super().__init__()
        self.model = model


class OwnAdapter(LoraModel):
    __module__ = "somewhere"


def adapted_inside(model):
    model.model.layers[0].self_attn.q_proj = LoraModel(model.model.layers[0].self_attn.q_proj)
    return model


def compiled_inside(model):
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


class Lightning(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = nn.ModuleDict({"student": model})


WRAPPED = {
    r"OptimizedModule: give the model inside, model\._orig_mod": torch.compile,
    r"DataParallel: give the model inside, model\.module": nn.DataParallel,
    r"Sequential: give the model inside, model\.0": nn.Sequential,
    r"Lightning: give the model inside, model\.inner\.student": Lightning,
    r"compiled.*model\.model\.layers\.1\._orig_mod": compiled_inside,
    r"The model is a LoraModel of PEFT.*merge_and_unload": LoraModel,
    r"The model is a OwnAdapter of PEFT.*merge_and_unload": OwnAdapter,
    r"model\.layers\.0\.self_attn\.q_proj is a LoraModel of PEFT": adapted_inside,
    r"a Linear: give what splice returned": lambda model: nn.Linear(2, 2),
    r"a ModuleList: give what splice returned": lambda model: model.model.layers,
    r"Expected a model of transformers, got a dict": lambda model: {"model": model},
    r"Expected a model of transformers, got a NoneType": lambda model: None,
    r"Expected a model of transformers, got a str": lambda model: "bundled/smollm2-135m",
}


@WRITE
@pytest.mark.parametrize("said", WRAPPED)
def test_it_says_what_to_give(said, write, compressed, tmp_path):
    with pytest.raises(ValueError, match=said):
        write(WRAPPED[said](compressed), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("write", [standalone, export])
def test_the_model_inside_is_saved(write, compressed, tmp_path, windows):
    """Also where ``model.compile()`` compiled it in place, which gives no weight another name."""
    expected = logits(compressed, windows)
    inside = (torch.compile(compressed)._orig_mod, nn.DataParallel(compressed).module)
    for i, model in enumerate(inside):
        assert torch.equal(logits(load(write(model, tmp_path / str(i)), device="cpu"), windows), expected)
    compressed.compile()
    assert torch.equal(logits(load(write(compressed, tmp_path / "in place"), device="cpu"), windows), expected)


def test_a_base_that_is_wrapped(llama, tmp_path):
    llama.source = Source.of(llama, "here")
    folder = save(splice(llama, narrow_plan(llama, 24)), tmp_path / "out")
    for wrapped in (torch.compile(build("llama")), nn.DataParallel(build("llama")), LoraModel(build("llama"))):
        with pytest.raises(ValueError, match="model of transformers|of PEFT"):
            load(folder, base=wrapped)
