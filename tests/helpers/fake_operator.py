"""Simulated training operator 1.9 and Kubeflow Trainer 2.3 for one namespace.

They create the pods of jobs and set the jobs' status. Pods have the names, labels and exact environment
of the real operators: for PyTorchJob pkg/controller.v1/pytorch/{envvar,master,elastic}.go and
pkg/controller.v1/common/pod.go of release 1.9, for TrainJob pkg/runtime/framework/plugins/torch/
torch.go. Conditions and their messages: pytorchjob_controller.go (UpdateJobStatus), common/job.go
(ReconcileJobs), pkg/util/status.go (setCondition); for Trainer 2.3 pkg/controller/
trainjob_controller.go, for its JobSet 0.12 tests/helpers/fake_jobset.py. Deadlines: pkg/core/job.go
(PastActiveDeadline), evaluated only after an event, as pytorchjob_controller.go passes a FakeWorkQueue
to the controller; the evaluation of all jobs every 10 hours (controller-runtime's
SyncPeriod) is not simulated. Trainer: reconcileDeadline, without delay. Services, webhooks, gang
scheduling and the workers' init container are omitted.
"""

from __future__ import annotations

import copy
import json
import threading
import uuid
from contextlib import suppress

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from tests.helpers.fake_jobset import RESTARTS_IGNORED, failure_action, job_failure, jobset_failure
from tests.helpers.fake_node import now, since

PYTORCH = ("kubeflow.org", "v1", "pytorchjobs")
TRAIN = ("trainer.kubeflow.org", "v1alpha1", "trainjobs")


def pytorch_environment(job: dict, kind: str, index: int) -> dict[str, str]:
    """Return the variables that envvar.go adds to each container of the pod."""
    spec, name = job["spec"], job["metadata"]["name"]
    replicas = {key: replica["replicas"] for key, replica in spec["pytorchReplicaSpecs"].items()}
    total, processes = sum(replicas.values()), spec.get("nprocPerNode", "auto")
    added = {"PYTHONUNBUFFERED": "1"}
    if "Master" in replicas:
        rank = index + (kind == "Worker")
        added |= {
            "MASTER_PORT": "23456",
            "PET_MASTER_PORT": "23456",
            "MASTER_ADDR": f"{name}-master-0",
            "PET_MASTER_ADDR": f"{name}-master-0",
            "WORLD_SIZE": str(total * (int(processes) if processes.isdigit() else 1)),
            "RANK": str(rank),
            "PET_NODE_RANK": str(rank),
        }
    added["PET_NPROC_PER_NODE"] = processes
    policy = spec.get("elasticPolicy")
    if policy is None:
        return {**added, "PET_NNODES": str(total)}
    optional = {"PET_MAX_RESTARTS": policy.get("maxRestarts"), "PET_RDZV_ID": policy.get("rdzvId")}
    return {
        **added,
        "PET_RDZV_ENDPOINT": f"{name}-worker-0:{policy.get('rdzvPort', 23456)}",
        "PET_RDZV_BACKEND": policy.get("rdzvBackend", "c10d"),
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        **{key: str(value) for key, value in optional.items() if value is not None},
    }


def merged(base: object, patch: object) -> object:
    """Return a strategic merge of pod templates: named objects merge by name, other lists are replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        both = {key: merged(base[key], patch[key]) for key in base.keys() & patch.keys()}
        return {**base, **patch, **both}
    if isinstance(base, list) and isinstance(patch, list) and base:
        key = next((key for key in ("mountPath", "name") if key in base[0]), None)
        if key:
            there, added = {item[key]: item for item in base}, {item[key]: item for item in patch}
            return list(merged(there, added).values())
    return patch


class FakeOperator:
    """Run both operators in a thread: `with FakeOperator(namespace):`."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.objects, self.core = client.CustomObjectsApi(), client.CoreV1Api()
        self.stopped, self.restarts, self.versions = threading.Event(), {}, {}

    def __enter__(self) -> FakeOperator:
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()

    def work(self) -> None:
        while not self.stopped.wait(0.2):
            for kind, tend in ((PYTORCH, self.tend_pytorch), (TRAIN, self.tend_train)):
                place = (*kind[:2], self.namespace, kind[2])
                with suppress(ApiException, HTTPError, ValueError):  # a controller retries
                    for job in self.objects.list_namespaced_custom_object(*place)["items"]:
                        before = json.dumps(job.get("status"))
                        if "deletionTimestamp" not in job["metadata"]:
                            tend(job)
                        if json.dumps(job.get("status")) != before:
                            name = job["metadata"]["name"]
                            self.objects.replace_namespaced_custom_object_status(*place, name, job)

    def pods(self, label: str, job: dict) -> dict[str, dict]:
        """Return the job's pods by name."""
        chosen = f"{label}={job['metadata']['name']}"
        found = self.core.list_namespaced_pod(
            self.namespace, label_selector=chosen, _preload_content=False
        )
        return {pod["metadata"]["name"]: pod for pod in json.loads(found.data)["items"]}

    def create(
        self, job: dict, name: str, template: dict, labels: dict, annotations: dict, variables: dict
    ) -> None:
        """Create a pod of the template, owned by the job."""
        template = copy.deepcopy(template)
        added = [
            {"name": key, **(value if isinstance(value, dict) else {"value": value})}
            for key, value in variables.items()
        ]
        for container in template["spec"]["containers"]:
            container["env"] = [*(container.get("env") or []), *added]
        metadata = template.get("metadata") or {}
        owner = {key: job[key] for key in ("apiVersion", "kind")}
        owner |= {key: job["metadata"][key] for key in ("name", "uid")}
        about = {
            "name": name,
            "labels": {**(metadata.get("labels") or {}), **labels},
            "annotations": {**(metadata.get("annotations") or {}), **annotations},
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        }
        pod = {"metadata": about, "spec": template["spec"]}
        try:
            self.core.create_namespaced_pod(self.namespace, pod)
        except ApiException as error:
            if error.status == 409:  # the previous pod is still being deleted
                return
            self.warn(job, json.loads(error.body)["message"])
            raise

    def warn(self, job: dict, message: str) -> None:
        """Create the event of a rejected pod, as pod_control.go does (for a TrainJob, the Job controller)."""
        mine = job["kind"] == "PyTorchJob"
        reference = {
            "namespace": self.namespace,
            "kind": job["kind"] if mine else "Job",
            "name": job["metadata"]["name"] + ("" if mine else "-node-0"),
            "uid": job["metadata"]["uid"] if mine else "of-that-job",
        }
        event = {
            "metadata": {"name": f"{reference['name']}.{uuid.uuid4().hex[:12]}"},
            "type": "Warning",
            "involvedObject": reference,
            "reason": "FailedCreatePod" if mine else "FailedCreate",
            "message": f"Error creating: {message}",
            **{"firstTimestamp": now(), "lastTimestamp": now(), "count": 1},
        }
        self.core.create_namespaced_event(self.namespace, event, _preload_content=False)

    def condition(self, job: dict, kind: str, reason: str, message: str, true: bool = True) -> None:
        """Set a condition: Running and Restarting exclude each other; an end unsets Running; Failed is final."""
        status = job.setdefault("status", {})
        there = {entry["type"]: entry for entry in status.setdefault("conditions", [])}
        if there.get("Failed", {}).get("status") == "True":
            return
        wanted = {"type": kind, "status": str(true), "reason": reason}
        if wanted.items() <= there.get(kind, {}).items():
            return
        there.pop({"Running": "Restarting", "Restarting": "Running"}.get(kind), None)
        there.pop(kind, None)
        if kind in ("Succeeded", "Failed") and "Running" in there:
            there["Running"]["status"] = "False"
        wanted |= {"message": message, "lastTransitionTime": now()}
        if job["kind"] == "PyTorchJob":
            wanted["lastUpdateTime"] = now()
            if kind in ("Succeeded", "Failed"):
                status.setdefault("completionTime", now())
        status["conditions"] = [*there.values(), wanted]

    @staticmethod
    def true(job: dict, *kinds: str) -> bool:
        return any(
            entry["type"] in kinds and entry["status"] == "True"
            for entry in job["status"].get("conditions", [])
        )

    def delete_pods(self, pods: dict[str, dict], but: tuple[str, ...] = ()) -> None:
        """Delete the pods whose phase is not in `but`."""
        for pod, found in pods.items():
            if found["status"]["phase"] not in but:
                self.core.delete_namespaced_pod(pod, self.namespace, _preload_content=False)

    def stirred(self, job: dict, pods: dict[str, dict]) -> bool:
        """Return whether the job or its pods have changed since the previous call."""
        versions = sorted(item["metadata"]["resourceVersion"] for item in (job, *pods.values()))
        uid = job["metadata"]["uid"]
        before, self.versions[uid] = self.versions.get(uid), versions
        return before != versions

    def tend_pytorch(self, job: dict) -> None:
        """Reconcile a PyTorchJob: common/job.go ReconcileJobs, then the controller's UpdateJobStatus."""
        name, policy = job["metadata"]["name"], job["spec"].get("runPolicy") or {}
        if not job.get("status"):
            self.condition(job, "Created", "PyTorchJobCreated", f"PyTorchJob {name} is created.")
        pods = self.pods("training.kubeflow.org/job-name", job)
        if self.true(job, "Succeeded", "Failed"):
            clean, keep = policy.get("cleanPodPolicy"), policy.get("ttlSecondsAfterFinished")
            if clean not in (None, "None"):
                self.delete_pods(pods, ("Succeeded", "Failed") if clean == "Running" else ())
            if keep is not None and since(job["status"]["completionTime"]) > keep:  # CleanupJob
                place = (*PYTORCH[:2], self.namespace, PYTORCH[2])
                self.objects.delete_namespaced_custom_object(*place, name)
            return
        if policy.get("suspend"):
            self.delete_pods(pods)
            why = ("PyTorchJobSuspended", f"PyTorchJob {name} is suspended.")
            self.condition(job, "Running", *why, False)
            self.condition(job, "Suspended", *why)
            return
        if self.true(job, "Suspended"):
            why = ("PyTorchJobResumed", f"PyTorchJob {name} is resumed.")
            self.condition(job, "Suspended", *why, False)
            job["status"]["startTime"] = now()
        running = [pod for pod in pods.values() if pod["status"]["phase"] == "Running"]
        again = sum(
            container["restartCount"]
            for pod in running
            for container in pod["status"].get("containerStatuses", [])
        )
        limits = {
            "it has reached the specified backoff limit": "backoffLimit" in policy
            and again >= max(1, policy["backoffLimit"]),
            "it was active longer than specified deadline": self.stirred(job, pods)
            and "activeDeadlineSeconds" in policy
            and "startTime" in job["status"]
            and since(job["status"]["startTime"]) >= policy["activeDeadlineSeconds"],
        }
        for limit, past in limits.items():
            if past:
                # release 1.9 deletes the pods before it sets Failed, regardless of cleanPodPolicy
                self.delete_pods(pods)
                message = f"Job {name} has failed because {limit}"
                self.condition(job, "Failed", "PyTorchJobFailed", message)
                return
        job["status"].setdefault("startTime", now())
        for kind, replica in job["spec"]["pytorchReplicaSpecs"].items():
            self.tend_replicas(job, kind, replica, pods)

    def tend_replicas(self, job: dict, kind: str, replica: dict, pods: dict[str, dict]) -> None:
        """Reconcile one replica type and its part of the job's status: common/pod.go ReconcilePods."""
        name, policy = job["metadata"]["name"], replica.get("restartPolicy", "OnFailure")
        counts = {"active": 0, "succeeded": 0, "failed": 0}
        for index in range(replica["replicas"]):
            pod = f"{name}-{kind.lower()}-{index}"
            if pod not in pods:
                template = copy.deepcopy(replica["template"])
                template["spec"]["restartPolicy"] = "Never" if policy == "ExitCode" else policy
                prefix = "training.kubeflow.org/"
                labels = {
                    f"{prefix}job-name": name,
                    f"{prefix}operator-name": "pytorchjob-controller",
                    f"{prefix}replica-type": kind.lower(),
                    f"{prefix}replica-index": str(index),
                    **({f"{prefix}job-role": "master"} if kind == "Master" else {}),
                }
                self.create(job, pod, template, labels, {}, pytorch_environment(job, kind, index))
                continue
            phase = pods[pod]["status"]["phase"]
            names = {"Succeeded": "succeeded", "Failed": "failed"}
            counts[names.get(phase, "active")] += phase != "Pending"
            codes = [
                container["state"]["terminated"]["exitCode"]
                for container in pods[pod]["status"].get("containerStatuses", [])
                if "terminated" in container["state"]
            ]
            again = policy == "OnFailure" or policy == "ExitCode" and max(codes, default=0) >= 128
            if phase == "Failed" and again:
                self.core.delete_namespaced_pod(pod, self.namespace, _preload_content=False)
                message = f"job {name} is restarting because {kind} replica(s) failed."
                self.condition(job, "Restarting", "PyTorchJobRestarting", message)
                counts["failed"] -= 1
        job["status"].setdefault("replicaStatuses", {})[kind] = counts
        leading = kind == "Master" or "Master" not in job["spec"]["pytorchReplicaSpecs"]
        wanted = 1 if "elasticPolicy" in job["spec"] and kind == "Worker" else replica["replicas"]
        if failed := counts["failed"]:
            message = f"PyTorchJob {name} is failed because {failed} {kind} replica(s) failed."
            self.condition(job, "Failed", "PyTorchJobFailed", message)
        elif leading and counts["succeeded"] >= wanted:
            message = f"PyTorchJob {name} is successfully completed."
            self.condition(job, "Succeeded", "PyTorchJobSucceeded", message)
        elif leading and counts["active"]:
            self.condition(job, "Running", "PyTorchJobRunning", f"PyTorchJob {name} is running.")

    def runtime(self, named: dict) -> dict:
        """Return the spec of a TrainJob's runtime, from the namespace or the cluster."""
        version, name = TRAIN[:2], named["name"]
        if named.get("kind") == "TrainingRuntime":
            place = (*version, self.namespace, "trainingruntimes")
            return self.objects.get_namespaced_custom_object(*place, name)["spec"]
        place = (*version, "clustertrainingruntimes")
        return self.objects.get_cluster_custom_object(*place, name)["spec"]

    def tend_train(self, job: dict) -> None:
        """Reconcile a TrainJob: its template, merged with the runtime's, is the indexed Job `node` of a JobSet."""
        name, status = job["metadata"]["name"], job.setdefault("status", {})
        pods = self.pods("jobset.sigs.k8s.io/jobset-name", job)
        if self.true(job, "Complete", "Failed"):
            self.delete_pods(pods, ("Succeeded", "Failed"))
            return
        if job["spec"].get("suspend"):
            self.delete_pods(pods)
            self.condition(job, "Suspended", "Suspended", "TrainJob is suspended")
            return
        if self.true(job, "Suspended"):
            self.condition(job, "Suspended", "Resumed", "TrainJob is resumed", False)
        resumed = [
            entry["lastTransitionTime"]
            for entry in status.get("conditions", [])
            if entry["type"] == "Suspended"
        ]
        start = resumed[0] if resumed else job["metadata"]["creationTimestamp"]
        if 0 < job["spec"].get("activeDeadlineSeconds", 0) < since(start):
            self.delete_pods(pods)  # the controller deletes the JobSet
            message = "TrainJob exceeded its active deadline"
            self.condition(job, "Failed", "DeadlineExceeded", message)
            return
        runtime = self.runtime(job["spec"]["runtimeRef"])
        trainer, nodes = job["spec"]["trainer"], job["spec"]["trainer"]["numNodes"]
        alive = [pod for pod in pods.values() if "deletionTimestamp" not in pod["metadata"]]
        phases = [pod["status"]["phase"] for pod in alive]
        spec = runtime["template"]["spec"]
        if failure := job_failure(spec["replicatedJobs"][0]["template"]["spec"], alive):
            policy, counted = spec.get("failurePolicy"), self.restarts.get(name, 0)
            if over := jobset_failure(policy, *failure, counted, f"{name}-node-0"):
                self.condition(job, "Failed", *over)
                return
            if failure_action(policy, *failure) != RESTARTS_IGNORED:
                self.restarts[name] = counted + 1
            self.delete_pods(pods)  # JobSet recreates all pods
        elif len(phases) == nodes and set(phases) == {"Succeeded"}:
            self.condition(job, "Complete", "AllJobsCompleted", "jobset completed successfully")
        template = spec["replicatedJobs"][0]["template"]["spec"]["template"]
        for patch in job["spec"].get("runtimePatches") or []:
            replicated = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
            template = merged(template, replicated["template"]["spec"]["template"])
        own = {key: trainer[key] for key in ("image", "command", "args", "env") if key in trainer}
        if "resourcesPerNode" in trainer:
            own["resources"] = trainer["resourcesPerNode"]
        template = merged(template, {"spec": {"containers": [{"name": "node", **own}]}})
        key = "batch.kubernetes.io/job-completion-index"
        labels = {
            "jobset.sigs.k8s.io/jobset-name": name,
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "jobset.sigs.k8s.io/job-index": "0",
        }
        rank = {"fieldRef": {"fieldPath": f"metadata.annotations['{key}']"}}
        environment = {
            "PET_NNODES": str(nodes),
            "PET_NPROC_PER_NODE": str(trainer.get("numProcPerNode", "auto")),
            "PET_NODE_RANK": {"valueFrom": rank},
            "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
            "PET_MASTER_PORT": "29500",
        }
        for index in range(nodes) if not pods else ():
            pod, place = f"{name}-node-0-{index}-{uuid.uuid4().hex[:5]}", {key: str(index)}
            self.create(job, pod, template, labels | place, place, environment)
        ready = phases.count("Running")
        counts = {"ready": ready == nodes, "succeeded": "Succeeded" in phases}
        counts |= {"failed": 0, "suspended": 0, "active": bool(phases)}
        status["jobsStatus"] = [{"name": "node", **{key: int(n) for key, n in counts.items()}}]
