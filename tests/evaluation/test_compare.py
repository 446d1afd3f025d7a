"""`vitdet compare`: inputs, errors and output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.conftest import minimal, options
from tests.helpers.random_results import random_set
from vitdet.cli.compare.inputs import Compared, check_comparable
from vitdet.cli.compare.text import comparison_text
from vitdet.config import flatten, load_config, save_config
from vitdet.data.protocol import Protocol
from vitdet.evaluation import coco
from vitdet.evaluation.bootstrap import bootstrap
from vitdet.tracking.table import markdown_table

Run = Callable[..., tuple[int, str, str]]
TRUTH = ["--annotations", "annotations.json"]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Write annotations.json and two files of box results; the second lacks most true positives of class 1."""
    truth, results = random_set(1, 60, 3)
    results = [{key: result[key] for key in result if key != "segmentation"} for result in results]
    tree = {
        "images": [{**image, "file_name": f"{image['id']}.jpg"} for image in truth.images.values()],
        "categories": list(truth.categories.values()),
        "annotations": [msgspec.to_builtins(annotation) for annotation in truth.objects],
    }
    worse = [result for result in results if result["category_id"] != 5 or result["image_id"] % 4]
    paths = []
    for name, content in (("annotations", tree), ("first", results), ("worse", worse)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    return paths


def refused(result: tuple[int, str, str], message: str) -> None:
    code, output, errors = result
    assert code == 1 and output == "" and errors.count("\n") == 1, errors
    assert message in errors


def test_results_files_are_compared(vitdet: Run, files: list[Path], tmp_path: Path) -> None:
    words = ["first.json", "worse.json", "first.json", *TRUTH, "--resamples", 100]
    code, text, errors = vitdet("compare", *words, "--output", "new/text.md")
    assert (code, errors) == (0, "")
    assert (tmp_path / "new" / "text.md").read_text() == text
    verdicts = [line for line in text.splitlines() if line.startswith("- ")]
    assert verdicts[0].startswith("- worse.json is worse than first.json (1) by ")
    assert "first.json (2) and first.json (1) do not differ significantly: +0.00" in verdicts[1]
    truth, results = random_set(1, 60, 3)
    ap = coco.compare(truth, results, ["bbox"])["bbox"].ap()
    assert f"| first.json (1) | box  | {ap:.2f} [" in text
    assert "## Speed" not in text and "## Settings" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["first.json"], "expected at least two results to compare, got 1"),
        (["first.json", "worse.json"], "requires --annotations FILE"),
        (["first.json", "none.json", *TRUTH], "none.json: no such"),
        (["none.pt", "first.json"], "none.pt: no such checkpoint"),
        (["tiny optim.lr=0.004", "first.json"], "no such MLflow store; set MLFLOW_TRACKING_URI"),
        (["first.json", TRUTH[1], *TRUTH], "annotations.json: expected a list of results"),
    ],
)
def test_invalid_inputs_are_refused_in_one_line(
    vitdet: Run, files: list[Path], words: list[str], message: str
) -> None:
    refused(vitdet("compare", *words, "--output", "text.md"), message)
    assert set(Path().iterdir()) == {Path(path.name) for path in files}


def compared(name: str, settings: dict[str, str], **metrics: float) -> Compared:
    truth, results = random_set(0, 20, 2)
    matches = coco.compare(truth, results, ["bbox"])["bbox"].matches
    better = matches.matched | (np.arange(len(matches.score)) % 9 == 0)[:, None]
    changed = matches if name == "a" else replace(matches, matched=better & ~matches.ignored)
    return Compared(name, {"bbox": changed}, Protocol("f" * 16, "x=1"), settings, metrics)


def settings(*overrides: str) -> dict[str, str]:
    return {key: str(value) for key, value in flatten(load_config("tiny", overrides)).items()}


def test_differing_settings_and_seeds_are_shown() -> None:
    three = [
        compared("a", {**settings(), "tracking.uri": "http://u:secret@x"}, images_per_second=3.25),
        compared("b", settings("train.seed=1"), memory_gb=2.0, gpu_hours=0.5),
        compared("c", settings("optim.lr=1")),
    ]
    check_comparable(three)
    resampled = bootstrap([evaluation.matches["bbox"] for evaluation in three], resamples=20)
    text = comparison_text(three, {"bbox": resampled})
    rows = {
        cells[0]: cells[1:]
        for line in text.partition("## Over seeds")[2].splitlines()
        if (cells := [cell.strip() for cell in line.strip("| ").split(" | ")])
    }
    values = [each.interval().value for each in resampled[:2]]
    expected = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert rows["a, b"][:3] == ["2", "box", expected]
    assert rows["a"] == ["3.25", "-", "-", "-"] and rows["b"] == ["-", "-", "2", "0.5"]
    assert rows["train.seed"] == ["0", "1", "0"]
    assert rows["optim.lr"] == ["0.002", "0.002", "1.0"]
    assert rows["tracking.uri"][0] == "http://***@x" and "secret" not in text
    assert "optim.steps" not in rows


def test_differences_over_few_images_have_no_verdict() -> None:
    truth, results = random_set(0, 6, 2)
    matches = coco.compare(truth, results, ["bbox"])["bbox"].matches
    none = replace(matches, matched=np.zeros_like(matches.matched))
    pairs = (("a", matches), ("b", none))
    both = [Compared(name, {"bbox": comparison}, None, {}, {}) for name, comparison in pairs]
    text = comparison_text(both, {"bbox": bootstrap([matches, none], resamples=20)})
    assert "for significance, which needs at least 10 images with objects (found: 4)" in text
    assert "(objects in 10 or more images): 0; significant: 0." in text
    assert "not corrected for multiple comparisons" in text
    tables = [row for row in text.splitlines() if row.startswith("| ")]
    assert not any(row.split(" | ")[-1].startswith(("yes", "no")) for row in tables)


@pytest.mark.parametrize(
    ("other", "are_seeds"),
    [
        ([], False),  # model.pt and best.pt of one training run
        (["train.seed=1"], True),
        (["train.seed=1", "data.workers=3"], True),
        (["train.seed=1", "evaluate.max_images=3"], False),  # can change the best step
    ],
)
def test_only_runs_that_differ_by_seed_are_averaged(other: list[str], are_seeds: bool) -> None:
    best = ["train.keep_best=box_ap"]
    two = [compared("a", settings(*best)), compared("b", settings(*best, *other))]
    resampled = bootstrap([evaluation.matches["bbox"] for evaluation in two], resamples=20)
    assert ("## Over seeds" in comparison_text(two, {"bbox": resampled})) is are_seeds


def test_a_folder_without_a_config_is_a_run_name(vitdet: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    refused(vitdet("compare", "tiny", "tiny"), "no such MLflow store; set MLFLOW_TRACKING_URI")
    save_config(load_config("tiny"), tmp_path / "tiny" / "config.yaml")
    refused(vitdet("compare", "tiny", "tiny"), "tiny/model.pt: no such checkpoint")


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (Protocol("e" * 16, "x=1"), "b and a have different validation data"),
        (Protocol("f" * 16, "x=2"), "b and a have different evaluate settings: x=2 and x=1"),
    ],
)
def test_different_data_or_settings_are_refused(protocol: Protocol, message: str) -> None:
    first, other = compared("a", {}), compared("b", {})
    with pytest.raises(ValueError, match=message):
        check_comparable([first, replace(other, protocol=None), replace(other, protocol=protocol)])


def test_a_padded_table_has_the_cells_of_a_plain_table() -> None:
    plain = markdown_table(["a", "long"], [["1", "-"], ["value", "2"]])
    padded = markdown_table(["a", "long"], [["1", "-"], ["value", "2"]], padded=True)
    assert plain == "| a | long |\n| --- | --- |\n| 1 | - |\n| value | 2 |\n"
    assert len({len(line) for line in padded.splitlines()}) == 1
    assert padded.replace(" ", "") == plain.replace(" ", "")


def test_a_cell_may_contain_a_vertical_bar() -> None:
    assert markdown_table(["class"], [["car|van"]]) == "| class |\n| --- |\n| car\\|van |\n"


def test_matches_next_to_a_linked_checkpoint_are_found(
    vitdet: Run, trained: Path, tmp_path: Path
) -> None:
    """`dvc config cache.type symlink` makes work/train/model.pt a link into DVC's cache."""
    (tmp_path / "work" / "train").mkdir(parents=True)
    (tmp_path / "work" / "train" / "model.pt").symlink_to(trained / "model.pt")
    assert vitdet("evaluate", "work/train/model.pt", "--plots", "work/plots")[0] == 0
    words = ["work/train/model.pt"] * 2
    code, _, errors = vitdet("compare", *words, "--resamples", 100)
    assert code == 0, errors


def test_an_invalid_tracking_uri_is_named_as_the_option(vitdet: Run) -> None:
    found = vitdet("compare", "a", "b", "--tracking-uri", "http://:5000")
    refused(found, "--tracking-uri: expected http://HOST:PORT, got http://:5000")


@pytest.mark.slow
def test_runs_and_checkpoints_are_compared(
    vitdet: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, changes in (("a", {}), ("b", {"train__seed": 1}), ("c", {"evaluate__nms_iou": 0.6})):
        words = options(minimal(tiny, optim__steps=2, train__eval_every=2, **changes))
        assert vitdet("train", "tiny", *words, "--output", f"work/{name}")[0] == 0
    refused(
        vitdet("compare", "work/a/model.pt", "work/b/model.pt"),
        "work/a/model.pt: no per-image matches are stored for this checkpoint; run `vitdet evaluate work/a/model.pt --plots work/a/plots`",
    )
    for name in "abc":
        code, *_ = vitdet("evaluate", f"work/{name}/model.pt", "--plots", f"work/{name}/plots")
        assert code == 0
    few = ["--resamples", 100]
    code, text, errors = vitdet("compare", "work/a", "work/b", *few)
    assert code == 0, errors
    assert "| train.seed | 0 " in text and "## Over seeds" in text and "training images/s" in text
    refused(vitdet("compare", "work/a/model.pt", "work/c/model.pt"), "different evaluate settings")
    # matches are found in MLflow by run name, by run ID, and for a moved checkpoint
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/work/mlflow.db"
    runs = MlflowClient(store).search_runs(["1"])
    seed = next(run for run in runs if run.data.params["train.seed"] == "1")
    default = [run for run in runs if run.data.params["evaluate.nms_iou"] == "0.5"]
    first = next(run for run in default if run is not seed)
    assert " train.seed=1 " in seed.info.run_name
    words = [first.info.run_id, seed.info.run_name, "--tracking-uri", store, *few]
    with monkeypatch.context() as patch:  # the option takes precedence
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/mlflow.db")
        refused(vitdet("compare", *words[:2]), "no/mlflow.db: no such MLflow store")
        code, from_runs, errors = vitdet("compare", *words)
    assert code == 0, errors
    boxes, expected = (
        [line.split("|")[3:] for line in table.splitlines() if "| box " in line]
        for table in (from_runs, text)
    )
    assert boxes == expected
    (tmp_path / "work" / "moved").mkdir()
    shutil.copy(tmp_path / "work" / "b" / "model.pt", tmp_path / "work" / "moved")
    assert vitdet("compare", "work/moved/model.pt", "work/b/model.pt", *few)[0] == 0
    unknown = vitdet("compare", "none", first.info.run_id, "--tracking-uri", store)
    refused(unknown, "none: neither a file")
    # the matches of another checkpoint are not used
    shutil.copy(tmp_path / "work" / "c" / "model.pt", tmp_path / "work" / "b" / "model.pt")
    refused(vitdet("compare", "work/b/model.pt", "work/a/model.pt"), "different evaluate settings")
