"""Requests to the Kubernetes API."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from components.launcher import queue, workflow
from components.launcher.errors import (
    describe_error,
    describe_outage,
    may_be_admitted_later,
    server_message,
)
from components.launcher.templates import FAILURE, Kind

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_TIMEOUT = (5, 30)  # connect and read timeouts in seconds
STAMP = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|[+-]\d\d:\d\d) ")  # start of a log line


@dataclass(frozen=True)
class Timeouts:
    """Poll interval and timeouts in seconds."""

    poll: float = 5
    api: float = 600  # how long to retry while the API server fails or does not respond
    # how long to retry a request that is forbidden but was allowed before: a starting API server
    # may still be loading Roles
    forbidden: float = 60
    operator: float = 300  # maximum time until the operator reacts to a new job
    start: float = 300  # how long a wrong image, Secret or command may keep pods from starting
    # maximum time until all pods are created and scheduled and their init containers have completed
    schedule: float = 3600
    deletion: float = 120  # maximum time until a job of an earlier attempt is deleted


def connect(retries: int | None = None) -> tuple[client.ApiClient, str]:
    """Return an API client and the namespace of the pod's service account or of the kubeconfig.

    retries: how often urllib3 retries a request; None: urllib3's default.
    Raises RuntimeError if there is no valid configuration.
    """
    settings, file = client.Configuration(), os.environ.get("KUBECONFIG")
    settings.retries = retries
    try:
        if in_cluster():
            config.load_incluster_config(client_configuration=settings)
            return client.ApiClient(settings), (SERVICE_ACCOUNT / "namespace").read_text().strip()
        config.load_kube_config(config_file=file, client_configuration=settings)
        namespace = active_context()["context"].get("namespace") or "default"
        return client.ApiClient(settings), namespace
    except config.ConfigException as error:
        raise RuntimeError(
            f"no cluster: not in a pod with a service account, and no usable kubeconfig ({error})"
        ) from None
    except (yaml.YAMLError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        problem = " ".join(str(error).split())
        raise RuntimeError(
            f"the kubeconfig {file or '~/.kube/config'} is not valid: {problem}"
        ) from None


def in_cluster() -> bool:
    """Return whether this process runs in a pod and uses that pod's cluster."""
    return not os.environ.get("KUBECONFIG") and (SERVICE_ACCOUNT / "namespace").exists()


def active_context() -> dict:
    """Return the kubeconfig's current context."""
    return config.list_kube_config_contexts(config_file=os.environ.get("KUBECONFIG"))[1]


def describe_namespace(namespace: str) -> str:
    """Return a description of a namespace and its cluster, for messages.

    Raises ValueError if the namespace does not exist, RuntimeError if the cluster does not respond.
    """
    api, _ = connect()
    context = "" if in_cluster() else active_context()["name"]
    name = f"the cluster of context {context}" if context else "this pod's cluster"
    try:
        client.CoreV1Api(api).read_namespace(namespace, _request_timeout=REQUEST_TIMEOUT)
    except ApiException as error:
        if error.status == 404:
            raise ValueError(
                f"{name} has no namespace {namespace}; pass the namespace of the run's "
                "pods with --namespace, or select the pipeline's cluster with KUBECONFIG"
            ) from None
    except HTTPError as error:
        raise RuntimeError(f"{name} {describe_outage(error)}") from None
    return f"namespace {namespace} of {name}"


def list_jobs(api: client.ApiClient, kind: Kind, namespace: str, selector: str) -> list[dict]:
    """Return the jobs of this kind that match the selector; [] if the kind is not installed.

    Raises PermissionError if the request is forbidden, RuntimeError on any other error.
    """
    return _request_once(api, kind, namespace, "list", label_selector=selector).get("items", [])


def delete_job(api: client.ApiClient, kind: Kind, namespace: str, name: str) -> None:
    """Delete a job, if it exists, and its pods. Raises the same errors as `list_jobs`."""
    _request_once(api, kind, namespace, "delete", name, propagation_policy="Background")


def release_job(
    api: client.ApiClient, kind: Kind, namespace: str, name: str, owners: list[dict]
) -> None:
    """Replace a job's owner references, if the job exists. Raises the errors of `list_jobs`."""
    change = {"metadata": {"ownerReferences": owners or None}}
    _request_once(api, kind, namespace, "patch", name, change)


def _request_once(
    api: client.ApiClient, kind: Kind, namespace: str, verb: str, *args: object, **options: str
) -> dict:
    """Send a request for jobs of this kind; return {} on 404. Raises the errors of `list_jobs`."""
    call = getattr(client.CustomObjectsApi(api), f"{verb}_namespaced_custom_object")
    resource = (kind.group, kind.version, namespace, kind.plural)
    try:
        return call(*resource, *args, _request_timeout=REQUEST_TIMEOUT, **options)
    except ApiException as error:
        if error.status == 404:  # the kind is not installed, or the job does not exist
            return {}
        raised = PermissionError if error.status == 403 else RuntimeError
        raise raised(describe_error(kind, namespace, f"{verb} {kind.plural}", error)) from None
    except HTTPError as error:
        raise RuntimeError(f"the API server {describe_outage(error)}") from None


class JobClient:
    """API requests for one job, retried while the API server fails or does not respond.

    All methods except `watch`, `log` and `workloads` raise RuntimeError with a one-line message on
    a timeout or if the request is rejected.
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
        self.watcher = watch.Watch(return_type=object)  # pods as dictionaries
        self.allowed: set[str] = set()  # verbs of requests that have succeeded
        self.reported: set[str] = set()  # verbs of optional requests that were forbidden

    def request(
        self,
        verb: str,
        call: Callable,
        *args: object,
        none_if: tuple[int, ...] = (),
        forbidden: float = 0,
        refused: float = 0,
        options: dict[str, object] | None = None,
        once: bool = False,
    ) -> dict | None:
        """Send a request; return the response, or None for a status in `none_if`.

        Args:
            forbidden: seconds to retry on 401, 403 or an unknown path if `verb` succeeded before.
            refused: seconds to retry after a rejection by a quota or an admission webhook.
            once: fail within 2.5 s instead of retrying.
        """
        start, reported = time.monotonic(), False
        timeout = (1, 1.5) if once else REQUEST_TIMEOUT
        while True:
            try:
                raw = call(
                    *args, _preload_content=False, _request_timeout=timeout, **(options or {})
                )
                response = json.loads(raw.data)
                if reported:
                    self.out("launcher: the API server is responding again")
                self.allowed.add(verb)
                return response
            except ApiException as error:
                # a starting API server may not have registered the custom resources yet
                unknown = error.status == 404 and not server_message(error)
                if error.status in none_if and not unknown:
                    return None
                problem = describe_error(self.kind, self.namespace, verb, error)
                limit = self.timeouts.api
                if may_be_admitted_later(error):
                    limit = refused
                elif unknown or error.status in (401, 403):
                    limit = forbidden if verb in self.allowed else 0
                elif error.status != 429 and error.status < 500:
                    limit = 0
            except (HTTPError, ValueError) as error:  # no response, or a truncated response
                problem = f"the API server {describe_outage(error)}"
                limit = self.timeouts.api
            if once or time.monotonic() - start >= limit:
                waited = f"; retried for {limit:.0f} s" if limit and not once else ""
                raise RuntimeError(problem + waited)
            if not reported:
                self.out(f"launcher: {problem}; retrying for up to {limit:.0f} s")
            reported = True
            time.sleep(min(self.timeouts.poll, 2))

    def _job_request(self, verb: str, *args: object, **limits: Any) -> dict | None:
        """Send a request for jobs of this kind; limits: keyword arguments of `request`."""
        call = getattr(self.objects, f"{verb}_namespaced_custom_object")
        resource = (self.kind.group, self.kind.version, self.namespace, self.kind.plural)
        return self.request(f"{verb} {self.kind.plural}", call, *resource, *args, **limits)

    def create(self, job: dict, refused: float = 0) -> dict | None:
        """Create the job and return it as stored; None if a job with this name exists.

        refused: seconds to retry after a rejection by a quota or an admission webhook.
        """
        return self._job_request("create", job, none_if=(409,), refused=refused)

    def get(self) -> dict | None:
        """Return the job, or None if it does not exist."""
        limit = self.timeouts.forbidden
        return self._job_request("get", self.name, none_if=(404,), forbidden=limit)

    def delete(self) -> None:
        """Delete the job, if it exists, and its pods."""
        options = {"propagation_policy": "Background"}
        self._job_request("delete", self.name, none_if=(404,), options=options)

    def replace(self, job: dict, failure: str) -> None:
        """Delete the job, and create `job`, of the same name, with the failure as annotation."""
        job["metadata"].setdefault("annotations", {})[FAILURE] = failure
        limit = time.monotonic() + self.timeouts.deletion
        self.delete()
        while self.create(job, self.timeouts.deletion) is None:
            # the existing job is the deleted one or, if an earlier response was lost, this one
            metadata = (self.get() or {"metadata": {}})["metadata"]
            if (metadata.get("annotations") or {}).get(FAILURE) == failure:
                return
            if time.monotonic() > limit:
                raise RuntimeError("the job is still being deleted; check its finalizers")
            time.sleep(min(self.timeouts.poll, 1))

    def patch(self, change: dict) -> None:
        """Apply a merge patch to the job, if it exists."""
        self._job_request("patch", self.name, change, none_if=(404,))

    def adopt(self, owners: list[dict]) -> None:
        """Replace the job's owner references."""
        self.patch({"metadata": {"ownerReferences": owners}})

    def annotate(self, annotations: dict[str, str]) -> None:
        """Set annotations of the job."""
        self.patch({"metadata": {"annotations": annotations}})

    def mark(self, failure: str, spec: dict | None) -> None:
        """Annotate the job with its failure. spec: patch of the spec that ends the job, or None."""
        change: dict = {"metadata": {"annotations": {FAILURE: failure}}}
        self.patch({**change, "spec": spec} if spec else change)

    def pod(self, name: str, once: bool = False) -> dict | None:
        """Return a pod, or None if it does not exist. once: fail within 2.5 s, no retries."""
        call, limit = self.core.read_namespaced_pod, self.timeouts.forbidden
        where = (name, self.namespace)
        return self.request("get pods", call, *where, none_if=(404,), forbidden=limit, once=once)

    def workflow(self, name: str, once: bool = False) -> dict | None:
        """Return a Workflow, or None if it does not exist. once: fail within 2.5 s, no retries."""
        call, limit = self.objects.get_namespaced_custom_object, self.timeouts.forbidden
        where = (workflow.GROUP, workflow.VERSION, self.namespace, workflow.PLURAL, name)
        return self.request(
            "get workflows", call, *where, none_if=(404,), forbidden=limit, once=once
        )

    def pods(self) -> tuple[list[dict], str]:
        """Return the job's pods and the resource version from which `watch` continues."""
        found = self.request(
            "list pods",
            self.core.list_namespaced_pod,
            self.namespace,
            options={"label_selector": self.kind.selector(self.name)},
            forbidden=self.timeouts.forbidden,
        )
        assert found is not None  # `none_if` is empty
        return found["items"], found["metadata"]["resourceVersion"]

    def watch(self, version: str, seconds: float) -> Iterator[dict]:
        """Yield the job's pods as they change, for `seconds`; ends early on any error.

        version: the resource version that `pods` returned.
        """
        try:
            for event in self.watcher.stream(
                self.core.list_namespaced_pod,
                self.namespace,
                label_selector=self.kind.selector(self.name),
                resource_version=version,
                timeout_seconds=max(1, round(seconds)),
                _request_timeout=(5, seconds + 10),
            ):
                yield event["object"]
        except (ApiException, HTTPError, ValueError, LookupError):
            return  # an error that persists is reported by the next request

    def events(self, selector: str) -> list[dict]:
        """Return the events that match a field selector; [] if listing is forbidden."""
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
        """Return the lines of a container's log, each prefixed with its timestamp and a space.

        Returns [] if the log cannot be read. Lines without a timestamp are left out: the kubelet
        responds with status 200 and an error message if the container no longer exists.

        Args:
            since: return only the lines of the last `since` seconds.
            tail: return only the last `tail` lines.
            previous: whether to read the log of the previous container instance.
            container: name of the container; "" for the training container.
        """
        options = {"since_seconds": since, "tail_lines": tail, "previous": previous or None}
        try:
            raw = self.core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=container or self.kind.container,
                timestamps=True,
                _preload_content=False,
                _request_timeout=REQUEST_TIMEOUT,
                **{key: value for key, value in options.items() if value is not None},
            )
            # not splitlines(), as lines may contain \r
            lines = raw.data.decode(errors="replace").split("\n")
            return [line for line in lines if STAMP.match(line)]
        except ApiException as error:
            self.report_forbidden("read logs", error)
            return []
        except HTTPError:
            return []

    def workloads(self, uid: str) -> list[dict] | None:
        """Return Kueue's Workloads of the job with this uid; None if they cannot be read."""
        try:
            return self.objects.list_namespaced_custom_object(
                queue.GROUP,
                queue.VERSION,
                self.namespace,
                queue.PLURAL,
                label_selector=f"{queue.JOB_UID}={uid}",
                _request_timeout=REQUEST_TIMEOUT,
            )["items"]
        except ApiException as error:
            self.report_forbidden("list workloads", error)
            return [] if error.status == 404 else None  # 404: Kueue is not installed
        except HTTPError:
            return None

    def report_forbidden(self, verb: str, error: ApiException) -> None:
        """Report once that an optional request is forbidden; other errors are not reported."""
        if error.status in (401, 403) and verb not in self.reported:
            self.out(f"launcher: {describe_error(self.kind, self.namespace, verb, error)}")
            self.reported.add(verb)
