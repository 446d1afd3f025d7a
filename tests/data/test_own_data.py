"""Custom data sets need only a folder; class names appear wherever the detector is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import MINIMAL, ROOT, minimal, options
from tests.training.test_fine_tuning import other_classes
from vitdet import Predictor
from vitdet.checkpoint import load_model_file
from vitdet.config import load_config, save_config
from vitdet.data.check import check
from vitdet.data.layout import explicit_settings, missing, resolve, resolve_config, split_files
from vitdet.types import Detections

Run = Callable[..., tuple[int, str, str]]
FEW = MINIMAL | {"optim.steps": 1, "data.max_images": 2}
SMALL = options([f"{key}={value}" for key, value in FEW.items()])
NAMES = ("bolt", "nut", "split pin")


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Write squares of three classes as a YOLO data set."""
    folder, rng = tmp_path / "yolo", np.random.default_rng(0)
    for split in ("train", "valid"):
        images, labels = folder / split / "images", folder / split / "labels"
        images.mkdir(parents=True)
        labels.mkdir()
        for number in range(3):
            pixels = rng.integers(0, 256, (96, 128, 3), np.uint8)
            Image.fromarray(pixels).save(images / f"{split}{number}.jpg")
            (labels / f"{split}{number}.txt").write_text(f"{number} 0.5 0.5 0.4 0.5\n")
    head = f"train: train/images\nval: valid/images\nnames: {list(NAMES)}\n"
    (folder / "data.yaml").write_text(head)
    return folder


def renamed(data: Path, **splits: str) -> Path:
    """Rename splits, given as old=new."""
    for old, new in splits.items():
        for name in ("{}", "annotations/instances_{}.json"):
            shutil.move(data / name.format(old), data / name.format(new))
    return data


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Return a function that returns the logged messages."""
    caplog.set_level("INFO")
    return lambda: "\n".join(caplog.messages)


def test_a_yolo_data_set_needs_one_setting_for_training(
    vitdet: Run, yolo: Path, tmp_path: Path, said: Callable[[], str]
) -> None:
    root, output = tmp_path / "parts", tmp_path / "runs" / "parts"
    assert vitdet("data", "convert", yolo, root)[0] == 0
    words = ["train", "tiny", *SMALL, "--set", f"data.root={root}", "--output", output]
    code, out, err = vitdet(*words)
    has = f"{root} has model.roi_heads.num_classes=3, model.mask.enabled=false"
    assert code == 0 and has in said().splitlines(), err
    assert "num_classes: 3" in (output / "config.yaml").read_text()
    assert load_model_file(output / "model.pt")["class_names"] == list(NAMES)
    assert Predictor.load(output / "model.pt").class_names == NAMES

    words = ["predict", output / "model.pt", root / "val" / "valid0.jpg", "--threshold", 0]
    code, out, _ = vitdet(*words, "--output", tmp_path / "drawn")
    found = json.loads((tmp_path / "drawn" / "detections.json").read_text())["valid0.jpg"]
    assert code == 0 and found[0]["name"] in out
    assert {category["name"] for category in found} <= set(NAMES)
    code, out, _ = vitdet("evaluate", output / "model.pt", "--plots", tmp_path / "plots")
    table = json.loads((tmp_path / "plots" / "classes.json").read_text())
    assert code == 0 and {row["class"] for row in table} <= set(NAMES) and table


def test_a_checkpoint_is_evaluated_on_the_splits_of_another_folder(
    vitdet: Run, trained: Path, own_tiny: Path, said: Callable[[], str]
) -> None:
    renamed(own_tiny, train="train2017", val="val2017")
    words = ["evaluate", trained / "model.pt", "--output", "m.json"]
    code, _, err = vitdet(*words, "--set", f"data.root={own_tiny}")
    assert code == 0, err
    assert f"{own_tiny} has data.train_split=train2017, data.val_split=val2017" in said()
    measured = json.loads(Path("m.measured.json").read_text())
    assert measured["data"]["val_split"] == "val2017"
    code, _, err = vitdet(*words, "--set", f"data.root={own_tiny}", "--set", "data.val_split=val")
    assert code == 1 and "the splits are train2017, val2017" in err


@pytest.mark.parametrize("recipe", ["tiny", "mask_rcnn_vitdet_b_coco", "mask_rcnn_vitdet_b_lvis"])
def test_a_folder_determines_splits_and_classes(own_tiny: Path, recipe: str) -> None:
    kind = [] if recipe != "mask_rcnn_vitdet_b_lvis" else ["data.dataset=coco"]
    renamed(own_tiny, train="train2017", val="valid")
    overrides = [*kind, f"data.root={own_tiny}", "optim.lr=1e-3"]
    config, found = resolve_config(recipe, overrides)
    data, count = config.data, config.model.roi_heads.num_classes
    assert (data.train_split, data.val_split, count) == ("train2017", "valid", 6)
    assert found["data.val_split"] == "valid"
    assert ("model.roi_heads.num_classes" in found) == (recipe != "tiny")
    told = [f"{key}={value}" for key, value in found.items()]
    # the folder changes only settings that a user could change
    assert load_config(recipe, [*overrides, *told]) == config


@pytest.mark.parametrize(
    "named", [["data.train_split=day", "data.val_split=night"], ["model.roi_heads.num_classes=4"]]
)
def test_settings_of_the_user_are_kept(own_tiny: Path, named: list[str]) -> None:
    overrides = [f"data.root={own_tiny}", *named]
    assert resolve_config("tiny", overrides) == (load_config("tiny", overrides), {})


def test_without_another_folder_a_recipe_is_unchanged(own_tiny: Path) -> None:
    recipe = load_config("mask_rcnn_vitdet_b_coco", [f"data.root={own_tiny}"])
    assert resolve(recipe, ["optim.lr"]) == (recipe, {})


def test_recipes_for_coco_are_unchanged_on_coco(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017", "train", "val"):
        categories = [{"id": number, "name": str(number)} for number in range(80)]
        path = tmp_path / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    override = f"data.root={tmp_path}"
    config = load_config("mask_rcnn_vitdet_b_coco", [override])
    assert resolve_config("mask_rcnn_vitdet_b_coco", [override]) == (config, {})


def test_settings_of_a_file_are_not_replaced(vitdet: Run, own_tiny: Path) -> None:
    config = load_config("tiny", minimal(own_tiny, model__roi_heads__num_classes=5))
    save_config(config, Path("mine.yaml"))
    words = ["train", "mine.yaml", "--set", f"data.root={own_tiny}", "--output", "out"]
    code, _, err = vitdet(*words)
    assert code == 1
    assert err.endswith("has 6 classes, but model.roi_heads.num_classes is 5; set it to 6\n")


def test_settings_missing_from_a_file_follow_the_folder(own_tiny: Path, tmp_path: Path) -> None:
    other_classes(own_tiny, ["one", "two"])
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: {{root: {own_tiny}, val_split: train}}\n")
    config, found = resolve_config(file)
    assert found == {"data.train_split": "train", "model.roi_heads.num_classes": 2}
    assert config.data.val_split == "train"
    file.write_text("data: {image_size: 64}\n")
    assert resolve_config(file) == (load_config(file), {})


def test_explicit_settings_override_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {root: here}\nmodel: {rpn: {norm: true}}\n")
    overrides = ["optim.lr = 1", "train.init="]
    assert explicit_settings("tiny", overrides) == {"optim.lr", "train.init"}
    assert {"data.root", "model.rpn.norm", "optim.lr"} < explicit_settings(file, overrides)
    assert "data.root" in explicit_settings("tiny", ["data={root: here}"])
    shipped = ROOT / "vitdet" / "recipes" / "tiny.yaml"
    assert explicit_settings(shipped, overrides) == {"data.root", "optim.lr", "train.init"}


def test_a_written_config_adapts_to_later_data(vitdet: Run, own_tiny: Path, tmp_path: Path) -> None:
    """The first stage of dvc.yaml writes the config before the data exists."""
    words = ["config", ROOT / "vitdet" / "recipes" / "tiny.yaml", "--set", f"data.root={own_tiny}"]
    moved = own_tiny.rename(tmp_path / "later")
    assert vitdet(*words, *SMALL, "--output", tmp_path / "config.yaml")[0] == 0
    assert load_config(tmp_path / "config.yaml").model.roi_heads.num_classes == 6  # from the recipe
    moved.rename(own_tiny)
    other_classes(own_tiny, ["one", "two"])
    renamed(own_tiny, train="train2017", val="val2017")
    config, found = resolve_config(tmp_path / "config.yaml")
    assert config.model.roi_heads.num_classes == 2
    assert (config.data.train_split, config.data.val_split) == ("train2017", "val2017")
    assert len(found) == 3
    code, _, err = vitdet("train", tmp_path / "config.yaml", "--output", tmp_path / "run")
    assert code == 0, err
    checkpoint = tmp_path / "run" / "model.pt"
    assert load_model_file(checkpoint)["class_names"] == ["one", "two"]
    code, _, err = vitdet("evaluate", checkpoint, "--config", tmp_path / "config.yaml")
    assert code == 0, err
    _, printed, _ = vitdet("config", "tiny")
    assert "num_classes: 6" in printed and "#" not in printed


def named_lvis(root: Path) -> None:
    for path in (root / "annotations").iterdir():
        path.rename(path.with_name(path.name.replace("instances", "lvis_v1")))


def broken(root: Path) -> None:
    (root / "annotations" / "instances_train.json").write_text('{"categories": [1, 2')


UNKNOWN = "no such file or folder; the splits are day, night; set data.train_split and data.val_s"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda root: renamed(root, train="day", val="night"), UNKNOWN),
        (lambda root: renamed(root, val="holdout"), "the splits are holdout, train;"),
        (lambda root: shutil.rmtree(root / "val"), "/val: no such file or folder; expected the im"),
        (lambda root: shutil.rmtree(root / "annotations"), "expected annotations/inst"),
        (named_lvis, "have a different format; set data.dataset=lvis"),
        (broken, "invalid JSON"),
    ],
    ids=["unknown names", "no validation", "no images", "nothing", "lvis", "broken"],
)
def test_incomplete_data_is_reported_in_one_line(
    vitdet: Run, own_tiny: Path, change: Callable, says: str
) -> None:
    change(own_tiny)
    words = ["train", "tiny", *SMALL, "--set", f"data.root={own_tiny}", "--output", "out"]
    code, _, err = vitdet(*words)
    assert code == 1 and err.count("\n") == 1 and says in err, err
    assert not Path("out").exists()


def test_a_finished_detector_is_fine_tuned_on_the_folder_s_classes(
    vitdet: Run, trained: Path, own_tiny: Path, tmp_path: Path, said: Callable[[], str]
) -> None:
    other_classes(own_tiny, ["one", "two"])
    words = options([f"train.init={trained / 'model.pt'}", f"data.root={own_tiny}"])
    code, _, err = vitdet("train", "tiny", *SMALL, *words, "--output", tmp_path / "run")
    assert code == 0, err
    assert "newly initialized (number of classes: 6 in the file, 2 in this model)" in said()
    assert Predictor.load(tmp_path / "run" / "model.pt").class_names == ("one", "two")


def test_drawn_names_are_those_of_the_checkpoint(
    trained: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("vitdet.visualize.paint", lambda *given: drawn.extend(given[3]))
    found: Detections = Predictor.load(trained / "model.pt")(picture, threshold=0.0)
    names = load_model_file(trained / "model.pt")["class_names"]
    found.draw(picture)
    pairs = zip(found.labels, found.scores, strict=True)
    assert drawn and drawn == [f"{names[label]} {score:.2f}" for label, score in pairs]


@pytest.mark.parametrize(
    "rename, says",
    [
        (lambda _: ["one", "two"], "class 0 is 'one', not "),
        (lambda names: [*names[:-1], "pentagon"], "class 5 is 'pentagon', not "),
        (lambda names: names[::-1], "class 0 is "),
    ],
    ids=["fewer", "as many, one of another name", "in another order"],
)
def test_evaluation_refuses_other_class_names(
    vitdet: Run, trained: Path, own_tiny: Path, rename: Callable, says: str
) -> None:
    other_classes(own_tiny, rename(load_model_file(trained / "model.pt")["class_names"]))
    words = ["evaluate", trained / "model.pt", "--set", f"data.root={own_tiny}"]
    code, _, err = vitdet(*words, "--output", "m.json")
    assert (
        code == 1 and says in err and "the classes of this data set differ from those of" in err
    ), err
    assert not Path("m.json").exists()


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.replace('"iscrowd"', '"score": NaN, "iscrowd"', 1).encode(),
    ],
    ids=["mark", "utf-16", "nan"],
)
def test_classes_in_unusual_json_are_counted(own_tiny: Path, rewrite: Callable) -> None:
    for path in (own_tiny / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"].append({"id": 99, "name": "seventh"})
        path.write_bytes(rewrite(json.dumps(content)))
    assert check(own_tiny, images=False).ok
    config, found = resolve_config("tiny", [f"data.root={own_tiny}"])
    assert config.model.roi_heads.num_classes == 7 and found == {"model.roi_heads.num_classes": 7}


def test_json_files_without_a_known_layout_are_named(own_tiny: Path) -> None:
    shutil.move(own_tiny / "annotations", own_tiny / "json")
    data = load_config("tiny", [f"data.root={own_tiny}"]).data
    assert str(missing(split_files(data, "train")[0], data)).endswith(
        "under data.root for each split, found json/instances_train.json, json/instances_val.json"
    )
