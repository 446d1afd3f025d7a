"""Rules for rendered manifests beyond schemas: webhooks, references, Pod Security, pinned images."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.free_maps import unknown
from tests.helpers.schemas import misspelled

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
# Set on GPU nodes by the clouds, or by the administrator (node-pools/onprem).
GPU_TAINT = "nvidia.com/gpu"
# Secrets that docs/kubeflow.md creates.
BY_HAND = {"vitdet-mlflow", "mlflow-server", "mlflow-tls"}
RUNTIMES = ("ClusterTrainingRuntime", "TrainingRuntime")
CLUSTER_SCOPED = {"PriorityClass"}

# Set by the operators; Trainer refuses them (torch.go of v2.3: TorchRunReservedEnvNames)
RESERVED = {
    "PET_NNODES",
    "PET_NPROC_PER_NODE",
    "PET_NODE_RANK",
    "PET_MASTER_ADDR",
    "PET_MASTER_PORT",
}


def kustomize(folder: Path) -> list[dict]:
    """The documents of a kustomization; ValueError with what kubectl says."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr)
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def problems(cluster: list[dict], jobs: list[dict], pools: dict[str, set[str]]) -> list[str]:
    """All that is wrong with what stays in a cluster and the jobs for it.

    pools: the labels "key=value" of each pool's nodes -> the taints on them.
    """
    documents = [*cluster, *jobs]
    found = [
        problem for document in documents for problem in [*misspelled(document), *unknown(document)]
    ]
    if found:
        return found  # the rest may assume the shape
    for document in jobs:
        found += refused(document)
    claims = {
        claim["metadata"]["name"]
        for document in documents
        if document["kind"] == "StatefulSet"
        for claim in document["spec"]["volumeClaimTemplates"]
    }
    for document in documents:
        for where, pod in pods([document]):
            found += insecure(where, pod, claims)
            found += dangling(where, pod, documents, document["metadata"]["namespace"])
            if "nodeSelector" in pod["spec"]:
                found += homeless(where, pod["spec"], pools)
    found += unmatched(documents)
    return found


def pods(documents: list[dict]) -> Iterator[tuple[str, dict]]:
    """(where, pod template) of everything that makes pods."""
    for document in documents:
        name, spec = f"{document['kind']} {document['metadata']['name']}", document.get("spec", {})
        if document["kind"] in ("Deployment", "Job", "StatefulSet"):
            yield name, spec["template"]
        elif document["kind"] == "PyTorchJob":
            for role, replica in spec["pytorchReplicaSpecs"].items():
                yield f"{name} {role}", replica["template"]
        elif document["kind"] in RUNTIMES:
            for job in spec["template"]["spec"]["replicatedJobs"]:
                yield f"{name} {job['name']}", job["template"]["spec"]["template"]


def containers(pod: dict) -> list[dict]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def refused(job: dict) -> list[str]:
    """What the webhooks would refuse: training operator 1.9, pkg/webhooks/pytorch; Trainer 2.3, the torch plugin."""
    name, spec, said = f"{job['kind']} {job['metadata']['name']}", job["spec"], []
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job["metadata"]["name"]):
        said.append("its name is no DNS-1035 label")
    if job["kind"] == "PyTorchJob":
        replicas = spec["pytorchReplicaSpecs"]
        said += [
            f"unknown replica type {role}" for role in replicas if role not in ("Master", "Worker")
        ]
        if "Master" in replicas and replicas["Master"].get("replicas") != 1:
            said.append("Master.replicas must be written as 1")
        if "Worker" in replicas and replicas["Worker"].get("replicas", 1) < 1:
            said.append("Worker.replicas must be at least 1")
        if "elasticPolicy" in spec:
            said += ["elasticPolicy needs Worker"] * ("Worker" not in replicas)
            said += ["elasticPolicy.nProcPerNode beside nprocPerNode"] * (
                "nProcPerNode" in spec["elasticPolicy"]
            )
            said += ["no Master may stand beside elasticPolicy here: it would not take part"] * (
                "Master" in replicas
            )
        for role, replica in replicas.items():
            names = [container["name"] for container in replica["template"]["spec"]["containers"]]
            said += [f"{role} has no container pytorch"] * ("pytorch" not in names)
            said += [f"{role}: a restart policy of the pod is overwritten"] * (
                "restartPolicy" in replica["template"]["spec"]
            )
        if not re.fullmatch(r"auto|cpu|gpu|[1-9]\d*", spec.get("nprocPerNode", "auto")):
            said.append(f"nprocPerNode {spec['nprocPerNode']}: not auto, cpu, gpu or a number")
    elif job["kind"] in RUNTIMES:
        inner = {entry["name"]: entry for entry in spec["template"]["spec"]["replicatedJobs"]}
        if "node" not in inner:
            said.append("no replicated job `node`")
        else:
            named = [
                c["name"]
                for c in inner["node"]["template"]["spec"]["template"]["spec"]["containers"]
            ]
            said += ["no container `node`"] * ("node" not in named)
            labels = inner["node"]["template"].get("metadata", {}).get("labels", {})
            said += ["its trainer step has no label"] * (
                labels.get("trainer.kubeflow.org/trainjob-ancestor-step") != "trainer"
            )
        env = {
            entry["name"]
            for _, pod in pods([job])
            for one in containers(pod)
            for entry in one.get("env", [])
        }
        said += [f"{key} is reserved" for key in env if key in RESERVED]
    return [f"{name}: {what}" for what in said]


def insecure(where: str, pod: dict, claims: set[str]) -> list[str]:
    """Pod Security `restricted`, and what of the house goes beyond: read-only root, resources, pinned images."""
    spec, said = pod["spec"], []
    context = spec.get("securityContext", {})
    said += ["may run as root"] * (
        context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) == 0
    )
    said += ["no seccomp profile"] * (
        context.get("seccompProfile", {}).get("type") != "RuntimeDefault"
    )
    said += [
        f"{key} is the host's"
        for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers")
        if spec.get(key)
    ]
    said += [
        f"volume {volume['name']} is of a kind that is refused"
        for volume in spec.get("volumes", [])
        if not set(volume)
        & {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    ]
    said += [
        f"volume {volume['name']} may fill the node"
        for volume in spec.get("volumes", [])
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]
    ]
    said += ["holds a token of the API server"] * (
        spec.get("automountServiceAccountToken") is not False
    )
    there = {volume["name"] for volume in spec.get("volumes", [])} | claims
    annotations = pod["metadata"].get("annotations", {})
    said += ["gets an Istio sidecar"] * (annotations.get("sidecar.istio.io/inject") != "false")
    for one in containers(pod):
        own, name = one.get("securityContext", {}), one["name"]
        said += [f"{name}: privileged"] * bool(own.get("privileged"))
        said += [f"{name}: may gain privileges"] * (
            own.get("allowPrivilegeEscalation") is not False
        )
        said += [f"{name}: its root is writable"] * (own.get("readOnlyRootFilesystem") is not True)
        said += [f"{name}: keeps capabilities"] * (own.get("capabilities") != {"drop": ["ALL"]})
        for kind in ("requests", "limits"):
            said += [
                f"{name}: no {kind} of {what}"
                for what in ("cpu", "memory")
                if what not in one.get("resources", {}).get(kind, {})
            ]
        said += [f"{name}: image {one['image']} is not pinned"] * (not pinned(one["image"]))
        mounted = [mount["name"] for mount in one.get("volumeMounts", [])]
        said += [f"{name}: nothing writable at /tmp"] * ("tmp" not in mounted)
        said += [
            f"{name}: mounts {volume}, which is no volume"
            for volume in mounted
            if volume not in there
        ]
    return [f"{where}: {what}" for what in said]


def pinned(image: str) -> bool:
    """By digest, or by a tag that names a version."""
    tag = re.search(r"(?:@(sha256:[0-9a-f]{64})|:([\w.-]+))$", image)
    return bool(tag and (tag[1] or re.search(r"\d+[.]\d+", tag[2])))


def dangling(where: str, pod: dict, documents: list[dict], namespace: str) -> list[str]:
    """Objects that a pod refers to and that do not exist in its namespace."""
    there = {
        (document["kind"], document["metadata"]["name"])
        for document in documents
        if document["metadata"].get("namespace", namespace) == namespace
        and ("namespace" in document["metadata"] or document["kind"] in CLUSTER_SCOPED)
    } | {("Secret", name) for name in BY_HAND}
    spec, wanted = pod["spec"], [("ServiceAccount", pod["spec"]["serviceAccountName"])]
    if "priorityClassName" in spec:
        wanted.append(("PriorityClass", spec["priorityClassName"]))
    for volume in spec.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        if "configMap" in volume:
            wanted.append(("ConfigMap", volume["configMap"]["name"]))
    for one in containers(pod):
        for source in one.get("envFrom", []):
            wanted += [("Secret", source["secretRef"]["name"])]
        for entry in one.get("env", []):
            wanted += [
                ("Secret", key["name"])
                for key in [entry.get("valueFrom", {}).get("secretKeyRef")]
                if key
            ]
    return [
        f"{where}: no {kind} {name} in {namespace}"
        for kind, name in wanted
        if (kind, name) not in there
    ]


def homeless(where: str, spec: dict, pools: dict[str, set[str]]) -> list[str]:
    """A selector without a pool, a toleration without a taint, a taint without a toleration."""
    wanted = {f"{key}={value}" for key, value in spec["nodeSelector"].items()}
    fitting = [taints for labels, taints in pools.items() if wanted <= set(labels.split(","))]
    if not fitting:
        return [
            f"{where}: no pool has {', '.join(sorted(wanted))}; there are {'; '.join(pools) or 'none'}"
        ]
    tolerated = {toleration["key"] for toleration in spec.get("tolerations", [])}
    said = [f"tolerates {key}, which no node is tainted with" for key in tolerated - fitting[0]]
    said += [f"does not tolerate {key}" for key in fitting[0] - tolerated]
    return [f"{where}: {what}" for what in said]


# Labels of the pods of pipeline steps, which are not part of the manifests (pipeline/graph.py).
STEPS = [
    {"app.kubernetes.io/name": "vitdet", "app.kubernetes.io/component": component}
    for component in ("step", "step-download")
]


def unmatched(documents: list[dict]) -> list[str]:
    """Selectors of services and policies that no pod has, bindings, runtimes and our own classes that are not there."""
    labels = [*STEPS, *(pod["metadata"]["labels"] for _, pod in pods(documents))]
    names, said = {(d["kind"], d["metadata"]["name"]) for d in documents}, []

    def labels_in(namespace: str) -> list[dict]:
        found = [one for one in documents if one["metadata"].get("namespace") == namespace]
        return [pod["metadata"]["labels"] for _, pod in pods(found)]

    for document in documents:
        for claim in [document, *document.get("spec", {}).get("volumeClaimTemplates", [])]:
            wanted = claim.get("spec", {}).get("storageClassName", "")  # others are the cluster's
            said += [f"no StorageClass {wanted}"] * (
                wanted[:7] == "vitdet-" and ("StorageClass", wanted) not in names
            )
        where, spec, chosen = (
            f"{document['kind']} {document['metadata']['name']}",
            document.get("spec", {}),
            [],
        )
        if document["kind"] == "Service":
            chosen = [spec["selector"]]
        elif document["kind"] in ("Deployment", "StatefulSet"):
            own = spec["template"]["metadata"]["labels"]
            said += [
                f"{where}: its own pods have no {wanted}"
                for wanted in [spec["selector"]["matchLabels"]]
                if not wanted.items() <= own.items()
            ]
        elif document["kind"] == "NetworkPolicy":
            sides = [side for rule in spec.get("ingress", []) for side in rule.get("from", [])]
            sides += [side for rule in spec.get("egress", []) for side in rule.get("to", [])]
            chosen = [
                entry.get("matchLabels", {})
                for entry in [
                    spec["podSelector"],
                    *(side["podSelector"] for side in sides if "podSelector" in side),
                ]
            ]
            said += [
                f"{where}: no pod of {space} has {wanted}"
                for space, wanted in map(_remote, sides)
                if space and not any(wanted.items() <= own.items() for own in labels_in(space))
            ]
        elif document["kind"] == "Ingress":
            said += [
                f"{where}: no Service {path['backend']['service']['name']}"
                for rule in spec["rules"]
                for path in rule["http"]["paths"]
                if ("Service", path["backend"]["service"]["name"]) not in names
            ]
        elif document["kind"] == "RoleBinding":
            wanted = [("Role", document["roleRef"]["name"])]
            wanted += [("ServiceAccount", subject["name"]) for subject in document["subjects"]]
            said += [
                f"{where}: no {kind} {name}" for kind, name in wanted if (kind, name) not in names
            ]
        elif document["kind"] == "TrainJob":
            runtime = (spec["runtimeRef"].get("kind", RUNTIMES[0]), spec["runtimeRef"]["name"])
            said += [f"{where}: no {' '.join(runtime)}"] * (runtime not in names)
        said += [
            f"{where}: no pod has {wanted}"
            for wanted in chosen
            if not any(wanted.items() <= own.items() for own in labels)
        ]
    return said


def _remote(side: dict) -> tuple[str, dict]:
    """Namespace and labels of a policy's peer in another namespace; ("", {}) of other peers."""
    if not {"namespaceSelector", "podSelector"} <= side.keys():
        return "", {}
    space = side["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    return space, side["podSelector"]["matchLabels"]
