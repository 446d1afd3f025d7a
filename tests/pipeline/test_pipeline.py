"""The compiled pipeline.

After an intended change, update the golden file:
  env -u VITDET_IMAGE python -m pipeline compile tests/golden_pipeline/pipeline.yaml \
    --job tests/golden_pipeline/jobs.yaml
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.job_manifests import job_image, job_shape, training_jobs
from pipeline.local import Screen
from pipeline.request import load_package
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden_pipeline"
JOBS = (GOLDEN / "jobs.yaml").read_text()


def pipeline(*words: object, stdin: str = "") -> subprocess.CompletedProcess:
    """Run `python -m pipeline WORDS`."""
    unset = ("VITDET_IMAGE", "MLFLOW_TRACKING_URI")
    outer = {key: value for key, value in os.environ.items() if key not in unset}
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        cwd=ROOT,
        env=outer,
        input=stdin,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = pipeline("compile", path, "--job", GOLDEN / "jobs.yaml")
    assert done.returncode == 0, done.stderr
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    print(f"pipeline compile: {seconds:.1f} s of CPU")
    return path


@pytest.fixture(scope="module")
def documents(compiled: Path) -> tuple[dict, dict]:
    """Return (pipeline spec, {executor: its Kubernetes configuration})."""
    specification, platforms = yaml.safe_load_all(compiled.read_text())
    return specification, platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def tasks_of(specification: dict) -> list[tuple[str, dict]]:
    """Return the tasks of all groups, with their names."""
    groups = [specification["root"], *specification["components"].values()]
    return [task for group in groups for task in group.get("dag", {}).get("tasks", {}).items()]


def test_the_pipeline_compiles_to_the_golden_file(compiled: Path) -> None:
    assert compiled.read_text() == (GOLDEN / "pipeline.yaml").read_text(), (
        "if the change is meant: see the docstring"
    )


def test_compiling_imports_neither_the_detector_nor_mlflow(compiled: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pipeline.__main__\n"
        "try: pipeline.__main__.main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'torchvision', 'mlflow', 'vitdet.models', 'dvc'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    words = ["compile", tmp_path / "pipeline.yaml", "--job", GOLDEN / "jobs.yaml"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pipeline.yaml").read_text() == compiled.read_text()


def test_the_jobs_in_manifests_compile_unchanged(tmp_path: Path) -> None:
    done = pipeline("compile", tmp_path / "own.yaml")
    assert done.returncode == 0, done.stderr
    assert "kind: PyTorchJob" in (tmp_path / "own.yaml").read_text()
    assert done.stderr.startswith("pipeline: the steps' image 'vitdet' has no registry")


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ("", "--job -: the input is empty"),
        ("kind: Service\n", "the YAML contains no PyTorchJob or TrainJob"),
        (
            "kind: TrainJob\nspec: {runtimeRef: {name: a}}\n---\nkind: TrainJob\nspec: {}\n",
            "two documents of kind TrainJob",
        ),
        ("a: [", "invalid YAML"),
        ("- a list\n", "no PyTorchJob or TrainJob"),
        ("kind: PyTorchJob\n", "the PyTorchJob has no spec"),
        (
            "kind: TrainJob\nspec: {runtimeRef: {name: vitdet}, trainer: {image: a}}\n",
            "the TrainJob's ClusterTrainingRuntime vitdet is not among the documents",
        ),
    ],
)
def test_an_invalid_job_is_rejected_in_one_line(stdin: str, message: str, tmp_path: Path) -> None:
    done = pipeline("compile", tmp_path / "a.yaml", "--job", "-", stdin=stdin)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "a.yaml").exists()


def test_the_jobs_are_embedded_as_text() -> None:
    jobs = training_jobs(JOBS)
    assert "runPolicy: {backoffLimit: 4}  # stays 4, not 4.0" in jobs
    assert "template: *template" in jobs
    assert "ServiceAccount" not in jobs


def test_steps_run_in_the_jobs_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_image(training_jobs(JOBS)) == "registry.example.com/vitdet:1"
    text = "expected one image for all training jobs, got a and registry.example.com/vitdet:1;"
    with pytest.raises(ValueError, match=text):
        job_image(training_jobs(JOBS.replace("numNodes: 2", "image: a, numNodes: 2")))
    outer = {**os.environ, "VITDET_IMAGE": "other:2"}
    words = [sys.executable, "-m", "pipeline", "compile", tmp_path / "other.yaml"]
    subprocess.run(words, cwd=ROOT, env=outer, check=True)
    spec, _ = yaml.safe_load_all((tmp_path / "other.yaml").read_text())
    executors = spec["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {"other:2"}


def test_every_step_has_its_volumes_and_variables(
    compiled: Path, documents: tuple[dict, dict]
) -> None:
    specification, kubernetes = documents
    assert "pip install" not in compiled.read_text()
    executors = specification["deploymentSpec"]["executors"]
    assert executors.keys() == kubernetes.keys()
    assert {executor["container"]["image"] for executor in executors.values()} == {
        "registry.example.com/vitdet:1"
    }
    for name, needs in kubernetes.items():
        assert needs["fieldPathAsEnv"] == [
            {"fieldPath": "metadata.labels['pipeline/runid']", "name": "KFP_RUN_ID"}
        ]
        assert [(mount["constant"], mount["mountPath"]) for mount in needs["pvcMount"]] == [
            ("vitdet-data", "/data")
        ]
        assert [secret["secretName"] for secret in needs["secretAsEnv"]] == ["vitdet-mlflow"]
        assert needs["securityContext"] == {
            "runAsUser": "1000",
            "runAsGroup": "1000",
            "runAsNonRoot": True,
        }
        assert {"memoryLimit", "memoryRequest", "cpuRequest"} <= executors[name]["container"][
            "resources"
        ].keys()
    with_gpu = [
        name for name, step in executors.items() if "accelerator" in step["container"]["resources"]
    ]
    assert with_gpu == ["exec-evaluate", "exec-evaluate-champion"]
    assert with_gpu == [name for name, needs in kubernetes.items() if "tolerations" in needs]
    for name in with_gpu:
        assert kubernetes[name]["nodeSelector"] == {"labels": {"vitdet/pool": "gpu-train"}}


def test_steps_with_side_effects_are_never_cached(documents: tuple[dict, dict]) -> None:
    specification, _ = documents
    tasks = dict(tasks_of(specification))
    steps = {name: task for name, task in tasks.items() if not re.search(r"-\d+$", name)}
    cached = {name for name, task in steps.items() if task["cachingOptions"].get("enableCache")}
    assert cached == {"configs", "train-job"}
    # The inputs contain everything that training depends on, except the run. The cache compares
    # artifacts by id, so only artifacts of steps that are themselves cached may be inputs.
    inputs = steps["train-job"]["inputs"]
    assert {"name", "data", "initial", "image", "job"} <= inputs["parameters"].keys()
    artifacts = {artifact["componentInputArtifact"] for artifact in inputs["artifacts"].values()}
    assert artifacts == {"pipelinechannel--configs-settings"}
    assert "pipeline_job" not in (GOLDEN / "pipeline.yaml").read_text()
    without = {name for name, task in steps.items() if "retryPolicy" not in task}
    assert without == {"configs", "champion"}  # champion is a group, not a pod


def test_a_step_that_is_lost_late_is_still_retried(documents: tuple[dict, dict]) -> None:
    """Argo counts maxDuration from the first attempt's start; it must exceed the duration of training."""
    specification, _ = documents
    tasks = [task for _, task in tasks_of(specification)]
    policies = [task["retryPolicy"] for task in tasks if "retryPolicy" in task]
    job = yaml.safe_load((ROOT / "manifests" / "pytorchjob" / "pytorchjob.yaml").read_text())
    longest = job["spec"]["runPolicy"]["activeDeadlineSeconds"]
    assert longest >= 1209600 and len(policies) == 10
    assert all(int(policy["backoffMaxDuration"].removesuffix("s")) > longest for policy in policies)


def test_every_parameter_has_a_description_and_a_default(documents: tuple[dict, dict]) -> None:
    """This lets users start a run in Kubeflow's UI without further input."""
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    assert sorted(parameters) == [
        *("fetch", "job_kind", "nodes", "overrides", "pool"),
        *("recipes", "seeds", "sweep", "workspace"),
    ]
    assert all(about["description"] and about["isOptional"] for about in parameters.values())
    defaults = {name: about["defaultValue"] for name, about in parameters.items()}
    assert defaults["recipes"] == ["tiny"] and defaults["seeds"] == 1 and defaults["fetch"] == ""


@pytest.mark.parametrize(
    ("jobs", "shape"),
    [
        (JOBS, (2, "pytorchjob")),
        (JOBS.replace("Nodes: 2", "Nodes: 5").replace("PyTorchJob", "Other"), (5, "trainjob")),
    ],
)
def test_the_job_determines_the_nodes_and_the_kind(jobs: str, shape: tuple[int, str]) -> None:
    assert job_shape(training_jobs(jobs)) == shape


def test_parallelism_is_as_requested(documents: tuple[dict, dict], tmp_path: Path) -> None:
    def limits(pipeline: dict) -> list[int]:
        tasks = [task for _, task in tasks_of(pipeline)]
        return [t["iteratorPolicy"]["parallelismLimit"] for t in tasks if "parameterIterator" in t]

    assert limits(documents[0]) == [1]
    three = tmp_path / "three.yaml"
    assert pipeline("compile", three, "--parallel", 3).returncode == 0
    assert limits(next(yaml.safe_load_all(three.read_text()))) == [3]
    assert limits(load_package(three, {}, True)["pipeline_spec"]) == [3]
    assert limits(load_package(three, {}, True, 2)["pipeline_spec"]) == [2]


def test_only_the_last_line_of_an_error_is_printed() -> None:
    class Lines(list):
        def write(self, text: str) -> None:
            self.append(text)

        def flush(self) -> None:
            pass

    shown, log = Lines(), Lines()
    screen = Screen(shown, log)
    for text in (
        "12:00:00.123 - INFO - Executing task \033[96m'train'\033[0m\n",
        "    ",
        "Traceback (most recent call last):\n",
        '      File "a.py", line 1, in <module>\n',
        "        train()\n",
        "    ValueError: what is wrong\n",
        "    next\n",
        "12:00:01.000 - ERROR - Task \033[96m'train'\033[0m finished with status FAILURE\n",
    ):
        screen.write(text)
    assert shown == ["-- train\n", "ValueError: what is wrong\n", "next\n", "-- train failed\n"]
    assert len(log) == 7
