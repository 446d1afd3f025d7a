"""A local HTTP server with planned faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler"], None]


class Web(ThreadingHTTPServer):
    """Serve `content` at every path, or `files` by path. `plan` lists the next responses, `plans` those
    of a path; later requests succeed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag = b"", '"one"'
        self.files: dict[str, bytes] = {}
        self.plan: list[Answer] = []
        self.plans: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, str | None]] = []  # path and Range of each request
        self.sent = 0  # bytes of bodies
        self.resting = threading.Event()  # once set, stalled requests end
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Ignore clients that were killed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:  # noqa: N802 - named by http.server
        self.close_connection = True
        with self.server.lock:
            self.server.asked.append((self.path, self.headers["Range"]))
            plan = self.server.plans.get(self.path) or self.server.plan
            lost = self.server.files and self.path not in self.server.files
            answer = plan.pop(0) if plan else status(404) if lost else file()
        answer(self)

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def begin(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes) -> None:
        for start in range(0, len(data), 1000):
            with self.server.lock:  # before sending: tests read it as soon as the client returns
                self.server.sent += len(data[start : start + 1000])
            self.wfile.write(data[start : start + 1000])
        self.wfile.flush()


def file(
    cut: int | None = None,
    ranges: bool = True,
    stall: bool = False,
    length: bool = True,
    tag: bool = True,
    shift: int = 0,
    honest: bool = True,
    surplus: int = 0,
    date: str = "",
) -> Answer:
    """Respond with the file. `cut`: end, or `stall`, after this many bytes of the body. `ranges`: support Range.
    `shift`: bytes by which the range starts later. `honest`: support If-Range. `surplus`: bytes announced but not sent.
    """

    def answer(to: Handler) -> None:
        content, start = to.server.files.get(to.path, to.server.content), 0
        headers: dict[str, object] = {"ETag": to.server.tag} if tag else {}
        headers |= {"Last_Modified": date} if date else {}
        known = to.headers["If-Range"] in (to.server.tag, date or None)
        if ranges and to.headers["Range"] and (known or not honest):
            start = int(to.headers["Range"].removeprefix("bytes=").removesuffix("-")) + shift
            if start >= len(content):
                return status(416)(to)
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        whole = {"Content_Length": len(content) - start + surplus}
        headers |= whole if length else {"Connection": "close"}
        to.begin(206 if "Content_Range" in headers else 200, **headers)
        to.body(content[start:][:cut])
        if stall:
            to.server.resting.wait(600)

    return answer


def status(code: int, text: bytes = b"no", **headers: object) -> Answer:
    """Respond with this status code and text."""

    def answer(to: Handler) -> None:
        to.begin(code, Content_Length=len(text), **headers)
        to.wfile.write(text)

    return answer


def changed(content: bytes, then: Answer) -> Answer:
    """Replace the file from this request on."""

    def answer(to: Handler) -> None:
        to.server.content, to.server.tag = content, '"two"'
        then(to)

    return answer


@contextmanager
def serve() -> Iterator[Web]:
    """Run the server."""
    with Web() as web:
        thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield web
        web.resting.set()
        web.shutdown()
        thread.join()
