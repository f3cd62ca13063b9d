"""Plans to refit, and what leaves the layers with a plan in place."""

import pytest
import torch
from conftest import captured_whole
from tiny_models import build, random_windows

from mlpreplace import (
    Linear,
    LowRank,
    Mean,
    NarrowMLP,
    NarrowPlusLinear,
    TwoLayerMLP,
    fit,
    spliced,
)
from mlpreplace.planning.read_out import read_out

FAMILIES = [NarrowMLP(12), NarrowPlusLinear(8, 4), TwoLayerMLP(12), Linear(), LowRank(4), Mean()]
MIXED = pytest.mark.parametrize("families", [FAMILIES[:3], FAMILIES[3:]], ids=["neurons", "linear"])


def fitted_plan(name: str, *families, **changes):
    """(model, plan): block i replaced by families[i], the last of them for all that follow. Mixtral has no neurons to keep."""
    model = build(name, **changes).to(torch.float32 if name == "mixtral" else torch.float64)
    blocks, stats = captured_whole(model, random_windows(), validation_windows=2)
    if name == "mixtral":
        families = [Linear() if isinstance(f, NarrowMLP | NarrowPlusLinear) else f for f in families]
    families = [*families, *[families[-1]] * len(blocks)]
    return model, {b: fit(b, stats, f) for b, f in zip(blocks, families, strict=False)}


def left(model, plan, blocks, windows, towards: str = "stream") -> list[torch.Tensor]:
    """What leaves the layer of every block ("stream"), or the block itself ("output"), with ``plan`` in place."""
    found = {}

    def keep(block):
        return lambda module, args, output: found.__setitem__(block, (output[0] if isinstance(output, tuple) else output).clone())

    with spliced(model, plan):
        paths = {b: f"{b.stack}.{b.layer}" if towards == "stream" else b.paths[-1] for b in blocks}
        handles = [model.get_submodule(path).register_forward_hook(keep(b)) for b, path in paths.items()]
        model(windows, use_cache=False)
        for handle in handles:
            handle.remove()
    return [found[block] for block in blocks]


@torch.no_grad()
def stream_error(model, plan, windows) -> float:
    """Relative squared error of the stream that leaves the last replaced layer, a mean over tokens."""
    last = [max(plan, key=lambda b: b.layer)]
    (dense,), (got,) = left(model, {}, last, windows), left(model, plan, last, windows)
    return ((got - dense).square().sum(-1) / dense.square().sum(-1)).mean().item()


def slopes(model, plan, windows, towards: str = "stream") -> list[float]:
    """Norm of the gradient of each refitted block's squared error by its own output weights."""
    outs = {b: out for b, r in plan.items() if b.kind == "mlp" and (out := read_out(r.family, r.body)) is not None}
    with torch.no_grad():
        dense = left(model, {}, outs, windows, towards)
    found = []
    for i, out in enumerate(outs.values()):
        learned = [*out.weights, *([] if out.bias is None else [out.bias])]
        for p in learned:
            p.requires_grad_(True)
        loss = (left(model, plan, outs, windows, towards)[i] - dense[i]).square().sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)]).norm().item())
        for p in learned:
            p.requires_grad_(False)
    return found


def same(a, b) -> bool:
    """Whether the replacements of plan ``a`` have the weights of those of ``b``."""
    return all(torch.equal(x, y) for block in a for x, y in zip(a[block].parameters(), b[block].parameters(), strict=True))


def pristine(model, modules) -> bool:
    return all(module is modules[name] for name, module in model.named_modules()) and not any(
        "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )
