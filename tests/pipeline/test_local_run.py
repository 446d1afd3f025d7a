"""`python -m pipeline run` locally, one process per step as in kfp: two recipes are compared, then one of them
with the resulting champion.

Most of the time is spent on importing torch, torchvision and MLflow in each of about 20 processes.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.cli.test_stages import client_of, recipe
from tests.conftest import ROOT, minimal, options
from tests.pipeline.test_pipeline import pipeline

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Finished:
    """A workspace, its runs' output, and its MLflow client."""

    space: Path
    first: subprocess.CompletedProcess
    second: subprocess.CompletedProcess
    client: MlflowClient

    def runs(self, done: subprocess.CompletedProcess) -> tuple[Run, list[Run]]:
        """Return the parent run and its child runs."""
        run_id = re.findall(r"^run (\w+)$", done.stdout, re.MULTILINE)[-1]
        (parent,) = self.client.search_runs(["1"], f"tags.group = '{run_id}'")
        return parent, self.client.search_runs(
            ["1"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        )


def steps(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^-- ([\w-]+)$", done.stdout, re.MULTILINE)


def table(done: subprocess.CompletedProcess) -> dict[str, list[str]]:
    """Return the cells of each recipe's row."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("| ") and not line.startswith(("| recipe ", "| --- "))
    ]
    return {re.sub(r"-\w{8}$", "", row[0]): row[1:] for row in rows}


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    space, heavier = folder / "space", recipe(folder / "heavier.yaml", optim__weight_decay=0.5)
    words = [*options(minimal(tiny, optim__steps=2, train__eval_every=2)), "--workspace", space]
    first, second = pipeline("run", "tiny", heavier, *words), pipeline("run", "tiny", *words)
    return Finished(space, first, second, client_of(space))


def test_two_recipes_are_trained_in_turn_and_end_in_one_table(finished: Finished) -> None:
    taken = steps(finished.first)
    # these steps precede the first training step
    assert sorted(taken[:4]) == ["announce", "configs", "data", "weights"]
    # the second model has the AP of the first one, the champion, so it does not pass the gate
    assert taken[4:-2] == ["train", "evaluate", "gate", "register", "train", "evaluate", "gate"]
    assert taken[-2:] == ["compare", "clean-up"] and taken[4:6] == ["train", "evaluate"]
    parent, children = finished.runs(finished.first)
    assert parent.info.status == "FINISHED"
    assert {child.data.params["optim.weight_decay"] for child in children} == {"0.05", "0.5"}
    assert {child.info.status for child in children} == {"FINISHED"}
    (digest,) = {child.inputs.dataset_inputs[0].dataset.digest for child in children}
    assert f"Data {digest.split('-')[1]}\n" in finished.first.stdout
    assert set(table(finished.first)) == {"tiny", "heavier"}
    assert sorted(row[-2] for row in table(finished.first).values()) == ["-", "1 (champion)"]
    assert [file.path for file in finished.client.list_artifacts(parent.info.run_id)] == [
        "comparison.md"
    ]


def test_the_run_ends_in_a_registered_champion(finished: Finished) -> None:
    (model,) = finished.client.search_registered_models()
    champion = finished.client.get_model_version(model.name, model.aliases["champion"])
    _, children = finished.runs(finished.first)
    assert champion.run_id in [child.info.run_id for child in children]
    assert str(champion.version) == "1"
    assert len(finished.client.search_model_versions(f"name = '{model.name}'")) == 1


def test_a_second_run_without_a_better_model_registers_nothing(finished: Finished) -> None:
    taken = steps(finished.second)
    assert taken[4:] == ["train", "evaluate", "gate", "compare", "clean-up"]
    *_, version, why = table(finished.second)["tiny"]
    assert (version, why) == ("-", "box AP 0, no better than the 0 of the champion, version 1")
    parent, (child,) = finished.runs(finished.second)
    assert parent.info.run_id != finished.runs(finished.first)[0].info.run_id
    assert parent.info.status == "FINISHED"
    assert child.info.status == "FINISHED"


def test_the_output_of_the_steps_is_printed(finished: Finished) -> None:
    shown = finished.first.stdout
    assert shown.count("step 2/2") >= 2
    assert not re.search(r"KFP Executor|executor_input|Traceback|schemaTitle|\033", shown)
    assert finished.first.stderr == ""
    logs = list((finished.space / "pipeline").glob("*.log"))
    assert len(logs) >= 2 and all("executor_input" in log.read_text() for log in logs)


def test_an_impossible_run_fails_in_its_first_steps(finished: Finished) -> None:
    done = pipeline("run", "tiny", "--set", "data.root=absent", "--workspace", finished.space)
    assert done.returncode == 1
    taken = re.findall(r"^-- (.+)$", done.stdout, re.MULTILINE)
    assert taken[0] == "configs" and taken[-1] == "clean-up"
    assert "data failed" in taken and "train" not in taken
    assert "absent" in done.stdout and "set the pipeline's parameter `fetch`" in done.stdout
    assert re.fullmatch(r"pipeline: step data failed; full log: \S+\n", done.stderr)


def test_a_run_with_invalid_arguments_is_not_started(finished: Finished, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    text = (ROOT / "vitdet" / "recipes" / "tiny.yaml").read_text()
    other.write_text(f"{text}\ntracking: {{experiment: other}}\n")
    for recipes, said in (
        (["tiny", other], f"{other} and tiny cannot be compared"),
        (["tinny"], "tinny: no such recipe; did you mean 'tiny'"),
    ):
        done = pipeline("run", *recipes, "--workspace", finished.space)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"pipeline: {said}")
