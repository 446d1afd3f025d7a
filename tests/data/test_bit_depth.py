"""Gray values of 10 to 14 bits in 16-bit files: reading with data.bit_depth, and reports by `data check --images`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.test_cli import Run, refused
from tests.data.test_odd_images import Watcher, data_set, unscaled
from tests.helpers.odd_files import GRAY, HIGH, MANY, WIDE, drawn, rgb
from vitdet.data.check import check
from vitdet.data.coco import ImageError
from vitdet.data.images import Reading, examine, open_image, read_image, upright
from vitdet.data.loader import train_loader, val_loader
from vitdet.predictor import Predictor

DEEP = MANY[..., 0] >> 4  # 12-bit values
SEEN = (DEEP >> 4).astype(np.uint8)
TWELVE = Reading(bit_depth=12)


def as_png(path: Path, pixels: np.ndarray) -> None:
    drawn(0, pixels.astype(">u2"), rgb(GRAY))(path)


def as_tiff(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.astype("<u2")).save(path, "TIFF")


def as_tiff_of_32_bits(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.astype(np.int32)).save(path, "TIFF")


def as_pgm(path: Path, pixels: np.ndarray, limit: int = 65535) -> None:
    path.write_bytes(f"P5 {WIDE} {HIGH} {limit}\n".encode() + pixels.astype(">u2").tobytes())


def as_plain_pgm(path: Path, pixels: np.ndarray, limit: int = 65535) -> None:
    path.write_text(f"P2 {WIDE} {HIGH} {limit}\n" + " ".join(map(str, pixels.ravel().tolist())))


FILES = {
    save.__name__: save for save in (as_png, as_tiff, as_tiff_of_32_bits, as_pgm, as_plain_pgm)
}
Write = Callable[..., None]


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
def test_values_are_scaled_to_eight_bits(write: Write, depth: int, tmp_path: Path) -> None:
    data, path = data_set(tmp_path, (HIGH, WIDE)), tmp_path / "odd" / "odd.jpg"
    write(path, MANY[..., 0].astype(int) >> (16 - depth))
    data = replace(data, bit_depth=depth)
    reading = Reading.of(data)
    expected = rgb((MANY[..., 0] >> 8).astype(np.uint8))
    assert np.array_equal(open_image(path, reading), expected)
    with Image.open(path) as file:
        assert np.array_equal(read_image(file, reading), expected)
    predictor = Predictor(Watcher(), ("thing",), data.image_size, reading=reading)
    predictor(path)
    loaders = train_loader(data, 1, 0, 0, 1), val_loader(data, 1)
    for batch in (*(next(iter(loader)) for loader in loaders), predictor.detector):
        assert np.array_equal(unscaled(batch, (HIGH, WIDE)), expected)


@pytest.mark.parametrize("write", [as_pgm, as_plain_pgm])
@pytest.mark.parametrize("reading", [Reading(), TWELVE])
def test_a_depth_in_the_file_needs_no_setting(
    write: Write, reading: Reading, tmp_path: Path
) -> None:
    path = tmp_path / "x.pgm"
    write(path, DEEP.astype(int), 4095)
    assert np.abs(np.asarray(open_image(path, reading)).astype(int) - rgb(SEEN)).max() <= 1
    assert examine(path.read_bytes(), reading).highest is None


def test_the_depth_stored_in_a_tiff_is_used(tmp_path: Path) -> None:
    pairs = DEEP.astype(int).reshape(-1, 2)
    packed = np.stack(  # 12 bits per value, most significant bit first
        [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1
    ).astype(np.uint8)
    # width, height, bits, no compression, black is 0, pixel offset, samples, rows, bytes
    tags = {256: WIDE, 257: HIGH, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: HIGH}
    tags[279] = packed.size
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "x.tif").write_bytes(head + packed.tobytes())
    for reading in (Reading(), Reading(bit_depth=14)):
        assert np.array_equal(open_image(tmp_path / "x.tif", reading), rgb(SEEN))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_in_which_zero_is_white_is_not_a_negative(kind: type, tmp_path: Path) -> None:
    path, deep = tmp_path / "x.tif", kind != np.uint8
    Image.fromarray((MANY[..., 0] >> (0 if deep else 8)).astype(kind)).save(path)
    expected = 255 - np.asarray(open_image(path))
    black, white = (struct.pack("<HHIH", 262, 3, 1, value) for value in (1, 0))
    assert black in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(black, white))
    assert np.array_equal(open_image(path), expected)
    with Image.open(path) as file:
        assert np.array_equal(read_image(file), expected)


@pytest.mark.parametrize("reading", [Reading(), Reading(bit_depth=8), TWELVE])
def test_eight_bit_values_are_unchanged(reading: Reading, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(GRAY).save(path)
    assert np.array_equal(open_image(path, reading), rgb(GRAY))


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_values_beyond_the_depth_are_refused(write: Write, tmp_path: Path) -> None:
    data, path = data_set(tmp_path, (HIGH, WIDE)), tmp_path / "odd" / "odd.jpg"
    write(path, np.full((HIGH, WIDE), 4096))
    says = "the largest pixel value is 4096, above 4095 for 12 bits; data.bit_depth must cover"
    for reader in (
        lambda: next(iter(train_loader(replace(data, bit_depth=12), 1, 0, 0, 1))),
        lambda: examine(path.read_bytes(), TWELVE),
        lambda: open_image(path, TWELVE),
    ):
        with pytest.raises((ValueError, ImageError), match=says):
            reader()
    assert says in "\n".join(check(tmp_path, reading=TWELVE).lines())


@pytest.mark.parametrize("kind", [2, 6])
def test_a_bit_depth_is_refused_for_sixteen_bit_color_images(kind: int, tmp_path: Path) -> None:
    data_set(tmp_path, (HIGH, WIDE))
    path = tmp_path / "odd" / "odd.jpg"
    pixels = MANY[..., : 3 if kind == 2 else 4] >> 4
    drawn(kind, pixels.astype(">u2"), rgb(GRAY))(path)
    says = "data.bit_depth=12 is only for gray images; save the image with 8 bits"
    for reader in (
        lambda: open_image(path, TWELVE),
        lambda: examine(path.read_bytes(), TWELVE),
        lambda: upright(Image.open(path), TWELVE),
    ):
        with pytest.raises(ValueError, match=says):
            reader()
    assert check(tmp_path).lines()[-3:-1] == [
        "warnings: 1",
        "  1 x 16-bit image whose values use only 12 bits and appear too dark (save it with 8 bits per channel)",
    ]


@pytest.mark.parametrize(
    ("highest", "says"),
    [
        ((1023, 40), "data.bit_depth=10"),
        ((900, 4080), "data.bit_depth=12"),
        ((16383, 5), "data.bit_depth=14"),
        ((16384, 5), ""),
        ((65535, 1023), ""),
    ],
)
def test_check_considers_the_range_of_all_images(
    vitdet: Run, tmp_path: Path, highest: tuple[int, int], says: str
) -> None:
    """A dark image among brighter ones causes no warning; the proposed setting removes warnings."""
    data_set(tmp_path, (HIGH, WIDE))
    path = tmp_path / "annotations" / "instances_odd.json"
    tree = json.loads(path.read_text())
    for number, high in enumerate(highest, 1):
        as_png(tmp_path / "odd" / f"{number}.png", np.full((HIGH, WIDE), high))
    tree["images"] = [tree["images"][0] | {"id": n, "file_name": f"{n}.png"} for n in (1, 2)]
    tree["annotations"] = [tree["annotations"][0] | {"id": n, "image_id": n} for n in (1, 2)]
    path.write_text(json.dumps(tree))
    code, output, _ = vitdet("data", "check", tmp_path, "--images")
    assert code == 0
    if not says:
        assert "warnings: none" in output
        return
    assert f"2 x 16-bit image whose values use only {says[-2:]} bits and appear too dark" in output
    assert f"image 1: '1.png': largest value {highest[0]} of 65535" in output
    assert f"(set {says})" in output
    code, output, _ = vitdet("data", "check", tmp_path, "--images", "--set", says)
    assert code == 0 and "warnings: none" in output
    report = ("data", "report", tmp_path, "--images", "--output", "page.html")
    assert vitdet(*report)[1].endswith(" 2 warnings\n")
    assert vitdet(*report, "--set", says)[1].endswith(" 0 warnings\n")


def test_commands_that_read_images_accept_max_pixels(
    vitdet: Run, tmp_path: Path, trained: Path
) -> None:
    data_set(tmp_path, (HIGH, WIDE))
    path = tmp_path / "odd" / "odd.jpg"
    Image.fromarray(GRAY).save(path, "PNG")
    predict = ("predict", trained / "model.pt", path, "--output", tmp_path / "drawn")
    looked = ("data", "check", tmp_path, "--images")
    small = f"data.max_pixels={HIGH * WIDE - 1}"
    refused(vitdet(*predict, "--set", small), f"more than data.max_pixels={HIGH * WIDE - 1}")
    assert not (tmp_path / "drawn").exists()
    code, output, _ = vitdet(*looked, "--set", small)
    assert code == 1 and "more than data.max_pixels" in output
    enough = f"data.max_pixels={HIGH * WIDE}"
    assert vitdet(*looked, "--set", enough)[0] == vitdet(*predict, "--set", enough)[0] == 0


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optim.lr=1", "optim.lr has no effect; --set accepts data.max_pixels and data.bit_d"),
        ("data.root=x", "data.root has no effect"),
        ("data={max_pixels: 7, flip: 0.1}", "data.flip has no effect"),
        ("data.bit_depth=11", "data.bit_depth: expected one of 0, 8, 10, 12, 14, 16, got 11"),
        ("data.max_pixels=0", "data.max_pixels must be between 1 and 178956970, got 0"),
    ],
)
@pytest.mark.parametrize("verb", ["predict", "check", "report"])
def test_settings_without_effect_are_refused(
    vitdet: Run, tiny: Path, trained: Path, picture: Path, verb: str, setting: str, says: str
) -> None:
    words = {
        "predict": ("predict", trained / "model.pt", picture, "--output", "drawn"),
        "check": ("data", "check", tiny),
        "report": ("data", "report", tiny, "--output", "page.html"),
    }[verb]
    refused(vitdet(*words, "--set", setting), says)
