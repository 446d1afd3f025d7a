"""Reading annotations and images: records, counts of dropped annotations, one-line errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdet.data.coco import ImageError, read_coco, read_image

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


def test_records_contain_usable_objects_in_order(tmp_path: Path) -> None:
    split = read_coco(_write(tmp_path, _content()), tmp_path / "train")
    assert split.class_names == ("dog", "cup") and split.category_ids == (3, 7)
    assert [record.image_id for record in split.records] == [10, 20]
    empty, full = split.records
    assert len(empty) == 0 and empty.boxes.shape == (0, 4)
    assert full.path == tmp_path / "train" / "b.png" and (full.height, full.width) == (30, 40)
    assert full.boxes.tolist() == [[2, 3, 12, 8], [0, 0, 40, 15]] and full.boxes.dtype == np.float32
    assert full.labels.tolist() == [1, 0] and full.labels.dtype == np.int64
    assert full.segmentations[0] == [TRIANGLE]
    assert split.dropped == {"marked as crowd": 1, "of zero size": 1}


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
        ([1, 2], "expected a JSON object with images, annotations, categories; got list"),
    ],
)
def test_a_bad_annotation_fails_in_one_line(tmp_path: Path, content: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        read_coco(_write(tmp_path, content), tmp_path / "train")
    message = str(caught.value)
    assert "\n" not in message and "instances_train.json" in message
    assert "vitdet data check" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such annotation file"):
        read_coco(tmp_path / "none.json", tmp_path)


def test_sixteen_bit_images_are_scaled_and_rotated(tmp_path: Path) -> None:
    pixels = np.array([[0, 255, 256], [32768, 40000, 65535]], np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    for name in ("x.png", "x.tiff"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        image = np.asarray(read_image(tmp_path / name, (2, 3)))
        assert image[::-1, ::-1, 0].tolist() == [[0, 0, 1], [128, 156, 255]]
        assert (image == image[..., :1]).all()


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    says = "x.jpg: no such image file; `vitdet data check ROOT --images"
    with pytest.raises(ImageError, match=says):
        read_image(tmp_path / "x.jpg")


def test_real_coco_annotations_are_read() -> None:
    if not SAMPLE.is_dir():
        pytest.skip("needs ../shared")
    objects = 0
    for split, crowd in (("train2017", 1), ("val2017", 5)):
        found = read_coco(SAMPLE / "annotations" / f"instances_{split}.json", SAMPLE / split)
        assert len(found.class_names) == 80 and found.dropped == {"marked as crowd": crowd}
        objects += sum(map(len, found.records))
    assert objects == 514 - 6
