"""The training job without a cluster: filling in a template, reading states and failure reasons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from components.launcher.status import blocking_reason, failure_reason, job_phase, root_cause
from components.launcher.templates import (
    KINDS,
    RECIPE,
    RUN,
    JobRequest,
    fill_template,
    job_name,
    label,
    process_counts,
)
from tests.helpers import fake_node

ROOT = Path(__file__).parents[2]
PYTORCH, TRAIN = KINDS["pytorchjob"], KINDS["trainjob"]
TEMPLATES = {kind: (ROOT / f"manifests/{kind}/{kind}.yaml").read_text() for kind in KINDS}
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "run", "uid": "1"}
LABELS = {RUN: "run-1", RECIPE: "tiny"}


def request(**changes: object) -> JobRequest:
    given = {
        "name": "vitdet-tiny-1",
        "namespace": "ours",
        "labels": LABELS,
        "image": "registry/vitdet:1",
        "args": ["train", "x.yaml"],
        "nodes": 2,
        "pool": "h200",
    }
    return JobRequest(**{**given, **changes})


def filled(**changes: object) -> dict:
    return fill_template(TEMPLATES["pytorchjob"], PYTORCH, request(**changes))


def replica(job: dict, kind: str) -> tuple[dict, dict]:
    """Return the pod's spec and the container of a replica type."""
    pod = job["spec"]["pytorchReplicaSpecs"][kind]["template"]["spec"]
    return pod, pod["containers"][0]


@pytest.mark.parametrize(
    "recipe", ["tiny", "Mask_RCNN.ViTDet-B COCO, 100 epochs of it", "123", "ä", "", "a-" * 40]
)
def test_a_jobs_name_is_a_dns_label_that_leaves_room_for_the_pods_suffix(recipe: str) -> None:
    name = job_name("run-1", recipe)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 40
    assert name == job_name("run-1", recipe)
    assert name not in (job_name("run-2", recipe), job_name("run-1", recipe + "x"))
    assert label("Mask RCNN (B)") == "Mask-RCNN-B" and len(label("x" * 80)) == 63


def test_the_requested_fields_are_filled_in_and_others_are_unchanged() -> None:
    job, template = filled(nodes=3, owner=OWNER), yaml.safe_load(TEMPLATES["pytorchjob"])
    assert job["metadata"]["name"] == "vitdet-tiny-1" and job["metadata"]["namespace"] == "ours"
    assert job["metadata"]["ownerReferences"] == [OWNER]
    assert job["metadata"]["labels"] == {**template["metadata"]["labels"], **LABELS}
    replicas = job["spec"]["pytorchReplicaSpecs"].items()
    assert {kind: spec["replicas"] for kind, spec in replicas} == {"Master": 1, "Worker": 2}
    for kind in ("Master", "Worker"):
        pod, container = replica(job, kind)
        assert container["image"] == "registry/vitdet:1"
        assert container["args"] == ["train", "x.yaml"]
        assert container["command"] == replica(template, kind)[1]["command"]
        assert pod["nodeSelector"]["vitdet/pool"] == "h200"
    # the limit of restarts becomes an annotation, as the launcher counts restarts by cause
    policy = {**template["spec"]["runPolicy"]}
    assert job["metadata"]["annotations"]["vitdet/restarts"] == str(policy.pop("backoffLimit"))
    assert job["spec"]["runPolicy"] == policy
    plain = replica(filled(pool="", image=""), "Master")[0]
    assert plain["nodeSelector"] == replica(template, "Master")[0]["nodeSelector"]


def test_a_job_of_one_node_has_no_worker_and_missing_limits_are_set() -> None:
    template = yaml.safe_load(TEMPLATES["pytorchjob"])
    template["spec"]["runPolicy"] = {"suspend": True}
    job = fill_template(yaml.safe_dump(template), PYTORCH, request(nodes=1))
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    assert job["spec"]["runPolicy"] == {
        "suspend": True,
        "activeDeadlineSeconds": 1209600,
        "ttlSecondsAfterFinished": 604800,
    }


def test_an_elastic_job_has_as_many_workers_as_nodes() -> None:
    template = yaml.safe_load(TEMPLATES["pytorchjob"])
    del template["spec"]["pytorchReplicaSpecs"]["Master"]
    with pytest.raises(ValueError, match="needs an elasticPolicy"):
        fill_template(yaml.safe_dump(template), PYTORCH, request())
    template["spec"]["elasticPolicy"] = {"minReplicas": 3, "maxReplicas": 9}
    job = fill_template(yaml.safe_dump(template), PYTORCH, request(nodes=2))
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2
    assert job["spec"]["elasticPolicy"] == {"minReplicas": 2, "maxReplicas": 2}
    assert PYTORCH.rank0(job) == {"training.kubeflow.org/replica-type": "worker"}
    assert PYTORCH.rank0(filled()) == {"training.kubeflow.org/replica-type": "master"}


TASK = {
    "affinity": {"nodeAffinity": {}},
    "node_selector": {"zone": "a", "vitdet/pool": "other"},
    "tolerations": [
        {"key": "spot", "operator": "Exists"},
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    ],
    "env": [{"name": "HOME", "value": "/data/home"}, {"name": "KFP_POD_NAME", "value": "step"}],
    "volumes": [{"name": "fast", "emptyDir": {}}],
    "volume_mounts": [
        {"name": "fast", "mountPath": "/fast"},
        {"name": "fast", "mountPath": "/tmp"},
    ],
    "resources": {"limits": {"nvidia.com/gpu": "8", "memory": "1Ti"}},
}


def test_the_tasks_settings_are_applied_to_the_pods() -> None:
    job, template = filled(task=TASK), yaml.safe_load(TEMPLATES["pytorchjob"])
    for kind in ("Master", "Worker"):
        pod, container = replica(job, kind)
        assert pod["affinity"] == TASK["affinity"]
        assert pod["nodeSelector"] == {"zone": "a", "vitdet/pool": "h200"}
        assert pod["tolerations"] == [
            TASK["tolerations"][1],
            TASK["tolerations"][0],
        ]  # no duplicates
        assert [volume for volume in pod["volumes"] if volume["name"] == "fast"] == TASK["volumes"]
        assert len(pod["volumes"]) == 1 + len(replica(template, kind)[0]["volumes"])
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert environment["HOME"] == "/data/home" and "KFP_POD_NAME" not in environment
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {"/data": "data", "/dev/shm": "shm", "/fast": "fast", "/tmp": "fast"}
        limits = {"cpu": "16", "memory": "1Ti", "nvidia.com/gpu": "8"}
        assert container["resources"] == {"limits": limits, "requests": {"cpu": "16"}}


def test_a_claim_mounted_by_task_and_template_is_one_volume() -> None:
    """KFP names a volume after its claim; a pod with two volumes of one claim stays in ContainerCreating."""
    paths = {"vitdet-data": "/work", "other": "/other"}
    task = {
        "volumes": [{"name": n, "persistentVolumeClaim": {"claimName": n}} for n in paths],
        "volume_mounts": [{"name": n, "mountPath": path} for n, path in paths.items()],
    }
    template = yaml.safe_load(TEMPLATES["pytorchjob"])
    # the job's file may give the volume any name
    for replica_spec in template["spec"]["pytorchReplicaSpecs"].values():
        text = re.sub(r"\bname: (vitdet-)?data\b", "name: mine", yaml.safe_dump(replica_spec))
        replica_spec.update(yaml.safe_load(text))
    job = fill_template(yaml.safe_dump(template), PYTORCH, request(task=task))
    for kind in ("Master", "Worker"):
        pod, container = replica(job, kind)
        claims = fake_node.claims({"spec": pod})
        assert claims == {"mine": "vitdet-data", "other": "other"}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        claimed = {"/data": "mine", "/work": "mine", "/other": "other"}
        assert {path: name for path, name in mounts.items() if name in claims} == claimed
    runtime = yaml.safe_load((ROOT / "manifests/trainjob/runtime.yaml").read_text())["spec"]
    (node,) = runtime["template"]["spec"]["replicatedJobs"]
    volumes = node["template"]["spec"]["template"]["spec"]["volumes"]
    assert task["volumes"][0] in volumes  # the controller merges volumes by name


def test_a_trainjob_has_the_same_settings_in_its_trainer_and_a_runtime_patch() -> None:
    job = fill_template(TEMPLATES["trainjob"], TRAIN, request(nodes=3, task=TASK, owner=OWNER))
    trainer = job["spec"]["trainer"]
    found = (trainer["image"], trainer["numNodes"], trainer["args"])
    assert found == ("registry/vitdet:1", 3, ["train", "x.yaml"])
    assert trainer["env"] == TASK["env"][:1] and trainer["resourcesPerNode"] == TASK["resources"]
    assert job["spec"]["activeDeadlineSeconds"] == 1209600
    assert job["metadata"]["ownerReferences"] == [OWNER]
    patch = job["spec"]["runtimePatches"][-1]["trainingRuntimeSpec"]
    (node,) = patch["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]
    assert node["name"] == "node" and pod["metadata"]["labels"] == LABELS
    assert pod["spec"]["nodeSelector"] == {"zone": "a", "vitdet/pool": "h200"}
    assert pod["spec"]["containers"] == [{"name": "node", "volumeMounts": TASK["volume_mounts"]}]
    # Trainer 2.1 reads the same settings from another field
    assert job["spec"]["podTemplateOverrides"] == [{"targetJobs": [{"name": "node"}], **pod}]
    # the launcher's patch is not added twice
    again = fill_template(yaml.safe_dump(job), TRAIN, request())["spec"]
    assert again["runtimePatches"][1:] == again["podTemplateOverrides"][1:] == []


@pytest.mark.parametrize(
    ("kind", "text", "change", "message"),
    [
        ("trainjob", "", {}, "must contain exactly one TrainJob, got PyTorchJob"),
        ("pytorchjob", "", {"nodes": 0}, "at least 1 node, got 0"),
        # the operator identifies the container by name
        ("pytorchjob", "name: pytorch ", {}, "no container named 'pytorch'"),
    ],
)
def test_an_invalid_template_is_rejected(kind: str, text: str, change: dict, message: str) -> None:
    template = TEMPLATES["pytorchjob"].replace(text, "name: main " if text else "")
    with pytest.raises(ValueError, match=message):
        fill_template(template, KINDS[kind], request(**change))


def conditions(*given: str, **more: str) -> dict:
    """Return a job with conditions such as "Running=True", with these additional fields in each."""
    pairs = (text.split("=") for text in given)
    return {"status": {"conditions": [{"type": a, "status": b, **more} for a, b in pairs]}}


@pytest.mark.parametrize(
    ("kind", "job", "phase"),
    [
        (PYTORCH, {}, ""),
        (PYTORCH, {"status": {"conditions": None}}, ""),
        (PYTORCH, conditions("Created=True"), "created"),
        (PYTORCH, conditions("Created=True", "Running=True"), "running"),
        (PYTORCH, conditions("Created=True", "Running=False", "Suspended=True"), "suspended"),
        (PYTORCH, conditions("Suspended=False", "Running=True"), "running"),
        (PYTORCH, conditions("Restarting=True", "Running=False"), "restarting"),
        (PYTORCH, conditions("Succeeded=True", "Running=False"), "succeeded"),
        # Failed counts at any position
        (PYTORCH, conditions("Failed=True", "Created=True", "Restarting=True"), "failed"),
        (PYTORCH, conditions("Failed=False", "Running=True"), "running"),
        (TRAIN, conditions("Suspended=False", "Complete=True"), "succeeded"),
        (TRAIN, conditions("Failed=True"), "failed"),
        (TRAIN, conditions("Suspended=True"), "suspended"),
        (TRAIN, {"status": {"jobsStatus": [{"name": "node", "ready": 1}]}}, "running"),
        (TRAIN, {"status": {"jobsStatus": [{"name": "node", "ready": 0}]}}, "created"),
    ],
)
def test_the_state_is_read_from_the_true_conditions(kind: object, job: dict, phase: str) -> None:
    assert job_phase(kind, {"metadata": {}, **job})[0] == phase


def test_a_new_trainjob_does_not_take_over_the_failure_of_a_deleted_one() -> None:
    """Trainer reads the JobSet by name; the deleted job's JobSet may still exist (jobset.go, Status)."""
    failed = conditions("Failed=True", lastTransitionTime="2026-01-01T00:00:00Z")
    for created, phase in (("2026-01-01T00:05:00Z", ""), ("2026-01-01T00:00:03Z", "failed")):
        job = {"metadata": {"creationTimestamp": created}, **failed}
        assert job_phase(TRAIN, job)[0] == phase


def pod(
    name: str = "w-0", phase: str = "Running", container: dict | None = None, **status: object
) -> dict:
    """Return a pod as the API server returns it."""
    states = [{"name": "pytorch", "restartCount": 0, **container}] if container else []
    labels = {"training.kubeflow.org/replica-type": "master"}
    return {
        "metadata": {"name": name, "uid": name, "labels": labels},
        "spec": {"nodeName": "n1"},
        "status": {"phase": phase, "containerStatuses": states, **status},
    }


def ended(
    code: int, reason: str = "Error", when: str = "2026-01-01T00:00:00Z", key: str = "state"
) -> dict:
    return {key: {"terminated": {"exitCode": code, "reason": reason, "finishedAt": when}}}


PREEMPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
LOW = {"reason": "Evicted", "message": "The node was low on resource: memory. "}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (pod(container=ended(1)), "Error, exit code 1"),
        (pod(container=ended(139)), "Error, exit code 139 (SIGSEGV)"),
        (pod(container=ended(137, "OOMKilled")), "OOMKilled, exit code 137 (SIGKILL)"),
        (pod(container=ended(9, "OOMKilled", key="lastState")), "OOMKilled, exit code 9"),
        (pod(phase="Failed", **LOW), "Evicted: The node was low on resource: memory."),
        (
            pod(container=ended(143), conditions=[{**PREEMPTED, "message": "preempted"}]),
            "PreemptionByScheduler, exit code 143 (SIGTERM): preempted",
        ),
    ],
)
def test_a_failed_pod_is_described_by_its_reason(found: dict, text: str) -> None:
    assert str(failure_reason(found)) == f"pod w-0 on node n1: {text}"


def test_the_cause_is_a_self_explanatory_reason_or_the_first_failure() -> None:
    echo = failure_reason(pod("a", container=ended(1, when="2026-01-01T00:00:05Z")))
    start = failure_reason(pod("b", container=ended(1, when="2026-01-01T00:00:04Z")))
    killed = failure_reason(pod("c", container=ended(137, "OOMKilled", "2026-01-01T00:00:09Z")))
    before = ended(137, "OOMKilled", "2025-01-01T00:00:09Z", key="lastState")
    mended = failure_reason(pod("d", container=before))
    assert root_cause([echo, start]) is start
    assert root_cause([echo, start, killed, mended]) is killed
    assert root_cause([mended, echo]) is echo and root_cause([]) is None
    assert failure_reason(pod()) is None
    assert failure_reason(pod(phase="Succeeded", container=ended(0, "Completed"))) is None


def waiting(**state: str) -> dict:
    return pod(phase="Pending", container={"state": {"waiting": state}})


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (waiting(reason="ErrImagePull", message="no tag"), "pod w-0: ErrImagePull: no tag"),
        (
            pod(phase="Pending", conditions=[UNSCHEDULABLE]),
            f"pod w-0: Unschedulable: {UNSCHEDULABLE['message']}",
        ),
        (waiting(reason="ContainerCreating"), "None"),
        (pod(), "None"),
    ],
)
def test_a_pod_that_does_not_start_is_described_by_its_reason(found: dict, text: str) -> None:
    assert str(blocking_reason(found)) == text


@pytest.mark.parametrize(
    ("kind", "nodes", "changes", "counts"),
    [
        ("pytorchjob", 2, {"nprocPerNode": "4"}, [8]),
        ("pytorchjob", 3, {"nprocPerNode": "gpu"}, [3]),  # one GPU per node
        ("pytorchjob", 1, {"nprocPerNode": "auto"}, []),
        ("pytorchjob", 4, {"nprocPerNode": "8", "elasticPolicy": {"minReplicas": 2}}, [16, 24, 32]),
        ("trainjob", 2, {}, [2]),
    ],
)
def test_processes_are_counted(kind: str, nodes: int, changes: dict, counts: list[int]) -> None:
    template = yaml.safe_load(TEMPLATES[kind])
    template["spec"].update(changes)
    job = fill_template(yaml.safe_dump(template), KINDS[kind], request(nodes=nodes))
    assert list(process_counts(KINDS[kind], job)) == counts
