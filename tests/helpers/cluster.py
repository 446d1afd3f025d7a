"""Fixtures for tests on a real API server: a namespace in which jobs run as local processes.

KUBECONFIG must name a control plane on this machine without a scheduler and kubelets;
tests/helpers/fake_node.py simulates them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from components.launcher.client import Timeouts
from components.launcher.templates import KINDS, RECIPE, RUN, job_name
from components.launcher.workflow import NODE
from tests.conftest import ROOT


def is_local() -> bool:
    """Return whether KUBECONFIG names an API server on this machine: tests must not reach others."""
    config = Path(os.environ.get("KUBECONFIG", ""))
    if not config.is_file():
        return False
    clusters = yaml.safe_load(config.read_text())["clusters"]
    hosts = {urlsplit(item["cluster"]["server"]).hostname for item in clusters}
    return hosts <= {"127.0.0.1", "localhost", "::1"}


on_cluster = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),  # if another thread of a test fails, the launcher keeps waiting
    pytest.mark.skipif(
        not is_local(), reason="needs KUBECONFIG of a test control plane on this machine"
    ),
]
# For jobs that should run: a loaded machine may be slow, so no timeout may expire.
LONG = dict.fromkeys(("api", "operator", "start", "schedule", "deletion"), 120)
PATIENT = Timeouts(poll=1, forbidden=15, **LONG)
# For jobs whose timeouts should expire.
QUICK = replace(PATIENT, start=3, schedule=3)


def definition(
    group: str, version: str, plural: str, kind: str, schema: dict | None = None
) -> dict:
    """Return a CustomResourceDefinition, whose schema accepts any object by default."""
    schema = schema or {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    served = {"name": version, "served": True, "storage": True}
    names = {"plural": plural, "singular": kind.lower(), "kind": kind}
    versions = [{**served, "schema": {"openAPIV3Schema": schema}}]
    spec = {"group": group, "scope": "Namespaced", "names": names, "versions": versions}
    about = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition"}
    return {**about, "metadata": {"name": f"{plural}.{group}"}, "spec": spec}


WORKFLOWS = definition("argoproj.io", "v1alpha1", "workflows", "Workflow")
ADMIN: dict[str, str] = {}  # the test's own KUBECONFIG while the launcher uses another
PIPELINE_RUN = "6f0c8a52-1f3e-4b7e-9b1b-0d6c35f7a001"


def kubectl(words: str, *more: str, given: object = None, fails: bool = False) -> str:
    """Run kubectl with these words; return stdout, or stderr if failure is expected."""
    text = given if isinstance(given, str) or given is None else json.dumps(given)
    done = subprocess.run(
        ["kubectl", *words.split(), *more],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, **ADMIN},
    )
    assert (done.returncode != 0) == fails, done.stderr + done.stdout
    return done.stderr if fails else done.stdout


def wait_until(holds: Callable[[], object], seconds: float = 600) -> object:
    """Poll `holds` until its result is true; return that result."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := holds():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come true in time")


def template(kind: str = "pytorchjob", script: bool = False) -> str:
    """Return the job of overlays/kind as `kubectl apply -k` sends it; `script` makes its args a shell script."""
    folder = ROOT / "manifests/overlays/kind" / ("trainjob" if kind == "trainjob" else "")
    found = subprocess.run(
        ["kubectl", "kustomize", folder], capture_output=True, text=True, check=True
    ).stdout
    job = next(part for part in yaml.safe_load_all(found) if part["kind"] == KINDS[kind].name)
    # vitdet/schedule-seconds: the tests' timeouts limit the wait for a node instead
    job["metadata"].pop("annotations")
    for container in job_containers(job) if script else ():
        container["command"] = ["sh", "-c"]
    return yaml.safe_dump(job)


def job_containers(job: dict) -> list[dict]:
    """Return the training containers of a job; for a TrainJob, its spec.trainer."""
    spec = job["spec"]
    if "trainer" in spec:
        return [spec["trainer"]]
    replicas = spec["pytorchReplicaSpecs"].values()
    return [replica["template"]["spec"]["containers"][0] for replica in replicas]


def arguments(
    text: str,
    args: list[str],
    recipe: str = "tiny",
    run: str = PIPELINE_RUN,
    nodes: int = 2,
    kind: str = "pytorchjob",
    task: dict | None = None,
) -> dict:
    """Return the arguments of `launch` for a job."""
    given = {"template": text, "args": args, "name": recipe, "run_id": run, "nodes": nodes}
    rest = {"pool": "", "image": "", "workspace": "/data"}
    return {**given, **rest, "kind": kind, "task_config": task}


class Scene:
    """A namespace with a node, an operator and a volume, and a launcher configured for it."""

    def __init__(self, namespace: str, folder: Path, timeouts: Timeouts) -> None:
        self.namespace = namespace
        self.volume, self.kubeconfig = folder / "volume", folder / "kubeconfig"
        self.timeouts = timeouts
        self.lines: list[str] = []
        self.node = None

    def launch(
        self,
        text: str,
        args: list[str],
        recipe: str = "tiny",
        run: str = PIPELINE_RUN,
        nodes: int = 2,
        timeouts: Timeouts | None = None,
        kind: str = "pytorchjob",
        task: dict | None = None,
        finished: Callable[[], bool] = lambda: False,
        keep_logs: Callable[[dict[str, str]], None] = lambda files: None,
    ) -> None:
        """Run `components.launcher.launch`; its output goes to self.lines and the test's output."""
        from components.launcher.launch import launch

        def out(line: str) -> None:
            self.lines.append(line)
            print(f"{time.strftime('%H:%M:%S')} {line}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(self.kubeconfig))
            launch(
                **arguments(text, args, recipe, run, nodes, kind, task),
                out=out,
                timeouts=timeouts or self.timeouts,
                finished=finished,
                keep_logs=keep_logs,
            )

    def start(
        self, text: str, args: list[str], recipe: str, environment: dict[str, str]
    ) -> subprocess.Popen:
        """Run the launcher in a separate process, as in a step's pod."""
        code = (
            "import json, sys; from tests.helpers.cluster import PATIENT; "
            "from components.launcher.launch import launch; "
            "launch(**json.loads(sys.argv[1]), timeouts=PATIENT)"
        )
        return subprocess.Popen(
            [sys.executable, "-u", "-c", code, json.dumps(arguments(text, args, recipe))],
            cwd=ROOT,
            text=True,
            env={**os.environ, **environment, "KUBECONFIG": str(self.kubeconfig)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def job(
        self, recipe: str = "tiny", kind: str = "pytorchjob", run: str = PIPELINE_RUN
    ) -> dict | None:
        """Return the job of a recipe, None if it does not exist."""
        shape = KINDS[kind]
        labels = f"{RUN}={run},{RECIPE}={recipe}"
        found = kubectl(f"get {shape.plural}.{shape.group} -n {self.namespace} -o json -l {labels}")
        return next(iter(json.loads(found)["items"]), None)

    def pods(
        self, recipe: str = "tiny", run: str = PIPELINE_RUN, kind: str = "pytorchjob"
    ) -> list[dict]:
        """Return the pods of the recipe's job, for a PyTorchJob the Master first."""
        selector = KINDS[kind].selector(job_name(run, recipe))
        found = kubectl(f"get pods -n {self.namespace} -o json -l", selector)
        return json.loads(found)["items"]

    def workflow(self, name: str) -> dict:
        """Return the Workflow of this name, created if it does not exist."""
        about = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow"}
        workflow = {**about, "metadata": {"name": name}, "spec": {}}
        kubectl("apply -f -", given=WORKFLOWS)
        kubectl("wait --for=condition=established crd/workflows.argoproj.io")
        return json.loads(kubectl(f"apply -n {self.namespace} -o json -f -", given=workflow))

    def step_pod(self, name: str, run: str = "run", attempt: int = 0) -> dict[str, str]:
        """Create a step's pod as Argo does; return what Kubeflow Pipelines adds to its environment.

        Argo v3.7: workflow/controller/workflowpod.go.
        """
        workflow = self.workflow(run)
        owner = {key: workflow[key] for key in ("apiVersion", "kind")}
        owner |= {"name": run, "uid": workflow["metadata"]["uid"]}
        metadata = {
            "name": name,
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
            "annotations": {NODE: f"{run}.root.train-job({attempt})"},
        }
        spec = {"schedulerName": "nobody", "containers": [{"name": "main", "image": "none"}]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        made = json.loads(kubectl(f"create -n {self.namespace} -o json -f -", given=pod))
        return {"KFP_POD_NAME": name, "KFP_POD_UID": made["metadata"]["uid"]}


@contextmanager
def scene(
    folder: Path, node: bool = True, operator: bool = True, reasons: dict[int, str] | None = None
) -> Iterator[Scene]:
    """Return a Scene.

    Without `node`, the test sets the pods' status and the launcher's timeouts are short;
    without `operator`, the jobs create no pods.
    """
    from kubernetes import client, config

    from tests.helpers.fake_node import FakeNode
    from tests.helpers.fake_operator import FakeOperator

    name = f"vitdet-test-{uuid.uuid4().hex[:8]}"
    settings = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    for context in settings["contexts"]:
        context["context"]["namespace"] = name
    (folder / "kubeconfig").write_text(yaml.safe_dump(settings))
    (folder / "volume").mkdir()
    made = Scene(name, folder, PATIENT if node else QUICK)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADMIN, "KUBECONFIG", os.environ["KUBECONFIG"])
        config.load_kube_config(str(folder / "kubeconfig"))
        kubectl(f"create namespace {name}")
        for what in (  # in reverse order of creation
            f"namespace {name}",
            f"pods --all -n {name} --force --grace-period=0",
            f"pytorchjobs,trainjobs --all -n {name}",
        ):
            stack.callback(kubectl, f"delete {what} --wait=false")
        variables = {"MLFLOW_TRACKING_URI": "sqlite:////data/mlflow.db"}
        secret = {"metadata": {"name": "vitdet-mlflow"}, "stringData": variables}
        client.CoreV1Api().create_namespaced_secret(name, secret)
        about = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass"}
        priority = {**about, "metadata": {"name": "vitdet-train"}, "value": 1000}
        kubectl("apply -f -", given=priority)
        if node:
            claims = {"vitdet-data": made.volume}
            made.node = stack.enter_context(FakeNode(name, folder, claims, reasons))
        if operator:
            stack.enter_context(FakeOperator(name))
        yield made


def namespace_for(purpose: str) -> Iterator[str]:
    """Yield the name of a new namespace; delete it afterwards."""
    name = f"vitdet-{purpose}-{uuid.uuid4().hex[:8]}"
    kubectl(f"create namespace {name}")
    yield name
    kubectl(f"delete namespace {name} --wait=false")
