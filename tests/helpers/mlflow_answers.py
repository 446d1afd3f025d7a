"""An HTTP server on loopback that responds like MLflow, or like another service at its address."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

RUN_ID = "1" * 32
RUN = {"run": {"info": {"run_id": RUN_ID, "status": "RUNNING"}, "data": {}}}
EXPERIMENT = {"experiment_id": "7", "name": "e", "lifecycle_stage": "active"}
CUT = "cut"  # a response: the connection is closed


class Server(http.server.ThreadingHTTPServer):
    """plan maps the end of a path to its first responses: (code, JSON, headers) or CUT.

    always: (code, body) of every response, if set. answering: an event; requests wait until it is set.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.uri = f"http://127.0.0.1:{self.server_port}"
        self.plan: dict[str, list] = {}
        self.always: tuple[int, bytes] | None = None
        self.answering = threading.Event()
        self.answering.set()
        self.asked: list[str] = []
        self.runs: list[dict] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.answering.wait(600)
        path = self.path.partition("?")[0].removeprefix("/api/2.0/mlflow/")
        self.server.asked.append(path)
        if path == "runs/create":
            self.server.runs.append(RUN["run"])
        plan = self.server.plan.get(path)
        answer = plan.pop(0) if plan else None
        if answer == CUT:
            self.connection.close()
            return
        bodies = {
            "experiments/search": {"experiments": [EXPERIMENT]},
            "experiments/get-by-name": {"experiment": EXPERIMENT},
            "runs/search": {"runs": self.server.runs},
            "runs/create": RUN,
            "runs/log-batch": {},
            "metrics/get-history": {"metrics": []},
        }
        code, body, headers = answer or (200, bodies.get(path), {})
        content = json.dumps(body).encode()
        if self.server.always is not None:
            code, content = self.server.always
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = answer  # noqa: N815 - named by http.server


@contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    with Server(port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.answering.set()
        server.shutdown()
