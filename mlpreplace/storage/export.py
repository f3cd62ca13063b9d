"""Write a compressed model as a plain transformers checkpoint, which loads without this package."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..models.architectures import layer_lists
from ..models.attention import PARTS, attention_weights
from ..models.blocks import Block, find_blocks
from ..models.checkpoints import no_progress_bars
from ..models.loading import WIDTHS, empty_model
from ..replacements.families import NarrowMLP
from ..replacements.narrow_attention import NarrowAttention
from ..replacements.plus_mean import NarrowAttentionPlusMean, NarrowPlusMean
from ..replacements.splice import replacements_of, unshared
from ..replacements.whole_layers import Removed, Tuned
from ..runtime.files import new_folder, whole_folder
from .card import PLAIN
from .rebuild import tensors_inside
from .record import describe, named_blocks, write_record
from .save import load_plain, writing
from .tensors import at_rest

HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")  # names in configurations
Tensors = dict[str, Tensor]
INSTEAD = "transformers has no form for that, save(model, folder, standalone=True) writes any model for mlpreplace.load"


def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    metrics: Mapping[str, object] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Write a spliced model into a new folder in its own architecture: narrower MLPs, fewer heads, without removed layers.

    With MLPs of one width in all layers, ``from_pretrained`` of transformers loads it. Several widths are written as
    ``per_layer_config``, which the models of transformers do not read yet: :func:`~mlpreplace.load` does. Every tensor is read
    back and compared before the folder appears. Logits are those of ``model``, bit for bit on the same machine; from
    ``from_pretrained``, where weights are mapped from the file, a single token's may differ in the last bits, as the products of
    some processors depend on the alignment of weights in memory (2.7e-6 on an AMD EPYC).

    Args:
        folder: is made before the work, and may be there already if it is empty.
        metrics: measured values that json can hold, for replacements.json and the model card. NaN and infinity become null.
        tokenizer: is saved with the model.

    Raises:
        ValueError: nothing was spliced; a model that is wrapped (compiled, PEFT, DataParallel); a replacement that the
            architecture cannot express. It can express :class:`NarrowMLP`, :class:`Tuned`, layers removed by
            :func:`~mlpreplace.replacements.without_layers`, and, where the configuration has a ``head_dim``,
            :class:`NarrowAttention` of as many heads and groups in every layer, with whole values, queries and keys.
        FileExistsError: ``folder`` exists and is not empty, or something else was written there meanwhile.
        OSError: it cannot be made or written; nothing is left there.
    """
    with new_folder(folder) as folder:
        record = describe(model, PLAIN, metrics)
        if record["int8"]:
            raise ValueError(f"{record['int8'][0]} computes in int8; {INSTEAD}.")
        dense = empty_model(type(model), model.config, meta=True)
        tensors, widths, heads, gone = _unspliced(model, dense)
        inside, stack = tensors_inside(model), layer_lists(dense)[0][1]
        buffers = {name: t for name, t in (dict(model.named_buffers()) | at_rest(model)).items() if name not in inside}
        buffers, tensors = (_renumbered(named, stack, gone) for named in (buffers, tensors))
        plain = _plain(type(model), _with_heads(_shrunk(model.config, dense, widths, gone), dense, heads, gone), tensors)
        record["widths"] = plain.config.is_heterogeneous
        with writing(folder), whole_folder(folder) as whole, no_progress_bars():
            # from_pretrained translates the names of tensors that some architectures have on disk; mlpreplace.load does not
            plain.save_pretrained(whole, save_original_format=not record["widths"])
            _read_back(whole, record, buffers | tensors)
            write_record(whole, model, record, tokenizer)
    return folder


def _unspliced(model: nn.Module, dense: nn.Module) -> tuple[Tensors, dict[Block, int], dict[Block, NarrowAttention], set[int]]:
    """(tensors under the names of the architecture, widths of narrowed MLPs, narrowed attention, removed layers, which are of a
    single stack)
    """
    found = replacements_of(model)
    blocks = named_blocks(dense, found)
    gone = {blocks[name].layer for name, r in found.items() if blocks[name].kind == "layer" and r.family == Removed()}
    inside = tensors_inside(model)
    tensors = {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in inside}
    names, widths, heads = {module: name for name, module in dense.named_modules()}, {}, {}
    for name, replacement in found.items():
        block, family = blocks[name], replacement.family
        if block.layer in gone and family == Removed():  # the layer, or its attention
            continue
        if isinstance(family, NarrowPlusMean | NarrowAttentionPlusMean):
            raise ValueError(f"{name} is replaced by {family}, whose output bias the architecture may not have: {INSTEAD}.")
        if isinstance(family, NarrowMLP):
            widths[block] = family.width
            tensors |= _of_narrow(block, replacement.body, names)
        elif isinstance(family, NarrowAttention):
            heads[block] = family
            tensors |= _of_heads(block, family, replacement.body)
        elif isinstance(family, Tuned):
            bodies = [replacement.body] if len(block.paths) == 1 else replacement.body
            for path, body in zip(block.paths, bodies, strict=True):
                tensors |= {f"{path}.{key}": t for key, t in body.state_dict(keep_vars=True).items()}
        else:
            raise ValueError(f"{name} is replaced by {family}: {INSTEAD}.")
    if left := [b for b in find_blocks(dense, "attention") if b.layer in gone and b.name not in found]:
        raise ValueError(f"{left[0].stack}.{left[0].layer} has lost its MLP and its norms but not its attention: {INSTEAD}.")
    return tensors, widths, heads, gone


def _of_narrow(block: Block, body: nn.Module, names: Mapping[nn.Module, str]) -> Tensors:
    first = [(block.up, body.gate_up)] if block.gate is block.up else [(block.gate, body.gate), (block.up, body.up)]
    tensors = {}
    for own, layer in (*first, (block.down, body.down)):
        if own is not None:
            tensors[f"{names[own]}.weight"] = nn.Parameter(layer.weight.T, False) if isinstance(own, Conv1D) else layer.weight
            if layer.bias is not None:
                tensors[f"{names[own]}.bias"] = layer.bias
    return tensors


def _of_heads(block: Block, family: NarrowAttention, body: nn.Module) -> Tensors:
    if block.heads.layout != "separate" or body.head_dim != body.key_dim or body.head_dim != body.value_dim:
        raise ValueError(f"{block.name} is replaced by {family}, whose projections the architecture does not have: {INSTEAD}.")
    if body.num_key_value_groups * family.groups != family.heads:
        raise ValueError(f"{block.name}: its groups of keys and values are read by unequal numbers of heads: {INSTEAD}.")
    places = {part: getattr(block.heads, part) for part in PARTS} | dict(
        zip(("query_norm", "key_norm"), block.heads.norms or (), strict=False)
    )
    layer = f"{block.stack}.{block.layer}"
    return {
        f"{layer}.{place}.{key}": t
        for part, place in places.items()
        for key, t in body.get_submodule(part).state_dict(keep_vars=True).items()
    }


def _renumbered(tensors: Tensors, stack: str, gone: set[int]) -> Tensors:
    """Without the tensors of layers that are ``gone`` from ``stack``; later layers move up."""
    kept = {}
    for name, tensor in tensors.items():
        if gone and name.startswith(f"{stack}."):
            index, _, rest = name.removeprefix(f"{stack}.").partition(".")
            if int(index) in gone:
                continue
            name = f"{stack}.{int(index) - sum(i < int(index) for i in gone)}.{rest}"
        kept[name] = tensor
    return kept


def _shrunk(config: PreTrainedConfig, dense: nn.Module, widths: Mapping[Block, int], gone: set[int]) -> PreTrainedConfig:
    """The configuration with fewer layers and narrower MLPs."""
    own = config.to_dict()
    config = copy.deepcopy(config)
    config.per_layer_config = None
    mlps = [block for block in find_blocks(dense) if block.layer not in gone]
    if gone:
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise ValueError(f"Attention of this {type(dense).__name__} depends on the number of its layer: {INSTEAD}.")
        layers = config.num_hidden_layers
        for key, value in own.items():  # layer_types, for example
            if isinstance(value, list) and len(value) == layers and "layer" in key:
                setattr(config, key, [item for i, item in enumerate(value) if i not in gone])
        config.num_hidden_layers = layers - len(gone)
    each = {i: widths.get(block, block.intermediate_size) for i, block in enumerate(mlps) if block.has_neurons}
    keys = [key for key in WIDTHS if key in own]
    if widths and not keys:
        raise ValueError(f"The configuration of a {type(dense).__name__} has no width of MLPs: {INSTEAD}.")
    if len(set(each.values())) > 1:
        if len({block.stack for block in mlps}) > 1:
            raise ValueError(f"MLPs of several widths in an encoder and a decoder: {INSTEAD}.")
        config.per_layer_config = {i: dict.fromkeys(keys, width) for i, width in each.items()}
    elif each:
        for key in keys:
            setattr(config, key, next(iter(each.values())))
    return config


def _with_heads(
    config: PreTrainedConfig, dense: nn.Module, heads: Mapping[Block, NarrowAttention], gone: set[int]
) -> PreTrainedConfig:
    """``config`` with the number of heads that all attention blocks have, which it can say for all layers at once."""
    if not heads:
        return config
    if missing := [key for key in HEADS if key not in config.to_dict()]:
        raise ValueError(f"The configuration of a {type(dense).__name__} has no {missing[0]}: {INSTEAD}.")
    left = [block for block in find_blocks(dense, "attention") if block.layer not in gone]
    if len(sizes := {heads.get(block) for block in left}) > 1:
        different = " and ".join(sorted(str(size or "all heads") for size in sizes)[:2])
        raise ValueError(f"Attention blocks have different numbers of heads ({different}): {INSTEAD}.")
    (size,), dim = sizes, attention_weights(left[0]).query.shape[1]
    for key, value in zip(HEADS, (size.heads, size.groups, dim), strict=True):
        setattr(config, key, value)
    return config


def _plain(model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Tensors) -> PreTrainedModel:
    """The model of ``config`` with ``tensors``. Raises ValueError unless they are exactly its own, in one precision."""
    plain = empty_model(model_class, config, meta=True)
    shapes = {name: t.shape for name, t in plain.state_dict().items()}
    if differing := sorted(k for k in shapes.keys() | tensors.keys() if k not in tensors or shapes.get(k) != tensors[k].shape):
        raise ValueError(f"A {model_class.__name__} of the narrower configuration has another {differing[0]}: {INSTEAD}.")
    if len(kinds := {t.dtype for t in tensors.values() if t.is_floating_point()}) > 1:
        raise ValueError(f"A checkpoint is loaded in one precision, this model is in {sorted(map(str, kinds))}: {INSTEAD}.")
    own = {id(t): nn.Parameter(unshared(t), False) if isinstance(t, nn.Parameter) else unshared(t) for t in tensors.values()}
    plain.load_state_dict({name: own[id(t)] for name, t in tensors.items()}, assign=True)
    return plain


def _read_back(whole: Path, record: dict, expected: Tensors) -> None:
    """Raise ValueError unless all ``expected`` tensors are loaded: an architecture may not store those it can compute."""
    plain = load_plain(whole, record)
    found = dict(plain.named_buffers()) | plain.state_dict()
    if lost := [name for name, t in expected.items() if name not in found or not torch.equal(found[name], t.detach().cpu())]:
        raise ValueError(
            f"{lost[0]} does not come back as it was from a checkpoint of a {record['model']} (was it cast? then load the base "
            f"in that precision): {INSTEAD}."
        )
