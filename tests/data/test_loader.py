"""Loaders: a step's batch depends only on seed and step; validation yields every image once."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from vitdet.config import DataConfig
from vitdet.data.dataset import read_split
from vitdet.data.loader import train_loader, val_loader
from vitdet.data.transforms import resize_and_pad
from vitdet.types import Batch


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Twelve noise images per split with triangles as objects; every third image has no object."""
    rng = np.random.default_rng(0)
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        images, annotations = [], []
        for index in range(12):
            height, width = (40, 60) if index % 2 else (70, 50)
            name = f"{index}.jpg"
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name)
            images.append({"id": 100 - index, "file_name": name, "height": height, "width": width})
            for k in range(index % 3):
                ids = {"id": len(annotations) + 1, "image_id": 100 - index, "category_id": k + 1}
                outline = [[5 + 9 * k, 6, 30, 8 + k, 18, 33]]
                shape = {"bbox": [5 + 9 * k, 6, 25 - 9 * k, 27], "segmentation": outline}
                annotations.append({**ids, **shape, "iscrowd": 0})
        categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    splits = {"train_split": "train", "val_split": "val"}
    changes = {"scale_range": (0.5, 2.0), "transpose": 0.5, "color_jitter": 0.2}
    return DataConfig(root=str(tmp_path), image_size=64, workers=0, **splits, **changes)


def _same(a: Batch, b: Batch) -> bool:
    pairs = [(a.images, b.images), (a.sizes, b.sizes)]
    for target, other in zip(a.targets, b.targets, strict=True):
        pairs += [(target.boxes, other.boxes), (target.labels, other.labels)]
        pairs += [(target.masks.edges, other.masks.edges), (target.masks.spans, other.masks.spans)]
    return a.image_ids == b.image_ids and all(torch.equal(*pair) for pair in pairs)


def test_batches_contain_images_sizes_and_targets(data: DataConfig) -> None:
    loader = train_loader(data, 4, seed=0, start_step=0, steps=6)
    batches = list(loader)
    assert len(batches) == len(loader) == 6 and loader.dataset.without_objects == 4
    assert loader.dataset.split.class_names == ("a", "b")
    for batch in batches:
        assert batch.images.shape == (4, 3, 64, 64) and batch.images.dtype == torch.uint8
        assert batch.sizes.shape == batch.originals.shape == (4, 2)
        assert batch.sizes.dtype == torch.int64
        for target, (height, width) in zip(batch.targets, batch.sizes.tolist(), strict=True):
            assert target.boxes.dtype == torch.float32 and target.labels.dtype == torch.int64
            assert len(target.boxes) == len(target.labels) == len(target.masks)
            assert target.masks.edges.shape[1:] == (4,)
            assert (target.boxes >= 0).all() and (target.boxes[:, 2::2] <= width).all()
            assert (target.boxes[:, 1::2] <= height).all()
    seen = [image_id for batch in batches[:2] for image_id in batch.image_ids]
    assert sorted(seen) == sorted(100 - index for index in range(12) if index % 3)


def test_resuming_and_workers_do_not_change_a_step(data: DataConfig) -> None:
    whole = list(train_loader(data, 4, seed=1, start_step=0, steps=7))
    resumed = list(train_loader(data, 4, seed=1, start_step=4, steps=7))
    assert len(resumed) == 3 and all(map(_same, whole[4:], resumed))
    apart = list(train_loader(replace(data, workers=2), 4, seed=1, start_step=0, steps=7))
    assert all(map(_same, whole, apart))
    other = next(iter(train_loader(data, 4, seed=2, start_step=0, steps=1)))
    assert not torch.equal(other.images, whole[0].images)
    assert len(train_loader(data, 4, seed=1, start_step=7, steps=7)) == 0


def test_two_ranks_get_the_images_of_a_single_process(data: DataConfig) -> None:
    alone = list(train_loader(data, 4, 0, 0, 3))
    halves = [list(train_loader(data, 4, 0, 0, 3, rank, 2)) for rank in range(2)]
    for whole, left, right in zip(alone, *halves, strict=True):
        assert whole.image_ids == left.image_ids + right.image_ids
        assert torch.equal(whole.images, torch.cat([left.images, right.images]))
    with pytest.raises(ValueError, match=r"multiple of 3 \(the number of processes"):
        train_loader(data, 4, 0, 0, 3, 0, 3)


def test_validation_yields_every_image_once_in_order(data: DataConfig) -> None:
    batches = list(val_loader(data, 5))
    ids = [image_id for batch in batches for image_id in batch.image_ids]
    assert ids == sorted(ids) and len(ids) == 12 and [len(batch) for batch in batches] == [5, 5, 2]
    assert batches[0].targets == [] and batches[0].originals.tolist()[0] == [40, 60]
    assert batches[0].sizes.tolist()[0] == [43, 64]
    parts = [batch.image_ids for rank in range(5) for batch in val_loader(data, 2, rank, 5)]
    assert [image_id for part in parts for image_id in part] == ids
    assert list(val_loader(replace(data, max_images=1), 1, 0, 2)) == []


def test_max_images_selects_the_lowest_ids_with_an_object(data: DataConfig) -> None:
    records = read_split(replace(data, max_images=3), "val").records
    assert [record.image_id for record in records] == [89, 90, 92]


def test_a_batch_is_pinned_for_the_gpu(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = next(iter(train_loader(data, 2, 0, 0, 1)))
    pinned = pin_memory(batch)  # as a DataLoader does if there is a GPU
    assert torch.equal(pinned.images, batch.images + 1) and pinned.targets is batch.targets


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_raises_a_one_line_error(data: DataConfig, workers: int) -> None:
    file = Path(data.root) / "train" / "1.jpg"
    file.write_bytes(file.read_bytes()[:600])
    says = r"train/1.jpg: the image cannot be read: .*vitdet data check"
    with pytest.raises(ValueError, match=says) as caught:
        list(train_loader(replace(data, workers=workers), 4, 0, 0, 2))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(data.root)


GROUP_SIGNAL = """
import os, signal, sys
from vitdet.config import DataConfig
from vitdet.data import train_loader
signal.signal(signal.SIGTERM, lambda *_: None)  # like a training run that finishes its step first
batches = iter(train_loader(DataConfig(root=sys.argv[1], train_split="train", image_size=64, workers=1), 4, 0, 0, 50))
next(batches)
os.killpg(0, signal.SIGTERM)
for _ in range(20):
    next(batches)
sys.exit(7)  # in the middle of the stream
"""


def test_workers_ignore_signals_to_the_process_group(data: DataConfig) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUP_SIGNAL, data.root],
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 7


def test_ignored_objects_are_counted_once(
    data: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(data.root) / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    train_loader(data, 4, seed=0, start_step=0, steps=1)
    # rank 0 has already logged the message
    train_loader(data, 4, seed=0, start_step=0, steps=1, rank=1, world_size=2)
    assert caplog.messages == [f"{path}: objects ignored in training: 1 of zero size"]


def test_an_empty_crop_is_replaced_by_another_image(data: DataConfig) -> None:
    data = replace(data, scale_range=(3.0, 6.0))
    redrawn = replace(data, redraw_empty=True)
    plain, full = (list(train_loader(split, 4, 1, 0, 10)) for split in (data, redrawn))
    empty = [len(target) == 0 for batch in plain for target in batch.targets]
    assert 5 < sum(empty) < 35 and all(len(target) for batch in full for target in batch.targets)
    images = (torch.cat([batch.images for batch in batches]) for batches in (full, plain))
    assert [torch.equal(*pair) for pair in zip(*images, strict=True)] == [
        not skip for skip in empty
    ]
    apart = list(train_loader(replace(redrawn, workers=2), 4, seed=1, start_step=6, steps=10))
    assert all(map(_same, full[6:], apart))


def test_redrawing_stops_if_no_crop_has_an_object(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(_: object, counts: np.ndarray, __: object) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(counts), 4), np.float32), np.zeros(len(counts), bool)

    monkeypatch.setattr("vitdet.data.dataset.visible_boxes", nothing)
    says = "100 consecutive crops without objects.*redraw_empty=false"
    with pytest.raises(ValueError, match=says):
        list(train_loader(replace(data, redraw_empty=True), 4, 0, 0, 1))


def test_rare_classes_are_repeated_on_all_ranks_and_after_a_restart(data: DataConfig) -> None:
    data = replace(data, repeat_threshold=1.0)  # class b is in 4 of 8 images, so its factor is 1.41
    alone = [image for batch in train_loader(data, 4, 0, 0, 200) for image in batch.image_ids]
    with_b = sum(image in (98, 95, 92, 89) for image in alone) / len(alone)
    assert with_b == pytest.approx(2**0.5 / (1 + 2**0.5), abs=0.03)
    ranks = (train_loader(data, 4, 0, 90, 100, rank, 2) for rank in (0, 1))
    steps = (left.image_ids + right.image_ids for left, right in zip(*ranks, strict=True))
    assert [image for step in steps for image in step] == alone[360:400]


@pytest.mark.parametrize("antialias", [True, False])
def test_validation_resizes_according_to_the_setting(data: DataConfig, antialias: bool) -> None:
    batch = next(iter(val_loader(replace(data, antialias=antialias), 1)))
    record = read_split(data, "val").records[0]
    expected, _ = resize_and_pad(np.asarray(Image.open(record.path)), 64, antialias)
    assert np.array_equal(batch.images[0].numpy(), expected)
