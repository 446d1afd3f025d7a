"""`evaluate` gets the same accelerator as training, for both kinds of job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.graph import compile_pipeline
from pipeline.job_manifests import accelerators, queue_labels
from tests.cluster.test_manifests import OVERLAYS, overlay
from tests.conftest import ROOT
from tests.helpers.manifests import needs_kubectl

GOLDEN = (ROOT / "tests" / "golden_pipeline" / "jobs.yaml").read_text()
TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def text(name: str, part: str = ".") -> str:
    return yaml.safe_dump_all(overlay(name, part))


def evaluation(job: str, file: Path) -> tuple[dict, dict]:
    """Compile a pipeline with this job; return (resources, Kubernetes configuration) of `evaluate`."""
    spec, platforms = yaml.safe_load_all(compile_pipeline(file, job).read_text())
    needs = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-evaluate"]
    container = spec["deploymentSpec"]["executors"]["exec-evaluate"]["container"]
    return container["resources"], needs


def test_the_accelerator_is_read_from_a_pytorchjob() -> None:
    assert accelerators(GOLDEN) == (8, [TOLERATION], {"vitdet/pool": "gpu-train"})
    assert accelerators(GOLDEN.replace("nvidia.com/gpu: 8", "ephemeral-storage: 1Gi")).gpus == 0


@needs_kubectl
@pytest.mark.parametrize("name", OVERLAYS)
def test_both_kinds_of_job_have_the_same_accelerator(name: str) -> None:
    found = accelerators(text(name, "trainjob"))
    assert (
        found
        == accelerators(text(name))
        == accelerators(f"{text(name)}---\n{text(name, 'trainjob')}")
    )
    pool = "cloud.google.com/compute-class" if name == "gke" else "vitdet/pool"
    assert found == ((0, []) if name == "kind" else (8, [TOLERATION])) + ({pool: "gpu-train"},)


@needs_kubectl
@pytest.mark.parametrize("name", ["gke", "kind"])
def test_evaluate_is_the_same_for_both_kinds_of_job(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.graph.IMAGE", "")
    resources, needs = evaluation(text(name, "trainjob"), tmp_path / "t.yaml")
    assert (resources, needs) == evaluation(text(name), tmp_path / "p.yaml")
    assert ("accelerator" in resources, "tolerations" in needs, "nodeSelector" in needs) == (
        name == "gke",
    ) * 3


def test_evaluate_waits_in_the_jobs_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.graph.IMAGE", "")
    own = evaluation(GOLDEN, tmp_path / "none.yaml")[1]["podMetadata"]["labels"]
    assert own == {"app.kubernetes.io/name": "vitdet", "app.kubernetes.io/component": "step"}
    labels = {"kueue.x-k8s.io/queue-name": "team", "kueue.x-k8s.io/priority-class": "low"}
    jobs = list(yaml.safe_load_all(GOLDEN))
    for job in jobs:
        job["metadata"]["labels"] = dict(labels)
    compiled = compile_pipeline(tmp_path / "queue.yaml", yaml.safe_dump_all(jobs))
    _, platforms = yaml.safe_load_all(compiled.read_text())
    executors = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    queued = {
        name: executor["podMetadata"]["labels"]
        for name, executor in executors.items()
        if labels.keys() & executor.get("podMetadata", {}).get("labels", {}).keys()
    }
    both = {**own, **labels}
    assert queued == {"exec-evaluate": both, "exec-evaluate-champion": both}
    other = yaml.safe_load((ROOT / "manifests/trainjob/trainjob.yaml").read_text())
    with pytest.raises(ValueError, match="must have the same labels kueue.x-k8s.io/"):
        queue_labels(yaml.safe_dump_all([*jobs, other]))


@pytest.fixture
def parts() -> tuple[dict, dict]:
    """Return (TrainJob, its runtime) of manifests/."""
    folder = ROOT / "manifests" / "trainjob"
    return tuple(
        yaml.safe_load((folder / file).read_text()) for file in ("trainjob.yaml", "runtime.yaml")
    )


def patch(pod: dict) -> dict:
    node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "manager": "m",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
    }


def said(*documents: dict) -> tuple:
    return accelerators(yaml.safe_dump_all(json.loads(json.dumps(documents))))


def test_a_trainjobs_settings_override_its_runtimes(parts: tuple[dict, dict]) -> None:
    job, runtime = parts
    assert said(job, runtime) == (1, [TOLERATION], {"vitdet/pool": "gpu-train"})
    job["spec"]["runtimePatches"] = [
        patch({"nodeSelector": {"zone": "a"}}),
        patch({"tolerations": [{"key": "x"}], "nodeSelector": {"vitdet/pool": "b"}}),
    ]
    job["spec"]["trainer"]["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": 4}}
    assert said(job, runtime) == (4, [{"key": "x"}], {"zone": "a", "vitdet/pool": "b"})
    assert said(job) == said(job, runtime)  # without its runtime only the job is read


def test_pod_template_overrides_of_trainer_2_1_override_the_runtime(
    parts: tuple[dict, dict],
) -> None:
    job, runtime = parts
    job["spec"]["podTemplateOverrides"] = [
        {"targetJobs": [{"name": "node"}], "spec": {"nodeSelector": {"vitdet/pool": "b"}}},
        {"targetJobs": [{"name": "other"}], "spec": {"nodeSelector": {"vitdet/pool": "c"}}},
        {"targetJobs": [{"name": "node"}], "metadata": {"labels": {"team": "a"}}},
    ]
    assert said(job, runtime) == (1, [TOLERATION], {"vitdet/pool": "b"})


def test_a_runtime_is_identified_by_kind_and_name(parts: tuple[dict, dict]) -> None:
    job, runtime = parts
    job["spec"]["runtimeRef"]["kind"] = "ClusterTrainingRuntime"
    with pytest.raises(
        ValueError,
        match="the TrainJob's ClusterTrainingRuntime vitdet-pool is not among the documents",
    ):
        said(job, runtime)
    assert said(job, {**runtime, "kind": "ClusterTrainingRuntime"}).gpus == 1
    with pytest.raises(ValueError, match="resourcesPerNode"):
        said(
            job,
            {"kind": "TrainingRuntime", "metadata": {"name": "other"}, "spec": {}},
            {"kind": "List"},
        )
