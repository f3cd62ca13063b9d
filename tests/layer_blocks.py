"""Deeper tiny models to remove layers from, references made by deleting layers, and calibrations of all methods."""

import copy

import torch
from tiny_models import SINGLE, build, random_windows

from mlpreplace.methods.registry import METHODS, calibrate
from mlpreplace.models.architectures import layer_lists

LAYERS = 6
SLIDING = ("mistral", "qwen2", "qwen3", "qwen2_moe", "gemma2", "gemma3_text")  # their configurations list a type for every layer


def deep(name: str, layers: int = LAYERS):
    """A tiny model with ``layers`` layers, in float64 where it can be."""
    changes = {"n_layer" if name == "gpt2" else "num_hidden_layers": layers}
    model = build(name, **changes | ({"layer_types": None} if name in SLIDING else {}))
    return model.to(torch.float32 if name in SINGLE else torch.float64)


def deleted(model, removed):
    """A copy of ``model`` whose layers ``removed`` are really gone. It cannot use a cache: its layers keep their numbers."""
    shorter = copy.deepcopy(model)
    (_, path, layers), *_ = layer_lists(shorter)
    kept = torch.nn.ModuleList(layer for i, layer in enumerate(layers) if i not in removed)
    shorter.set_submodule(path, kept)
    shorter.config.num_hidden_layers = len(kept)
    if getattr(shorter.config, "layer_types", None):
        shorter.config.layer_types = [t for i, t in enumerate(shorter.config.layer_types) if i not in removed]
    return shorter


def calibrated(model, sparsities=(0.3,), methods=tuple(METHODS), windows=None, **options):
    """A calibration for ``methods`` on a few random windows."""
    windows = random_windows(14, 16, seed=1) if windows is None else windows
    options = dict(validation_windows=2, sample_windows=None, progress=False) | options
    return calibrate(model, windows, sparsities, methods=methods, **options)


def streams(model, windows, mask=None):
    """Reference: the residual stream between layers in float64, [layers + 1, tokens, hidden], from the model's own outputs."""
    found = []
    layers = layer_lists(model)[0][2]

    def keep(value):
        value = value[0] if isinstance(value, tuple) else value
        found.append(value.detach().double()[... if mask is None else mask].reshape(-1, value.shape[-1]))

    hooks = [layers[0].register_forward_pre_hook(lambda m, a, k: keep(a[0] if a else k["hidden_states"]), with_kwargs=True)]
    hooks += [layer.register_forward_hook(lambda m, a, output: keep(output)) for layer in layers]
    with torch.no_grad():
        model(windows, attention_mask=None if mask is None else mask.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)
