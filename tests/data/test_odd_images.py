"""Images other than plain RGB JPEG files, through every reader: exact pixels, or a one-line error.

Expected pixels are computed in `odd_files`, without Pillow.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.cli.test_cli import Run, refused
from tests.helpers.odd_files import GRAY, HIGH, ODD, RNG, WIDE, Make, png
from vitdet.config import DataConfig
from vitdet.data.check import check
from vitdet.data.coco import ImageError
from vitdet.data.dataset import read_split
from vitdet.data.images import Reading, examine, image_size, open_image, upright
from vitdet.data.loader import train_loader, val_loader
from vitdet.datasets.report.portrait import portrait
from vitdet.evaluation.pictures import draw_truth
from vitdet.predictor import Predictor
from vitdet.types import Batch, Detections
from vitdet.visualize import draw


class Watcher(nn.Module):
    """A detector that records its input and returns no detections."""

    def forward(self, images: torch.Tensor, targets: None, sizes: torch.Tensor) -> list[Detections]:
        self.images = images
        none = torch.zeros(0)
        return [Detections(none.reshape(0, 4), none, none.long(), none.reshape(0, 28, 28))]


def data_set(root: Path, size: tuple[int, int], name: str = "odd.jpg") -> DataConfig:
    """Annotate one object in the image ROOT/odd/odd.jpg; the canvas has the image's longest side."""
    (root / "odd").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    height, width = size
    outline = [[0, 0, width, 0, width, height, 0, height]]
    shape = {"bbox": [0, 0, width, height], "area": width * height, "segmentation": outline}
    tree = {
        "images": [{"id": 1, "file_name": name, "height": height, "width": width}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, **shape}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (root / "annotations" / "instances_odd.json").write_text(json.dumps(tree))
    plain = {"image_size": max(size), "workers": 0, "scale_range": (1.0, 1.0), "flip": 0.0}
    return DataConfig(root=str(root), train_split="odd", val_split="odd", **plain)


def unscaled(batch: Batch | Watcher, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels (H, W, 3) of the batch's only image, without padding."""
    return batch.images.numpy()[0, :, : size[0], : size[1]].transpose(1, 2, 0)


def readings(data: DataConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of each part of the program and the upright image as read by it."""
    record = read_split(data, "odd").records[0]
    yield "open_image", np.asarray(open_image(record.path))
    yield "what was read before", np.asarray(upright(open_image(record.path)))
    size = record.height, record.width
    yield "training", unscaled(next(iter(train_loader(data, 1, 0, 0, 1))), size)
    yield "evaluation", unscaled(next(iter(val_loader(data, 1))), size)
    predictor = Predictor(Watcher(), ("thing",), data.image_size)
    found = predictor(record.path)
    yield "predictor", unscaled(predictor.detector, size)
    yield "drawing", np.asarray(draw(record.path, found, scale=1))
    with Image.open(record.path) as file:
        predictor(file)
        yield "predictor of an open file", unscaled(predictor.detector, size)


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_all_readers_return_the_same_upright_pixels(make: Make, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    path = tmp_path / "odd" / "odd.jpg"  # the file name does not determine the format
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as the command line does
        expected, near = make(path)
        data = data_set(tmp_path, expected.shape[:2])
        for reader, seen in readings(data):
            assert seen.shape == expected.shape, reader
            assert np.abs(seen.astype(int) - expected).max() <= near, reader
        assert image_size(path) == examine(path.read_bytes()).size == expected.shape[:2]
        assert check(tmp_path, images=True).lines()[1:] == [
            "  odd (images: 1, annotations: 1, categories: 1)",
            *(DARK if expected.max() == 0 else CLEAN),
        ]
        record = read_split(data, "odd").records[0]
        assert "error" not in portrait(record, ("thing",), "odd")
        assert draw_truth(record, ("thing",)).mode == "RGB"


CLEAN = ["errors: none", "warnings: none"]
# both 16-bit images with 8-bit values are read as black
DARK = [
    "errors: none",
    "warnings: 1",
    "  1 x 16-bit image whose values use only 8 bits and appear too dark (set data.bit_depth=8)",
    "      instances_odd.json: image 1: 'odd.jpg': largest value 255 of 65535",
]
JPEG = io.BytesIO()
Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(JPEG, "JPEG", progressive=True)
LARGE = png((20000, 20000), 1, 0, [])
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
RAW = io.BytesIO()  # a camera's raw file starts with a preview
Image.new("RGB", (16, 16)).save(RAW, "TIFF", tiffinfo={254: 1})
TRUNCATED = "the image cannot be read: image file is truncated"
Content = bytes | Image.Image | Callable[[Path], None]
REFUSED: dict[str, tuple[Content, str]] = {
    "truncated": (JPEG.getvalue()[:-400], TRUNCATED),
    "truncated by two bytes": (JPEG.getvalue()[:-2], TRUNCATED),
    "head of a JPEG": (JPEG.getvalue()[:30], "the image cannot be read: "),
    "half a PNG": (png((64, 64), 8, 0, [bytes(64)] * 64)[:48], "the image cannot be read: "),
    "text": (b"<!doctype html>", "not an image that can be read"),
    "a program in PostScript": (EPS, "not an image that can be read"),
    "the preview of a raw file": (RAW.getvalue(), "not an image that can be read"),
    "empty": (b"", "the file is empty"),
    "a folder": (Path.mkdir, "the path is a folder"),
    "missing": (lambda path: None, ""),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), ""),
    "a pipe": (os.mkfifo, "not a regular file"),
    "too large": (LARGE, "the image has more than 178,956,970 pixels; downscale it or cut it into"),
    "fractions": (Image.fromarray(GRAY / np.float32(255)), "the pixels are floating-point numbers"),
    "32 bits": (Image.fromarray(GRAY.astype(np.int32) * 70000), "values range from 0 to "),
    "below zero": (Image.fromarray(GRAY.astype(np.int32) - 1000), "values range from -1000 to "),
}


@pytest.mark.parametrize(("content", "says"), REFUSED.values(), ids=REFUSED)
def test_unusable_images_are_refused_in_one_line(
    vitdet: Run, tmp_path: Path, trained: Path, content: Content, says: str
) -> None:
    data, path = data_set(tmp_path / "own", (64, 64)), tmp_path / "own" / "odd" / "odd.jpg"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Image.Image):
        content.save(path, "TIFF")
    else:
        content(path)
    code, output, errors = vitdet("data", "check", "own", "--images")
    assert (code, errors) == (1, "")
    assert "errors: 1\n" in output and "image 1: odd/'odd.jpg'" in output
    assert says in output if says else "missing image file" in output
    predicted = vitdet("predict", trained / "model.pt", path, "--output", "drawn")
    refused(predicted, says or "no such image file")
    with pytest.raises((ImageError, FileNotFoundError), match="vitdet data check") as caught:
        next(iter(train_loader(data, 1, 0, 0, 1)))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert says in str(caught.value) or "no such file (missing images: 1)" in str(caught.value)
    assert vitdet("data", "report", "own", "--output", "page.html")[0] == 0
    assert not (tmp_path / "drawn").exists()


def test_warnings_of_pillow_are_not_shown(
    vitdet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set(tmp_path, (HIGH, WIDE))
    ODD["EXIF that is broken: cut"](tmp_path / "odd" / "odd.jpg")
    # Pillow warns above this limit, and raises an error above twice the limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HIGH * WIDE - 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert vitdet("data", "check", tmp_path, "--images")[::2] == (0, "")
        predict = vitdet("predict", "none.pt", tmp_path / "odd" / "odd.jpg", "--output", "drawn")
        refused(predict, "none.pt: no such")
    assert not said


def users(data: DataConfig, path: Path) -> list[Callable[[], object]]:
    """Return functions that train, evaluate and predict on the image with the settings of `data`."""
    return [
        lambda: next(iter(train_loader(data, 1, 0, 0, 1))),
        lambda: next(iter(val_loader(data, 1))),
        lambda: Predictor(Watcher(), ("thing",), 64, reading=Reading.of(data))(path),
    ]


def test_an_image_with_too_many_pixels_is_not_decoded(
    vitdet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = data_set(tmp_path, (13000, 13000)), tmp_path / "odd" / "odd.jpg"
    Image.new("RGB", (16, 16)).save(path, "JPEG")
    content = path.read_bytes()
    place = content.index(b"\xff\xc0") + 5  # offset of height and width in the frame header
    path.write_bytes(content[:place] + (13000).to_bytes(2, "big") * 2 + content[place + 4 :])
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    expected = (
        "the image has 13,000 x 13,000 pixels, more than data.max_pixels=100000000; downscale it, "
        "cut it into tiles, or raise data.max_pixels"
    )
    data = replace(data, image_size=64)
    readers = [lambda: open_image(path), lambda: image_size(path)]
    for reader in (*readers, lambda: examine(path.read_bytes()), *users(data, path)):
        with pytest.raises((ValueError, ImageError)) as caught:
            reader()
        assert expected in str(caught.value)
    status, said, _ = vitdet("data", "check", tmp_path, "--images")
    assert status == 1 and expected in said


@pytest.mark.parametrize(("bound", "fits"), [(HIGH * WIDE, True), (HIGH * WIDE - 1, False)])
def test_an_image_may_have_at_most_max_pixels(bound: int, fits: bool, tmp_path: Path) -> None:
    data, path = data_set(tmp_path, (HIGH, WIDE)), tmp_path / "odd" / "odd.jpg"
    ODD["gray"](path)
    refusal = pytest.raises((ValueError, ImageError), match="data.max_pixels")
    for use in users(replace(data, max_pixels=bound), path):
        with nullcontext() if fits else refusal:
            use()


def test_a_decoder_error_becomes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise KeyError("two\nlines")

    Image.new("RGB", (3, 3)).save(tmp_path / "x.bmp")
    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ValueError, match=r"^[^\n]*x.bmp: the image cannot be read: [^\n]*$"):
        open_image(tmp_path / "x.bmp")


@pytest.mark.parametrize("found", [(24, 16), (16, 25)])
def test_a_size_without_the_exif_rotation_is_explained(
    tmp_path: Path, found: tuple[int, int]
) -> None:
    data = data_set(tmp_path, found)
    ODD["gray"](tmp_path / "odd" / "odd.jpg")
    hint = "annotations must refer to the upright image, after its EXIF orientation is applied"
    sizes = f"annotated {found[1]} x {found[0]}"
    with pytest.raises(ImageError, match=f"24 x 16 pixels, {sizes}") as caught:
        next(iter(train_loader(data, 1, 0, 0, 1)))
    text = "\n".join(check(tmp_path, images=True).lines())
    assert (hint in str(caught.value)) == (hint in text) == (found == (24, 16))
    assert f"24 x 16, {sizes}" in text


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (1, 20000), (20000, 1)])
def test_an_image_of_one_row_or_column_is_accepted(size: tuple[int, int], tmp_path: Path) -> None:
    data, path = data_set(tmp_path, size), tmp_path / "odd" / "odd.jpg"
    path.write_bytes(png(size, 8, 2, [bytes([3, 99, 200]) * size[1]] * size[0]))
    plain = DataConfig(workers=0)
    data = replace(data, image_size=64, scale_range=plain.scale_range, flip=plain.flip)
    long = tuple(min(side, 64) if max(size) > 64 else 64 for side in size)
    batch = next(iter(val_loader(data, 1)))
    assert batch.sizes[0].tolist() == list(long) and batch.images.sum() == 302 * long[0] * long[1]
    for batch in train_loader(data, 1, 0, 0, 20):
        high, wide = batch.sizes[0].tolist()
        assert batch.images.sum() == 302 * high * wide
        assert (batch.images[0, :, :high, :wide] > 0).all()
    found = Predictor(Watcher(), ("thing",), 64)(path)
    assert found.draw(path).convert("RGB").getpixel((0, 0)) == (3, 99, 200)


def test_damaged_images_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """`check` and training accept the same files and read equal sizes."""
    rng, path, read = np.random.default_rng(3), tmp_path / "x", 0
    files = []
    for make in ODD.values():
        make(path)
        files.append(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(400):
            content = np.frombuffer(files[number % len(files)], np.uint8).copy()
            places = rng.integers(0, min(len(content), rng.choice([60, 300])), rng.integers(1, 5))
            content[places] = rng.integers(0, 256)
            end = None if number % 4 else rng.integers(1, len(content))
            path.write_bytes(content.tobytes()[:end])
            said = []
            for reader in (
                lambda: open_image(path).size[::-1],
                lambda: examine(path.read_bytes()).size,
            ):
                try:
                    said.append(reader())
                except ValueError as error:
                    assert "\n" not in str(error)
                    said.append("refused")
            assert said[0] == said[1], (number, said)
            read += said[0] != "refused"
    assert 40 < read < 360
