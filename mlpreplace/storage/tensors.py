"""All tensors of a model by name, each stored once, and the way back."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    """All tensors, buffers outside of the state dict included: casting a model casts them, too."""
    return dict(model.named_buffers()) | model.state_dict(keep_vars=True)


def temporary_buffers(model: nn.Module) -> set[str]:
    """Names of buffers outside of the state dict, which a model computes from its configuration."""
    return {name for name, _ in model.named_buffers()} - model.state_dict().keys()


def tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of ``model`` once, {name: tensor}, and the other names of tied ones, {name: name of its tensor}."""
    owners: dict[int, str] = {}
    tensors, tied = {}, {}
    for name, tensor in _by_name(model).items():
        owner = owners.setdefault(id(tensor), name)
        if owner == name:
            tensors[name] = tensor.detach()
        else:
            tied[name] = owner
    return tensors, tied


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str] | None = None, untouched: Collection[str] = ()
) -> None:
    """Set every tensor of ``model`` except the ``untouched`` ones: the inverse of :func:`tensors_of`.

    Raises:
        ValueError: a tensor is missing, or the model has none of its name.
    """
    own = _by_name(model)
    for name, owner in (tied or {}).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, own[owner])
    expected = own.keys() - set(untouched) - (tied or {}).keys()
    if differing := sorted(expected ^ tensors.keys()):
        raise ValueError(f"{len(differing)} tensors are missing or have no place in the {type(model).__name__}: {differing[:3]}.")
    for name, tensor in tensors.items():
        if own[name].dtype != tensor.dtype:
            own[name].data = own[name].data.to(tensor.dtype)
    # copied, not assigned: the last bits of a product depend on the layout of parameters in memory
    _, temporary = model.load_state_dict(tensors, strict=False)
    for name in temporary:
        own[name].copy_(tensors[name])
