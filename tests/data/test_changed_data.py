"""A custom data set in the pipeline by one override, and a resubmitted run after the data changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cli.test_stages import client_of
from tests.conftest import MINIMAL
from tests.data.test_fingerprint import add_image
from tests.training.test_fine_tuning import other_classes
from vitdet import stages
from vitdet.checkpoint import load_model_file, save
from vitdet.config import load_config, save_config
from vitdet.data.layout import resolve_config


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@dataclass
class Run:
    """The steps of a pipeline run of one recipe, as the graph calls them."""

    space: Path
    folder: Path
    run_id: str
    name: str = ""
    data: str = ""
    notes: Sequence[str] = ()

    def path(self, name: str) -> str:
        return str(self.folder / self.run_id / name)

    @property
    def common(self) -> tuple[str, str, str, str, str]:
        """Return the common arguments of the steps after evaluation."""
        return self.path("figures"), self.path("configs"), self.name, str(self.space), self.run_id

    def prepare(self, root: Path, *overrides: str, recipe: str = "tiny") -> Run:
        overrides = (f"data.root={root}", "optim.steps=1", *SMALL, *overrides)
        (self.name,) = stages.resolve_configs(
            [recipe], overrides, str(self.space), self.path("settings")
        )
        self.data, _, self.notes = stages.prepare_data(
            self.path("settings"), str(self.space), self.path("configs"), self.path("manifest")
        )
        return self

    def train(self) -> Run:
        run = self.path("settings"), self.name, self.data, str(self.space), self.run_id
        stages.train_recipe(*run, self.path("model.pt"))
        return self

    def evaluate(self) -> bool:
        run = self.path("configs"), self.name, self.data, str(self.space), self.run_id
        outputs = self.path("figures"), self.path("report")
        return stages.evaluate_recipe(self.path("model.pt"), *run, *outputs).known

    def better(self, ap: float) -> None:
        """Overwrite the measured AP."""
        row = json.loads(Path(self.path("figures")).read_text())
        row["metrics"]["box_ap"] = ap
        row.pop("plots", None)  # the matches in this folder have a different AP
        Path(self.path("figures")).write_text(json.dumps(row))

    def evaluate_champion(self) -> str:
        return stages.evaluate_champion(self.path("model.pt"), *self.common)

    def gate(self) -> tuple[bool, str]:
        return stages.gate(*self.common, self.path("verdict"))

    def register(self) -> str:
        return stages.register_recipe(self.path("model.pt"), *self.common)


SMALL = [f"{key}={value}" for key, value in MINIMAL.items() if key != "optim.steps"]


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a custom data set, and a workspace whose registry has a champion trained on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr("vitdet.tracking.registry.try_model", lambda *_: None)
        folder = tmp_path_factory.mktemp("changed")
        shutil.copytree(tiny, folder / "own")
        run = Run(folder / "space", folder, "0" * 16).prepare(folder / "own").train()
        assert run.evaluate() and run.gate()[0]
        assert "version 1 (champion)" in run.register()
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    """A second run with the first run's checkpoint, on data that a test may change."""
    shutil.copytree(finished / "own", tmp_path / "own")
    run = Run(finished / "space", tmp_path, f"{abs(hash(request.node.name)):016x}"[:16])
    Path(run.path("")).mkdir(parents=True)
    shutil.copyfile(finished / ("0" * 16) / "model.pt", run.path("model.pt"))
    return run


def version(run: Run) -> str:
    client: MlflowClient = client_of(run.space)
    return str(client.get_model_version_by_alias("vitdet", "champion").version)


@pytest.mark.parametrize("recipe", ["tiny", "mask_rcnn_vitdet_b_coco"])
def test_custom_data_needs_one_override(own_tiny: Path, tmp_path: Path, recipe: str) -> None:
    other_classes(own_tiny, ["bolt", "nut"])
    run = Run(tmp_path / "space", tmp_path, "1" * 16)
    run.prepare(own_tiny, "train.init=", recipe=recipe)
    config = load_config(Path(run.path("configs")) / f"{run.name}.yaml")
    assert config.model.roi_heads.num_classes == 2
    assert (config.data.train_split, config.data.val_split) == ("train", "val")
    (note,) = run.notes
    assert note.startswith(f"{run.name}: {own_tiny} has ") and "num_classes=2" in note
    argv = stages.train_argv(run.path("settings"), run.name, run.data, str(run.space), run.run_id)
    assert load_config(argv[1]) == config  # the config that a cluster job reads
    assert resolve_config(argv[1])[0] == config


def test_two_recipes_are_compared_on_custom_data(own_tiny: Path, tmp_path: Path) -> None:
    overrides = [f"data.root={own_tiny}", "train.init=", "evaluate.max_detections=60"]
    folders = [str(tmp_path / name) for name in ("settings", "space", "configs", "manifest")]
    recipes = ["tiny", "mask_rcnn_vitdet_b_coco"]
    names = stages.resolve_configs(recipes, overrides, folders[1], folders[0])
    stages.prepare_data(*folders)
    splits = {load_config(tmp_path / "configs" / f"{name}.yaml").data.val_split for name in names}
    assert len(names) == 2 and splits == {"val"}


def test_a_setting_of_the_user_is_not_replaced(own_tiny: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "space", tmp_path, "1" * 16)
    with pytest.raises(ValueError, match="has 6 classes, but model.roi_heads.num_classes is 5"):
        run.prepare(own_tiny, "model.roi_heads.num_classes=5")


def test_after_an_added_image_a_new_run_trains_again(own_tiny: Path, tmp_path: Path) -> None:
    first = Run(tmp_path / "space", tmp_path, "1" * 16).prepare(own_tiny)
    same = Run(tmp_path / "space", tmp_path, "2" * 16).prepare(own_tiny)
    assert (first.name, first.data) == (same.name, same.data)
    add_image(own_tiny)
    changed = Run(tmp_path / "space", tmp_path, "3" * 16).prepare(own_tiny)
    assert changed.name == first.name and changed.data != first.data
    assert changed.data.split("-")[1] == first.data.split("-")[1]  # unchanged validation split
    with pytest.raises(ValueError, match="train has changed since it was verified"):
        first.train()
    changed.train()
    stored = load_model_file(changed.path("model.pt"))
    assert "-".join(stored["fingerprints"].values()) == changed.data


def test_after_an_added_class_a_new_run_trains_again(own_tiny: Path, tmp_path: Path) -> None:
    first = Run(tmp_path / "space", tmp_path, "1" * 16).prepare(own_tiny)
    for path in (own_tiny / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"].append({"id": 99, "name": "seventh"})
        path.write_text(json.dumps(content))
    changed = Run(tmp_path / "space", tmp_path, "2" * 16).prepare(own_tiny)
    assert changed.data != first.data and "num_classes=7" in changed.notes[0]
    changed.train()
    assert len(load_model_file(changed.path("model.pt"))["class_names"]) == 7


def test_added_training_images_do_not_change_the_gate_s_verdict(again: Run) -> None:
    add_image(again.folder / "own")
    assert again.prepare(again.folder / "own").evaluate()
    passed, reason = again.gate()
    assert not passed and "no better than" in reason


def test_on_other_validation_data_the_champion_is_evaluated_again(again: Run) -> None:
    add_image(again.folder / "own", "val")
    assert not again.prepare(again.folder / "own").evaluate()
    again.better(3.0)
    passed, reason = again.gate()
    assert not passed and "has no AP on this validation data" in reason
    assert again.evaluate_champion() == "champion, version 1: box AP 0"
    assert again.gate() == (True, "box AP 3, above the 0 of the champion, version 1")
    again.better(0.0)
    assert not again.gate()[0]
    assert again.evaluate()  # the registry now has the champion's AP on this data


def test_with_other_settings_the_champion_is_evaluated_again(again: Run) -> None:
    assert not again.prepare(again.folder / "own", "evaluate.max_detections=7").evaluate()
    assert again.evaluate_champion() == "champion, version 1: box AP 0"
    assert again.evaluate() and not again.gate()[0]


def test_a_champion_with_other_classes_is_not_replaced(again: Run) -> None:
    other_classes(again.folder / "own", ["bolt", "nut"])
    run = again.prepare(again.folder / "own").train()
    assert not run.evaluate()
    run.better(99.0)
    assert "the classes of this model (" in run.evaluate_champion()
    passed, reason = run.gate()
    assert not passed and "register the candidate under another tracking.model_name" in reason
    assert len(reason.splitlines()) == 1
    assert "(champion)" not in run.register()
    assert version(run) == "1"


def test_a_champion_whose_artifacts_are_gone_is_not_replaced(again: Run) -> None:
    add_image(again.folder / "own", "val")
    hidden = again.space / "runs" / "hidden"
    shutil.move(again.space / "runs" / "mlartifacts", hidden)
    try:
        assert not again.prepare(again.folder / "own", "data.max_images=3").evaluate()
        again.better(99.0)
        assert "cannot be evaluated" in again.evaluate_champion()
        passed, reason = again.gate()
    finally:
        shutil.move(hidden, again.space / "runs" / "mlartifacts")
    assert not passed and "cannot be evaluated" in reason


def test_the_command_line_registers_a_champion_through_the_gate(
    own_tiny: Path, vitdet: Callable, tmp_path: Path
) -> None:
    metrics, first = tmp_path / "metrics.json", tmp_path / "runs" / "first"
    config = resolve_config("tiny", [f"data.root={own_tiny}", "optim.steps=1", *SMALL])[0]
    words = ["--alias", "champion", "--output", tmp_path / "registered.json"]
    model = stages.train(config, "tiny", first)
    code, out, err = vitdet("register", model, *words)
    assert code == 0 and "version 1 (champion): box AP 0: the first champion" in out, err
    assert vitdet("register", model, *words)[0] == 0  # the champion itself is accepted again

    other = tmp_path / "runs" / "other" / "model.pt"
    other.parent.mkdir()
    save(other, {**load_model_file(model), "run_id": None, "step": 2})
    code, _, err = vitdet("register", other, *words)
    assert code == 1 and "no better than the 0 of the champion, version 1" in err

    # the checkpoint has metrics on the old data, metrics.json has metrics on the new data
    add_image(own_tiny, "val")
    metrics.write_text('{"box_ap": 3.0}')
    code, out, err = vitdet("register", other, *words, "--metrics", metrics)
    assert code == 1 and "the data that its metrics were measured on is unknown; run" in err
    words += ["--config", tmp_path / "config.yaml"]
    save_config(config, tmp_path / "config.yaml")
    code, out, err = vitdet("register", other, *words, "--metrics", metrics)
    assert code == 0 and "box AP 3, above the 0 of the champion, version 1" in out, err
    shutil.rmtree(own_tiny)
    code, _, err = vitdet("register", model, *words)
    # version 2 was first registered with its AP on the old data
    assert code == 1 and "no better than the 0 of the champion, version 2" in err, err
    assert err.count("\n") == 1, err
