"""The manifests as `kubectl kustomize` renders them: every overlay and every optional component."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import yaml

from components.launcher.templates import KINDS, RESTARTS, SCHEDULE, JobRequest, fill_template
from tests.conftest import ROOT
from tests.helpers.manifests import (
    GPU_TAINT,
    containers,
    insecure,
    kustomize,
    needs_kubectl,
    pods,
    problems,
)
from vitdet.config import recipes

pytestmark = needs_kubectl
MANIFESTS = ROOT / "manifests"
CLOUDS, GPUS = ("gke", "eks", "onprem"), ("a10", "a100", "h100", "h200", "l4")
OVERLAYS = ("kind", *CLOUDS)
# folders of an overlay, except those of its training jobs
PARTS = ("cluster", "dedicated", "namespace", "mlflow", "data")
# the job's folder -> the folder of its kustomization in an overlay
JOBS = {"pytorchjob": ".", "trainjob": "trainjob"}
HEADER = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"


@cache
def overlay(name: str, part: str = ".") -> list[dict]:
    return kustomize(MANIFESTS / "overlays" / name / part)


def installed(name: str, root: Path | None = None) -> list[dict]:
    """Return all objects of an overlay except training jobs."""
    render = overlay if root is None else lambda _, part: kustomize(root / "overlays" / name / part)
    return [document for part in parts(name) for document in render(name, part)]


def parts(name: str) -> list[str]:
    """Return an overlay's PARTS; `kind` has no `dedicated`: its jobs share Kubeflow's namespace."""
    return [part for part in PARTS if (name, part) != ("kind", "dedicated")]


def pools(
    name: str, root: Path = MANIFESTS, cluster: list[dict] | None = None
) -> dict[str, set[str]]:
    """Return {labels: taints} of an overlay's GPU nodes."""
    nodes = root / "node-pools" / name
    if name == "kind":
        return {
            ",".join(f"{key}={value}" for key, value in node["labels"].items()): set()
            for node in yaml.safe_load((nodes / "cluster.yaml").read_text())["nodes"]
        }
    if name == "onprem":  # the commands in its comment
        text = (nodes / "kustomization.yaml").read_text()
        (label,) = re.findall(r"kubectl label nodes -l \S+ (\S+)", text)
        (taint,) = re.findall(rf"kubectl taint nodes -l {label} (\S+)=present:NoSchedule", text)
        return {label: {taint}}
    found = {}
    for document in overlay(name, "cluster") if cluster is None else cluster:
        if document["kind"] == "ComputeClass":
            # GKE creates the label and the taint
            found[f"cloud.google.com/compute-class={document['metadata']['name']}"] = {GPU_TAINT}
        elif document["kind"] == "NodePool":
            template = document["spec"]["template"]
            labels = template["metadata"]["labels"].items()
            taints = {taint["key"] for taint in template["spec"]["taints"]}
            found[",".join(f"{key}={value}" for key, value in labels)] = taints
    return found


def build(root: Path, name: str, resources: list[str], components: list[str]) -> list[dict]:
    """Build these resources and components with an overlay's values, in a copy of manifests/."""
    folder = root / "overlays" / name / "made"
    folder.mkdir(exist_ok=True)
    listed = {
        "resources": ["../values", *(f"../../../{each}" for each in resources)],
        "components": [f"../../../{each}" for each in components],
    }
    (folder / "kustomization.yaml").write_text(HEADER + yaml.safe_dump(listed))
    return kustomize(folder)


@pytest.mark.parametrize("part", JOBS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_torchrun_grants_its_processes_the_pods_grace_period(name: str, part: str) -> None:
    found = [pod for _, pod in pods(overlay(name, JOBS[part]))]
    assert (
        len(found) == {"pytorchjob": 2, "trainjob": 1}[part]
    )  # Master and Worker; the runtime's node
    for pod in found:
        (container,) = pod["spec"]["containers"]
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        assert 0.8 * grace <= int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace


@pytest.mark.parametrize("part", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid(name: str, part: str) -> None:
    jobs = overlay(name, JOBS[part])
    # a runtime is applied before the job that refers to it
    kinds = {"pytorchjob": ["PyTorchJob"], "trainjob": ["TrainingRuntime", "TrainJob"]}
    assert [job["kind"] for job in jobs] == kinds[part]
    assert problems(installed(name), jobs, pools(name)) == []


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    "options",
    [
        *(["rdma"], ["volcano"], ["coscheduling"], ["kueue"], ["one-zone"]),
        *(["no-priority-class"], ["+elastic"], ["rdma", "kueue", "one-zone", "+elastic"]),
    ],
    ids="-".join,
)
def test_an_option_is_valid(options: list[str], job: str, copy: Path) -> None:
    before = [f"components/{option}" for option in options if option[0] != "+"]
    after = [f"components/{option[1:]}" for option in options if option[0] == "+"]
    jobs = build(copy, "onprem", [job], ["node-pools/onprem", *before, "components/values", *after])
    assert jobs != overlay("onprem", JOBS[job]) or (job == "trainjob" and options == ["+elastic"])
    assert problems(installed("onprem"), jobs, pools("onprem")) == []
    if after and job == "pytorchjob":
        replicas, policy = jobs[0]["spec"]["pytorchReplicaSpecs"], jobs[0]["spec"]["elasticPolicy"]
        assert {role: replica["replicas"] for role, replica in replicas.items()} == {"Worker": 2}
        assert (policy["minReplicas"], policy["maxReplicas"]) == (1, 2)


@pytest.mark.parametrize("job", JOBS)
def test_the_queue_covers_the_pods_requests_and_priority(job: str, copy: Path) -> None:
    """Kueue admits neither other resources nor a job whose WorkloadPriorityClass is missing."""
    options = ["components/rdma", "components/kueue", "components/values"]
    jobs = build(copy, "onprem", [job], ["node-pools/onprem", *options])
    cluster = build(copy, "onprem", ["cluster"], ["components/kueue-queues", "components/values"])
    queue, local = (
        [d for d in cluster if d["kind"] == kind] for kind in ("ClusterQueue", "LocalQueue")
    )
    (group,) = queue[0]["spec"]["resourceGroups"]
    requested = {
        resource
        for _, pod in pods(jobs)
        for container in containers(pod)
        for resource in container["resources"]["requests"]
    }
    assert "rdma/rdma_shared_device_a" in requested <= set(group["coveredResources"])
    quotas = [resource["name"] for resource in group["flavors"][0]["resources"]]
    assert quotas == group["coveredResources"]
    (labels,) = (d["metadata"]["labels"] for d in jobs if d["kind"].lower() == job)
    assert labels["kueue.x-k8s.io/queue-name"] == local[0]["metadata"]["name"]
    values = {d["kind"]: d["value"] for d in cluster if d["kind"].endswith("PriorityClass")}
    assert labels["kueue.x-k8s.io/priority-class"] == "vitdet-train" and len(values) == 2
    assert values["PriorityClass"] == values["WorkloadPriorityClass"]


@pytest.mark.parametrize(
    ("option", "scheduler"),
    [("volcano", "volcano"), ("coscheduling", "scheduler-plugins-scheduler")],
)
def test_the_pods_of_a_trainjob_are_scheduled_as_a_group(
    option: str, scheduler: str, copy: Path
) -> None:
    """Trainer creates the PodGroup, but does not set the pods' scheduler."""
    parts = ["node-pools/onprem", f"components/{option}", "components/values"]
    made = build(copy, "onprem", ["trainjob"], parts)
    (runtime,) = (document for document in made if document["kind"] == "TrainingRuntime")
    assert list(runtime["spec"]["podGroupPolicy"]) == [option]
    assert [pod["spec"]["schedulerName"] for _, pod in pods([runtime])] == [scheduler]


@pytest.mark.parametrize("gpu", GPUS)
def test_one_line_changes_the_gpu_and_another_the_price(gpu: str, copy: Path) -> None:
    for name in CLOUDS:
        if (name, gpu) == ("gke", "a10"):
            continue  # Google Cloud has no such GPU
        folder = copy / "overlays" / name
        chosen = folder / "values" / "kustomization.yaml"
        assert "components/h100" in chosen.read_text()
        changed = chosen.read_text().replace("components/h100", f"components/{gpu}")
        chosen.write_text(f"{changed}  - ../../../components/spot\n")
        text = yaml.safe_dump_all(kustomize(folder / ("cluster" if name != "onprem" else ".")))
        family = {"a10": "g5", "a100": "p4de", "h100": "p5", "h200": "p5en", "l4": "g6"}[gpu]
        words = {
            "gke": f"type: nvidia-{gpu}",
            "eks": f"- {family}\n",
            "onprem": f"- NVIDIA-{gpu.upper()}",
        }[name]
        assert words in text
        assert {"gke": "spot: true", "eks": "- spot\n", "onprem": ""}[name] in text
        (job,), (runtime, _) = kustomize(folder), kustomize(folder / "trainjob")
        policy = runtime["spec"]["template"]["spec"]["failurePolicy"]
        limits = (job["spec"]["runPolicy"]["backoffLimit"], policy["maxRestarts"])
        assert limits == (50, 50)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_value_is_used_where_documented(name: str, copy: Path) -> None:
    file = copy / "overlays" / name / "values" / "values.yaml"
    values = yaml.safe_load(file.read_text())
    marks = {key: str(70_001 + number) for number, key in enumerate(values["data"])}
    marks |= {"spot": "true"} if "spot" in marks else {}  # kustomize keeps the field's type
    file.write_text(yaml.safe_dump({**values, "data": marks}))
    folder = copy / "overlays" / name
    rendered = [*kustomize(folder), *kustomize(folder / "trainjob"), *installed(name, copy)]
    if name != "kind":
        rendered += build(copy, name, [], ["components/kueue-queues", "components/values"])
        rendered += build(copy, name, [], ["components/mlflow-ingress", "components/values"])
    if name in ("gke", "eks"):
        both = [f"node-pools/{name}", f"node-pools/{name}/reservation"]
        rendered += build(copy, name, [], [*both, "components/values"])
    rendered += build(copy, name, ["pytorchjob"], ["components/values", "components/elastic"])
    text = yaml.safe_dump_all(rendered)
    assert [key for key, mark in marks.items() if not re.search(rf"\b{mark}\b", text)] == []
    places = {document["metadata"].get("namespace", marks["namespace"]) for document in rendered}
    assert places == {marks["namespace"], marks["mlflowNamespace"]}
    assert not re.search(r"namespace: vitdet\b|metadata.name: vitdet\b|vitdet-mlflow\.svc", text)
    del marks["pool"]
    file.write_text(yaml.safe_dump({**values, "data": marks}))
    with pytest.raises(ValueError, match="data.pool"):
        kustomize(folder)


@pytest.mark.parametrize("name", OVERLAYS)
def test_both_kinds_of_job_run_the_same_container(name: str) -> None:
    (job,), (runtime, trainjob) = deepcopy((overlay(name), overlay(name, "trainjob")))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    master, worker = (replicas[role]["template"] for role in ("Master", "Worker"))
    assert master == worker
    ((_, node),) = pods([runtime])
    # the runtime's volume has the name of its claim
    node = json.loads(
        json.dumps(node)
        .replace('"name": "vitdet-data"', '"name": "data"')
        .replace("jobset.sigs.k8s.io/jobset-name", "training.kubeflow.org/job-name")
    )
    node["spec"].pop("restartPolicy", None)
    ours, theirs = master["spec"]["containers"][0], node["spec"]["containers"][0]
    assert ours["args"] == trainjob["spec"]["trainer"]["args"] and ours["args"][0] == "train"
    assert ours["args"][1] in recipes()
    assert theirs["image"] == trainjob["spec"]["trainer"]["image"]
    # between these words, a PyTorchJob's command sets up its c10d rendezvous
    assert ours["command"][0] == theirs["command"][0] == "torchrun"
    assert ours["command"][-2:] == theirs["command"][-2:] == ["-m", "vitdet"]
    gpus = ours["resources"]["limits"].get("nvidia.com/gpu", 1)
    for container in (ours, theirs):
        for key in ("name", "args", "ports", "command"):
            container.pop(key, None)
    assert {**master, "spec": {**master["spec"], "containers": [ours]}} == node
    assert trainjob["spec"]["trainer"]["numProcPerNode"] == gpus
    assert job["spec"]["nprocPerNode"] == ("gpu" if name != "kind" else "1")
    assert trainjob["spec"]["trainer"]["numNodes"] == 1 + replicas["Worker"]["replicas"]


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("name", OVERLAYS)
def test_the_launchers_job_is_valid(name: str, nodes: int) -> None:
    jobs = []
    for kind, part in JOBS.items():
        *others, job = overlay(name, part)
        space = job["metadata"]["namespace"]
        request = JobRequest(
            "vitdet-x", space, {"vitdet/run": "r"}, "", ["train", "x.yaml"], nodes, ""
        )
        filled = fill_template(yaml.safe_dump(job), KINDS[kind], request)
        filled["spec"].pop("podTemplateOverrides", None)  # the API server drops it, see pruned.py
        jobs += [*others, filled]
    assert problems(installed(name), jobs, pools(name)) == []
    assert len(jobs[0]["spec"]["pytorchReplicaSpecs"]) == min(nodes, 2)
    assert jobs[0]["metadata"]["annotations"] == {SCHEDULE: "3600", RESTARTS: "6"}
    assert jobs[-1]["metadata"]["annotations"] == {SCHEDULE: "3600"}
    assert (
        "backoffLimit" not in jobs[0]["spec"]["runPolicy"]
    )  # the launcher counts restarts by cause


@pytest.mark.parametrize("name", CLOUDS)
def test_the_trainjob_of_another_pool_has_its_own_runtime(name: str, copy: Path) -> None:
    file = copy / "overlays" / name / "values" / "values.yaml"
    file.write_text(file.read_text().replace("pool: gpu-train", "pool: small"))
    runtime, job = kustomize(copy / "overlays" / name / "trainjob")
    first, _ = overlay(name, "trainjob")
    assert runtime["metadata"]["name"] == job["spec"]["runtimeRef"]["name"] == "vitdet-small"
    assert first["metadata"]["name"] == "vitdet-gpu-train"
    ((_, pod),) = pods([runtime])
    assert list(pod["spec"]["nodeSelector"].values()) == ["small"]


def test_another_pool_is_another_compute_class() -> None:
    request = JobRequest("x", "vitdet", {}, "", ["train"], 2, "small")
    job = fill_template(yaml.safe_dump(overlay("gke")[0]), KINDS["pytorchjob"], request)
    assert [pod["spec"]["nodeSelector"] for _, pod in pods([job])] == [
        {"cloud.google.com/compute-class": "small"}
    ] * 2


def test_overlays_have_no_secrets_and_only_known_placeholders() -> None:
    for name in CLOUDS:
        assert not [document for document in installed(name) if document["kind"] == "Secret"]
        text = yaml.safe_dump_all([*overlay(name), *installed(name)])
        assert {"gke": 1, "eks": 6, "onprem": 0}[name] == text.count("YOUR-")


@pytest.mark.parametrize("name", OVERLAYS)
def test_jobs_cannot_mount_the_secrets_of_mlflow(name: str) -> None:
    """The passwords of the administrator and the database are in a namespace without jobs."""
    spaces = {"jobs": set(), "server": set()}
    for document in [*overlay(name), *overlay(name, "trainjob"), *installed(name)]:
        for secret in ("mlflow-server", "vitdet-mlflow"):
            names = [
                found
                for _, pod in pods([document])
                for found in re.findall(rf"'name': '{secret}'", str(pod))
            ]
            if names:
                where = "server" if secret == "mlflow-server" else "jobs"
                spaces[where].add(document["metadata"]["namespace"])
    assert len(spaces["jobs"]) == len(spaces["server"]) == 1
    assert not spaces["jobs"] & spaces["server"]


@pytest.mark.parametrize("name", CLOUDS)
def test_network_policies_cover_every_pod_of_the_jobs_namespace(name: str) -> None:
    """Only the download job and the downloading steps may reach public addresses."""
    policies = [document for document in installed(name) if document["kind"] == "NetworkPolicy"]
    jobs = [policy for policy in policies if policy["metadata"]["namespace"] == "vitdet"]
    (deny,) = (policy["spec"] for policy in jobs if policy["metadata"]["name"] == "default-deny")
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    out = {
        policy["metadata"]["name"]
        for policy in jobs
        for rule in policy["spec"].get("egress", [])
        for side in rule.get("to", [])
        if side.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
    }
    assert out == {"vitdet-data", "vitdet-downloads"}
    open_rules = [
        rule for policy in jobs for rule in policy["spec"].get("egress", []) if not rule.get("to")
    ]
    assert {port["port"] for rule in open_rules for port in rule["ports"]} == {53}


@pytest.mark.parametrize("name", OVERLAYS)
def test_policies_select_the_steps_that_the_pipeline_labels(name: str) -> None:
    _, platforms = yaml.safe_load_all((ROOT / "tests/golden_pipeline/pipeline.yaml").read_text())
    executors = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    key = "app.kubernetes.io/component"
    found = {executor["podMetadata"]["labels"][key] for executor in executors.values()}
    policies = {
        document["metadata"]["name"]: document["spec"]["podSelector"]
        for document in overlay(name, "namespace")
        if document["kind"] == "NetworkPolicy"
    }
    (rule,) = policies["vitdet-steps"]["matchExpressions"]
    assert rule == {"key": key, "operator": "In", "values": sorted(found)}
    downloads = policies["vitdet-downloads"]["matchLabels"][key]
    downloading = {
        n for n, executor in executors.items() if downloads in str(executor["podMetadata"])
    }
    assert downloading == {"exec-data", "exec-weights"}


def test_the_operators_init_container_meets_restricted_pod_security() -> None:
    (template,) = kustomize(MANIFESTS / "training-operator")
    text = re.sub(r"{{[.](\w+)}}", r"\1", template["data"]["initContainer.yaml"])
    _, pod = next(pods(overlay("kind")))
    added = yaml.safe_load(text)[0]
    # only `insecure` requires this: the container writes no files
    added["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]
    assert insecure("", {**pod, "spec": {**pod["spec"], "initContainers": [added]}}, set()) == []
    patch = yaml.safe_load((MANIFESTS / "training-operator" / "deployment-patch.yaml").read_text())
    (volume,) = patch["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == template["metadata"]["name"]


def test_images_are_ours_or_pinned_by_digest() -> None:
    images = {
        container["image"]
        for name in OVERLAYS
        for part in (".", "trainjob", *parts(name))
        for _, pod in pods(overlay(name, part))
        for container in containers(pod)
    }
    ours = {
        image
        for image in images
        if re.fullmatch(r"(registry[.]example[.]com/)?vitdet(-mlflow)?:\d+[.]\d+[.]\d+", image)
    }
    assert ours and all("@sha256:" in image for image in images - ours), images - ours
