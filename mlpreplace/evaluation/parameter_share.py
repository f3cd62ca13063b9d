"""Parameters and FLOPs of models by part, computed from published configurations alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
import transformers
import yaml
from transformers import PreTrainedModel

from ..models.architectures import layer_lists
from ..models.blocks import KINDS, find_blocks
from ..models.parameters import count_parameters

PUBLISHED = Path(__file__).with_name("published_models.yaml")


@dataclass(frozen=True)
class PublishedModel:
    """One entry of published_models.yaml."""

    name: str
    model_type: str
    class_name: str  # of a model class in transformers
    config: dict[str, object]  # keyword arguments of its configuration
    published_params: int  # according to its card, paper or checkpoint

    def build(self) -> PreTrainedModel:
        """The model on the meta device: shapes without weights. Raises AttributeError where transformers lacks the class."""
        model_class = getattr(transformers, self.class_name)
        with torch.device("meta"):
            return model_class(model_class.config_class(**self.config))


def published_configs() -> list[PublishedModel]:
    """The entries of published_models.yaml, in the file's order."""
    entries = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return [PublishedModel(class_name=entry.pop("class"), **entry) for entry in entries]


def model_kind(model: PreTrainedModel) -> str:
    """ "decoder", "encoder", "encoder-decoder" or "vision"."""
    if model.main_input_name == "pixel_values":
        return "vision"
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    return "decoder" if model.can_generate() else "encoder"


def _longest(model: PreTrainedModel) -> int | None:
    """Tokens of the longest input; None where relative positions set no limit (T5)."""
    config = model.config.get_text_config()
    if model_kind(model) == "vision":
        return (config.image_size // config.patch_size) ** 2 + 1  # patches and the class token
    return getattr(config, "max_position_embeddings", None)


def _keys_per_query(context: int, causal: bool, window: int | None) -> float:
    """Mean number of keys that a query attends to, over the positions of ``context`` tokens."""
    if not causal:
        return context
    ramp = min(context, window or context)  # the first tokens attend to 1, 2, … keys, up to the window
    return (ramp * (ramp + 1) / 2 + (context - ramp) * ramp) / context


def _score_flops(model: PreTrainedModel, context: int) -> float:
    """FLOPs per token of all query-key and score-value products: 4 · keys · heads · head_dim per layer."""
    config, kind, flops = model.config.get_text_config(), model_kind(model), 0.0
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    for stack, _, layers in layer_lists(model):
        for index in range(len(layers)):
            sliding = window if types is None or types[index] == "sliding_attention" else None
            for position in range(len(stack.attention)):
                # a decoder layer of an encoder-decoder has two attentions: one causal, one over the whole source
                causal = kind == "decoder" or (position == 0 and len(stack.attention) > 1)
                flops += 4 * _keys_per_query(context, causal, sliding) * width
    return flops


def model_shares(model: PreTrainedModel, name: str, context: int = 2048) -> dict[str, object]:
    """The row of one model in :func:`parameter_shares`. The model may be on the meta device.

    Raises ValueError for a context below one token or an unknown architecture.
    """
    if context < 1:
        raise ValueError(f"context is a number of tokens and at least 1, not {context}.")
    parts = count_parameters(model)
    blocks = {kind: find_blocks(model, kind) for kind in KINDS}
    active = {kind: sum(b.n_active_params for b in found) for kind, found in blocks.items()}
    context = min(context, _longest(model) or context)
    head = model.get_output_embeddings()
    flops = {
        "mlp_flops": 2 * active["mlp"],
        "attention_flops": 2 * active["attention"] + _score_flops(model, context),
        "head_flops": 0 if head is None else 2 * head.weight.numel(),
    }
    return {
        "model": name,
        "model_type": model.config.model_type,
        "kind": model_kind(model),
        "layers": len(blocks["mlp"]),
        "hidden_size": model.config.get_text_config().hidden_size,
        "measured": next(model.parameters()).device.type != "meta",
        **{part: parts[part] for part in ("total", "mlp", "attention", "embedding", "head", "other")},
        "mlp_active": active["mlp"],
        "mlp_share_of_blocks": parts["mlp"] / (parts["mlp"] + parts["attention"]),
        "mlp_share_of_all": parts["mlp"] / parts["total"],
        "context": context,
        **flops,
        "flops_per_token": sum(flops.values()),
        "mlp_share_of_flops": flops["mlp_flops"] / sum(flops.values()),
    }


@cache  # a second; a table for another context needs the same models
def _published_models() -> dict[str, PreTrainedModel]:
    return {published.name: published.build() for published in published_configs()}


def parameter_shares(context: int = 2048) -> pd.DataFrame:
    """Parameters and FLOPs by part of every published configuration, one row a model. No weights are loaded.

    Args:
        context: tokens of a sequence. A model that reads fewer is counted at its longest input (column ``context``).

    Returns:
        A table. Parameters: ``total``, ``mlp``, ``attention``, ``embedding`` (with a tied head), ``head`` (untied), ``other``
        (norms, poolers; patch projection and positions of a ViT), ``mlp_active`` (used by one token, fewer in a mixture of
        experts). ``mlp_share_of_blocks`` is mlp / (mlp + attention), ``mlp_share_of_all`` mlp / total. ``layers`` counts all
        stacks, ``measured`` says whether weights were loaded.

        FLOPs per token of a forward pass, two for a multiply-add: ``mlp_flops`` = 2 · active parameters;
        ``attention_flops`` = 2 · parameters + 4 · keys · heads · head_dim per layer; ``head_flops`` = 2 · vocabulary · hidden.
        ``keys`` is a mean over positions: (context + 1) / 2 under a causal mask, fewer under a sliding window, the whole
        context without a mask. Norms, softmax, activations and lookups are not counted
        (Kaplan et al. 2020, table 1: their 2 · n_ctx is 4 · keys under a causal mask).

        A token is a word piece; in a vision transformer, a patch of the image. In an encoder-decoder it stands for one token
        of the source and one of the target, each in its own stack, with ``context`` tokens on either side.
    """
    return pd.DataFrame([model_shares(model, name, context) for name, model in _published_models().items()])
