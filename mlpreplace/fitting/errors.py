"""How far a replacement is from its block on sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..replacements.records import Errors
from ..statistics.moments import Sample


def sample_errors(module: nn.Module, sample: Sample) -> Errors:
    """Output errors of a replacement on the real tokens of a sample. Raises ValueError where it holds none."""
    sample = sample.to(next((p.device for p in module.parameters()), sample.x.device))
    with torch.inference_mode():
        return errors_of(module(sample.x), sample)


def errors_of(outputs: Tensor, sample: Sample) -> Errors:
    """Errors of ``outputs`` [windows, seq_len, hidden] on the real tokens of a sample. Raises ValueError where it holds none."""
    if not bool(sample.mask.any()):
        raise ValueError("A sample has no real token to measure errors on: its windows are nothing but padding.")
    g, y = outputs[sample.mask].float(), sample.y[sample.mask].float()  # [tokens, hidden]
    error = (g - y).square().sum(-1)  # [tokens]
    energy = y.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    relative = error / energy
    q25, median, q75 = relative.quantile(relative.new_tensor([0.25, 0.5, 0.75])).tolist()
    return Errors(
        mean=relative.mean().item(),
        median=median,
        q25=q25,
        q75=q75,
        pooled=(error.sum() / energy.sum()).item(),
        damage=(error / sample.residual_energy[sample.mask]).mean().item(),
        cosine=1 - torch.cosine_similarity(g, y, dim=-1).mean().item(),
    )
