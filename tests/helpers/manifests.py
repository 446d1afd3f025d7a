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
# The taint that the clouds or the administrator (node-pools/onprem) set on GPU nodes.
GPU_TAINT = "nvidia.com/gpu"
# Secrets that users create by the commands in docs/kubeflow.md.
BY_HAND = {"vitdet-mlflow", "mlflow-server", "mlflow-tls"}
RUNTIMES = ("ClusterTrainingRuntime", "TrainingRuntime")
CLUSTER_SCOPED = {"PriorityClass"}

# Variables set by the operators; Trainer rejects those of a TrainJob and overwrites those of a runtime
# (torch.go of v2.3: TorchRunReservedEnvNames)
RESERVED = {
    f"PET_{name}" for name in "NNODES NPROC_PER_NODE NODE_RANK MASTER_ADDR MASTER_PORT".split()
}


def kustomize(folder: Path) -> list[dict]:
    """Return the documents of a kustomization; raise ValueError with the message of kubectl."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr)
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def problems(cluster: list[dict], jobs: list[dict], pools: dict[str, set[str]]) -> list[str]:
    """Return all problems of a cluster's permanent objects and of its jobs.

    `pools` maps each pool's node labels "key=value,..." to the nodes' taints.
    """
    documents = [*cluster, *jobs]
    if found := [
        text for document in documents for text in misspelled(document) + unknown(document)
    ]:
        return found  # later checks rely on the schema
    found = [problem for document in jobs for problem in refused(document)]
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
    """Yield (location, pod template) for every object that creates pods."""
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


def broken(*rules: tuple[object, str]) -> list[str]:
    """Return the texts of the violated rules."""
    return [text for wrong, text in rules if wrong]


def refused(job: dict) -> list[str]:
    """Return what the webhooks would reject.

    Training operator 1.9, pkg/webhooks/pytorch; Trainer 2.3, the torch plugin.
    """
    name, spec = job["metadata"]["name"], job["spec"]
    is_label = re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name)
    said = broken((not is_label, "its name is no DNS-1035 label"))
    if job["kind"] == "PyTorchJob":
        replicas, local = spec["pytorchReplicaSpecs"], spec.get("nprocPerNode", "auto")
        elastic, master = spec.get("elasticPolicy"), replicas.get("Master", {"replicas": 1})
        said += broken(
            (replicas.keys() - {"Master", "Worker"}, f"unknown replica type in {list(replicas)}"),
            (master.get("replicas") != 1, "Master.replicas must be written as 1"),
            (replicas.get("Worker", {}).get("replicas", 1) < 1, "Worker.replicas: at least 1"),
            (elastic and "Worker" not in replicas, "elasticPolicy needs Worker"),
            ("nProcPerNode" in (elastic or {}), "elasticPolicy.nProcPerNode beside nprocPerNode"),
            (elastic and "Master" in replicas, "a Master beside elasticPolicy takes no part"),
            (not re.fullmatch(r"auto|cpu|gpu|[1-9]\d*", local), f"nprocPerNode {local}"),
        )
        for role, replica in replicas.items():
            pod = replica["template"]["spec"]
            names = [container["name"] for container in pod["containers"]]
            said += broken(
                ("pytorch" not in names, f"{role} has no container pytorch"),
                ("restartPolicy" in pod, f"{role}: a restart policy of the pod is overwritten"),
            )
    elif job["kind"] in RUNTIMES:
        inner = {entry["name"]: entry for entry in spec["template"]["spec"]["replicatedJobs"]}
        if "node" not in inner:
            return [f"{job['kind']} {name}: no replicated job `node`"]
        node = inner["node"]["template"]
        named = [container["name"] for container in node["spec"]["template"]["spec"]["containers"]]
        labels = node.get("metadata", {}).get("labels", {})
        step = labels.get("trainer.kubeflow.org/trainjob-ancestor-step")
        env = [
            entry
            for _, pod in pods([job])
            for container in containers(pod)
            for entry in container.get("env", [])
        ]
        said += broken(
            ("node" not in named, "no container `node`"),
            (step != "trainer", "its trainer step has no label"),
            *((entry["name"] in RESERVED, f"{entry['name']} is reserved") for entry in env),
        )
    return [f"{job['kind']} {name}: {what}" for what in said]


VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
HOST = ("hostNetwork", "hostPID", "hostIPC", "hostUsers")


def insecure(where: str, pod: dict, claims: set[str]) -> list[str]:
    """Return the violations of Pod Security `restricted` and of this project's rules.

    This project also requires a read-only root, resources, pinned images, no token and no sidecar.
    """
    spec, context = pod["spec"], pod["spec"].get("securityContext", {})
    volumes = spec.get("volumes", [])
    there = {volume["name"] for volume in volumes} | claims
    root = context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) == 0
    sidecar = pod["metadata"].get("annotations", {}).get("sidecar.istio.io/inject") != "false"
    seccomp = context.get("seccompProfile", {}).get("type")
    said = broken(
        (root, "may run as root"),
        (seccomp != "RuntimeDefault", "no seccomp profile"),
        *((spec.get(key), f"{key} is the host's") for key in HOST),
        *(
            (not set(volume) & VOLUMES, f"volume {volume['name']} is of a refused kind")
            for volume in volumes
        ),
        *((unlimited(volume), f"{volume['name']} has no limit") for volume in volumes),
        (spec.get("automountServiceAccountToken") is not False, "has a token of the API server"),
        (sidecar, "gets an Istio sidecar"),
    )
    for part in containers(pod):
        own, name, image = part.get("securityContext", {}), part["name"], part["image"]
        resources = part.get("resources", {})
        mounted = [mount["name"] for mount in part.get("volumeMounts", [])]
        said += broken(
            (own.get("privileged"), f"{name}: privileged"),
            (own.get("allowPrivilegeEscalation") is not False, f"{name}: may gain privileges"),
            (own.get("readOnlyRootFilesystem") is not True, f"{name}: its root is writable"),
            (own.get("capabilities") != {"drop": ["ALL"]}, f"{name}: keeps capabilities"),
            *(
                (what not in resources.get(kind, {}), f"{name}: no {kind} of {what}")
                for kind in ("requests", "limits")
                for what in ("cpu", "memory")
            ),
            (not pinned(image), f"{name}: image {image} is not pinned"),
            ("tmp" not in mounted, f"{name}: nothing writable at /tmp"),
            *((key not in there, f"{name}: mounts {key}, which is no volume") for key in mounted),
        )
    return [f"{where}: {what}" for what in said]


def unlimited(volume: dict) -> bool:
    return "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]


def pinned(image: str) -> bool:
    """Return whether a digest or a version tag pins the image."""
    tag = re.search(r"(?:@(sha256:[0-9a-f]{64})|:([\w.-]+))$", image)
    return bool(tag and (tag[1] or re.search(r"\d+[.]\d+", tag[2])))


def dangling(where: str, pod: dict, documents: list[dict], namespace: str) -> list[str]:
    """Return references of pods to objects that do not exist in the pod's namespace."""
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
    for part in containers(pod):
        keys = [entry.get("valueFrom", {}).get("secretKeyRef") for entry in part.get("env", [])]
        keys += [source["secretRef"] for source in part.get("envFrom", [])]
        wanted += [("Secret", key["name"]) for key in keys if key]
    return [
        f"{where}: no {kind} {name} in {namespace}"
        for kind, name in wanted
        if (kind, name) not in there
    ]


def homeless(where: str, spec: dict, pools: dict[str, set[str]]) -> list[str]:
    """Return selectors without a pool, tolerations without a taint and taints without a toleration."""
    wanted = {f"{key}={value}" for key, value in spec["nodeSelector"].items()}
    fitting = [taints for labels, taints in pools.items() if wanted <= set(labels.split(","))]
    if not fitting:
        there = "; ".join(pools) or "none"
        return [f"{where}: no pool has {', '.join(sorted(wanted))}; there are {there}"]
    tolerated = {toleration["key"] for toleration in spec.get("tolerations", [])}
    said = [f"tolerates {key}, which no node is tainted with" for key in tolerated - fitting[0]]
    said += [f"does not tolerate {key}" for key in fitting[0] - tolerated]
    return [f"{where}: {what}" for what in said]


# Labels of the pipeline steps' pods, which are not part of the manifests (pipeline/graph.py).
STEPS = [
    {"app.kubernetes.io/name": "vitdet", "app.kubernetes.io/component": component}
    for component in ("step", "step-download")
]


def unmatched(documents: list[dict]) -> list[str]:
    """Return selectors without a pod, and references to missing Services, Roles, runtimes and so on."""
    labels = [*STEPS, *(pod["metadata"]["labels"] for _, pod in pods(documents))]
    names, said = {(d["kind"], d["metadata"]["name"]) for d in documents}, []

    def labels_in(namespace: str) -> list[dict]:
        found = [item for item in documents if item["metadata"].get("namespace") == namespace]
        return [pod["metadata"]["labels"] for _, pod in pods(found)]

    for document in documents:
        for claim in [document, *document.get("spec", {}).get("volumeClaimTemplates", [])]:
            wanted = claim.get("spec", {}).get("storageClassName", "")  # only vitdet-* is ours
            said += [f"no StorageClass {wanted}"] * (
                wanted[:7] == "vitdet-" and ("StorageClass", wanted) not in names
            )
        where, spec = f"{document['kind']} {document['metadata']['name']}", document.get("spec", {})
        chosen = []
        if document["kind"] == "Service":
            chosen = [spec["selector"]]
        elif document["kind"] in ("Deployment", "StatefulSet"):
            own, wanted = spec["template"]["metadata"]["labels"], spec["selector"]["matchLabels"]
            said += broken(
                (not wanted.items() <= own.items(), f"{where}: its own pods have no {wanted}")
            )
        elif document["kind"] == "NetworkPolicy":
            sides = [side for rule in spec.get("ingress", []) for side in rule.get("from", [])]
            sides += [side for rule in spec.get("egress", []) for side in rule.get("to", [])]
            peers = [side["podSelector"] for side in sides if "podSelector" in side]
            chosen = [selector.get("matchLabels", {}) for selector in (spec["podSelector"], *peers)]
            said += [
                f"{where}: no pod of {space} has {wanted}"
                for space, wanted in map(_remote, sides)
                if space and not any(wanted.items() <= own.items() for own in labels_in(space))
            ]
        elif document["kind"] == "Ingress":
            paths = [path for rule in spec["rules"] for path in rule["http"]["paths"]]
            services = [path["backend"]["service"]["name"] for path in paths]
            missing = [name for name in services if ("Service", name) not in names]
            said += [f"{where}: no Service {name}" for name in missing]
        elif document["kind"] == "RoleBinding":
            wanted = {("Role", document["roleRef"]["name"])}
            wanted |= {("ServiceAccount", subject["name"]) for subject in document["subjects"]}
            said += [f"{where}: no {kind} {name}" for kind, name in sorted(wanted - names)]
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
    """Return namespace and labels of a policy's peer in another namespace, ("", {}) for other peers."""
    if not {"namespaceSelector", "podSelector"} <= side.keys():
        return "", {}
    space = side["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    return space, side["podSelector"]["matchLabels"]
