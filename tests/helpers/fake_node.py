"""A node's simulated scheduler, kubelet, DNS and volumes; a namespace's pods are local processes.

A pod without a node is bound to this node; its first container becomes a process; its status is
written in the shapes of core/v1 PodStatus as the kubelet writes them; its log is served as the
kubelet does (GET /containerLogs/NAMESPACE/POD/CONTAINER?follow&timestamps&tailLines&sinceSeconds&
previous), through which the API server answers `kubectl logs`. Images, probes, init containers and
limits are not simulated. It needs the local test control plane.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from tests.helpers.fake_container import Container, now
from tests.helpers.mlflow_server import free_port

ROOT = Path(__file__).parents[2]
GRACE = 5  # seconds between SIGTERM and SIGKILL, instead of a pod's 30 or more


def since(when: str) -> float:
    """Return the seconds since a timestamp of the API."""
    return time.time() - datetime.fromisoformat(when).timestamp()


class FakeNode:
    """`with FakeNode(namespace, {claim: folder}) as node`; node.containers: {pod name: Container}.

    A pod sees a claim's folder only where it mounts the claim. A pod with two volumes of one claim is Unschedulable here,
    so that tests end; a kubelet leaves it in ContainerCreating (kubernetes/kubernetes, issue 127004).

    `reasons` maps exit codes to the container runtime's reasons, e.g. {137: "OOMKilled"}.
    """

    def __init__(
        self,
        namespace: str,
        folder: Path,
        claims: dict[str, Path],
        reasons: dict[int, str] | None = None,
    ) -> None:
        self.namespace, self.claims, self.reasons = namespace, claims, reasons or {}
        self.name, self.core = f"node-of-{namespace}", client.CoreV1Api()
        self.containers: dict[str, Container] = {}
        self.uids: dict[str, str] = {}
        self.ports: dict[str, int] = {}
        self.stopped = threading.Event()
        words = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=node"
        files = ("-keyout", folder / "key.pem", "-out", folder / "cert.pem")
        subprocess.run([*words.split(), *files], check=True, capture_output=True)
        kubelet = type("Kubelet", (Kubelet,), {"node": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), kubelet)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)

    def __enter__(self) -> FakeNode:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.core.create_node({"metadata": {"name": self.name}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self.server.server_port}},
        }
        self.core.patch_node_status(self.name, {"status": status})
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()
        for container in self.containers.values():
            container.wait()
        self.server.shutdown()
        self.server.server_close()
        with suppress(ApiException):
            self.core.delete_node(self.name)

    def work(self) -> None:
        while not self.stopped.wait(0.2):
            try:
                answer = self.core.list_namespaced_pod(self.namespace, _preload_content=False)
                found = json.loads(answer.data)["items"]
                for pod in found:
                    self.tend(pod)
            except (ApiException, HTTPError, ValueError):
                # a kubelet survives API server outages and conflicts
                continue
            there = {pod["metadata"]["uid"] for pod in found}
            for name, uid in self.uids.items():
                if uid not in there and self.containers[name].process.poll() is None:
                    self.containers[name].wait()  # force-deleted

    def tend(self, pod: dict) -> None:
        """Advance the pod's lifecycle by one step."""
        name, uid, status = pod["metadata"]["name"], pod["metadata"]["uid"], pod["status"]
        mine = self.uids.get(name) == uid
        if "deletionTimestamp" in pod["metadata"]:
            if mine and self.containers[name].process.poll() is None:
                container = self.containers[name]
                if not container.killed_at:
                    container.killed_at = time.monotonic()
                    container.kill(signal.SIGTERM)
                elif time.monotonic() - container.killed_at > GRACE:
                    container.kill()
            else:
                if mine:
                    self.containers[name].wait()
                self.core.delete_namespaced_pod(
                    name, self.namespace, grace_period_seconds=0, _preload_content=False
                )
        elif status.get("phase") in ("Failed", "Succeeded"):
            if mine and self.containers[name].process.poll() is None:
                self.containers[name].wait()  # evicted
        elif pod["spec"].get("schedulerName") != "default-scheduler":
            return
        elif len(set(claims(pod).values())) < len(claims(pod)):
            unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
            status = {"conditions": [{**unscheduled, "message": "a claim twice"}]}
            self.core.patch_namespaced_pod_status(name, self.namespace, {"status": status})
        elif not pod["spec"].get("nodeName"):
            target = {"kind": "Node", "name": self.name}
            binding = {"metadata": {"name": name}, "target": target}
            self.core.create_namespaced_pod_binding(
                name, self.namespace, binding, _preload_content=False
            )
        elif not mine:
            spec = pod["spec"]["containers"][0]
            self.containers[name] = Container(name, *self.process_of(pod, spec))
            self.uids[name] = uid
            self.write(pod, "Running", {"running": {"startedAt": now()}})
        elif (code := self.containers[name].process.poll()) is not None:
            self.end(pod, self.containers[name], code if code >= 0 else 128 - code)

    def end(self, pod: dict, container: Container, code: int) -> None:
        """Restart the ended process in place, or end the pod."""
        container.wait()
        reason = self.reasons.get(code) or ("Error" if code else "Completed")
        over = {"exitCode": code, "reason": reason, "startedAt": container.started}
        over |= {"finishedAt": now(), "containerID": f"containerd://{container.process.pid}"}
        if code and pod["spec"]["restartPolicy"] == "OnFailure":
            container.start()
            container.restarts += 1
            self.write(pod, "Running", {"running": {"startedAt": now()}}, {"terminated": over})
        else:
            self.write(pod, "Failed" if code else "Succeeded", {"terminated": over})

    def write(self, pod: dict, phase: str, state: dict, last: dict | None = None) -> None:
        container, name = pod["spec"]["containers"][0], pod["metadata"]["name"]
        runs, restarts = "running" in state, self.containers[name].restarts
        state_of = {"name": container["name"], "image": container["image"], "imageID": ""}
        state_of |= {"ready": runs, "started": runs, "restartCount": restarts}
        state_of |= {"state": state, "lastState": last or {}}
        status = {"phase": phase, "hostIP": "127.0.0.1", "podIP": "127.0.0.1", "startTime": now()}
        change = {"status": {**status, "containerStatuses": [state_of]}}
        self.core.patch_namespaced_pod_status(name, self.namespace, change, _preload_content=False)

    def process_of(self, pod: dict, spec: dict) -> tuple[list[str], dict[str, str], Path]:
        """Return command, environment and folder, with mount paths and DNS names replaced by local ones."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        for reference in spec.get("envFrom") or []:
            environment |= self.secret(reference["secretRef"]["name"])
        for variable in spec.get("env") or []:
            source = variable.get("valueFrom") or {}
            key = source.get("secretKeyRef")
            path = (source.get("fieldRef") or {}).get("fieldPath", "")
            if path.startswith("metadata.annotations['"):
                environment[variable["name"]] = pod["metadata"]["annotations"][path.split("'")[1]]
            elif key:
                found = self.secret(key["name"])
                if key["key"] in found or not key.get("optional"):
                    environment[variable["name"]] = found[key["key"]]
            else:
                environment[variable["name"]] = variable.get("value", "")
        self.resolve(pod, environment)
        folders = {
            mount["mountPath"]: self.claims[claims(pod)[mount["name"]]]
            for mount in spec.get("volumeMounts") or []
            if mount["name"] in claims(pod)
        }
        words = [*(spec.get("command") or []), *(spec.get("args") or [])]
        value_of = lambda found: environment.get(found[1], found[0])  # noqa: E731
        command = [re.sub(r"\$\((\w+)\)", value_of, local(word, folders)) for word in words]
        folder = Path(local(spec.get("workingDir") or "/tmp", folders))
        return command, {key: local(value, folders) for key, value in environment.items()}, folder

    def secret(self, name: str) -> dict[str, str]:
        answer = self.core.read_namespaced_secret(name, self.namespace, _preload_content=False)
        data = json.loads(answer.data).get("data", {})
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def resolve(self, pod: dict, environment: dict[str, str]) -> None:
        """Replace DNS names of services by the loopback address, with a separate port for each job.

        As all pods share this address, torchrun cannot tell from it which pod is the rendezvous host or in which order
        the nodes are; is_host and the local address say so instead.
        """
        owners = pod["metadata"].get("ownerReferences") or [{"uid": ""}]
        port = str(self.ports.setdefault(owners[0]["uid"], free_port()))
        looked_for = environment.get("PET_RDZV_ENDPOINT") or environment.get("PET_MASTER_ADDR")
        rank = environment.get("PET_NODE_RANK")
        here = {"PET_RDZV_ENDPOINT": f"127.0.0.1:{port}"}
        here |= dict.fromkeys(("MASTER_ADDR", "PET_MASTER_ADDR"), "127.0.0.1")
        here |= dict.fromkeys(("MASTER_PORT", "PET_MASTER_PORT"), port)
        environment |= {name: here[name] for name in here.keys() & environment.keys()}
        if looked_for:
            host = looked_for.split(":")[0] == pod["metadata"]["name"] or rank == "0"
            # torchrun drops a lost node after 3 of these intervals, 6 s here and 15 s by default.
            environment["PET_RDZV_CONF"] = f"is_host={int(host)},keep_alive_interval=2"
            environment["PET_LOCAL_ADDR"] = f"127.0.0.{1 + int(rank or 0)}"


def claims(pod: dict) -> dict[str, str]:
    """Return the pod's claims by volume name."""
    return {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["spec"].get("volumes") or []
        if "persistentVolumeClaim" in volume
    }


def local(text: str, folders: dict[str, Path]) -> str:
    """Replace mount paths by local folders."""
    for mount, folder in folders.items():
        text = str(folder) if text == mount else text.replace(f"{mount}/", f"{folder}/")
    return text


class Kubelet(BaseHTTPRequestHandler):
    """Serve the kubelet's log endpoint."""

    node: FakeNode

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        asked = {key: value[0] for key, value in parse_qs(url.query).items()}
        container = self.node.containers.get(url.path.split("/")[3])
        instance = -2 if asked.get("previous") == "true" else -1
        if container is None or len(container.lines) < -instance:
            self.send_error(404 if container is None else 400)
            return
        first = time.time() - float(asked.get("sinceSeconds", "inf"))
        shown = [line for line in list(container.lines[instance]) if line[0] >= first]
        shown = shown[-int(asked["tailLines"]) :] if "tailLines" in asked else shown
        self.send_response(200)
        self.end_headers()
        for when, text in shown:
            fraction = f"{when % 1:.9f}"[2:].rstrip("0")  # Go's RFC3339Nano omits trailing zeros
            whole = datetime.fromtimestamp(int(when), UTC).strftime("%Y-%m-%dT%H:%M:%S")
            stamp = f"{whole}{'.' if fraction else ''}{fraction}Z "
            stamp *= asked.get("timestamps") == "true"
            self.wfile.write(f"{stamp}{text}\n".encode())

    def log_message(self, *given: object) -> None:
        pass
