"""A local API server with the calls of Kubeflow Pipelines' v2beta1 that the client uses, and planned failures.

Shapes of bodies and errors: kubeflow/pipelines, backend/api/v2beta1 (2.17). Names of a run's tasks: as in Argo.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from pipeline.cli import main
from pipeline.connection import Transport

Run = Callable[..., tuple[int, str, str]]  # words of `python -m pipeline` -> code, stdout, stderr
API = "/apis/v2beta1"
FORM = "<form action='/dex/auth/local'>Log in</form>"
PAGE = f"<!DOCTYPE html>\n<html><title>Dex</title>{FORM}</html>"
KEYS = {"experiments": "experiment_id", "runs": "run_id", "recurringruns": "recurring_run_id"}


@dataclass
class Request:
    """A recorded request; `words` is "METHOD path" below the API's root."""

    words: str
    query: dict[str, str]
    headers: dict[str, str]
    body: dict


class Kubeflow(ThreadingHTTPServer):
    """plan["METHOD path"] lists the next responses to such requests; later requests succeed.

    states: a run's next states, one per request. token, cookie: the accepted credentials; None accepts all requests.
    health: the body of the health endpoint. unknown: a field of the pipeline that the server does not know.
    """

    daemon_threads = True

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme = "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket, self.scheme = context.wrap_socket(self.socket, server_side=True), "https"
        self.users, self.token, self.cookie = False, None, None
        self.health, self.unknown = {"tag_name": "2.17.0", "pipeline_store": "database"}, ""
        self.requests: list[Request] = []
        self.plan: dict[str, list[Callable[[Handler], None]]] = defaultdict(list)
        self.kept: dict[str, list[dict]] = {"experiments": [], "runs": [], "recurringruns": []}
        self.states: list[dict] = []
        self.resting = threading.Event()  # once set, stalled requests end
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def words(self) -> list[str]:
        return [request.words for request in self.requests]

    def bodies(self, words: str) -> list[dict]:
        return [request.body for request in self.requests if request.words == words]

    def handle_error(self, *_: object) -> None:
        """Ignore clients that disconnect."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Kubeflow
    silent = False

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self) -> None:
        self.close_connection = True
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.request_made = Request(
            f"{self.command} {parts.path.removeprefix(API)}",
            {key: values[0] for key, values in parse_qs(parts.query).items()},
            dict(self.headers),
            json.loads(body or b"{}"),
        )
        with self.server.lock:
            self.server.requests.append(self.request_made)
            planned = self.server.plan[self.request_made.words]
            act = planned.pop(0) if planned else Handler.serve
        act(self)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815 - named by http.server

    def serve(self) -> None:
        server, made = self.server, self.request_made
        if server.token and self.headers["Authorization"] != f"Bearer {server.token}":
            return self.fail(401, "Unauthenticated")
        if server.cookie and self.headers["Cookie"] != server.cookie:
            login = "https://dex.example.com/auth?client_id=kf&state=hidden"
            return self.send(302, PAGE, Location=login)
        method, (_, *path) = self.command, made.words.split(" ")[1].split("/")
        if path == ["healthz"]:
            return self.send(200, {**server.health, "multi_user": server.users})
        kept = server.kept.get(path[0])
        if kept is None:
            return self.send(404, "404 page not found")
        key = KEYS[path[0]]
        if len(path) == 1:
            return self.create(kept, key) if method == "POST" else self.list(kept, path[0])
        name, _, verb = path[1].partition(":")
        found = next((item for item in kept if item[key] == name), None)
        if found is None:
            return self.fail(404, f"{path[0]} {name} not found.")
        if verb == "terminate":
            found["state"] = "CANCELING"
            return self.send(200, {})
        if method == "DELETE":
            kept.remove(found)
            return self.send(200, {})
        if path[0] == "runs" and server.states:
            found.update(server.states.pop(0))
        return self.send(200, found)

    def create(self, kept: list[dict], key: str) -> None:
        body = self.request_made.body
        experiments = {item["experiment_id"] for item in self.server.kept["experiments"]}
        if key == "experiment_id":
            if bool(body.get("namespace")) != self.server.users:
                return self.fail(400, "Invalid input error: namespace")
            name = body["display_name"]
            if any(item["display_name"] == name for item in kept):
                return self.fail(409, f"Already exist error: experiment {name} already exists")
        elif (name := self.server.unknown) and f'"{name}"' in json.dumps(body):
            # an unparsable Kubernetes part causes an internal error with a stack trace
            return self.fail(500, f'Internal error: proto: (line 1:2): unknown field "{name}"\nat')
        elif body["experiment_id"] not in experiments:
            return self.fail(400, "Invalid input error: experiment")
        kept.append({**body, key: f"0000-{key[:3]}-{len(kept)}", "state": "PENDING"})
        return self.send(200, kept[-1])

    def list(self, kept: list[dict], kind: str) -> None:
        query = self.request_made.query
        if kind == "experiments":
            if bool(query.get("namespace")) != self.server.users:
                return self.fail(400, "Invalid input error: namespace")
            [asked] = json.loads(query["filter"])["predicates"]
            kept = [item for item in kept if item["display_name"] == asked["stringValue"]]
        named = {"recurringruns": "recurringRuns"}.get(kind, kind)
        return self.send(200, {named: kept, "total_size": len(kept)} if kept else {})

    def fail(self, code: int, message: str) -> None:
        self.send(code, {"error": message, "code": 13, "message": message, "details": []})

    def send(self, code: int, body: dict | str, **headers: str) -> None:
        if self.silent:
            return
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        if isinstance(body, dict):
            kind = "application/json"
        else:
            kind = "text/html" if body[:1] == "<" else "text/plain"
        about = {"Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close"}
        self.send_response(code)
        for name, value in {**about, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(server: Kubeflow) -> Iterator[Kubeflow]:
    """Run the server."""
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.resting.set()
        server.shutdown()
        server.server_close()


def command(
    kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Return cli(*words), which runs `python -m pipeline` here and returns code, stdout and stderr."""
    for name in list(os.environ):
        if name.startswith(("KFP_", "KF_PIPELINES", "KUBERNETES_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(Transport, "backoff", 0.01)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", kubeflow.url)
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return (stop.value.code, *capsys.readouterr())

    return run


def failing(code: int, message: str = "internal", done: bool = False) -> Callable[[Handler], None]:
    """Plan an error response; with `done`, the server executes the request first."""

    def act(handler: Handler) -> None:
        handler.silent = done
        handler.serve() if done else None
        handler.silent = False
        handler.fail(code, message)

    return act


def stalling(handler: Handler) -> None:
    """Send no response."""
    handler.server.resting.wait(600)


def cut(handler: Handler) -> None:
    """Send half a response."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    handler.wfile.write(head + b"{")


def page(handler: Handler) -> None:
    """Send a login page as Istio and Dex do."""
    handler.send(200, PAGE)


def task(name: str, state: str, **more: object) -> dict:
    """Return a run's task."""
    return {"task_id": f"id-{name}", "display_name": name, "state": state, **more}
