"""The best checkpoint, and early stopping."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.conftest import STEPS, Recorder, minimal
from tests.helpers.runs import assert_equal, cut_at, go, refused, same_weights, stop_at
from vitdet import stages
from vitdet.checkpoint import load_model_file
from vitdet.config import Config, load_config, override, save_config
from vitdet.config.digest import digest, training_settings
from vitdet.evaluation import evaluate
from vitdet.evaluation.evaluator import measured_metrics
from vitdet.stages.workspace import result
from vitdet.training import trainer
from vitdet.training.best import Best

ENDING = {
    "train__keep_best": "box_ap50",
    "train__patience": 2,
    "train__eval_every": 1,
    "train__save_every": 100,
    "optim__steps": 12,
}


def settings(**changes: object) -> Config:
    return override(Config(), [f"train.{key}={value}" for key, value in changes.items()])


def best_of(tmp_path: Path, **changes: object) -> Best:
    return Best(settings(**changes).train, tmp_path / "out", tmp_path / "states")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterable[float]], None]:
    """measure([1.0, 2.0, ...]) sets the box AP50 of the next evaluations, which are not run."""

    def use(values: Iterable[float]) -> None:
        series = iter(values)

        def evaluate_detector(*_: object) -> tuple[dict[str, float], list]:
            return {"box_ap": 1.0, "box_ap50": next(series)}, []

        monkeypatch.setattr(trainer, "evaluate_detector", evaluate_detector)
        monkeypatch.setattr(trainer, "write_pictures", lambda *_, **__: [])

    return use


def test_the_first_of_equal_values_is_best_and_patience_counts_evaluations(tmp_path: Path) -> None:
    best = best_of(tmp_path, keep_best="mask_ap", patience=2)
    found = [best.update({"mask_ap": ap}, step) for step, ap in enumerate([1.0, 3.0, 3.0], 1)]
    assert found == [True, True, False] and not best.is_final()
    assert best.metrics() == {"best_mask_ap": 3.0, "best_step": 2}
    best.update({"mask_ap": 2.0}, 4)
    assert best.is_final() and (best.step, best.stale) == (2, 2)
    without = best_of(tmp_path)
    assert not without.update({}, 1) and without.metrics() == {} and not without.is_final()
    alone = best_of(tmp_path, patience=1)  # measured by box AP
    assert alone.update({"box_ap": 1.0}, 1) and not alone.update({"box_ap": 1.0}, 2)
    assert alone.is_final() and not alone.keeps


def test_early_stopping_ends_new_and_resumed_runs(
    tiny: Path,
    tmp_path: Path,
    measure: Callable[[Iterable[float]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(folder: str) -> Recorder:
        return go(tiny, tmp_path / folder, **ENDING, states=tmp_path / f"{folder}-states")

    measure([1.0, 3.0, 3.0, 2.0])
    with caplog.at_level(logging.INFO, "vitdet"):
        whole = run("whole")
    assert (max(whole.points), whole.status) == (4, "FINISHED")
    assert whole.points[4]["best_box_ap50"] == 3.0 and whole.points[4]["best_step"] == 2
    assert [text for text in caplog.messages if "training ends at step 4 of 12" in text]
    model, best = (load_model_file(tmp_path / "whole" / f"{name}.pt") for name in ("model", "best"))
    assert (model["step"], model["metrics"]["box_ap50"]) == (4, 2.0)
    assert (best["step"], best["metrics"]["box_ap50"]) == (2, 3.0)
    assert run("whole").points == {}  # already complete

    measure([1.0, 3.0, 3.0, 2.0])
    states = tmp_path / "cut-states"
    cut_at(3, tiny, tmp_path / "cut", "box_ap50", **ENDING, states=states)  # the evaluation is lost
    shutil.rmtree(tmp_path / "cut")  # as DVC does
    measure([3.0, 2.0])
    rest = run("cut")
    assert (min(rest.points), max(rest.points)) == (3, 4)
    for name, ours in (("model", model), ("best", best)):
        theirs = load_model_file(tmp_path / "cut" / f"{name}.pt")
        assert theirs["step"] == ours["step"] and theirs["metrics"] == ours["metrics"]
        assert_equal(ours["model"], theirs["model"])

    (tmp_path / "cut" / "model.pt").unlink()
    measure([])
    assert run("cut").points == {}  # the run had ended
    assert load_model_file(tmp_path / "cut" / "model.pt")["step"] == 4


def test_a_run_always_ends_with_its_best_detector(
    tiny: Path, tmp_path: Path, measure: Callable[[Iterable[float]], None]
) -> None:
    def run(values: Iterable[float]) -> Recorder:
        measure(values)
        return go(tiny, folder, **ENDING | {"train__patience": 1})

    folder = tmp_path / "run"
    best, stored = folder / "best.pt", folder / "checkpoints" / "best.pt"
    run([3.0, 2.0])
    best.unlink()
    assert not run([]).points and load_model_file(best)["step"] == 1  # restored from its folder
    best.unlink()
    stored.unlink()
    # the evaluation of the last state becomes the best, and patience starts again
    assert sorted(run([2.0, 1.0]).points) == [2, 3]
    assert load_model_file(best)["step"] == 2 and load_model_file(folder / "model.pt")["step"] == 3
    best.unlink()
    shutil.rmtree(stored.parent)
    with refused(r"finished run .step 3, without best.pt., but .*contains no training state"):
        run([])


def test_a_run_stopped_early_continues_with_more_patience(
    tiny: Path, tmp_path: Path, measure: Callable[[Iterable[float]], None]
) -> None:
    def run(values: Iterable[float], patience: int) -> list[int]:
        measure(values)
        changes = ENDING | {"train__patience": patience, "optim__steps": 4}
        return sorted(go(tiny, tmp_path / "run", **changes).points)

    assert run([3.0, 2.0, 2.0], 2) == [1, 2, 3]
    with refused("different config .*train.patience: 1, not 2"):
        run([], 1)
    assert run([4.0], 0) == [4]
    assert load_model_file(tmp_path / "run" / "best.pt")["step"] == 4
    with refused("different config .*train.patience: 3, not 0"):
        run([], 3)


@pytest.mark.slow
def test_the_best_detector_has_its_recorded_metrics(
    tiny: Path, trained: Path, tmp_path: Path
) -> None:
    stop_at(5, tiny, tmp_path, train__keep_best="box_ap")
    with refused(r"train.eval_every: 3, not 4; .*evaluate.nms_iou: 0.6, not 0.5"):
        go(tiny, tmp_path, train__keep_best="box_ap", train__eval_every=3, evaluate__nms_iou=0.6)
    go(tiny, tmp_path, train__keep_best="box_ap")
    model, best = (load_model_file(tmp_path / f"{name}.pt") for name in ("model", "best"))
    same_weights(tmp_path, trained)
    assert best["step"] in (4, STEPS)
    assert evaluate(tmp_path / "best.pt", device="cpu") == best["metrics"]
    assert best["metrics"]["box_ap"] >= model["metrics"]["box_ap"]


def test_a_lost_best_detector_is_replaced_at_the_next_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = best_of(tmp_path, keep_best="box_ap", patience=3)
    state = {"value": 5.0, "step": 4, "stale": 1}
    best.restore(state, 6)
    assert "the best detector (step 4) was lost" in caplog.text
    assert best.stale == 0 and best.update({"box_ap": 1.0}, 8)
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / "best.pt").write_bytes(b"damaged")
    best.restore(state, 6)
    assert best.value is None


def test_incompatible_settings_are_refused(tiny: Path) -> None:
    with refused("'box_app' is not an AP metric that is measured .*; did you mean 'box_ap'"):
        settings(keep_best="box_app")
    with refused(r"'mask_ap' .* model.mask.enabled=false; known: box_ap, "):
        override(settings(keep_best="mask_ap"), ["model.mask.enabled=false"])
    with refused("'box_ap_rare' .* data.dataset=coco"):
        settings(keep_best="box_ap_rare")
    assert override(settings(), ["data.dataset=lvis", "train.keep_best=box_ap_rare"])
    with refused(r"train.eval_every must be between 1 and .*, got 0"):
        settings(keep_best="box_ap", eval_every=0)


def test_a_metric_that_the_data_lacks_is_refused_before_writing(tiny: Path, tmp_path: Path) -> None:
    measured = measured_metrics(load_config("tiny", minimal(tiny)))
    sizes = {f"box_ap_{size}" for size in ("large", "medium", "small")}
    missing = min(sizes - set(measured))
    with refused(f"do not measure {missing}, for which no object in val counts; "):
        go(tiny, tmp_path / "run", train__keep_best=missing)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("selecting", ["keep_best=box_ap", "patience=3"])
def test_evaluation_settings_change_the_digest_if_they_select_the_result(selecting: str) -> None:
    ours = load_config("tiny", [f"train.{selecting}"])
    assert digest(ours) != digest(load_config("tiny"))
    for change in ("train.eval_every=7", "evaluate.nms_iou=0.7", "evaluate.max_images=7"):
        assert digest(override(ours, [change])) != digest(ours)
        assert training_settings(override(ours, [change])) != training_settings(ours)
    assert digest(override(ours, ["train.log_every=7", "tracking.experiment=x"])) == digest(ours)


@pytest.mark.parametrize(("metric", "file"), [("", "model.pt"), ("box_ap", "best.pt")])
def test_keep_best_selects_the_final_checkpoint(metric: str, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny-12345678-run"
    save_config(settings(keep_best=metric), folder / "config.yaml")
    for name in ("model.pt", "best.pt"):
        (folder / name).write_text(name)
    assert result(folder) == folder / file and result(folder / "model.pt") == folder / "model.pt"
    stages.copy_checkpoint(str(tmp_path), "tiny-12345678", "run", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_text() == file
    assert stages.is_trained(str(tmp_path), "tiny-12345678", "run")


def test_settings_that_affect_the_weights_are_written_for_dvc(
    tmp_path: Path, vitdet: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("config", "tiny", "--output", "config.yaml", "--training", "training.json")
    assert vitdet(*words)[0] == 0
    without = json.loads((tmp_path / "training.json").read_text())
    assert without["optim.lr"] == load_config("tiny").optim.lr
    assert not without.keys() & {"train.eval_every", "evaluate.nms_iou", "train.log_every"}
    assert vitdet(*words, "--set", "train.patience=2")[0] == 0
    added = json.loads((tmp_path / "training.json").read_text()).keys() - without.keys()
    assert {"train.eval_every", "evaluate.nms_iou"} <= added and "train.log_every" not in added
