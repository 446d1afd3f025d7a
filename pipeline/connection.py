"""The connection to Kubeflow Pipelines: credentials, timeouts, retries, errors.

The requests are those of kfp_server_api, the generated client that kfp.Client uses. kfp.Client 2.17
itself is not used. Its constructor requests /healthz without a timeout, then again every 5 s with a
traceback each, reads cookies from ~/.config/kfp and, depending on an environment variable, prompts.
It waits forever on a server that stalls and on a cancelled run, does not retry after a 5xx, and
prints an error's headers including cookies; its `enable_caching=False` does not apply to steps
inside an ExitHandler, a loop or a condition, thus to none of ours.

Secrets are read from a file, the environment or the pod, never from the command line, which every
user of the machine can read; no message contains one.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from kfp_server_api import ApiClient, ApiException, Configuration
from kfp_server_api.rest import RESTClientObject, RESTResponse
from urllib3 import exceptions

IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # kfp uses the same path
LOGIN = "a token (--token-file FILE or KFP_TOKEN) or a cookie (--cookie-file FILE or KFP_COOKIE)"
TRANSIENT = (429, 500, 502, 503, 504)  # status codes of a server that may recover


class ServerError(OSError):
    """A failed request, as a message for the user.

    status: that of HTTP, 0 without an answer. transient: it may succeed later. sent: it may have
    taken effect.
    """

    def __init__(
        self, message: str, status: int, *, transient: bool = False, sent: bool = True
    ) -> None:
        super().__init__(message)
        self.status, self.transient, self.sent = status, transient, sent


@dataclass(frozen=True)
class Secret:
    """A token or cookie: its source, for messages, and how to read it.

    It is read for every request: tokens of pods and of login helpers are renewed in their files.
    """

    source: str
    read: Callable[[], str] = field(repr=False)


def server_address(host: str) -> str:
    """The API's address: `host`, else KF_PIPELINES_ENDPOINT, else in a pod the cluster's service.

    Raises ValueError when none is known or it is not http(s)://NAME[/PATH].
    """
    host = host or os.environ.get("KF_PIPELINES_ENDPOINT", "")
    if not host and "KUBERNETES_SERVICE_HOST" in os.environ:
        host = IN_CLUSTER
    if not host:
        raise ValueError(
            "no server is named: --host URL or KF_PIPELINES_ENDPOINT, as in "
            "https://kubeflow.example.com/pipeline"
        )
    parts = urlsplit(host)
    if parts.username or parts.password:
        raise ValueError(
            f"the address of the server holds a name or password; leave it out and give {LOGIN}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{host}: expected http:// or https://, as in https://kubeflow.example.com/pipeline"
        )
    # Kubeflow's dashboard shows the page in a frame, under an address with this prefix
    path = parts.path.removeprefix("/_")
    return f"{parts.scheme}://{parts.netloc}{path}".rstrip("/")


def in_cluster_address(host: str) -> bool:
    """Whether an address is one of a cluster's own services."""
    name = urlsplit(host).hostname or ""
    return name == "ml-pipeline" or name.endswith(".svc") or ".svc." in name


def credentials(
    host: str, token_file: str = "", cookie_file: str = ""
) -> tuple[Secret | None, Secret | None]:
    """Token and cookie: from the files, else KFP_TOKEN and KFP_COOKIE, else the pod's token.

    The pod's token is sent to the cluster's services only, unless KF_PIPELINES_SA_TOKEN_PATH names
    it. Raises ValueError for an invalid one.
    """
    token = named_secret("token", token_file, "KFP_TOKEN")
    cookie = named_secret("cookie", cookie_file, "KFP_COOKIE")
    pod = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "")
    if not pod and in_cluster_address(host) and POD_TOKEN.exists():
        pod = str(POD_TOKEN)
    if pod and not token and not cookie:
        token = Secret(
            "the pod",
            lambda: validate_secret("token", read_secret(pod, "the pod's token"), "the pod"),
        )
    for secret in filter(None, (token, cookie)):
        secret.read()
    return token, cookie


def named_secret(kind: str, file: str, variable: str) -> Secret | None:
    """The token or cookie that the user names, if any; "-" is standard input."""
    if file:
        source = f"--{kind}-file"
        text = read_secret(file, source)
        once = file == "-" or not Path(file).is_file()  # a pipe
        return Secret(
            source,
            lambda: validate_secret(kind, text if once else read_secret(file, source), source),
        )
    value = os.environ.get(variable)
    if value:
        return Secret(variable, lambda: validate_secret(kind, value, variable))
    return None


def read_secret(file: str, source: str) -> str:
    """The text of a secret's file. Raises ValueError, without the name: it may be the secret."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
    raise ValueError(f"{source}: cannot be read: {reason}")


def validate_secret(kind: str, text: str, source: str) -> str:
    """The secret as a header's value; http.client would print an invalid one in its traceback."""
    text = text.strip().removeprefix("Bearer ").removeprefix("Cookie: ").strip()
    if not re.fullmatch(r"[!-~]+" if kind == "token" else r"[ -~]+", text):
        raise ValueError(
            f"{source}: expected one line with a {kind}, got {'nothing' if not text else 'other things'}"
        )
    if kind == "cookie" and "=" not in text:
        raise ValueError(
            f"{source}: expected a cookie as NAME=VALUE, as in authservice_session=..."
        )
    return text


class Transport(RESTClientObject):
    """The transport of the generated client with timeouts, safe retries, and ServerError.

    timeout: seconds to connect, and between two parts of the answer. retries: after the first
    attempt; a request that changes something is repeated only if it cannot have arrived. report:
    called with the reason of a retry.
    """

    backoff = 1.0  # seconds before the first retry, doubled for each further one

    def __init__(
        self,
        configuration: Configuration,
        token: Secret | None,
        cookie: Secret | None,
        timeout: float,
        retries: int,
        report: Callable[[str], None],
    ) -> None:
        # urllib3's own retries are immediate, not after a 5xx, and follow redirects to login pages
        configuration.retries = False
        super().__init__(configuration)
        self.host, self.timeout, self.retries = configuration.host, timeout, retries
        self.report = report
        self.cookie, self.login = cookie, [secret for secret in (token, cookie) if secret]

    def request(
        self,
        method: str,
        url: str,
        query_params: list | None = None,
        headers: dict | None = None,
        body: object = None,
        post_params: list | None = None,
        _preload_content: bool = True,
        _request_timeout: object = None,
    ) -> RESTResponse:
        """Like the base class, which takes a pair of timeouts and ignores a single float."""
        cookies = {"Cookie": self.cookie.read()} if self.cookie else {}
        for attempt in range(self.retries + 1):
            try:
                answer = super().request(
                    method,
                    url,
                    query_params,
                    {**(headers or {}), **cookies},
                    body,
                    post_params,
                    _preload_content,
                    (self.timeout, self.timeout),
                )
                if answer.data.lstrip()[:1] in (b"{", b""):
                    return answer
                kind = "a web page" if answer.data.lstrip()[:1] == b"<" else "other text"
                failure = ServerError(
                    f"{self.host} answers with {kind}, not as the API of Kubeflow Pipelines does: "
                    f"{self.login_hint()}",
                    answer.status,
                )
            except ApiException as error:
                failure = self.response_error(error)
            except exceptions.HTTPError as error:
                failure = self.connection_error(error)
            safe = method == "GET" or not failure.sent
            if attempt == self.retries or not failure.transient or not safe:
                break
            pause = self.backoff * 2**attempt
            self.report(f"{failure}; again in {pause:g} s")
            time.sleep(pause)
        raise failure  # outside of `except`: no traceback leads to the request's headers

    def response_error(self, error: ApiException) -> ServerError:
        """The error for an answer with a status of failure."""
        status = error.status or 0
        if not status:  # the base class turns TLS errors into this
            reason = " ".join(
                re.sub(r"SSLError|\(_ssl\.c:\d+\)|\[SSL: \w+\]", "", str(error.reason)).split()
            )
            return ServerError(
                f"{self.host}: no TLS connection ({reason}); the certificate of a private authority is given"
                " with --ca-file, and http:// is for a server without TLS",
                0,
                sent=False,
            )
        text, location = self.server_text(error), (error.headers or {}).get("location", "")
        if 300 <= status < 400:
            target, here = urlsplit(location)._replace(query="", fragment=""), urlsplit(self.host)
            moved = target.hostname == here.hostname and target.scheme != here.scheme
            return ServerError(
                f"{self.host} sends us to {target.geturl() or 'another page'}: "
                f"{'give that one as --host' if moved else self.login_hint()}",
                status,
            )
        if status == 401 and not self.login:
            return ServerError(f"{self.host} wants to know who asks (401): give {LOGIN}", status)
        if status == 401:
            return ServerError(
                f"{self.host} does not accept the login of {self.login_sources()} (401): it has expired, or is for"
                f" another server{text}",
                status,
            )
        if status == 403:
            who = (
                f"the login of {self.login_sources()}"
                if self.login
                else "a request without token and cookie"
            )
            return ServerError(f"{self.host} forbids this to {who} (403){text}", status)
        return ServerError(
            f"{self.host} answers {status} {error.reason}{text}",
            status,
            transient=status in TRANSIENT,
            sent=status != 429,
        )

    def connection_error(self, error: exceptions.HTTPError) -> ServerError:
        """The error when there is no answer."""
        if isinstance(error, exceptions.NameResolutionError):
            return ServerError(f"{self.host}: no such host", 0, sent=False)
        if isinstance(error, exceptions.ConnectTimeoutError | exceptions.NewConnectionError):
            reason = (
                getattr(error.__cause__, "strerror", None)
                or f"no connection within {self.timeout:g} s"
            )
            return ServerError(f"{self.host}: {reason}", 0, transient=True, sent=False)
        if isinstance(error, exceptions.ReadTimeoutError):
            return ServerError(
                f"{self.host}: no answer within {self.timeout:g} s", 0, transient=True
            )
        return ServerError(
            f"{self.host}: the connection broke off before an answer", 0, transient=True
        )

    def login_hint(self) -> str:
        """What to do when the server returns a web page."""
        path = (
            ""
            if urlsplit(self.host).path
            else "; with a whole Kubeflow the address ends in /pipeline"
        )
        if not self.login:
            return f"it asks for a login: give {LOGIN}{path}"
        return f"the login of {self.login_sources()} has expired or is not accepted{path}"

    def login_sources(self) -> str:
        """The sources of the secrets."""
        return " and ".join(secret.source for secret in self.login)

    def server_text(self, error: ApiException) -> str:
        """The message of the API, on one line, with our secrets masked should it repeat them."""
        body = (error.body or b"").decode(errors="replace")
        try:
            text = str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            # the text of a proxy, as Istio's "RBAC: access denied", but no web page
            text = "" if "<" in body else body
        text = " ".join(text.split())
        for secret in self.login:
            text = text.replace(secret.read(), "***")
        return f": {text if len(text) <= 300 else text[:297] + '...'}" if text else ""


def connect(
    host: str,
    token: Secret | None = None,
    cookie: Secret | None = None,
    *,
    ca_file: str = "",
    timeout: float = 30.0,
    retries: int = 3,
    report: Callable[[str], None] = lambda _: None,
) -> ApiClient:
    """A client for the service classes of kfp_server_api; see Transport for the arguments.

    Raises FileNotFoundError when ca_file is missing. Its requests raise ServerError.
    """
    if ca_file and not Path(ca_file).is_file():
        raise FileNotFoundError(f"--ca-file {ca_file}: no such file")
    configuration = Configuration(host=host)
    configuration.ssl_ca_cert = ca_file or None
    client = ApiClient(configuration)
    if token:
        read_token = token.read

        def renew(settings: Configuration) -> None:
            settings.api_key["authorization"] = read_token()

        configuration.api_key = {"authorization": ""}
        configuration.api_key_prefix = {"authorization": "Bearer"}
        configuration.refresh_api_key_hook = renew
    client.rest_client = Transport(configuration, token, cookie, timeout, retries, report)
    return client
