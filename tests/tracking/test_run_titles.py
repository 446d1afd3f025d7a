"""Names, descriptions and tags of runs, and names of metrics."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric

from vitdet import __version__
from vitdet.cli import parser
from vitdet.config import Config, load_config, override, save_config
from vitdet.tracking.mlflow import tracking_uri
from vitdet.tracking.naming import LONGEST, description, recipe_of, run_name
from vitdet.tracking.runs import log_evaluation, metric_name, start_tracker, with_metric_names

ODD = ["data.root=it's a 'set'", "data.train_split='quoted'", "optim.milestones=[0.5]"]


def name_of(config: Config, stem: str) -> str:
    return run_name(config, *recipe_of(config, stem))


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("mask_rcnn_vitdet_b_coco", [], "mask_rcnn_vitdet_b_coco"),
        ("mask_rcnn_vitdet_b_coco", ["optim.lr=2e-4"], "mask_rcnn_vitdet_b_coco optim.lr=0.0002"),
        ("tiny", ["train.seed=1", "optim.ema=0"], "tiny train.seed=1 optim.ema=0"),
        ("tiny", ["data.root=x", "tracking.uri=http://x"], "tiny"),
        ("tiny", ["train.init="], 'tiny train.init=""'),
    ],
)
@pytest.mark.parametrize("resolved", [False, True])
def test_a_run_is_named_after_its_recipe_and_changed_settings(
    recipe: str, overrides: list[str], expected: str, resolved: bool, tmp_path: Path
) -> None:
    config, stem = load_config(recipe, overrides), recipe
    if resolved:  # `vitdet config RECIPE --output config.yaml`, then `vitdet train config.yaml`
        save_config(config, tmp_path / "config.yaml")
        config, stem = load_config(tmp_path / "config.yaml"), "config"
    assert name_of(config, stem) == expected
    assert recipe_of(config, stem) == (recipe, recipe)


def test_a_config_file_of_the_user_keeps_its_name() -> None:
    config = load_config("tiny", ["optim.lr=1"])
    assert recipe_of(config, "heavier") == ("heavier", "tiny")
    assert name_of(config, "heavier") == "heavier optim.lr=1"


def test_a_long_name_has_the_number_of_omitted_settings() -> None:
    config = load_config("tiny", ["data.train_split=" + "x" * 99, "optim.lr=1", "train.seed=2"])
    assert name_of(config, "tiny") == "tiny train.seed=2 optim.lr=1 +1 more"
    config = load_config("tiny", ["optim.lr=1", "train.init=" + "x" * 120])
    assert name_of(config, "tiny") == "tiny +2 more"
    assert len(name_of(config, "y" * 300)) <= LONGEST


@pytest.mark.parametrize("recipe", ["tiny", "mask_rcnn_swin_t_coco"])
def test_the_described_command_trains_with_the_same_settings(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe, [*ODD, "train.init=", "optim.lr=3e-7", "data.flip=0"])
    text = description(config, recipe, tmp_path / "a folder")
    words = shlex.split(text.replace("\\\n", ""))
    assert words[0] == "vitdet" and text.startswith("    vitdet")  # formatted as code
    args = parser().parse_args(words[1:])
    assert load_config(args.recipe, args.overrides) == config
    assert args.output == tmp_path / "a folder"


def test_tags_have_recipe_data_code_and_machine_without_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = "http://user:secret@host/tiny.pt"
    store = f"sqlite:///{tmp_path}/mlflow.db?key=http://user:secret@x"
    config = load_config("tiny", ["optim.lr=1", "data.root=/data/shapes", f"train.init={weights}"])
    uri = tracking_uri("", tmp_path)
    client = MlflowClient(uri, uri)
    client.search_experiments()  # creates the tables, which is slow on a loaded machine
    start_tracker(config, "config", tmp_path / "run", "", "0" * 16, None, 0).close()
    (run,) = client.search_runs(["1"])
    tags = run.data.tags
    assert tags["recipe"] == "tiny" and tags["data"] == "shapes"
    assert tags["data_fingerprint"] == "0" * 16
    assert tags["torch"] == torch.__version__ and tags["vitdet"] == __version__
    assert tags["hostname"] and tags["device"] and tags["git_revision"]
    assert run.info.run_name == "tiny train.init=http://***@host/tiny.pt optim.lr=1"
    assert tags["mlflow.note.content"].startswith("    vitdet train tiny \\\n        --set ")
    assert "secret" not in str(run.to_dictionary())
    config = override(load_config("tiny"), [f"tracking.uri={store}"])
    assert "secret" not in description(config, "tiny", tmp_path)


def test_training_and_evaluation_log_their_commit_and_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # not in a repository, like the image
    config = load_config("tiny")
    monkeypatch.setenv("VITDET_REVISION", "a" * 40 + "-dirty")
    monkeypatch.setenv("VITDET_IMAGE", "registry.example.com/vitdet@sha256:" + "1" * 64)
    tracker = start_tracker(config, "tiny", tmp_path / "run", "", "0" * 16, None, 0)
    tracker.close()
    checkpoint = {"run_id": tracker.run_id, "step": 3, "config": {"tracking": {"uri": ""}}}
    monkeypatch.setattr("vitdet.tracking.runs.load_model_file", lambda path: checkpoint)
    monkeypatch.setenv("VITDET_REVISION", "b" * 40)
    monkeypatch.delenv("VITDET_IMAGE")  # not set outside a cluster
    run_id = log_evaluation(tmp_path / "model.pt", {"box_ap": 1.0}, None, tmp_path)
    uri = tracking_uri("", tmp_path)
    run = MlflowClient(uri, uri).get_run(run_id)
    tags = run.data.tags
    assert tags["git_revision"] == "a" * 40 + "-dirty"
    assert tags["mlflow.source.git.commit"] == "a" * 40
    assert tags["image"] == "registry.example.com/vitdet@sha256:" + "1" * 64
    assert tags["evaluation.git_revision"] == "b" * 40 and "evaluation.image" not in tags
    assert run.data.metrics["box_ap"] == 1.0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("box_ap", "box_ap"),
        ("class_ap/traffic light", "class_ap/traffic light"),
        ("class_ap/cup (small), 50%", "class_ap/cup _small__ 50_"),
        ("class_ap/a/b", "class_ap/a_b"),
        ("class_ap/..", "class_ap/_"),
        ("class_ap/", "class_ap/_"),
        ("class_ap/.hidden", "class_ap/_hidden"),
        ("class_ap/straße", "class_ap/straße"),
        ("class_ap/" + "x" * 300, "class_ap/" + "x" * 241),
    ],
)
def test_metrics_have_names_that_mlflow_accepts(name: str, expected: str) -> None:
    assert metric_name(name) == expected
    _validate_metric(expected, 1.0, 1, 1)


def test_metrics_of_two_classes_have_distinct_names() -> None:
    given = {"class_ap/a/b": 1.0, "class_ap/a_b": 2.0, "class_ap/a_b_2": 3.0, "class_ap/a?b": 4.0}
    assert with_metric_names(given) == {
        "class_ap/a_b": 1.0, "class_ap/a_b_2": 2.0, "class_ap/a_b_2_2": 3.0, "class_ap/a_b_3": 4.0
    }  # fmt: skip
    long = with_metric_names({"x" * 300: 1.0, "x" * 301: 2.0})
    assert list(long) == ["x" * 250, "x" * 248 + "_2"]
