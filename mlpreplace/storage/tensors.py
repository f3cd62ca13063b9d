"""All tensors of a model by name, each stored once, and the way back."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..models.loading import empty_model


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    """All tensors, buffers outside of the state dict included: casting a model casts them, too."""
    return dict(model.named_buffers(remove_duplicate=False)) | model.state_dict(keep_vars=True)


def temporary_buffers(model: nn.Module) -> set[str]:
    """Names of buffers outside of the state dict, which a model computes from its configuration."""
    return {name for name, _ in model.named_buffers(remove_duplicate=False)} - model.state_dict().keys()


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of ``model`` once, {name: tensor}, and the other names of tied ones, {name: name of its tensor}.

    A temporary buffer is never tied: dynamic RoPE hands one tensor to two names between forward passes.
    """
    owners: dict[int, str] = {}
    tensors, tied, temporary = {}, {}, temporary_buffers(model)
    for name, tensor in _by_name(model).items():
        owner = name if name in temporary else owners.setdefault(id(tensor), name)
        if owner == name:
            tensors[name] = tensor.detach()
        else:
            tied[name] = owner
    return tensors, tied


def at_rest(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the temporary buffers, {name: tensor}, as they are before the first forward pass, in the precision they have now.

    Two kinds follow the length of the inputs: frequencies of dynamic RoPE, and tables of positions, which grow. The next short
    input resets the first, and a new model makes the second anew, so what they are at the moment is no part of the model.
    """
    new = empty_model(type(model), model.config, meta=True)
    shapes = {name: buffer.shape for name, buffer in new.named_buffers(remove_duplicate=False)}
    own = _by_name(model)
    buffers = {name: _at_start(model, name, own[name]) for name in sorted(temporary_buffers(model))}
    if grown := [name for name, t in buffers.items() if name in shapes and shapes[name] != t.shape]:
        made = _by_name(empty_model(type(model), model.config))
        buffers |= {name: made[name].to(buffers[name]) for name in grown}
    return {name: buffer.detach().clone() for name, buffer in buffers.items()}


def _at_start(model: nn.Module, name: str, buffer: Tensor) -> Tensor:
    """The frequencies that RoPE of a kind that follows the input keeps for the next short one; other buffers as they are."""
    path, _, leaf = name.rpartition(".")
    rope, start = model.get_submodule(path), leaf.removesuffix("inv_freq")
    if start == leaf or start.endswith("original_"):
        return buffer
    kind = getattr(rope, "rope_type", "")
    kind = kind.get(start.removesuffix("_"), "") if isinstance(kind, Mapping) else kind  # by kind of layer (Gemma 3)
    follows = kind and ("dynamic" in kind or kind == "longrope")
    return getattr(rope, f"{start}original_inv_freq", buffer) if follows else buffer


def check_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str], untouched: Collection[str], where: object
) -> None:
    """Raise ValueError unless ``tensors`` are all of ``model``, which may be on the meta device, but for tied and untouched ones.

    ``where`` is what the error names.
    """
    own = _by_name(model)
    for name, owner in tied.items():
        if not {name, owner} <= own.keys() or owner not in {*tensors, *untouched} or _form(own[name]) != _form(own[owner]):
            raise ValueError(f"{where}: {name} cannot be tied to {owner}, as it says.")
    expected = own.keys() - set(untouched) - tied.keys()
    if differing := sorted(expected ^ tensors.keys()):
        raise ValueError(
            f"{where}: {len(differing)} tensors are missing or have no place in the {type(model).__name__}: {differing[:3]}."
        )
    for name, tensor in sorted(tensors.items()):
        if own[name].shape != tensor.shape or own[name].is_floating_point() != tensor.is_floating_point():
            found, expected = (f"{t.dtype} {list(t.shape)}" for t in (tensor, own[name]))
            raise ValueError(f"{where}: {name} is {found}, and the rest of the folder says {expected}.")


def _form(tensor: Tensor) -> tuple:
    return tensor.shape, isinstance(tensor, nn.Parameter)


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str] | None = None, untouched: Collection[str] = ()
) -> None:
    """Set every tensor of ``model`` except the ``untouched`` ones: the inverse of :func:`tensors_of`.

    Raises ValueError as :func:`check_tensors` does.
    """
    tied = tied or {}
    check_tensors(model, tensors, tied, untouched, "The weights")
    own = _by_name(model)
    for name, owner in tied.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, own[owner])
    for name, tensor in tensors.items():
        if own[name].dtype != tensor.dtype:
            own[name].data = own[name].data.to(tensor.dtype)
    # copied, not assigned: the last bits of a product depend on the layout of parameters in memory
    _, temporary = model.load_state_dict(tensors, strict=False)
    for name in temporary:
        own[name].copy_(tensors[name])
