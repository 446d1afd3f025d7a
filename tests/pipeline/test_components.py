"""Components are thin wrappers; `train_job` checks its inputs before it requests GPUs."""

import ast
import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from kfp import dsl
from kfp.dsl.python_component import PythonComponent

import components
from components.cleanup import clean_up
from components.compare import announce, compare
from components.config import configs
from components.data import data
from components.evaluate import evaluate, evaluate_champion
from components.gate import gate
from components.register import register
from components.train import train, train_job
from components.weights import weights
from tests.conftest import minimal
from vitdet import stages

ALL = [announce, clean_up, compare, configs, data, evaluate, evaluate_champion]
ALL += [gate, register, train, train_job, weights]
RUN = "0123456789abcdef"
FOLDER = Path(components.__file__).parent


def statements(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    """Return all statements of a body at any depth, without its docstring."""
    for node in ast.walk(function):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and node is not function and not docstring:
            yield node


@pytest.mark.parametrize("step", ALL, ids=lambda step: step.name)
def test_a_body_is_short_and_imports_only_this_project(step: PythonComponent) -> None:
    (function,) = ast.parse(inspect.getsource(step.python_func)).body
    body = list(statements(function))
    assert len(body) <= 8
    modules = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    assert all(module.split(".")[0] in ("vitdet", "components") for module in modules)
    assert not any(isinstance(node, ast.Import | ast.Try | ast.FunctionDef) for node in body)


def test_every_component_is_checked() -> None:
    decorated = [
        node.name
        for path in FOLDER.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and any("component" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    assert sorted(decorated) == sorted(step.python_func.__name__ for step in ALL)


@pytest.mark.parametrize("step", ALL, ids=lambda step: step.name)
def test_a_component_installs_nothing_and_has_no_defaults(step: PythonComponent) -> None:
    container = step.component_spec.implementation.container
    assert "pip" not in " ".join(container.command[:-1])
    parameters = inspect.signature(step.python_func).parameters.values()
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)


def test_train_and_train_job_have_the_same_interface() -> None:
    here, there = (
        dict(inspect.signature(step.python_func).parameters) for step in (train, train_job)
    )
    assert there.pop("task_config").annotation is dsl.TaskConfig
    assert list(here.values()) == list(there.values())


def test_the_run_id_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(components.RUN_ID, raising=False)
    with pytest.raises(RuntimeError, match=f"{components.RUN_ID} is not set"):
        components.run_id()


class Jobs:
    """Replaces `launch` and `clean_up_jobs`: records the arguments and writes the job's output."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.ended: list[tuple[str, bool]] = []

    def launch(self, **asked: object) -> None:
        self.asked.append(asked)
        output = Path(asked["args"][asked["args"].index("--output") + 1])
        (output / "model.pt").write_bytes(b"a model")

    def clean_up_jobs(self, run_id: str, own: str, succeeded: bool) -> tuple[list[str], list[str]]:
        self.ended.append((run_id, succeeded))
        return ["vitdet-tiny-1"], ["vitdet-tiny-2: failed; stays"]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    made = Jobs()
    monkeypatch.setenv(components.RUN_ID, RUN)
    monkeypatch.setitem(
        sys.modules,
        "components.launcher.launch",
        SimpleNamespace(launch=made.launch, clean_up_jobs=made.clean_up_jobs),
    )
    return made


class Prepared:
    """A workspace after the steps configs and data."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.space, self.checkpoint = root, folder / "space", folder / "out" / "model.pt"
        self.settings = str(folder / "settings")
        (self.name,) = stages.resolve_configs(
            ["tiny"], minimal(root), str(self.space), self.settings
        )
        self.data = stages.prepare_data(
            self.settings, str(self.space), str(folder / "configs"), str(folder / "manifest")
        ).fingerprint

    def train_job(self, task: dsl.TaskConfig) -> None:
        train_job.python_func(
            name=self.name,
            settings=dsl.Artifact(uri=self.settings),
            data=self.data,
            initial="w",
            workspace=str(self.space),
            nodes=2,
            pool="gpu",
            job_kind="trainjob",
            job="kind: TrainJob",
            image="vitdet:1",
            checkpoint=dsl.Model(uri=str(self.checkpoint)),
            task_config=task,
        )


@pytest.fixture
def prepared(own_tiny: Path, tmp_path: Path) -> Prepared:
    return Prepared(own_tiny, tmp_path)


def test_a_job_gets_the_training_command_line(prepared: Prepared, jobs: Jobs) -> None:
    task = dsl.TaskConfig(
        node_selector={"a": "b"},
        tolerations=[{"key": "k"}],
        env=[{"name": "N", "value": "v"}],
        volumes=[{"name": "v"}],
        volume_mounts=[{"name": "v", "mountPath": "/v"}],
        affinity={"nodeAffinity": {}},
        resources={"limits": {"cpu": "100m"}},
    )
    prepared.train_job(task)
    (asked,) = jobs.asked
    output = prepared.space / "runs" / f"{prepared.name}-{RUN[:8]}"
    assert asked["args"] == [
        *("train", str(output / f"{prepared.name}.yaml"), "--output", str(output)),
        *("--weights", str(prepared.space / "weights"), "--group", RUN),
    ]
    wanted = {"template": "kind: TrainJob", "kind": "trainjob", "run_id": RUN}
    wanted |= {"nodes": 2, "pool": "gpu", "image": "vitdet:1"}
    assert wanted.items() <= asked.items()
    assert asked["task_config"] == {**vars(task), "resources": None}  # the job's file sets them
    assert prepared.checkpoint.read_bytes() == b"a model" and asked["finished"]()
    asked["check_processes"](2)  # the batch is 2
    with pytest.raises(ValueError, match=r"multiple of 3 \(.*\), got 2; set it to 3"):
        asked["check_processes"](3)
    asked["keep_logs"]({"rank-00001.log": "bad image\n"})
    assert (output / "logs" / "rank-00001.log").read_text() == "bad image\n"

    from vitdet.cli import parser

    given = parser().parse_args(asked["args"])  # the command line accepts them
    assert given.group == RUN
    prepared.train_job(task)  # a step that was complete creates no second job
    assert len(jobs.asked) == 1


def test_no_gpu_is_requested_without_the_data(prepared: Prepared, jobs: Jobs) -> None:
    shutil.rmtree(prepared.root)
    with pytest.raises(FileNotFoundError, match="removed after the data was verified"):
        prepared.train_job(dsl.TaskConfig())
    assert jobs.asked == []


def test_no_gpu_is_requested_without_the_weights(
    own_tiny: Path, tmp_path: Path, jobs: Jobs
) -> None:
    prepared = Prepared(own_tiny, tmp_path)
    start = tmp_path / "start.safetensors"
    start.touch()
    (prepared.name,) = stages.resolve_configs(
        ["tiny"], minimal(own_tiny, train__init=start), str(prepared.space), prepared.settings
    )
    start.unlink()
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        prepared.train_job(dsl.TaskConfig())
    assert jobs.asked == []


def end_run(folder: Path, kind: str, state: str) -> Path:
    """Run the exit handler; return its table."""
    table = dsl.HTML(uri=str(folder / "table"))
    status = dsl.PipelineTaskFinalStatus(state, "", "", None, None)
    given = {"recipes": ["tiny"], "overrides": [], "workspace": str(folder), "job_kind": kind}
    clean_up.python_func(**given, status=status, table=table)
    return Path(table.path)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the states with which MLflow's parent runs were ended."""
    states: list[str] = []
    monkeypatch.setattr(stages, "end_parent_run", lambda *words: states.append(words[-1]))
    return states


@pytest.mark.parametrize(
    ("kind", "state", "ended"),
    [
        ("pytorchjob", "FAILED", [(RUN, False)]),
        ("pytorchjob", "SUCCEEDED", [(RUN, True)]),
        ("", "CANCELLED", []),
    ],
)
def test_the_end_of_a_run_deletes_its_jobs(
    kind: str, state: str, ended: list, jobs: Jobs, tmp_path: Path, closed: list[str]
) -> None:
    assert "No training run was started" in end_run(tmp_path, kind, state).read_text()
    assert jobs.ended == ended and closed == [state]


def test_the_parent_run_ends_even_if_the_jobs_cannot_be_deleted(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: list[str]
) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(sys.modules["components.launcher.launch"], "clean_up_jobs", forbidden)
    with pytest.raises(PermissionError):
        end_run(tmp_path, "pytorchjob", "FAILED")
    assert closed == ["FAILED"]
