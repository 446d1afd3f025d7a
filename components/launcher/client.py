"""The requests to the Kubernetes API; the only importer of `kubernetes`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.launcher.templates import FAILURE, Kind

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True)
class Timeouts:
    """Seconds between two polls of a job, and for how long each problem is tolerated."""

    poll: float = 5
    api: float = 600  # the API server does not answer
    # it refuses what it allowed before, as after a restart until it has read the roles
    forbidden: float = 60
    operator: float = 300  # the operator does not react to a new job
    start: float = 300  # a pod cannot start: image, Secret, command
    # a pod waits for a node, a quota, a volume, or an init container: the operator's own waits for
    # the Master and fails every 200 s
    schedule: float = 3600
    deletion: float = 120  # a job of an earlier attempt is still being deleted


def connect() -> tuple[client.ApiClient, str]:
    """A client of the API server, and the namespace: the pod's own, else the kubeconfig's.

    Raises RuntimeError when there is neither.
    """
    settings, file = client.Configuration(), os.environ.get("KUBECONFIG")
    try:
        if in_cluster():
            config.load_incluster_config(client_configuration=settings)
            return client.ApiClient(settings), (SERVICE_ACCOUNT / "namespace").read_text().strip()
        config.load_kube_config(config_file=file, client_configuration=settings)
        namespace = active_context()["context"].get("namespace") or "default"
        return client.ApiClient(settings), namespace
    except config.ConfigException as error:
        raise RuntimeError(
            f"no cluster: this is no pod with a service account, and no kubeconfig ({error})"
        ) from error


def in_cluster() -> bool:
    """Whether this is a pod that uses its own cluster."""
    return not os.environ.get("KUBECONFIG") and (SERVICE_ACCOUNT / "namespace").exists()


def active_context() -> dict:
    """The kubeconfig's current context."""
    return config.list_kube_config_contexts(config_file=os.environ.get("KUBECONFIG"))[1]


def describe_namespace(namespace: str) -> str:
    """The namespace and cluster that requests go to, for a message.

    Raises ValueError when the cluster has no such namespace, RuntimeError when it does not answer.
    An account that may not read namespaces gets no error.
    """
    api, _ = connect()
    name = (
        "this pod's cluster"
        if in_cluster()
        else f"the cluster of context {active_context()['name']}"
    )
    try:
        client.CoreV1Api(api).read_namespace(namespace, _request_timeout=(5, 30))
    except ApiException as error:
        if error.status == 404:
            raise ValueError(
                f"{name} has no namespace {namespace}; give that of the run's pods with --namespace, or "
                "set KUBECONFIG or its current context to the pipeline's cluster"
            ) from error
    except HTTPError as error:
        raise RuntimeError(f"{name} does not answer ({type(error).__name__})") from error
    return f"namespace {namespace} of {name}"


def owner_reference() -> dict | None:
    """An ownerReference to this pod; None outside of a pipeline step.

    The variables are `commonEnvs` of the backend's argocompiler/common.go. It is not the job's
    controller, for which Kueue would take it, and does not block its own deletion, which would need
    one more right.
    """
    name, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid} if name and uid else None


def list_jobs(api: client.ApiClient, kind: Kind, namespace: str, selector: str) -> list[dict]:
    """The jobs of a kind that a label selector selects; none when the kind is not installed.

    Raises PermissionError when that is forbidden, RuntimeError on any other error.
    """
    call = client.CustomObjectsApi(api).list_namespaced_custom_object
    resource = (kind.group, kind.version, namespace, kind.plural)
    answer = request_once(kind, namespace, call, resource, {"label_selector": selector})
    return answer.get("items", [])


def delete_job(api: client.ApiClient, kind: Kind, namespace: str, name: str) -> None:
    """Delete a job, if it exists, and its pods. Raises like `list_jobs`."""
    call = client.CustomObjectsApi(api).delete_namespaced_custom_object
    resource = (kind.group, kind.version, namespace, kind.plural, name)
    request_once(kind, namespace, call, resource, {"propagation_policy": "Background"})


def request_once(
    kind: Kind, namespace: str, call: Callable, args: tuple[str, ...], options: dict[str, str]
) -> dict:
    """The answer to a request without retries, {} on 404. Raises like `list_jobs`."""
    try:
        return call(*args, _request_timeout=(5, 30), **options)
    except ApiException as error:
        if error.status == 404:  # this kind is not installed, or the job is gone
            return {}
        raised = PermissionError if error.status == 403 else RuntimeError
        raise raised(describe_error(kind, namespace, "delete", error)) from error
    except HTTPError as error:
        raise RuntimeError(f"the API server does not answer ({type(error).__name__})") from error


def server_message(error: ApiException) -> str:
    """The API server's message; "" for a path that it does not know."""
    try:
        return json.loads(error.body)["message"]
    except (ValueError, KeyError, TypeError):
        return ""


def describe_error(kind: Kind, namespace: str, verb: str, error: ApiException) -> str:
    """One line for a rejected request: what was tried, why it failed, what to do."""
    message = server_message(error)
    what = f"cannot {verb} in namespace {namespace}"
    if error.status in (401, 403):
        return f"{what}: {message or error.reason}; the pipeline's service account needs the Role of manifests/shared"
    if error.status == 404 and not message:
        return f"{what}: the cluster knows no {kind.name} ({kind.group}/{kind.version}); install {kind.operator}"
    return f"{what}: {message or error.reason} (HTTP {error.status})"


class JobClient:
    """The requests about one job, retried while the API server does not answer or fails.

    All methods raise RuntimeError, with one line, when the time is up or the request is rejected.
    """

    def __init__(
        self,
        api: client.ApiClient,
        kind: Kind,
        name: str,
        namespace: str,
        out: Callable[[str], None],
        timeouts: Timeouts,
    ) -> None:
        self.kind, self.name, self.namespace = kind, name, namespace
        self.out, self.timeouts = out, timeouts
        self.objects, self.core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self.resource = (kind.group, kind.version, namespace, kind.plural)
        self.reported_logs = False  # that logs may not be read

    def request(
        self,
        verb: str,
        call: Callable,
        *args: object,
        none_if: tuple[int, ...] = (),
        forbidden: float = 0,
        options: dict[str, object] | None = None,
    ) -> dict | None:
        """The answer, None for a status in `none_if`.

        forbidden: seconds for which a status 401 or 403 is taken for a passing one.
        """
        start, reported = time.monotonic(), False
        while True:
            try:
                raw = call(
                    *args, _preload_content=False, _request_timeout=(5, 30), **(options or {})
                ).data
                answer = json.loads(raw)
                if reported:
                    self.out("launcher: the API server answers again")
                return answer
            except ApiException as error:
                # an API server that is starting does not know the custom kinds yet
                unknown = error.status == 404 and not server_message(error)
                if error.status in none_if and not unknown:
                    return None
                problem = describe_error(self.kind, self.namespace, verb, error)
                limit = self.timeouts.api
                if unknown or error.status in (401, 403):
                    limit = forbidden
                elif error.status != 429 and error.status < 500:
                    limit = 0
                cause: Exception = error
            except (HTTPError, ValueError) as error:  # no answer, or a truncated one
                problem = f"the API server does not answer ({type(error).__name__})"
                limit, cause = self.timeouts.api, error
            if time.monotonic() - start >= limit:
                raise RuntimeError(problem + (f", for {limit:.0f} s" if limit else "")) from cause
            if not reported:
                self.out(f"launcher: {problem}; asking again for {limit:.0f} s")
            reported = True
            time.sleep(min(self.timeouts.poll, 2))

    def create(self, job: dict) -> bool:
        """Create the job; False when one of this name exists."""
        created = self.request(
            f"create {self.kind.plural}",
            self.objects.create_namespaced_custom_object,
            *self.resource,
            job,
            none_if=(409,),
        )
        return created is not None

    def get(self) -> dict | None:
        """The job, None when there is none."""
        return self.request(
            f"get {self.kind.plural}",
            self.objects.get_namespaced_custom_object,
            *self.resource,
            self.name,
            none_if=(404,),
            forbidden=self.timeouts.forbidden,
        )

    def adopt(self, owner: dict) -> None:
        """Make `owner` the only owner of the job."""
        self.patch({"metadata": {"ownerReferences": [owner]}})

    def mark(self, failure: str, halt: bool) -> None:
        """Annotate the job with its failure; halt: suspend it, so that its pods are deleted."""
        change: dict = {"metadata": {"annotations": {FAILURE: failure}}}
        self.patch({**change, "spec": self.kind.halt} if halt else change)

    def patch(self, change: dict) -> None:
        """Apply a merge patch, the only type that this client sends for custom objects."""
        self.request(
            f"patch {self.kind.plural}",
            self.objects.patch_namespaced_custom_object,
            *self.resource,
            self.name,
            change,
            none_if=(404,),
        )

    def delete(self) -> None:
        """Delete the job, if it exists, and its pods."""
        self.request(
            f"delete {self.kind.plural}",
            self.objects.delete_namespaced_custom_object,
            *self.resource,
            self.name,
            none_if=(404,),
            options={"propagation_policy": "Background"},
        )

    def pods(self) -> tuple[list[dict], str]:
        """The job's pods, and the resource version from which `watch` continues."""
        found = self.request(
            "list pods",
            self.core.list_namespaced_pod,
            self.namespace,
            options={"label_selector": self.kind.selector(self.name)},
            forbidden=self.timeouts.forbidden,
        )
        assert found is not None  # no status is expected instead
        return found["items"], found["metadata"]["resourceVersion"]

    def watch(self, version: str, seconds: float) -> Iterator[dict]:
        """The job's pods as they change, for this long; it ends early when the connection drops."""
        try:
            lines = self.core.list_namespaced_pod(
                self.namespace,
                label_selector=self.kind.selector(self.name),
                resource_version=version,
                watch=True,
                timeout_seconds=max(1, round(seconds)),
                _preload_content=False,
                _request_timeout=(5, seconds + 10),
            )
            for line in lines:
                event = json.loads(line)
                if event["type"] == "ERROR":  # the version is too old: the next list has a new one
                    return
                yield event["object"]
        except (ApiException, HTTPError, ValueError):
            return  # the next request reports it, if it lasts

    def events(self, selector: str) -> list[dict]:
        """The events that a field selector selects; none when they may not be listed."""
        found = self.request(
            "list events",
            self.core.list_namespaced_event,
            self.namespace,
            none_if=(401, 403),
            options={"field_selector": selector},
        )
        return found["items"] if found else []

    def log(
        self,
        pod: str,
        since: int | None = None,
        tail: int | None = None,
        previous: bool = False,
        container: str = "",
    ) -> list[str]:
        """Lines of a container's log, each after its time and a space; none when there is no log.

        since: of the last so many seconds; tail: the last lines; previous: of the instance before
        the running one; container: "" is the one that trains.
        """
        options = {"since_seconds": since, "tail_lines": tail, "previous": previous or None}
        try:
            raw = self.core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=container or self.kind.container,
                timestamps=True,
                _preload_content=False,
                _request_timeout=(5, 30),
                **{key: value for key, value in options.items() if value is not None},
            )
            return raw.data.decode(errors="replace").splitlines()
        except ApiException as error:
            if error.status in (401, 403) and not self.reported_logs:
                problem = describe_error(self.kind, self.namespace, "read logs", error)
                self.out(f"launcher: {problem}")
                self.reported_logs = True
            return []  # or the container has not started, the pod is gone, its node does not answer
        except HTTPError:
            return []
