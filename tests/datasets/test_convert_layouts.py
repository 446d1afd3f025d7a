"""`vitdet data convert`: the formats of all annotation tools are converted to the same records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vitdet.data.check import check

Run = Callable[..., tuple[int, str, str]]
Layout = Callable[[Path], None]
BOX = [10.0, 10.0, 30.0, 30.0]
POINTS = [(65.5, 20.0), (81.0, 35.5), (65.5, 51.0), (50.0, 35.5)]
DIAMOND = [value for point in POINTS for value in point]
WIDTH, HEIGHT = 96, 64


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        color = 20 * ord(name[-1]) % 255, 90, 90
        Image.new("RGB", (WIDTH, HEIGHT), color).save(folder / f"{name}.jpg")


def coco(*names: str, prefix: str = "", root: bool = False) -> dict:
    """Return an annotation file with categories 1 and 2, and with Roboflow's category 0 if `root`."""
    ball = {"category_id": 2, "bbox": [50.0, 20.0, 31.0, 31.0], "segmentation": [DIAMOND]}
    box = {"category_id": 1, "bbox": BOX, "segmentation": []}
    annotations = [
        {"id": 2 * number + place, "image_id": number, "area": 900, "iscrowd": 0, **annotation}
        for number in range(1, 1 + len(names))
        for place, annotation in enumerate((box, ball))
    ]
    categories = [
        {"id": number, "name": name, "supercategory": "things"}
        for number, name in enumerate(("box", "ball"), 1)
    ]
    if root:
        categories.append({"id": 0, "name": "things", "supercategory": "none"})
    images = [
        {"id": number, "file_name": f"{prefix}{name}.jpg", "width": WIDTH, "height": HEIGHT}
        for number, name in enumerate(names, 1)
    ]
    return {"categories": categories, "images": images, "annotations": annotations}


def label_rows() -> str:
    x, y, width, height = BOX
    box = ((x + width / 2) / WIDTH, (y + height / 2) / HEIGHT, width / WIDTH, height / HEIGHT)
    outline = [value / (HEIGHT if k % 2 else WIDTH) for k, value in enumerate(DIAMOND)]
    return "\n".join(" ".join(map(str, row)) for row in ((0, *box), (1, *outline)))


def voc_xml(name: str, points: bool = False) -> str:
    if points:
        numbers = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in POINTS)
    else:
        numbers = "".join(f"<x{k}>{x}</x{k}><y{k}>{y}</y{k}>" for k, (x, y) in enumerate(POINTS, 1))
    return (
        f"<annotation><folder></folder><filename>{name}.jpg</filename><size><width>{WIDTH}</width>"
        f"<height>{HEIGHT}</height><depth>3</depth></size>"
        "<object><name>box</name><bndbox><xmin>11</xmin><xmax>40</xmax><ymin>11</ymin><ymax>40</ymax>"
        "</bndbox></object><object><name>ball</name><bndbox><xmin>50</xmin><xmax>81</xmax>"
        f"<ymin>20</ymin><ymax>51</ymax></bndbox><polygon>{numbers}</polygon></object></annotation>"
    )


def shapes(*more: dict) -> list[dict]:
    corners = [[40, 40], [10, 10]]
    common = {"group_id": None, "description": "", "flags": {}, "mask": None}
    return [
        {"label": "box", "points": corners, "shape_type": "rectangle"} | common,
        {"label": "ball", "points": POINTS, "shape_type": "polygon"} | common,
        *more,
    ]


def labelme(name: str, found: list[dict]) -> dict:
    size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {"shapes": found, "imagePath": f"{name}.jpg", "imageData": None, **size}


def cvat_xml(*names: str, more: str = "", subset: str = "") -> str:
    points = ";".join(f"{x},{y}" for x, y in POINTS)
    found = "".join(
        f'<image id="{number}" name="{name}.jpg" {subset} width="{WIDTH}" height="{HEIGHT}">'
        '<box label="box" source="manual" occluded="0" xtl="10.00" ytl="10.00" xbr="40.00" ybr="40.00"'
        f' z_order="0"></box><polygon label="ball" source="manual" points="{points}" z_order="0">'
        f"</polygon>{more}</image>"
        for number, name in enumerate(names)
    )
    labels = "".join(f"<label><name>{name}</name></label>" for name in ("box", "ball"))
    return (
        '<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version><meta><task>'
        f"<labels>{labels}</labels></task></meta>{found}</annotations>"
    )


def yolo_lists(root: Path) -> None:
    """Write the layout of https://docs.cvat.ai/docs/dataset_management/formats/format-yolo-ultralytics/"""
    write(root / "data.yaml", "path: ./\ntrain: train.txt\nnames:\n  0: box\n  1: ball\n")
    write(root / "train.txt", "data/images/train/p1.jpg\nimages/train/p2.jpg\n")
    images(root / "images/train", "p1", "p2")
    for name in ("p1", "p2"):
        write(root / f"labels/train/{name}.txt", label_rows())


def voc_folders(root: Path) -> None:
    images(root / "JPEGImages", "p1", "p2")
    write(root / "Annotations/p1.xml", voc_xml("p1"))
    write(root / "Annotations/p2.xml", voc_xml("p2", points=True))
    write(root / "ImageSets/Main/default.txt", "p1\np2\n")


def voc_without_lists(root: Path) -> None:
    voc_folders(root)
    (root / "ImageSets/Main/default.txt").unlink()


def voc_beside(root: Path) -> None:
    images(root, "p1", "p2")
    for name in ("p1", "p2"):
        write(root / f"{name}.xml", voc_xml(name))


def labelme_files(root: Path) -> None:
    images(root, "p1", "p2")
    for name in ("p1", "p2"):
        write(root / f"{name}.json", labelme(name, shapes()))


def cvat_images(root: Path) -> None:
    images(root / "images", "p1", "p2")
    write(root / "annotations.xml", cvat_xml("p1", "p2"))


def coco_layout(folder: str, file: str, **options: object) -> Layout:
    """Return a function that writes images in a folder, and an annotation file."""

    def layout(root: Path) -> None:
        images(root / folder, "p1", "p2")
        write(root / file, coco("p1", "p2", **options))

    return layout


roboflow = coco_layout("train", "train/_annotations.coco.json", root=True)
cvat_coco = coco_layout("images/default", "annotations/instances_default.json")
fiftyone = coco_layout("data", "labels.json")
coco_beside = coco_layout("", "my_export.json")
LAYOUTS = {
    "yolo": yolo_lists,
    "voc": voc_folders,
    "voc without lists": voc_without_lists,
    "voc beside": voc_beside,
    "roboflow": roboflow,
    "cvat's coco": cvat_coco,
    "cvat's old coco": coco_layout("images", "annotations/instances_default.json"),
    "label studio": coco_layout("images", "result.json", prefix="images/"),
    "label studio on windows": coco_layout("images", "result.json", prefix="images\\"),
    "label studio 1.16": coco_layout("images", "result.json", prefix="../../ls/media/upload/4/"),
    "fiftyone": fiftyone,
    "coco beside": coco_beside,
    "coco": coco_layout("train", "annotations/instances_train.json"),
    "labelme": labelme_files,
    "cvat": cvat_images,
}


def records(root: Path, split: str) -> list:
    tree = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    name_of = {category["id"]: category["name"] for category in tree["categories"]}
    file_of = {image["id"]: image["file_name"] for image in tree["images"]}
    assert all((root / split / name).is_file() for name in file_of.values())
    assert sorted(name_of.values()) == ["ball", "box"]
    keys = ("bbox", "segmentation", "area")
    found = [
        (file_of[item["image_id"]], name_of[item["category_id"]], *(item[key] for key in keys))
        for item in tree["annotations"]
    ]
    return sorted(found, key=lambda row: row[:3])


def expected(*names: str) -> list:
    """Return the expected records. The outline has 481 pixels; its geometric area is 480.5."""
    return [
        record
        for name in names
        for record in (
            (f"{name}.jpg", "ball", [50, 20, 31, 31], [DIAMOND], 481),
            (f"{name}.jpg", "box", BOX, [], 900),
        )
    ]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_layout_gives_the_same_records(vitdet: Run, layout: Layout) -> None:
    layout(Path("source"))
    code, output, errors = vitdet("data", "convert", "source", "out")
    assert (code, errors) == (0, "")
    assert records(Path("out"), "train") == expected("p1", "p2")
    notes = [line for line in output.splitlines()[1:] if "root category" not in line]
    assert notes == [
        "  no validation split, which training requires; --val-share 0.1 uses 10% of the images as val",
        "  2 x objects with a box but no mask (--boxes-as-masks converts boxes to masks)",
    ]
    assert check(Path("out")).ok
    words = ("--val-share", "0.5", "--boxes-as-masks")
    assert vitdet("data", "convert", "source", "divided", *words)[0] == 0
    assert check(Path("divided")).ok
    code, _, errors = vitdet("data", "convert", "source", "none", "--splits", "dev")
    assert code == 1 and "no split dev; available: train" in errors


def split_layout(file: str, content: Callable[[str], object]) -> Layout:
    """Return a function that writes one folder per split, with an image and its annotations."""

    def layout(root: Path) -> None:
        for split, name in (("train", "p1"), ("valid", "p2"), ("test", "p3")):
            images(root / split, name)
            write(root / split / file.format(name), content(name))

    return layout


split_roboflow = split_layout("_annotations.coco.json", lambda name: coco(name, root=True))
split_voc = split_layout("{}.xml", voc_xml)
split_labelme = split_layout("{}.json", lambda name: labelme(name, shapes()))


def split_cvat(root: Path) -> None:
    parts = []
    for split, name in (("Train", "p1"), ("Validation", "p2"), ("Test", "p3")):
        images(root / "images" / split, name)
        parts.append(cvat_xml(name, subset=f'subset="{split}"'))
    body = [part.partition("</meta>")[2].removesuffix("</annotations>") for part in parts]
    write(root / "annotations.xml", f"<annotations>{''.join(body)}</annotations>")


def split_cvat_yolo(root: Path) -> None:
    subsets = {"Test": "p3", "Train": "p1", "valid": "p2"}
    lists = "".join(f"{subset}: {subset}.txt\n" for subset in subsets)
    write(root / "data.yaml", f"names:\n  0: box\n  1: ball\npath: .\n{lists}")
    for subset, name in subsets.items():
        write(root / f"{subset}.txt", f"images/{subset}/{name}.jpg\n")
        images(root / "images" / subset, name)
        write(root / f"labels/{subset}/{name}.txt", label_rows())


SPLIT = [split_roboflow, split_voc, split_labelme, split_cvat, split_cvat_yolo]


@pytest.mark.parametrize("layout", SPLIT)
def test_the_splits_of_a_layout_are_converted(vitdet: Run, tmp_path: Path, layout: Layout) -> None:
    layout(tmp_path / "source")
    assert vitdet("data", "convert", "source", "out")[0] == 0
    for split, name in (("train", "p1"), ("val", "p2"), ("test", "p3")):
        assert records(tmp_path / "out", split) == expected(name)
    code, output, _ = vitdet("data", "convert", "source", "two", "--splits", "train,val")
    assert code == 0 and not (tmp_path / "two/test").exists()
    assert "  split test skipped, not requested" in output.splitlines()


@pytest.mark.parametrize(
    ("layout", "file"),
    [(coco_beside, "my_export.json"), (cvat_coco, "annotations/instances_default.json")],
)
def test_a_file_can_be_the_source(vitdet: Run, tmp_path: Path, layout: Layout, file: str) -> None:
    layout(tmp_path / "source")
    assert vitdet("data", "convert", tmp_path / "source" / file, "out")[0] == 0
    assert records(tmp_path / "out", "train") == expected("p1", "p2")


FORMATS = [yolo_lists, voc_folders, coco_beside, labelme_files, cvat_images]


@pytest.mark.parametrize("layout", FORMATS)
def test_the_limit_of_pixels_can_be_set(vitdet: Run, layout: Layout) -> None:
    layout(Path("source"))
    words = ("data", "convert", "source", "out", "--set")
    code, output, errors = vitdet(*words, f"data.max_pixels={WIDTH * HEIGHT - 1}")
    assert (code, output) == (1, "") and "or raise data.max_pixels" in errors
    assert os.listdir() == ["source"]
    assert vitdet(*words, f"data.max_pixels={WIDTH * HEIGHT}")[0] == 0


@pytest.mark.parametrize("setting", ["data.bit_depth=12", "optim.lr=1"])
def test_a_setting_without_effect_is_rejected(vitdet: Run, setting: str) -> None:
    coco_beside(Path("source"))
    _, _, errors = vitdet("data", "convert", "source", "out", "--set", setting)
    key = setting.partition("=")[0]
    assert errors == f"vitdet: {key} has no effect; --set accepts data.max_pixels\n"
    assert os.listdir() == ["source"]


def test_a_root_category_with_objects_is_a_class(vitdet: Run, tmp_path: Path) -> None:
    roboflow(tmp_path / "source")
    path = tmp_path / "source/train/_annotations.coco.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["category_id"] = 0
    write(path, tree)
    output = vitdet("data", "convert", "source", "out")[1]
    assert output.startswith("out: 3 classes") and "root category" not in output


def test_all_problems_of_a_coco_file_are_reported_at_once(vitdet: Run, tmp_path: Path) -> None:
    fiftyone(tmp_path / "source")
    tree = coco("p1", "p2", "p3")
    tree["annotations"][0]["bbox"] = "none"
    tree["annotations"][1]["segmentation"] = [["a"] * 6]
    tree["images"][1]["width"] = 97
    write(tmp_path / "source/labels.json", tree)
    code, output, errors = vitdet("data", "convert", "source", "out")
    assert (code, output) == (1, "") and not (tmp_path / "out").exists()
    assert errors.startswith("vitdet: source: 4 problems, nothing was written\n")
    for text in (
        "1 x bbox that is not four finite numbers",
        "1 x polygon with coordinates that are not finite numbers",
        "1 x image size that differs from the annotations",
        "1 x missing image file",
    ):
        assert f"  {text}\n" in errors


def test_skipped_coco_objects_are_counted(vitdet: Run, tmp_path: Path) -> None:
    fiftyone(tmp_path / "source")
    tree = coco("p1", "p2")
    tree["annotations"][0]["bbox"] = [10, 10, 0, 5]
    tree["annotations"][1]["category_id"] = 9
    tree["annotations"][2]["iscrowd"] = 1
    tree["annotations"].append(tree["annotations"][0] | {"id": 99, "iscrowd": 1})
    write(tmp_path / "source/labels.json", tree)
    images(tmp_path / "source/data", "p9")
    output = vitdet("data", "convert", "source", "out")[1].splitlines()
    assert "  2 x objects of zero size skipped" in output
    assert "  1 x objects without a known category skipped" in output
    assert "  1 x difficult objects or crowds: ignored in training and evaluation" in output
    assert "  1 x images skipped (not in any converted split)" in output
    annotations = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert [annotation["iscrowd"] for annotation in annotations["annotations"]] == [1, 0]


def test_labelme_shapes_are_converted_or_skipped(vitdet: Run, tmp_path: Path) -> None:
    circle = {"label": "box", "points": [[5, 5], [9, 9]], "shape_type": "circle"}
    parts = [
        {"label": "ball", "points": [[x, 0], [x + 5, 0], [x, 5]], "group_id": 7} for x in (0, 20)
    ]
    images(tmp_path / "source", "p1", "p2")
    write(tmp_path / "source/p1.json", labelme("p1", shapes(circle, circle, *parts)))
    write(tmp_path / "source/other.json", {"a": 1})
    code, output, errors = vitdet("data", "convert", "source", "out")
    assert (code, errors) == (0, "")
    assert {
        "  2 x shapes of type 'circle' skipped",
        "  1 x JSON files without shapes ignored",
        "  1 x images without a JSON file skipped",
    } <= {*output.splitlines()}
    found = records(tmp_path / "out", "train")
    assert len(found) == 3 and len(found[0][3]) == 2 and found[0][2] == [0, 0, 25, 5]


def test_labelme_reports_all_problems(vitdet: Run, tmp_path: Path) -> None:
    images(tmp_path / "source", "p1")
    bad = [{"label": 3, "points": []}, {"label": "a", "points": [[1, "x"]]}]
    far = {"label": "a", "points": [[0, 0], [5, 0], [5, 900]]}
    write(tmp_path / "source/p1.json", labelme("p1", shapes(*bad, far)))
    write(tmp_path / "source/p2.json", labelme("p2", shapes()))
    write(tmp_path / "source/p3.json", '{"shapes": [')
    write(tmp_path / "source/p4.json", labelme("../../secret", shapes()))
    code, output, errors = vitdet("data", "convert", "source", "out")
    assert (code, output) == (1, "") and "6 problems" in errors
    for place in ("p1.json: shape 3", "p1.json: shape 4", "p2.json", "p3.json", "p4.json"):
        assert place in errors


def test_cvat_shapes_are_converted_or_skipped(vitdet: Run, tmp_path: Path) -> None:
    more = (
        '<polyline label="box" points="1,1;2,2"/><tag label="box"/><tag label="ball"/>'
        '<mask label="ball" rle="1, 2, 3" left="4" top="5" width="3" height="2"/>'
        '<mask label="ball" rle="6" left="4" top="5" width="3" height="2"/>'
        '<polygon label="box" points="1,1;9,9"/>'
        '<box label="box" xtl="40" ytl="20" xbr="60" ybr="30" rotation="90.0"/>'
    )
    images(tmp_path / "source/images", "p1")
    write(tmp_path / "source/annotations.xml", cvat_xml("p1", more=more))
    code, output, errors = vitdet("data", "convert", "source", "out")
    assert (code, errors) == (0, "")
    assert {
        "  1 x elements <polyline> skipped",
        "  2 x elements <tag> skipped",
        "  1 x rotated boxes replaced by their axis-aligned bounding boxes",
        "  1 x objects of zero size skipped",
        "  1 x outlines with fewer than 3 points skipped",
    } <= {*output.splitlines()}
    found = [row[1:] for row in records(tmp_path / "out", "train")]
    (mask,) = [row for row in found if isinstance(row[2], dict)]
    (turned,) = [row for row in found if row[0] == "box" and row[1] != BOX]
    assert mask[1] == [5, 5, 2, 1] and mask[3] == 2
    assert turned[1] == [45, 15, 10, 20]


def test_subsets_of_cvat_with_the_same_split_are_merged(vitdet: Run, tmp_path: Path) -> None:
    """CVAT exports tasks without a subset as `train`, next to the subset Train."""
    split_cvat_yolo(tmp_path / "source")
    text = (tmp_path / "source/data.yaml").read_text() + "train: train_list.txt\n"
    write(tmp_path / "source/data.yaml", text)
    write(tmp_path / "source/train_list.txt", "images/Test/p3.jpg\n")
    assert vitdet("data", "convert", "source", "out")[0] == 0
    assert records(tmp_path / "out", "train") == expected("p1", "p3")


def test_other_names_of_a_split_are_read_only_if_it_has_no_images(
    vitdet: Run, tmp_path: Path
) -> None:
    split_cvat_yolo(tmp_path / "source")
    text = (tmp_path / "source/data.yaml").read_text() + "val: valid.txt\nvalidation: missing\n"
    write(tmp_path / "source/data.yaml", text)
    assert vitdet("data", "convert", "source", "out")[0] == 0
    assert records(tmp_path / "out", "val") == expected("p2")


@pytest.mark.parametrize("suffix", ["", ".PNG"])
def test_frames_of_a_video_in_cvat_are_found(vitdet: Run, tmp_path: Path, suffix: str) -> None:
    """CVAT stores them as NAME.PNG, but omits the extension in annotations.xml."""
    images(tmp_path / "source/images", "p1")
    (tmp_path / "source/images/p1.jpg").rename(tmp_path / f"source/images/frame_000001{suffix}")
    xml = cvat_xml("frame_000001").replace(".jpg", "")
    write(tmp_path / "source/annotations.xml", xml)
    assert vitdet("data", "convert", "source", "out")[0] == 0
    assert {row[0] for row in records(tmp_path / "out", "train")} == {f"frame_000001{suffix}"}


def test_cvat_tracks_are_rejected(vitdet: Run, tmp_path: Path) -> None:
    write(tmp_path / "source/annotations.xml", "<annotations><track label='a'/></annotations>")
    code, _, errors = vitdet("data", "convert", "source", "out")
    assert code == 1 and "contains tracks; export the task as 'CVAT for images'" in errors


def test_an_unknown_layout_is_described(vitdet: Run, tmp_path: Path) -> None:
    images(tmp_path / "source/pictures", "p1", "p2")
    write(tmp_path / "source/labels.csv", "a,b")
    write(tmp_path / "source/via.json", {"_via_settings": {}, "_via_img_metadata": {}})
    write(tmp_path / "source/x.xml", "<dataset/>")
    code, output, errors = vitdet("data", "convert", "source", "out")
    assert (code, output, errors.count("\n")) == (1, "", 1)
    for text in (
        "pictures/ (2 .jpg)",
        "labels.csv",
        "via.json (JSON, keys ['_via_settings', '_via_img_metadata'])",
        "x.xml (XML, '<dataset/>')",
        "expected yolo: data.yaml",
    ):
        assert text in errors, errors
