"""The manifests as `kubectl kustomize` renders them: every overlay, every optional component, and planted typos."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

from components.jobs import KINDS, Wish, fill
from tests.conftest import ROOT
from tests.manifests import GPU_TAINT, containers, insecure, kustomize, pods, problems
from vitdet.config import recipes

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
MANIFESTS = ROOT / "manifests"
CLOUDS, GPUS = ("gke", "eks", "onprem"), ("a100", "h100", "h200")
OVERLAYS = ("kind", *CLOUDS)
JOBS = {"pytorchjob": ".", "trainjob": "trainjob"}  # folder of the job -> folder of its kustomization in an overlay
HEADER = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"


@cache
def overlay(name: str, part: str = ".") -> list[dict]:
    return kustomize(MANIFESTS / "overlays" / name / part)


def pools(name: str, root: Path = MANIFESTS, cluster: list[dict] | None = None) -> dict[str, set[str]]:
    """The labels of an overlay's GPU nodes -> their taints."""
    nodes = root / "node-pools" / name
    if name == "kind":
        return {",".join(f"{key}={value}" for key, value in node["labels"].items()): set()
                for node in yaml.safe_load((nodes / "cluster.yaml").read_text())["nodes"]}
    if name == "onprem":  # the commands that README.md has repeated
        text = (nodes / "kustomization.yaml").read_text()
        label, = re.findall(r"kubectl label nodes -l \S+ (\S+)", text)
        taint, = re.findall(rf"kubectl taint nodes -l {label} (\S+)=present:NoSchedule", text)
        return {label: {taint}}
    found = {}
    for document in overlay(name, "cluster") if cluster is None else cluster:
        if document["kind"] == "ComputeClass":
            found[f"cloud.google.com/compute-class={document['metadata']['name']}"] = {GPU_TAINT}  # by GKE itself
        elif document["kind"] == "NodePool":
            template = document["spec"]["template"]
            labels = ",".join(f"{key}={value}" for key, value in template["metadata"]["labels"].items())
            found[labels] = {taint["key"] for taint in template["spec"]["taints"]}
    return found


def build(root: Path, name: str, resources: list[str], components: list[str], extra: str = "") -> list[dict]:
    """A kustomization of an overlay's values, these resources and components, in a copy of manifests/."""
    folder = root / "overlays" / name / "made"
    folder.mkdir(exist_ok=True)
    listed = {"resources": ["../values", *(f"../../../{each}" for each in resources)],
              "components": [f"../../../{each}" for each in components]}
    (folder / "kustomization.yaml").write_text(HEADER + yaml.safe_dump(listed) + extra)
    return kustomize(folder)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(MANIFESTS, tmp_path / "manifests")


@pytest.mark.parametrize("part", ["pytorchjob", "trainjob"])
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_right(name: str, part: str) -> None:
    jobs = overlay(name, JOBS[part])
    assert [job["kind"] for job in jobs] == {"pytorchjob": ["PyTorchJob"],
                                             "trainjob": ["ClusterTrainingRuntime", "TrainJob"]}[part]
    assert problems(overlay(name, "cluster"), jobs, pools(name)) == []


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("options", [["rdma"], ["volcano"], ["coscheduling"], ["kueue"], ["profile"], ["+elastic"],
                                     ["rdma", "kueue", "+elastic"]], ids="-".join)
def test_an_option_is_right(options: list[str], job: str, copy: Path) -> None:
    before = [f"components/{option}" for option in options if option[0] != "+"]
    after = [f"components/{option[1:]}" for option in options if option[0] == "+"]
    jobs = build(copy, "onprem", [job], ["node-pools/onprem", *before, "components/values", *after])
    assert jobs != overlay("onprem", JOBS[job]) or (job == "trainjob" and options == ["+elastic"])
    assert problems(overlay("onprem", "cluster"), jobs, pools("onprem")) == []
    if after and job == "pytorchjob":
        spec = jobs[0]["spec"]
        assert {role: replica["replicas"] for role, replica in spec["pytorchReplicaSpecs"].items()} == {"Worker": 2}
        assert (spec["elasticPolicy"]["minReplicas"], spec["elasticPolicy"]["maxReplicas"]) == (1, 2)


@pytest.mark.parametrize("name", CLOUDS)
def test_queues_and_profiles_fit_every_cluster(name: str, copy: Path) -> None:
    own = [f"node-pools/{name}"] if name != "onprem" else []
    made = build(copy, name, ["shared", "mlflow"],
                 [*own, "components/kueue-queues", "components/profile", "components/values"])
    kinds = {document["kind"] for document in made}
    assert {"ClusterQueue", "LocalQueue", "ResourceFlavor"} <= kinds and not {"Namespace", "PriorityClass"} & kinds
    jobs = build(copy, name, ["pytorchjob"], [
        *(["node-pools/onprem"] if name == "onprem" else []), "components/profile", "components/values",
        *(["node-pools/gke/job"] if name == "gke" else [])])
    assert problems(made, jobs, pools(name)) == []


@pytest.mark.parametrize("gpu", GPUS)
def test_one_line_changes_the_gpu_and_one_the_price(gpu: str, copy: Path) -> None:
    for name in CLOUDS:
        chosen = copy / "overlays" / name / "values" / "kustomization.yaml"
        assert "components/h100" in chosen.read_text()
        chosen.write_text(chosen.read_text().replace("components/h100", f"components/{gpu}")
                          + "  - ../../../components/spot\n")
        text = yaml.safe_dump_all(kustomize(copy / "overlays" / name / ("cluster" if name != "onprem" else ".")))
        words = {"gke": f"type: nvidia-{gpu}-", "eks": f"- {gpu}\n", "onprem": f"- NVIDIA-{gpu.upper()}"}[name]
        assert words in text
        assert {"gke": "spot: true", "eks": "- spot\n", "onprem": ""}[name] in text


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_value_reaches_its_place(name: str, copy: Path) -> None:
    file = copy / "overlays" / name / "values" / "values.yaml"
    values = yaml.safe_load(file.read_text())
    marks = {key: str(70_001 + number) for number, key in enumerate(values["data"])}
    marks |= {"spot": "true"} if "spot" in marks else {}  # kustomize keeps a place's type
    file.write_text(yaml.safe_dump({**values, "data": marks}))
    folder = copy / "overlays" / name
    rendered = [*kustomize(folder), *kustomize(folder / "trainjob"), *kustomize(folder / "cluster")]
    queues = ["components/kueue-queues"] if name != "kind" else []
    rendered += build(copy, name, ["shared"], [*queues, "components/values"])
    rendered += build(copy, name, ["pytorchjob"], ["components/values", "components/elastic"])
    text = yaml.safe_dump_all(rendered)
    assert [key for key, mark in marks.items() if not re.search(rf"\b{mark}\b", text)] == []
    places = {document["metadata"].get("namespace", marks["namespace"]) for document in rendered}
    assert places == {marks["namespace"]}
    file.write_text(yaml.safe_dump({**values, "data": {key: value for key, value in marks.items() if key != "pool"}}))
    with pytest.raises(ValueError, match="data.pool"):
        kustomize(folder)


@pytest.mark.parametrize("name", OVERLAYS)
def test_both_kinds_run_the_same(name: str) -> None:
    (job,), (runtime, trainjob) = overlay(name), overlay(name, "trainjob")
    master, worker = (job["spec"]["pytorchReplicaSpecs"][role]["template"] for role in ("Master", "Worker"))
    assert master == worker
    (_, node), = pods([runtime])
    node["spec"].pop("restartPolicy", None)
    ours, theirs = master["spec"]["containers"][0], node["spec"]["containers"][0]
    assert ours["args"] == trainjob["spec"]["trainer"]["args"] and ours["args"][0] == "train"
    assert ours["args"][1] in recipes()
    assert theirs["image"] == trainjob["spec"]["trainer"]["image"]
    assert ours["command"][0] == theirs["command"][0] == "torchrun"  # a PyTorchJob's nodes meet by c10d
    assert ours["command"][-2:] == theirs["command"][-2:] == ["-m", "vitdet"]
    own = ("name", "args", "ports", "command")
    assert {**master, "spec": {**master["spec"], "containers": [{k: v for k, v in ours.items() if k not in own}]}} == \
           {**node, "spec": {**node["spec"], "containers": [{k: v for k, v in theirs.items() if k not in own}]}}
    gpus = ours["resources"]["limits"].get("nvidia.com/gpu", 1)
    assert trainjob["spec"]["trainer"]["numProcPerNode"] == gpus
    assert job["spec"]["nprocPerNode"] == ("gpu" if name != "kind" else "1")
    assert trainjob["spec"]["trainer"]["numNodes"] == 1 + job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("name", OVERLAYS)
def test_the_launcher_s_job_is_right_too(name: str, nodes: int) -> None:
    jobs = []
    for kind, part in JOBS.items():
        wish = Wish("vitdet-x", "vitdet", {"vitdet/run": "r"}, "", ["train", "x.yaml"], nodes, "")
        *others, job = overlay(name, part)
        jobs += [*others, fill(yaml.safe_dump(job), KINDS[kind], wish)]
    assert problems(overlay(name, "cluster"), jobs, pools(name)) == []
    assert len(jobs[0]["spec"]["pytorchReplicaSpecs"]) == min(nodes, 2)


def test_another_pool_is_another_compute_class() -> None:
    wish = Wish("x", "vitdet", {}, "", ["train"], 2, "small")
    job = fill(yaml.safe_dump(overlay("gke")[0]), KINDS["pytorchjob"], wish)
    assert [pod["spec"]["nodeSelector"] for _, pod in pods([job])] == [
        {"cloud.google.com/compute-class": "small"}] * 2


def test_passwords_and_answers_of_users_stand_where_they_should() -> None:
    for name in CLOUDS:
        assert not [document for document in overlay(name, "cluster") if document["kind"] == "Secret"]
        text = yaml.safe_dump_all([*overlay(name), *overlay(name, "cluster")])
        assert {"gke": 1, "eks": 4, "onprem": 0}[name] == text.count("YOUR-"), "what README.md has users fill in"


def test_the_operator_s_init_container_meets_restricted() -> None:
    template, = kustomize(MANIFESTS / "training-operator")
    text = re.sub(r"{{[.](\w+)}}", r"\1", template["data"]["initContainer.yaml"])
    _, pod = next(pods(overlay("kind")))
    added = yaml.safe_load(text)[0]
    added["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]  # which it does without: its root stays unwritten
    assert insecure("", {**pod, "spec": {**pod["spec"], "initContainers": [added]}}, set()) == []
    patch = yaml.safe_load((MANIFESTS / "training-operator" / "deployment-patch.yaml").read_text())
    volume, = patch["spec"]["template"]["spec"]["volumes"]
    assert volume["configMap"]["name"] == template["metadata"]["name"]


def test_images_are_ours_or_pinned_by_digest() -> None:
    images = {one["image"] for name in OVERLAYS for part in (".", "trainjob", "cluster")
              for _, pod in pods(overlay(name, part)) for one in containers(pod)}
    ours = {image for image in images if re.fullmatch(r"(registry[.]example[.]com/)?vitdet:\d+[.]\d+[.]\d+", image)}
    assert ours and all("@sha256:" in image for image in images - ours), images - ours


def swap(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, f"{old} stands there no more"
        return text.replace(old, new)

    return change


TYPOS = {
    "a field of the job": ("pytorchjob/pytorchjob.yaml", swap("backoffLimit", "backofLimit")),
    "a field of the pod": ("pytorchjob/pytorchjob.yaml", swap("nodeSelector", "nodeSelecter")),
    "a field of the container": ("pytorchjob/pytorchjob.yaml", swap("volumeMounts", "volumeMount")),
    "a field of the pod's metadata": ("pytorchjob/pytorchjob.yaml", swap("annotations:", "annotation:")),
    "a type": ("pytorchjob/pytorchjob.yaml", swap("enableServiceLinks: false", 'enableServiceLinks: "no"')),
    "the container's name": ("pytorchjob/pytorchjob.yaml", swap("name: pytorch ", "name: torch ")),
    "a replica's role": ("pytorchjob/pytorchjob.yaml", swap("    Worker:", "    Workers:")),
    "the master's count": ("pytorchjob/pytorchjob.yaml", swap("replicas: 1  # must", "replicas: 2  # must")),
    "the account": ("pytorchjob/pytorchjob.yaml", swap("AccountName: vitdet-train", "AccountName: vitdet-trains")),
    "the claim": ("shared/volume.yaml", swap("name: vitdet-data", "name: vitdet-date")),
    "the priority": ("shared/priority.yaml", swap("name: vitdet-train", "name: vitdet-trian")),
    "the secret": ("pytorchjob/pytorchjob.yaml", swap("name: vitdet-mlflow", "name: vitdet-mflow")),
    "a mount": ("pytorchjob/pytorchjob.yaml", swap("{name: shm, mountPath", "{name: smh, mountPath")),
    "the pool": ("node-pools/eks/karpenter.yaml", swap("vitdet/pool", "vitdet/pools")),
    "a taint": ("node-pools/eks/karpenter.yaml", swap("key: nvidia.com/gpu", "key: nvidia.com/gpus")),
    "a field of the pool": ("node-pools/eks/karpenter.yaml", swap("expireAfter", "expiresAfter")),
    "root": ("pytorchjob/pytorchjob.yaml", swap("runAsNonRoot: true", "runAsNonRoot: false")),
    "a writable root": ("mlflow/server.yaml", swap("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false")),
    "no seccomp": ("mlflow/database.yaml", swap("type: RuntimeDefault", "type: Unconfined")),
    "a floating tag": ("overlays/eks/values/values.yaml", swap("vitdet:0.1.0", "vitdet:latest")),
    "a port of a probe's schema": ("mlflow/server.yaml", swap("periodSeconds: 5", "periodSecond: 5")),
    "a service's selector": ("mlflow/server.yaml", swap("selector: {app.kubernetes.io/name: mlflow}",
                                                        "selector: {app.kubernetes.io/name: mlfow}")),
    "a policy's selector": ("shared/network.yaml", swap("name: mlflow}", "name: mflow}")),
    "a role's field": ("shared/accounts.yaml", swap("resources: [pods]", "resource: [pods]")),
    "the binding's account": ("shared/accounts.yaml", swap("{kind: ServiceAccount, name: vitdet-pipeline, namespace",
                                                           "{kind: ServiceAccount, name: vitdet-pipelin, namespace")),
    "a value's name": ("overlays/eks/values/values.yaml", swap("sharedMemory", "sharedMemori")),
    "a replaced place": ("components/values/job.yaml", swap("vitdet/pool", "vitdet/pol")),
    "the runtime's name": ("trainjob/trainjob.yaml", swap("runtimeRef: {name: vitdet}", "runtimeRef: {name: vitde}")),
    "a removed field": ("trainjob/trainjob.yaml", swap("  trainer:", "  podTemplateOverrides: []\n  trainer:")),
    "a reserved variable": ("trainjob/runtime.yaml", swap("NCCL_DEBUG", "PET_NNODES")),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_noticed(typo: str, copy: Path) -> None:
    path, change = TYPOS[typo]
    (copy / path).write_text(change((copy / path).read_text()))
    try:
        folder = copy / "overlays" / "eks"
        untouched = path.startswith(("pytorchjob", "trainjob"))
        cluster = overlay("eks", "cluster") if untouched else kustomize(folder / "cluster")
        jobs = kustomize(folder / "trainjob" if path.startswith("trainjob") else folder)
    except ValueError:
        return  # kubectl itself noticed
    assert problems(cluster, jobs, pools("eks", copy, cluster)) != []


def test_the_guide_names_files_that_exist() -> None:
    for guide in (MANIFESTS / "README.md", MANIFESTS / "training-operator" / "kustomization.yaml"):
        for path in re.findall(r"(?<![\w/])manifests/[\w./-]+\w", guide.read_text()):
            assert (ROOT / path).exists(), f"{guide.name}: {path}"
    text = (MANIFESTS / "README.md").read_text()
    for folder in re.findall(r"(?<![\w/])((?:components|overlays|node-pools)/[\w-]+)", text):
        assert (MANIFESTS / folder).exists() or folder == "overlays/CLUSTER", folder
    named = set(re.findall(r"`([\w-]+)`", text)) | set(re.findall(r"components/([\w-]+)", text))
    assert {path.name for path in (MANIFESTS / "components").iterdir()} - named == set()
