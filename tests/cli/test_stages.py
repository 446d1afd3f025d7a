"""The pipeline's stages in sequence in one process: two recipes in one workspace."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.conftest import minimal
from vitdet import stages
from vitdet.config import RECIPES, Config, load_config, save_config
from vitdet.config.digest import digest, legacy_digest
from vitdet.stages.preparation import Data
from vitdet.stages.workspace import training_folder
from vitdet.tracking.mlflow import tracking_uri
from vitdet.tracking.runs import start_tracker

RUN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client_of(workspace: Path) -> MlflowClient:
    uri = tracking_uri("", workspace / "runs")
    return MlflowClient(uri, uri)


def recipe(path: Path, **changes: object) -> str:
    """Write the recipe `tiny` with other settings, given as section__key=value."""
    tree = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        tree[section][leaf] = value
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def resolve(recipes: list[str], overrides: list[str], folder: Path) -> list[str]:
    space, settings = str(folder / "space"), str(folder / "settings")
    return stages.resolve_configs(recipes, overrides, space, settings)


@pytest.mark.slow
@pytest.mark.usefixtures("untried")
def test_two_recipes_are_trained_compared_and_registered(
    tiny: Path, vitdet: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    space, configs, manifest = (str(tmp_path / name) for name in ("space", "configs", "manifest"))
    heavier = recipe(tmp_path / "heavier.yaml", optim__weight_decay=0.5)
    names = resolve(["tiny", heavier], minimal(tiny, optim__steps=2, train__eval_every=2), tmp_path)
    assert [name.rpartition("-")[0] for name in names] == ["tiny", "heavier"]
    settings = str(tmp_path / "settings")
    data = stages.prepare_data(settings, space, configs, manifest).fingerprint
    stages.fetch_weights(settings, space)
    # the second call simulates a retried step
    parents = {stages.start_parent_run(settings, space, RUN) for _ in range(2)}
    assert len(parents) == 1
    verdicts = []
    for name in names:
        checkpoint, figures, verdict, report = (
            str(tmp_path / name / kind) for kind in ("model.pt", "figures", "verdict", "report")
        )
        stages.train_recipe(settings, name, data, space, RUN, checkpoint)
        known = stages.evaluate_recipe(
            checkpoint, configs, name, data, space, RUN, figures, report
        ).known
        assert Path(report).read_text().startswith("<!doctype html>")
        passed, _ = stages.gate(figures, configs, name, space, RUN, verdict)
        assert known and passed  # there is no champion
        verdicts.append(verdict)
    first, second = tmp_path / names[0], tmp_path / names[1]
    stages.register_recipe(
        str(first / "model.pt"), str(first / "figures"), configs, names[0], space, RUN
    )
    page, links = tmp_path / "table.html", tmp_path / "links.md"
    table = stages.compare(verdicts, configs, space, RUN, str(page), str(links))

    assert links.read_text() == table  # a local database has no web page to link to
    assert all(f"<td>{name}</td>" in page.read_text() for name in names)
    # the exit handler of a successful run writes the same table
    assert stages.compare_finished(space, RUN, str(tmp_path / "end.html")) == ""
    assert (tmp_path / "end.html").read_text() == page.read_text()
    assert f"Data {data.split('-')[1]}" in table
    rows = {
        line.split(" | ")[0].strip("| "): line for line in table.splitlines() if line[:1] == "|"
    }
    assert "| 1 (champion) |" in rows[names[0]] and "| - |" in rows[names[1]]
    client = client_of(tmp_path / "space")
    (parent,) = client.search_runs(["1"], f"tags.group = '{RUN}'")
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {child.data.params["optim.weight_decay"] for child in children} == {"0.05", "0.5"}
    assert {child.inputs.dataset_inputs[0].dataset.digest for child in children} == {data}
    assert {"box_ap/" + name for name in names} <= set(parent.data.metrics)
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["comparison.md"]
    assert parent.info.status == "RUNNING"
    ends = {"FAILED": "FAILED", "CANCELED": "KILLED", "RUNNING": "FINISHED", "COMPLETE": "FINISHED"}
    for state, status in ends.items():
        stages.end_parent_run(["tiny"], [], space, RUN, state)
        assert client.get_run(parent.info.run_id).info.status == status

    # `compare` accepts MLflow run IDs
    logged = [child.data.metrics for child in children]
    assert all(any(key.startswith("class_ap/") for key in values) for values in logged)
    runs, seen = [child.info.run_id for child in children], tmp_path / "runs.md"
    words = ["compare", *runs, "--tracking-uri", tracking_uri("", tmp_path / "space" / "runs")]
    assert vitdet(*words, "--resamples", 100, "--output", seen)[0] == 0
    assert "| optim.weight_decay |" in seen.read_text()

    # A repeated step trains nothing, and a model with no better AP leaves the champion in place.
    stages.train_recipe(settings, names[0], data, space, RUN, str(tmp_path / "again.pt"))
    assert (tmp_path / "again.pt").read_bytes() == (first / "model.pt").read_bytes()
    passed, reason = stages.gate(
        str(second / "figures"), configs, names[1], space, RUN, str(tmp_path / "verdict")
    )
    assert not passed
    assert "no better than" in reason


def test_operational_settings_do_not_change_the_names(tmp_path: Path) -> None:
    changes = ["data.workers=1", "train.keep=9", "tracking.experiment=x", "evaluate.nms_iou=0.4"]
    names = resolve(["tiny"], [], tmp_path)
    assert resolve(["tiny"], changes, tmp_path) == names
    assert resolve(["tiny"], ["optim.lr=1"], tmp_path) != names
    (tmp_path / "a").mkdir()
    other = recipe(tmp_path / "a" / "tiny.yaml", data__workers=3)
    with pytest.raises(
        ValueError, match=r"with the same training settings, .* differ \(data.workers: 3, not"
    ):
        resolve(["tiny", other], [], tmp_path)


def test_a_training_run_started_by_commit_dad8b8b_is_found(tmp_path: Path) -> None:
    """The folder's name contains the digest of version 0.1."""
    (name,) = resolve(["tiny"], [], tmp_path)
    space, runs = str(tmp_path / "space"), tmp_path / "space" / "runs"
    expected = runs / f"{name}-{RUN[:8]}"
    assert training_folder(space, name, RUN) == expected
    config = load_config(tmp_path / "settings" / f"{name}.yaml")
    old = runs / f"tiny-{legacy_digest(config)[:8]}-{RUN[:8]}"
    assert old != expected
    save_config(config, old / "config.yaml")
    assert training_folder(space, name, RUN) == old
    assert training_folder(space, old.name.removesuffix(f"-{RUN[:8]}"), RUN) == old
    assert training_folder(space, name, "another run") == runs / f"{name}-another "
    (other,) = resolve(["tiny"], ["optim.lr=1"], tmp_path)
    assert training_folder(space, other, RUN) == runs / f"{other}-{RUN[:8]}"
    expected.mkdir()
    assert training_folder(space, name, RUN) == expected


@pytest.mark.parametrize("digits", [digest, legacy_digest])
def test_the_recipe_tag_excludes_the_digest_in_a_config_name(
    digits: Callable[[Config], str], tmp_path: Path
) -> None:
    config = load_config("tiny")
    name = f"tiny-{digits(config)[:8]}"
    start_tracker(config, name, tmp_path / "run", "group", "0" * 16, None, 0).close()
    (run,) = runs_in(tmp_path)
    assert run.data.tags["recipe"] == "tiny"
    assert run.info.run_name == "tiny"
    # without a pipeline, 8 digits belong to the name that the user chose
    start_tracker(config, "tiny-20261127", tmp_path / "own", "", "0" * 16, None, 0).close()
    assert "tiny-20261127" in {run.data.tags["recipe"] for run in runs_in(tmp_path)}


def runs_in(folder: Path) -> list[Run]:
    client = MlflowClient(tracking_uri("", folder), tracking_uri("", folder))
    return client.search_runs([each.experiment_id for each in client.search_experiments()])


@pytest.mark.parametrize(
    ("recipes", "overrides", "message"),
    [
        (["tiny", "tiny"], [], "given twice"),
        ([], [], "at least one"),
        (["tinny"], [], "did you mean 'tiny'"),
        (["tiny"], ["optim.lr=-1"], "optim.lr must be above 0"),
        (["mask_rcnn_vitdet_b_coco", "mask_rcnn_vitdet_b_lvis"], [], "cannot be compared"),
        (["tiny", "OTHER"], [], "other.yaml and tiny cannot be compared: .* data.val_split is te"),
    ],
)
def test_invalid_stage_inputs_are_refused_in_one_line(
    recipes: list[str], overrides: list[str], message: str, tmp_path: Path
) -> None:
    other = recipe(tmp_path / "other.yaml", data__val_split="test")
    with pytest.raises(ValueError, match=message) as refused:
        resolve([other if name == "OTHER" else name for name in recipes], overrides, tmp_path)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "settings").exists()  # nothing was written


def test_relative_paths_are_resolved_in_the_workspace(tmp_path: Path) -> None:
    (name,) = resolve(["tiny"], ["data.root=sets/mine", "train.init=files/start.pt"], tmp_path)
    config = load_config(tmp_path / "settings" / f"{name}.yaml")
    assert config.data.root == str(tmp_path / "space" / "sets" / "mine")
    assert config.train.init == str(tmp_path / "space" / "files" / "start.pt")
    (absolute,) = resolve(["tiny"], ["data.root=/sets/mine"], tmp_path)
    config = load_config(tmp_path / "settings" / f"{absolute}.yaml")
    assert (config.data.root, config.train.init) == ("/sets/mine", "mae_vit_tiny")


def prepare(folder: Path, fetch: str = "") -> Data:
    names = ("settings", "space", "configs", "manifest")
    return stages.prepare_data(*(str(folder / name) for name in names), fetch)


def test_only_the_demo_data_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitdet.demo import tiny

    made = tiny.make_tiny
    monkeypatch.setattr(tiny, "make_tiny", lambda folder: made(folder, 3, 2, processes=1))
    resolve(["tiny"], [], tmp_path)
    data = prepare(tmp_path)
    described = json.loads((tmp_path / "manifest").read_text())
    assert described["images"]["train"]["count"] == 3
    assert "-".join(described["fingerprints"].values()) == data.fingerprint
    assert prepare(tmp_path) == data and data.notes == []
    shutil.rmtree(tmp_path / "settings")
    resolve(["tiny"], ["data.root=absent"], tmp_path)
    with pytest.raises(FileNotFoundError, match="absent") as missing:
        prepare(tmp_path)
    assert "`fetch` (--fetch)" in str(missing.value) and "manifests/data" in str(missing.value)
    assert not (tmp_path / "space" / "absent").exists()


def test_the_data_is_fetched_to_the_volume_on_request(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path / "space" / "export")
    resolve(["tiny"], ["data.root=sets/mine"], tmp_path)
    with pytest.raises(ValueError, match="fetch convert absent: .*absent: no such file or folder"):
        prepare(tmp_path, "convert absent")
    data = prepare(tmp_path, "convert export --format coco")
    assert "6 classes; train 12 images" in capsys.readouterr().out
    assert prepare(tmp_path, "convert export --format coco") == data
    assert "already exists; skipping conversion" in capsys.readouterr().out


def test_a_model_for_other_classes_than_the_data_is_refused(tiny: Path, tmp_path: Path) -> None:
    resolve(["tiny"], [f"data.root={tiny}", "model.roi_heads.num_classes=5"], tmp_path)
    with pytest.raises(ValueError, match="has 6 classes, but model.roi_heads.num_classes is 5"):
        prepare(tmp_path)


def test_fetched_initial_weights_have_the_digest_of_their_content(
    tiny: Path, tmp_path: Path
) -> None:
    resolve(["tiny"], [f"data.root={tiny}"], tmp_path)
    space = str(tmp_path / "space")
    digest = stages.fetch_weights(str(tmp_path / "settings"), space)
    (file,) = (tmp_path / "space" / "weights").iterdir()
    assert file.name == "mae_vit_tiny.safetensors"
    assert stages.fetch_weights(str(tmp_path / "settings"), space) == digest
    file.write_bytes(file.read_bytes() + b" ")
    assert stages.fetch_weights(str(tmp_path / "settings"), space) != digest
