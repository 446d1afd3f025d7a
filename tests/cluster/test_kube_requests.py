"""Requests to the Kubernetes API without a cluster: which rejections are retried, and their messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3 import HTTPConnectionPool
from urllib3.exceptions import MaxRetryError, NameResolutionError, ProtocolError

from components.launcher.client import JobClient, Timeouts, connect
from components.launcher.errors import describe_outage
from components.launcher.templates import FAILURE
from tests.cluster.conftest import Clock
from tests.cluster.test_following import PYTORCH, SHORT


def answers(*given: object) -> Callable:
    """Return a request function that returns these responses; the last one is repeated."""
    waiting = list(given)

    def call(*_: object, **options: object) -> object:
        answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if isinstance(answer, Exception):
            raise answer
        return type("Raw", (), {"data": answer})

    return call


def refused(status: int, message: str | None = None) -> ApiException:
    error, body = ApiException(status=status, reason="reason"), {"kind": "Status"}
    error.body = json.dumps({**body, "message": message}) if message else "404 page not found"
    return error


def cluster(lines: list[str], timeouts: Timeouts = SHORT) -> JobClient:
    api = client.ApiClient(client.Configuration())
    return JobClient(api, PYTORCH, "j", "ours", lines.append, timeouts)


def test_requests_to_an_unavailable_api_server_are_retried() -> None:
    lines: list[str] = []
    ask = cluster(lines).request
    busy = (refused(503, "starting"), refused(429, "later"))
    gone = [ProtocolError("reset"), *busy, b'{"half', b'{"a": 1}']
    assert ask("get x", answers(*gone)) == {"a": 1}
    assert lines == [
        "launcher: the API server does not respond (ProtocolError); retrying for up to 0 s",
        "launcher: the API server is responding again",
    ]
    # a starting API server may not have loaded the RBAC rules or the custom resources yet
    starting = [refused(403, "no roles yet"), refused(404), b"{}"]
    assert ask("get x", answers(*starting), none_if=(404,), forbidden=5) == {}
    with pytest.raises(RuntimeError, match="no roles yet"):
        ask("get y", answers(*starting), none_if=(404,), forbidden=5)
    with pytest.raises(RuntimeError, match="the API server does not respond"):
        ask("get x", answers(ProtocolError("reset")))


ANONYMOUS = 'pods is forbidden: User "system:anonymous"'
NO_ROLE = (
    'pytorchjobs.kubeflow.org is forbidden: User "system:serviceaccount:ours:u" cannot create '
    'resource "pytorchjobs"'
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            refused(403, f'{NO_ROLE} in API group "kubeflow.org" in the namespace "ours"'),
            "^cannot create in namespace ours: account system:serviceaccount:ours:u has no Role that allows create "
            "on pytorchjobs.kubeflow.org; apply manifests/shared",
        ),
        (refused(403, 'namespace "ours" is being terminated'), "is being terminated .HTTP 403.$"),
        (
            refused(403, 'admission webhook "v.io" denied the request: spec.x: Required value: y'),
            "spec.x: Required value: y .HTTP 403.$",
        ),
        (
            refused(403, f'{ANONYMOUS} cannot list resource "pods" in API group ""'),
            "the request had no credentials",
        ),
        (refused(401, "Unauthorized"), "does not accept the credentials .HTTP 401.$"),
        (
            refused(404),
            "no resource PyTorchJob .kubeflow.org/v1.; install the Kubeflow training operator .v1.9., or submit a "
            "TrainJob .--job-kind trainjob. if the cluster has this kind$",
        ),
        (
            refused(404, 'namespaces "ours" not found'),
            'cannot create in namespace ours: namespaces "ours" not found',
        ),
        (refused(422, "spec.x: Invalid value"), "spec.x: Invalid value .HTTP 422."),
    ],
)
def test_a_rejection_is_reported_in_one_line_at_once(error: ApiException, message: str) -> None:
    lines: list[str] = []
    with pytest.raises(RuntimeError, match=message) as raised:
        cluster(lines, Timeouts()).request("create", answers(error))
    assert "\n" not in str(raised.value) and not lines
    assert raised.value.__cause__ is None and raised.value.__context__ is None


@pytest.mark.parametrize(
    "message",
    [
        'pytorchjobs "x" is forbidden: exceeded quota: q, requested: count/pytorchjobs.kubeflow.org=1, '
        "used: count/pytorchjobs.kubeflow.org=1, limited: count/pytorchjobs.kubeflow.org=1",
        'admission webhook "policy.example.com" denied the request: \n\nno trainings at night\n',
    ],
)
def test_rejections_by_a_quota_or_policy_are_retried(message: str, clock: Clock) -> None:
    """The wait is logged once, with its timeout."""
    lines: list[str] = []
    ask, text = cluster(lines, Timeouts()).request, " ".join(message.split())
    refusal = refused(403, message)
    assert ask("create", answers(refusal, refusal, b"{}"), refused=9) == {}
    what = f"cannot create in namespace ours: {text} (HTTP 403)"
    assert lines == [
        f"launcher: {what}; retrying for up to 9 s",
        "launcher: the API server is responding again",
    ]
    start = clock.now
    with pytest.raises(RuntimeError) as raised:
        ask("create", answers(refused(403, message)), refused=9)
    assert str(raised.value) == f"{what}; retried for 9 s" and 9 <= clock.now - start < 12


@pytest.mark.parametrize(
    ("text", "message"),
    [("{: [", "is not valid: while parsing"), ("[1]", "is not valid: "), ("", "file is empty")],
)
def test_an_invalid_kubeconfig_is_reported_in_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(RuntimeError, match=message) as raised:
        connect()
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    assert raised.value.__suppress_context__


def test_an_outage_is_reported_with_its_kind() -> None:
    reset = MaxRetryError(HTTPConnectionPool("h"), "/", NameResolutionError("h", None, OSError()))
    assert describe_outage(reset) == "does not respond (NameResolutionError)"
    assert describe_outage(ProtocolError("reset")) == "does not respond (ProtocolError)"


def test_only_lines_with_a_timestamp_are_log_lines() -> None:
    """The kubelet responds with status 200 if the runtime has removed the container."""
    ours = cluster([])
    ours.core.read_namespaced_pod_log = answers(
        b"2026-01-01T00:00:01Z [rank0]:a\rb\n2026-01-01T08:00:02.5+08:00 \n",
        b"unable to retrieve container logs for containerd://3bb6fd00e2a1",
        b"",
    )
    assert ours.log("w-0") == ["2026-01-01T00:00:01Z [rank0]:a\rb", "2026-01-01T08:00:02.5+08:00 "]
    assert ours.log("w-0", previous=True) == ours.log("w-0") == []


class Jobs:
    """Replaces the API of jobs: a deleted job remains for one more request; the first response to create is lost."""

    def __init__(self) -> None:
        self.stored: dict | None = {"metadata": {"name": "j"}}
        self.refusals = [refused(403, "pytorchjobs is forbidden: exceeded quota: q")]
        self.remaining = 1

    def create_namespaced_custom_object(self, *where: object, **options: object) -> object:
        if self.stored:
            self.remaining -= 1
            if self.remaining < 0 and "annotations" not in self.stored["metadata"]:
                self.stored = None
            raise refused(409)
        if self.refusals:
            raise self.refusals.pop()
        self.stored = where[-1]
        raise ProtocolError("reset")

    def delete_namespaced_custom_object(self, *where: object, **options: object) -> object:
        return type("Raw", (), {"data": b"{}"})

    def get_namespaced_custom_object(self, *where: object, **options: object) -> object:
        return type("Raw", (), {"data": json.dumps(self.stored).encode()})


def test_a_job_is_replaced_once_despite_a_quota_and_a_lost_response() -> None:
    ours, jobs = cluster([], Timeouts(poll=0, deletion=60)), Jobs()
    ours.objects = jobs
    job = {"metadata": {"name": "j"}, "spec": {}}
    ours.replace(job, "out of memory")
    assert jobs.stored == job and job["metadata"]["annotations"] == {FAILURE: "out of memory"}
    assert not jobs.refusals
