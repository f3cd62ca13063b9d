"""Batches of model inputs: keyword arguments by name, for token windows, images and pairs of sentences alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .architectures import layer_lists
from .blocks import check_held

Batch = Mapping[str, Tensor]  # {"pixel_values": …}, {"input_ids": …, "attention_mask": …, "labels": …}; first axis: items
IGNORED = -100  # the label of a position that is no target


def token_batches(
    windows: Tensor, mask: Tensor | None = None, *, batch_size: int = 4, labels: bool = False
) -> list[dict[str, Tensor]]:
    """Token windows [windows, seq_len] as batches: input_ids and, where there is a mask, attention_mask.

    Args:
        mask: True (or 1) where a token is real, [windows, seq_len].
        labels: whether to add the tokens as labels, for the loss of a causal language model.
    """
    columns = _columns(windows, mask)
    if labels:
        columns["labels"] = windows if mask is None else windows.masked_fill(~mask.bool(), IGNORED)
    return in_batches(columns, batch_size)


def _columns(windows: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    return {"input_ids": windows} | ({} if mask is None else {"attention_mask": mask.long()})


def in_batches(batch: Batch, batch_size: int) -> list[dict[str, Tensor]]:
    """A large batch as batches of ``batch_size`` items; the last may be smaller."""
    return [{name: t[i : i + batch_size] for name, t in batch.items()} for i in range(0, items(batch), batch_size)]


def on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch on the device where ``model`` takes its inputs."""
    device = input_device(model)
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in batch.items()}


def items(batch: Batch) -> int:
    """Number of items (images, windows, sentences) of a batch. Raises ValueError without tensors, or with unequal lengths."""
    sizes = {len(t) for t in batch.values() if isinstance(t, Tensor) and t.dim()}
    if len(sizes) != 1:
        raise ValueError(f"Expected tensors of one length in a batch, got {sorted(sizes) or 'none'} in {list(batch)}.")
    return sizes.pop()


def is_seq2seq(model: nn.Module) -> bool:
    return getattr(model.config, "is_encoder_decoder", False)


def real_tokens(model: nn.Module, stack: str, batch: Batch) -> Tensor | None:
    """Which tokens are real in a stack of ``model``, [batch, seq_len]; None where the batch has no mask for it."""
    if not is_seq2seq(model) or stack != layer_lists(model)[-1][1]:
        return batch.get("attention_mask")
    if "decoder_attention_mask" not in batch and "labels" in batch:  # from which the model makes decoder inputs
        return batch["labels"] != IGNORED
    return batch.get("decoder_attention_mask")


def check_batches(batches: list[Batch], name: str = "batches") -> None:
    """Raise ValueError without batches, and for a batch that is no keyword arguments of a model."""
    if not batches:
        raise ValueError(f"There are no {name}.")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"Expected {name} of keyword arguments for the model, {{'input_ids': …}}, got a {type(batch).__name__}: "
                "token_batches(windows) makes them of windows."
            )
        items(batch)


def input_device(model: nn.Module) -> torch.device:
    """The device where ``model`` takes its inputs and returns its logits: that of its first weights."""
    return check_held(next(model.parameters()), type(model).__name__).device


def check_windows(windows: Tensor, model: nn.Module, mask: Tensor | None = None) -> None:
    """Raise ValueError unless ``windows`` are token ids [windows, seq_len] that ``model`` can read."""
    if windows.dim() != 2 or windows.is_floating_point():
        raise ValueError(f"Expected token ids [windows, seq_len], got {windows.dtype} {tuple(windows.shape)}.")
    if mask is not None and mask.shape != windows.shape:
        raise ValueError(f"The mask is {tuple(mask.shape)}, the windows are {tuple(windows.shape)}.")
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context and windows.shape[1] > context:
        raise ValueError(f"Windows of {windows.shape[1]} tokens are longer than the model's context of {context}.")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary and windows.numel() and int(windows.max()) >= vocabulary:
        raise ValueError(
            f"Token id {int(windows.max())} is outside the model's vocabulary of {vocabulary}: another model's tokenizer?"
        )


def as_batch(windows: Tensor | Batch, model: nn.Module, mask: Tensor | None = None) -> Batch:
    """Token windows [windows, seq_len] and their mask, checked, as one batch; a batch as it is.

    Raises ValueError for windows that ``model`` cannot read, and for a mask beside a batch.
    """
    if isinstance(windows, Mapping):
        if mask is not None:
            raise ValueError("A batch has masks of its own, attention_mask and decoder_attention_mask: expected no other.")
        return windows
    check_windows(windows, model, mask)
    return _columns(windows, mask)
