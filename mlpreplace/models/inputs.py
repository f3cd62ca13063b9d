"""Batches of model inputs: keyword arguments by name, for token windows, images and pairs of sentences alike."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from numbers import Integral

import torch
from torch import Tensor, nn

from .architectures import layer_lists
from .blocks import check_held

Batch = Mapping[str, Tensor]  # {"pixel_values": …}, {"input_ids": …, "attention_mask": …, "labels": …}; first axis: items
IGNORED = -100  # the label of a position that is no target
IDS = (torch.int64, torch.int32)
OWN_POSITIONS = ("create_position_ids_from_inputs_embeds", "get_rope_index")  # in models that make them of real tokens


def token_batches(
    windows: Tensor, mask: Tensor | None = None, *, batch_size: int = 4, labels: bool = False
) -> list[dict[str, Tensor]]:
    """Token windows [windows, seq_len] as batches: input_ids and, where there is a mask, attention_mask.

    Args:
        mask: True (or 1) where a token is real, [windows, seq_len].
        labels: whether to add the tokens as labels, for the loss of a causal language model.

    Raises:
        ValueError: what is no token ids or no mask, a batch_size below 1, labels of windows of a single token.
    """
    _check_ids(windows, mask, least=2 if labels else 1)
    columns = _columns(windows, mask)
    if labels:
        columns["labels"] = windows if mask is None else windows.masked_fill(~mask.bool().to(windows.device), IGNORED)
    return in_batches(columns, batch_size)


def _columns(windows: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    return {"input_ids": windows} | ({} if mask is None else {"attention_mask": mask.long()})


def in_batches(batch: Batch, batch_size: int) -> list[dict[str, Tensor]]:
    """A large batch as batches of ``batch_size`` items; the last may be smaller. Raises ValueError for a batch_size below 1."""
    check_batch_size(batch_size)
    return [{name: t[i : i + batch_size] for name, t in batch.items()} for i in range(0, items(batch), batch_size)]


def check_batch_size(batch_size: int | None) -> None:
    """Raise ValueError unless it is a whole number of 1 or more, or None for a default."""
    if batch_size is not None and (not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"Expected batch_size ≥ 1, a whole number, got {batch_size!r}.")


def on_device(batch: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch as ``model`` reads it: where it takes its inputs and, with padding before the text, with position_ids.

    These count real tokens, as ``model.generate`` has them, so that padding changes nothing. They are added to a batch that
    has none where the model takes them and would otherwise count the padding: RoBERTa's follow the tokens in any case.
    """
    device = input_device(model)
    moved = {name: _usable(t.to(device)) if isinstance(t, Tensor) else t for name, t in batch.items()}
    mask = moved.get("attention_mask")
    if "position_ids" in moved or mask is None or not _left_padded(mask) or not _counts_padding(model):
        return moved
    return moved | {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}


def _usable(t: Tensor) -> Tensor:
    """A copy, to take gradients with, of a tensor that was made under torch.inference_mode(); others as they are."""
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t


def _left_padded(mask: Tensor) -> bool:
    """Whether a real token comes after padding in any row of a mask [batch, seq_len]."""
    real = mask.bool()
    return mask.dim() == 2 and bool((real[:, 1:] & ~real[:, :-1]).any())


def _counts_padding(model: nn.Module) -> bool:
    """Whether the model takes positions, and would make them of all tokens."""
    if is_seq2seq(model) or "position_ids" not in signature(model.forward).parameters:
        return False
    return not any(hasattr(module, own) for module in model.modules() for own in OWN_POSITIONS)


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
    """Raise ValueError without batches, for a batch that is no keyword arguments of a model, and for tokens that are no ids."""
    if not batches:
        raise ValueError(f"There are no {name}: token_batches(windows) makes them of windows.")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"Expected {name} of keyword arguments for the model, {{'input_ids': …}}, got a {type(batch).__name__}: "
                "token_batches(windows) makes them of windows."
            )
        items(batch)
        _check_tokens(batch)


def input_device(model: nn.Module) -> torch.device:
    """The device where ``model`` takes its inputs and returns its logits: that of its first weights."""
    return check_held(next(model.parameters()), type(model).__name__).device


def check_windows(windows: Tensor, model: nn.Module, mask: Tensor | None = None, *, least: int = 1) -> None:
    """Raise ValueError unless ``windows`` are token ids [windows, seq_len] that ``model`` can read.

    Args:
        mask: [windows, seq_len], 1 or True where a token is real.
        least: tokens of a window: 2 where tokens are predicted.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"Expected a model, got a {type(model).__name__}: load_model(name) loads one.")
    _check_ids(windows, mask, least)
    check_context(windows.shape[1], model)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if vocabulary and int(windows.max()) >= vocabulary:
        raise ValueError(
            f"Token id {int(windows.max())} is outside the model's vocabulary of {vocabulary}: another model's tokenizer?"
        )


def check_context(seq_len: int, model: nn.Module) -> None:
    """Raise ValueError for windows of more tokens than ``model`` can read."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and seq_len > context:
        raise ValueError(f"Windows of {seq_len} tokens are longer than the model's context of {context}.")


def _check_tokens(batch: Batch) -> None:
    """As :func:`_check_ids`, for the tokens of a batch, if it has any."""
    if (ids := batch.get("input_ids")) is not None:
        mask = batch.get("attention_mask")
        _check_ids(ids, None if isinstance(mask, Tensor) and mask.dim() != 2 else mask, 1)


def _check_ids(windows: Tensor, mask: Tensor | None, least: int) -> None:
    """Raise ValueError for what is no token ids [windows, seq_len] to any model, or no mask of them."""
    _check_tensor(windows, "windows", "token ids [windows, seq_len]")
    if windows.dtype not in IDS or windows.dim() != 2:
        hint = ": .long() makes them int64" if windows.dim() == 2 else ": windows[None] is a single one of them"
        raise ValueError(f"Expected token ids [windows, seq_len] in int64, got {windows.dtype} {tuple(windows.shape)}{hint}.")
    n_windows, seq_len = windows.shape
    if n_windows < 1 or seq_len < least:
        why = ": a prediction needs a token before it" if least > 1 else ""
        raise ValueError(f"Expected 1 window or more of {least} tokens or more, got {n_windows} of {seq_len}{why}.")
    if int(windows.min()) < 0:
        raise ValueError(
            f"Token id {int(windows.min())} is negative: expected ids from 0 on. Padding is any id, and 0 in the mask."
        )
    if mask is None:
        return
    _check_tensor(mask, "mask", "1 or True where a token is real, [windows, seq_len]")
    if mask.shape != windows.shape:
        raise ValueError(f"The mask is {tuple(mask.shape)}, the windows are {tuple(windows.shape)}.")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("Expected a mask of 0 and 1, or False and True: 1 where a token is real.")
    if not bool(mask.any()):
        raise ValueError("The mask is 0 everywhere: a pass needs a real token.")


def _check_tensor(value: object, name: str, meaning: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"Expected {name} as a tensor, {meaning}, got a {type(value).__name__}: torch.tensor(...) makes one.")


def as_batch(windows: Tensor | Batch, model: nn.Module, mask: Tensor | None = None) -> Batch:
    """Token windows [windows, seq_len] and their mask as one batch; a batch as it is. Both are checked.

    Raises ValueError for what ``model`` cannot read, and for a mask beside a batch.
    """
    if isinstance(windows, Mapping):
        if mask is not None:
            raise ValueError("A batch has masks of its own, attention_mask and decoder_attention_mask: expected no other.")
        check_batches([windows])
        if "input_ids" in windows and "pixel_values" not in windows:  # where images stand are ids that no text has
            check_windows(windows["input_ids"], model)
        return windows
    check_windows(windows, model, mask)
    return _columns(windows, mask)
