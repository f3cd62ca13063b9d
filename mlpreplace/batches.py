"""Batches of any model's inputs: keyword arguments by name, so that images and pairs of sentences go where windows of text do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from .models import input_device
from .structure import layer_lists

Batch = Mapping[str, Tensor]  # {"pixel_values": …}, {"input_ids": …, "attention_mask": …, "labels": …}; the first axis is items

IGNORED = -100  # as a label: no token to predict


def token_batches(
    windows: Tensor, mask: Tensor | None = None, *, batch_size: int = 4, labels: bool = False
) -> list[dict[str, Tensor]]:
    """Token windows [windows, seq_len] as batches: input_ids and, where there is a mask, attention_mask.

    Args:
        mask: True (or 1) where a token is real, [windows, seq_len].
        labels: whether the tokens are labels as well, from which a causal language model computes its loss.
    """
    columns = {"input_ids": windows}
    if mask is not None:
        columns["attention_mask"] = mask.long()
    if labels:
        columns["labels"] = windows if mask is None else windows.masked_fill(~mask.bool(), IGNORED)
    return split(columns, batch_size)


def split(batch: Batch, batch_size: int) -> list[dict[str, Tensor]]:
    """A large batch as batches of ``batch_size`` items, the last of what is left."""
    return [{name: t[i : i + batch_size] for name, t in batch.items()} for i in range(0, items(batch), batch_size)]


def on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch where ``model`` takes its inputs."""
    device = input_device(model)
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in batch.items()}


def items(batch: Batch) -> int:
    """Images, windows or sentences in a batch; raises ValueError where tensors disagree about it or there are none."""
    sizes = {len(t) for t in batch.values() if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1:
        raise ValueError(f"Expected tensors of one length in a batch, got {sorted(sizes) or 'none'} in {list(batch)}.")
    return sizes.pop()


def is_seq2seq(model: nn.Module) -> bool:
    return getattr(model.config, "is_encoder_decoder", False)


def real_tokens(model: nn.Module, stack: str, batch: Batch) -> Tensor | None:
    """Which tokens of a stack of ``model`` are real, [batch, seq_len]; None where the batch says nothing about it."""
    if not is_seq2seq(model) or stack != layer_lists(model)[-1][1]:
        return batch.get("attention_mask")
    if "decoder_attention_mask" not in batch and "labels" in batch:  # of which the model makes the decoder's inputs
        return batch["labels"] != IGNORED
    return batch.get("decoder_attention_mask")


def through_layers(model: nn.Module) -> Callable[[Batch], object]:
    """Runs a batch through all layers, and through the head only of an encoder-decoder: it makes the decoder's inputs of
    labels.
    """
    forward, unread = (model, ()) if is_seq2seq(model) else (getattr(model, "base_model", model), ("labels",))
    options = {"use_cache": False} if getattr(model.config.get_text_config(), "use_cache", None) is not None else {}
    return lambda batch: forward(**options, **{name: t for name, t in batch.items() if name not in unread})


def check_batches(batches: list[Batch], name: str = "batches") -> None:
    """Raise ValueError unless there is a batch, and each is keyword arguments for a model."""
    if not batches:
        raise ValueError(f"There are no {name}.")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"Expected {name} of keyword arguments for the model, {{'input_ids': …}}, got a {type(batch).__name__}: "
                "token_batches(windows) makes them of windows."
            )
        items(batch)
