"""The command line: the files that each command writes, and one-line errors."""

from __future__ import annotations

import importlib.util
import json
import logging
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import ROOT, environment, minimal, options
from vitdet.config import load_config
from vitdet.evaluation import evaluator
from vitdet.files import sha256
from vitdet.tracking.measured import read_measured

Run = Callable[..., tuple[int, str, str]]
FIND = importlib.util.find_spec


@pytest.fixture(autouse=True)
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make mlflow unimportable, which saves seconds; `test_distributed` covers tracking."""
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlflow" else FIND(name)
    )


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files."""
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(result: tuple[int, str, str], message: str) -> None:
    code, output, errors = result
    assert (code, output, errors.count("\n")) == (1, "", 1), errors
    assert errors.startswith("vitdet: ") and message in errors, errors


def python(folder: Path, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run Python with these arguments and the tests' environment, in `cwd` or else in the folder."""
    command, env = [sys.executable, *map(str, words)], environment(folder)
    return subprocess.run(command, cwd=cwd or folder, env=env, capture_output=True, text=True)


def test_the_version_is_printed(vitdet: Run) -> None:
    code, output, errors = vitdet("--version")
    assert (code, errors) == (0, "") and output.count("\n") == 1
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert output.startswith(f"vitdet {version}, torch {torch.__version__}, Python 3.")


def test_config_prints_or_writes_the_settings(vitdet: Run, tmp_path: Path) -> None:
    code, output, errors = vitdet("config", "tiny", "--set", "optim.lr=3e-4")
    assert (code, errors) == (0, "") and yaml.safe_load(output)["optim"]["lr"] == 3e-4
    assert vitdet("config", "tiny", "--output", "a/config.yaml")[:2] == (0, "")
    assert load_config(tmp_path / "a" / "config.yaml") == load_config("tiny")


def test_the_tiny_data_is_created_and_checked(vitdet: Run, tmp_path: Path) -> None:
    words = ("data", "tiny", "made", "--train", "3", "--val", "2", "--seed", "5")
    assert vitdet(*words) == (0, "made: 3 + 2 images\n", "")
    assert vitdet(*words) == (0, "made: 3 + 2 images, already complete\n", "")
    refused(vitdet(*words[:-1], "6"), "contains something other than the tiny data set")
    code, output, _ = vitdet("data", "check", "made")
    assert code == 0 and "train (images: 3," in output and "errors: none" in output
    next((tmp_path / "made" / "train").glob("*.jpg")).unlink()
    code, output, _ = vitdet("data", "check", "made")
    assert code == 1 and "errors: 1" in output


def test_weights_are_listed_and_fetched(vitdet: Run, tmp_path: Path) -> None:
    code, output, _ = vitdet("weights", "list")
    assert code == 0 and "mae_vit_tiny" in output
    save_file({"x": torch.zeros(1)}, tmp_path / "own.safetensors")
    code, output, _ = vitdet("weights", "fetch", "own.safetensors", "--output", "there")
    assert (code, output) == (0, "there/own.safetensors\n")
    vitdet("config", "tiny", "--set", "train.init=", "--output", "config.yaml")
    code, output, _ = vitdet("weights", "fetch", "config.yaml", "--output", "nothing")
    assert code == 0 and "starts from random weights" in output and (tmp_path / "nothing").is_dir()
    for name, message in (
        ("mae_vit_tny", "did you mean 'mae_vit_tiny'?"),
        ("none.safetensors", "none.safetensors: no such weights file"),
    ):
        refused(vitdet("weights", "fetch", name, "--output", "x"), message)
    assert not (tmp_path / "x").exists()


def test_train_shows_progress_and_resumes(vitdet: Run, tiny: Path, tmp_path: Path) -> None:
    words = ("train", "tiny", *options(minimal(tiny, optim__steps=2)), "--output", "run")
    code, output, errors = vitdet(*words)
    assert (code, output) == (0, "run/model.pt\n")
    steps = [line.split("  ")[0] for line in errors.splitlines()]
    assert steps == ["step 1/2", "step 2/2", "step 2/2"]
    assert names(tmp_path / "run") == {"model.pt", "config.yaml", "checkpoints", "pictures"}
    assert not leftovers(tmp_path)
    assert vitdet(*words)[:2] == (0, "run/model.pt\n")
    message = "finished run with a different config (optim.lr: 5.0, not 0.001)"
    refused(vitdet(*words, "--set", "optim.lr=5"), message)


def test_evaluate_writes_its_outputs(vitdet: Run, trained: Path, tmp_path: Path) -> None:
    words = "--output m/metrics.json --pictures pics --plots plots --report deep/report.html"
    config = ["--config", trained / "config.yaml"]
    code, output, errors = vitdet("evaluate", trained / "model.pt", *words.split(), *config)
    assert (code, errors) == (0, "")
    assert 'src="data:image/jpeg;base64,' in (tmp_path / "deep" / "report.html").read_text()
    assert [line.split()[0] for line in output.splitlines()] == ["ap", "box", "mask"]
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert {"box_ap", "mask_ap", "box_ap50"} <= set(metrics)
    assert len(list((tmp_path / "pics").glob("*.jpg"))) == 4
    files = "classes.json curve.json matches.measured.json matches.npz report.html results.json"
    assert names(tmp_path / "plots") == {*files.split(), "thresholds.json"}
    assert not leftovers(tmp_path)
    code, output, _ = vitdet("evaluate", trained / "model.pt", "--set", "evaluate.max_detections=1")
    assert code == 0 and names(tmp_path) == {"deep", "m", "pics", "plots"}


@pytest.mark.parametrize("inputs", ["none.pt", "--results none.json --annotations none.json"])
@pytest.mark.parametrize(
    ("option", "kind", "message"),
    [
        ("--output", Path.mkdir, "Is a directory: 'used'"),
        ("--report", Path.mkdir, "Is a directory: 'used'"),
        ("--plots", Path.touch, "used: is a file; expected the name of a folder"),
    ],
)
def test_an_output_of_the_wrong_kind_is_refused_before_the_evaluation(
    vitdet: Run, tmp_path: Path, inputs: str, option: str, kind: Callable, message: str
) -> None:
    kind(tmp_path / "used")
    refused(vitdet("evaluate", *inputs.split(), option, "used"), message)
    assert names(tmp_path) == {"used"}


def test_a_checkpoint_replaced_during_its_evaluation_does_not_get_its_metrics(
    vitdet: Run,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A training run with train.keep_best may replace best.pt at any time."""
    best, before = tmp_path / "best.pt", sha256(trained / "model.pt")
    shutil.copy(trained / "model.pt", best)

    def measure(*_: object, **__: object) -> dict[str, float]:
        torch.save(torch.load(best) | {"step": 99}, best)
        return {"box_ap": 1.0}

    monkeypatch.setattr(evaluator, "evaluate", measure)
    assert vitdet("evaluate", "best.pt", "--output", "metrics.json")[0] == 0
    measured = read_measured(tmp_path / "metrics.json")
    assert measured and measured.checkpoint_sha256 == before
    assert "best.pt: was replaced during its evaluation" in caplog.text


def test_evaluating_a_moved_checkpoint_creates_no_tracking_store(
    vitdet: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", FIND)
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "model.pt", tmp_path / "run")
    assert vitdet("evaluate", "run/model.pt")[0] == 0
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "model.pt"}


def test_predict(vitdet: Run, trained: Path, tiny: Path, picture: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(sorted((tiny / "val").iterdir())[0], tmp_path / "picture.jpg"))
    images = (picture, other, picture)
    words = ("predict", trained, *images, "--output", "drawn", "--threshold", 0)
    code, output, _ = vitdet(*words)
    drawn = ["drawn/picture.jpg", "drawn/picture_2.jpg"]
    assert code == 0 and [line.split(":")[0] for line in output.splitlines()] == drawn
    found = json.loads((tmp_path / "drawn" / "detections.json").read_text())
    assert set(found) == {"picture.jpg", "picture_2.jpg"}
    assert set(found["picture.jpg"][0]) == {"name", "score", "box"}
    assert Image.open(tmp_path / "drawn" / "picture_2.jpg").format == "JPEG"
    assert not leftovers(tmp_path)


def test_predict_needs_only_the_checkpoint(
    vitdet: Run, trained: Path, picture: Path, tmp_path: Path
) -> None:
    content = torch.load(trained / "model.pt", weights_only=True)
    content["config"]["data"]["root"] = "no longer there"
    torch.save(content, tmp_path / "carried.pt")
    words = ("predict", "carried.pt", picture, "--output", "drawn", "--threshold", 0)
    code, output, _ = vitdet(*words)
    assert code == 0 and output.startswith("drawn/picture.jpg: ")
    refused(vitdet("evaluate", "carried.pt", "--output", "m.json"), "no longer there")
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("config tny", "tny: no such recipe; did you mean 'tiny'?"),
        ("train none.yaml --output run", "none.yaml: no such config file"),
        ("train tiny --set optim.lrate=1 --output run", "optim.lrate: no such setting"),
        ("train tiny --set data.root=nowhere --set train.init= --output run", "nowhere"),
        ("train tiny --set train.init=no.pt --output run", "no such weights file"),
        ("evaluate none.pt", "none.pt: no such checkpoint"),
        ("predict none.pt none.jpg --output drawn", "none.jpg: no such image file"),
        ("data tiny x --train 0", "expected 1 to 500000 images"),
    ],
)
def test_an_error_has_one_line_and_leaves_no_files(
    vitdet: Run, tmp_path: Path, words: str, message: str
) -> None:
    refused(vitdet(*words.split()), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "invalid choice: 'trian'"),
        ("compare a b --resamples many", "expected an integer from 100 to 1000000, got 'many'"),
        ("promote a --version 0", "expected a version number, got '0'"),
        ("data convert a b --splits ,", "expected names separated by commas, got ','"),
    ],
)
def test_a_wrong_argument_is_named(vitdet: Run, words: str, message: str) -> None:
    code, output, errors = vitdet(*words.split())
    assert (code, output) == (2, "") and message in errors


def change(root: Path, edit: Callable[[dict], object]) -> None:
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def plain(content: dict) -> dict:
    """Return an annotation that is not a crowd."""
    return next(annotation for annotation in content["annotations"] if not annotation["iscrowd"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: [item.update(image_id=99) for item in c["annotations"]], "an unknown image"),
        (
            lambda c: [item.update(category_id=99) for item in c["annotations"]],
            "an unknown category",
        ),
        (lambda c: plain(c).update(bbox=[5000, 5000, 10, 10]), "box far outside its image"),
        (lambda c: plain(c).update(segmentation=[5]), "polygon that is not a list"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "duplicate "),
        (lambda c: c["images"].append(c["images"][0]), "duplicate "),
        (lambda c: c["images"][0].update(file_name="none.jpg"), "no such file"),
        (lambda c: c.pop("categories"), "no 'categories' in the file"),
        ('{"images": [', "invalid JSON"),
        ("[]", "top level: not COCO's layout"),
    ],
)
def test_a_damaged_data_set_is_rejected_and_leaves_no_files(
    vitdet: Run, own_tiny: Path, tmp_path: Path, edit: Callable[[dict], object] | str, message: str
) -> None:
    if isinstance(edit, str):
        (own_tiny / "annotations" / "instances_train.json").write_text(edit)
    else:
        change(own_tiny, edit)
    refused(vitdet("train", "tiny", *options(minimal(own_tiny)), "--output", "run"), message)
    assert not (tmp_path / "run").exists()
    code, output, errors = vitdet("data", "check", own_tiny)
    assert code == 1 and errors == "" and "errors: none" not in output


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_rejected_in_one_line(
    vitdet: Run, own_tiny: Path, tmp_path: Path, workers: int
) -> None:
    for path in (own_tiny / "train").iterdir():
        path.write_bytes(path.read_bytes()[:-200])
    settings = options(minimal(own_tiny, data__workers=workers))
    result = vitdet("train", "tiny", *settings, "--output", "run")
    refused(result, ".jpg: the image cannot be read: ")
    assert not leftovers(tmp_path) and not (tmp_path / "run" / "model.pt").exists()


def test_boxes_of_zero_size_are_counted_and_omitted(
    vitdet: Run, own_tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(own_tiny, lambda c: plain(c).update(bbox=[3, 3, 0, 9]))
    settings = options(minimal(own_tiny, optim__steps=1))
    with caplog.at_level(logging.WARNING, "vitdet"):
        assert vitdet("train", "tiny", *settings, "--output", "run")[0] == 0
    (message,) = [text for text in caplog.messages if "objects ignored in training" in text]
    assert "of zero size" in message


def test_checkpoints_that_do_not_fit_are_rejected(
    vitdet: Run, trained: Path, own_tiny: Path, picture: Path, tmp_path: Path
) -> None:
    state, model = sorted((trained / "checkpoints").glob("*.pt"))[-1], trained / "model.pt"
    message = "expected a 'vitdet detector, version 1' file, got 'vitdet training state"
    refused(vitdet("evaluate", state), message)
    result = vitdet("predict", picture, picture, "--output", "drawn")
    refused(result, "not a complete vitdet checkpoint")
    result = vitdet("evaluate", model, "--set", "optim.lr=1")
    refused(result, "only data.* and evaluate.* settings of a trained checkpoint can be overridden")
    for name in ("train", "val"):
        path = own_tiny / "annotations" / f"instances_{name}.json"
        path.write_text(path.read_text().replace('"star"', '"sun"'))
    words = ("--set", f"data.root={own_tiny}", "--output", "m.json", "--plots", "plots")
    refused(vitdet("evaluate", model, *words), "the classes of this data set differ from those of")
    assert names(tmp_path) == {"own", "picture.png"}


def test_predict_checks_its_inputs_before_writing(
    vitdet: Run, trained: Path, tiny: Path, picture: Path, tmp_path: Path
) -> None:
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.jpg"
    text.write_text("no picture")
    cut.write_bytes(sorted((tiny / "val").iterdir())[0].read_bytes()[:-500])
    model = trained / "model.pt"
    for words, message in (
        ((picture, text), "text.jpg: not an image that can be read"),
        ((picture, cut), "cut.jpg: the image "),
        ((picture, "--threshold", 2), "--threshold must be between"),
    ):
        refused(vitdet("predict", model, *words, "--output", "drawn"), message)
    assert not (tmp_path / "drawn").exists()
    photo = Path(shutil.copy(sorted((tiny / "val").iterdir())[0], tmp_path / "photo.jpg"))
    before = photo.read_bytes()
    refused(vitdet("predict", model, photo, "--output", "."), "would overwrite the image")
    assert photo.read_bytes() == before


def test_an_output_that_cannot_be_a_folder_is_rejected(
    vitdet: Run, trained: Path, tiny: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for output in ("file", "file/inside"):
        refused(vitdet("train", "tiny", *options(minimal(tiny)), "--output", output), "file")
        refused(vitdet("predict", trained / "model.pt", picture, "--output", output), "file")
    refused(vitdet("evaluate", trained / "model.pt", "--output", "file/m.json"), "file")
    refused(vitdet("config", "tiny", "--output", "file/c.yaml"), "file")
    assert (tmp_path / "file").read_text() == "mine"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Simulate a full disk: no file can grow beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_training_resumes_after_a_full_disk(vitdet: Run, tiny: Path, tmp_path: Path) -> None:
    settings = options(minimal(tiny, optim__steps=4, train__save_every=1))
    words = ("train", "tiny", *settings, "--output", "run")
    with largest_file(8_000_000):  # the first state is smaller: it has no optimizer moments
        code, output, errors = vitdet(*words)
    assert (code, output) == (1, "")
    message = "step_00000001.pt: could not be written ([Errno 27] File too large); free some"
    assert message in errors.splitlines()[-1]
    assert names(tmp_path / "run" / "checkpoints") == {".lock", "step_00000000.pt"}
    assert not leftovers(tmp_path)
    assert vitdet(*words)[:2] == (0, "run/model.pt\n")


def test_commands_run_in_a_separate_process(vitdet: Run, tiny: Path, tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "vitdet", "config", "tiny")
    assert done.returncode == 0 and done.stderr == "" and "optim" in yaml.safe_load(done.stdout)
    wrong = "vitdet: optim.lr: expected a number, got 'x'\n"
    assert vitdet("config", "tiny", "--set", "optim.lr=x") == (1, "", wrong)
    assert vitdet()[0] == vitdet("trian")[0] == 2
    settings = options(minimal(tiny, data__val_split="test"))
    done = python(tmp_path, "-m", "vitdet", "train", "tiny", *settings, "--output", "run")
    refused((done.returncode, done.stdout, done.stderr), "instances_test.json: no such file or fo")
    assert not list(tmp_path.iterdir())
