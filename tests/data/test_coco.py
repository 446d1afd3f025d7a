"""Reading annotation files: records, dropped and counted annotations, one-line errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdet.data.coco import ImageError, read_coco, read_image
from vitdet.data.images import upright

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "coco-sample"
TRIANGLE = [2.0, 3.0, 12.0, 3.0, 2.0, 8.0]


def _content() -> dict:
    thing = {"image_id": 20, "category_id": 3, "segmentation": [TRIANGLE]}
    rle = {"size": [30, 40], "counts": [600, 600]}
    return {
        "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "dog"}],
        "images": [
            {"id": 20, "file_name": "b.png", "height": 30, "width": 40},
            {"id": 10, "file_name": "a.png", "height": 20, "width": 40},
        ],
        "annotations": [
            thing | {"id": 1, "category_id": 7, "bbox": [2, 3, 10, 5]},
            thing | {"id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1, "segmentation": rle},
            thing | {"id": 3, "bbox": [5, 5, 0, 4], "iscrowd": 0},
            thing | {"id": 4, "bbox": [0, 0, 40, 15], "iscrowd": 0, "segmentation": rle},
        ],
    }


def _write(folder: Path, content: object) -> Path:
    path = folder / "annotations" / "instances_train.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_records_hold_usable_objects_in_order(tmp_path: Path) -> None:
    split = read_coco(_write(tmp_path, _content()), tmp_path / "train")
    assert split.class_names == ("dog", "cup") and split.category_ids == (3, 7)
    assert [record.image_id for record in split.records] == [10, 20]
    empty, full = split.records
    assert len(empty) == 0 and empty.boxes.shape == (0, 4)
    assert full.path == tmp_path / "train" / "b.png" and (full.height, full.width) == (30, 40)
    assert full.boxes.tolist() == [[2, 3, 12, 8], [0, 0, 40, 15]] and full.boxes.dtype == np.float32
    assert full.labels.tolist() == [1, 0] and full.labels.dtype == np.int64
    assert full.segmentations[0] == [TRIANGLE]
    assert split.dropped == {"crowd": 1, "of zero size": 1}


def _damage(where: str, **values: object) -> dict:
    content = _content()
    content[where][0].update(values)
    return content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_damage("annotations", id=2), "annotation 2: duplicate annotation id: entry 1"),
        (_damage("annotations", segmentation=[5]), "annotation 1 .image 20.: polygon that is not"),
        (_damage("annotations", bbox=[500, 3, 10, 5]), "box far outside .*on 40 x 30 pixels"),
        (_damage("images", height=0), "image 20: image height that is not a whole number from 1"),
        ({"images": [], "annotations": []}, "no 'categories' in the file"),
        ([1, 2], "expected an object with images, annotations, categories; got a list"),
    ],
)
def test_a_problem_is_one_line_that_says_what_to_do(
    tmp_path: Path, content: object, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        read_coco(_write(tmp_path, content), tmp_path / "train")
    message = str(caught.value)
    assert "\n" not in message and "instances_train.json" in message
    assert "vitdet data check" in message


def test_broken_json_and_missing_file(tmp_path: Path) -> None:
    path = _write(tmp_path, {})
    path.write_text('{"images": [')
    with pytest.raises(ValueError, match="invalid JSON"):
        read_coco(path, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such annotation file"):
        read_coco(tmp_path / "none.json", tmp_path)


def test_images_of_any_mode_come_upright_and_rgb(tmp_path: Path) -> None:
    for mode in ("L", "LA", "P", "RGBA", "1"):
        Image.new(mode, (6, 4)).save(tmp_path / f"{mode}.png")
        image = read_image(tmp_path / f"{mode}.png", (4, 6))
        assert image.mode == "RGB" and image.size == (6, 4)
    Image.new("CMYK", (6, 4)).save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg").mode == "RGB"
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", (6, 4)).size == (4, 6)


def test_sixteen_bits_are_scaled_and_turned(tmp_path: Path) -> None:
    pixels = np.array([[0, 255, 256], [32768, 40000, 65535]], np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    for name in ("x.png", "x.tiff"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        image = np.asarray(read_image(tmp_path / name, (2, 3)))
        assert (
            image[::-1, ::-1, 0].tolist() == [[0, 0, 1], [128, 156, 255]]
            and (image == image[..., :1]).all()
        )
    wide = Image.fromarray(pixels.astype(np.int32))
    assert wide.mode == "I" and np.asarray(upright(wide))[1, :, 0].tolist() == [128, 156, 255]
    assert np.asarray(upright(Image.fromarray(np.array([[7, 255]], np.int32))))[
        0, :, 0
    ].tolist() == [7, 255]


def test_unusable_images_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    with pytest.raises(
        ImageError, match="x.jpg: no such image file; `vitdet data check ROOT --images"
    ):
        read_image(path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    with pytest.raises(ImageError, match="x.jpg: 64 x 64 pixels, annotated 70 x 64"):
        read_image(path, (64, 70))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ImageError, match="x.jpg: the image cannot be read: .*truncated"):
        read_image(path)
    path.write_text("no image")
    with pytest.raises(ImageError, match="x.jpg: not an image that can be read"):
        read_image(path)


def test_real_coco_annotations() -> None:
    if not SAMPLE.is_dir():
        pytest.skip("needs ../shared")
    objects = 0
    for split, crowd in (("train2017", 1), ("val2017", 5)):
        found = read_coco(SAMPLE / "annotations" / f"instances_{split}.json", SAMPLE / split)
        assert len(found.class_names) == 80 and found.dropped == {"crowd": crowd}
        objects += sum(map(len, found.records))
    assert objects == 514 - 6
