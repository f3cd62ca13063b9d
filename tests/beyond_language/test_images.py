"""Images of MNIST are split without overlap, moved, and classified: accuracy is a share of images."""

from types import SimpleNamespace

import pytest
import torch
from conftest import noise
from tiny_models import batches_for, build

from mlpreplace import find_blocks
from mlpreplace.beyond_language.images import BLACK, MNIST, PARTS, accuracy, load_images, shifted, small_vit
from mlpreplace.beyond_language.pretrain import pretrain
from mlpreplace.methods.sliding import drop_mlps
from mlpreplace.models.inputs import in_batches
from mlpreplace.planning.distil import Tuning


def test_images_are_split_without_overlap():
    parts = {name: load_images(MNIST, name) for name in PARTS}
    assert sum(len(p["labels"]) for p in parts.values()) == 5000
    images = torch.cat([p["pixel_values"] for p in parts.values()])
    assert images.shape[1:] == (1, 28, 28) and images.min() == BLACK and images.max() == 1
    labels = torch.cat([p["labels"] for p in parts.values()])
    assert labels.bincount().tolist() == [500] * 10  # of each digit
    assert len(images.flatten(1).unique(dim=0)) == 5000  # none is in two parts
    first = load_images(MNIST, "test", n=5)
    assert torch.equal(first["pixel_values"], parts["test"]["pixel_values"][:5])


def test_bad_requests_for_images():
    with pytest.raises(ValueError, match="Unknown split 'dev'; expected one of train"):
        load_images(MNIST, "dev")
    with pytest.raises(ValueError, match="Images of owner/name need the model's processor"):
        load_images("owner/name", "train")


def test_shifted_images_move():
    batch = load_images(MNIST, "test", n=2)
    moved = shifted(batch, by=1)
    assert moved["pixel_values"].shape == (18, 1, 28, 28) and torch.equal(moved["labels"], batch["labels"].repeat(9))
    images, moved = batch["pixel_values"], moved["pixel_values"]
    assert torch.equal(moved[8:10], images)  # the middle of the nine
    assert torch.equal(moved[:2, :, 1:, 1:], images[..., :-1, :-1]) and (moved[:2, :, 0] == BLACK).all()


def test_accuracy_is_the_share_of_right_images():
    model, batches = build("vit"), batches_for("vit", labels=True)
    plan = drop_mlps(find_blocks(model))
    found = accuracy(model, {"dense": {}, "dropped": plan}, batches)
    with torch.no_grad():
        right = torch.cat([model(b["pixel_values"]).logits.argmax(-1) == b["labels"] for b in batches])
    assert found["dense"].value == pytest.approx(right.float().mean().item()) and found["dense"].tokens == len(right)
    assert found["dense"].low <= found["dense"].value <= found["dense"].high
    assert list(found) == ["dense", "dropped"]


def test_accuracy_of_what_is_always_right():
    """Of labels that are what the model says."""
    model = build("vit")
    images = noise(4, 3, 16, 16).float()
    with torch.no_grad():
        labels = model(images).logits.argmax(-1)
    (found,) = accuracy(model, {"dense": {}}, [{"pixel_values": images, "labels": labels}]).values()
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_a_small_vit_learns_and_is_kept(results):
    train = load_images(MNIST, "train", n=32)
    how = Tuning(steps=16, learning_rate=2e-3, check_steps=8)
    data = in_batches(train, 16), in_batches(train, 32)
    model, again = small_vit(2, 16), small_vit(2, 16)
    report = pretrain(model, *data, how, cached=True, progress=False)
    assert report.steps == 16 and min(report.validation_curve) < report.validation_curve[0]
    assert pretrain(again, *data, how, cached=True, progress=False) == report
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert len(list(results.glob("pretrain-*"))) == 1
    other = small_vit(2, 16, seed=1)
    assert not torch.equal(next(other.parameters()), next(small_vit(2, 16).parameters()))


def test_images_of_the_hub(monkeypatch):
    """A column of images under whatever name, and labels; the processor of the model makes the pixels."""
    import datasets
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    rows = datasets.Dataset.from_dict({"img": [Image.new("L", (4, 4))] * 3, "label": [0, 2, 1]}, features=features)
    asked = SimpleNamespace()

    def load_dataset(path, config, split):
        asked.path, asked.config, asked.split = path, config, split
        return rows

    def processor(images, return_tensors):
        return {"pixel_values": torch.stack([torch.zeros(len(image.getbands()), *image.size) for image in images])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    batch = load_images("owner/name:plain", "test", processor=processor, n=2)
    assert (asked.path, asked.config, asked.split) == ("owner/name", "plain", "test")
    assert batch["pixel_values"].shape == (2, 3, 4, 4) and batch["labels"].tolist() == [0, 2]
    rows = rows.remove_columns("label")
    with pytest.raises(ValueError, match="one column of images and a label, it has img"):
        load_images("owner/name", "test", processor=processor)
