"""The connection to Kubeflow Pipelines: credentials, timeouts, retries, errors.

Requests are sent with kfp_server_api, the generated client that kfp.Client uses. kfp.Client 2.17
itself is not used: its constructor requests /healthz without a timeout, prints a traceback at
each retry, reads cookies from ~/.config/kfp and, if an environment variable is set, prompts the
user. It waits forever on a server that stalls and on a canceled run, does not retry after HTTP 5xx,
and prints an error's headers, including cookies. Its `enable_caching=False` has no effect on steps
inside an ExitHandler, a loop or a condition.

Secrets are read from a file, the environment or the pod, never from the command line, which every
user of the machine can read. No message contains a secret.
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

from pipeline.versions import refused_field

IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # kfp uses the same path
LOGIN = "a token (--token-file FILE or KFP_TOKEN) or a cookie (--cookie-file FILE or KFP_COOKIE)"
TRANSIENT = (429, 500, 502, 503, 504)  # status codes of a server that may recover


class ServerError(OSError):
    """A failed request, with a message for the user.

    Args:
        status: HTTP status; 0 if there was no response.
        transient: Whether a retry may succeed.
        sent: Whether the request may have taken effect.
        field: Field of the pipeline that the server does not support; "" for other errors.
    """

    def __init__(
        self,
        message: str,
        status: int,
        *,
        transient: bool = False,
        sent: bool = True,
        field: str = "",
    ) -> None:
        super().__init__(message)
        self.status, self.transient, self.sent, self.field = status, transient, sent, field


@dataclass(frozen=True)
class Secret:
    """A token or cookie, with its source for messages.

    The value is read for every request, as the kubelet and login helpers rewrite token files.
    renewed: whether a later read may return a different value.
    """

    source: str
    read: Callable[[], str] = field(repr=False)
    renewed: bool = False


def server_address(host: str) -> str:
    """Return the API's URL: `host`, KF_PIPELINES_ENDPOINT, or, in a pod, the cluster's service.

    Raises ValueError if no URL is set, or the URL has credentials or is not http(s)://NAME[/PATH].
    """
    host = host or os.environ.get("KF_PIPELINES_ENDPOINT", "")
    if not host and "KUBERNETES_SERVICE_HOST" in os.environ:
        host = IN_CLUSTER
    if not host:
        raise ValueError(
            "no server URL: pass --host URL or set KF_PIPELINES_ENDPOINT, e.g. "
            "https://kubeflow.example.com/pipeline"
        )
    parts = urlsplit(host)
    if parts.username or parts.password:
        raise ValueError(
            f"the server URL contains a user name or password; remove it and pass {LOGIN}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{host}: expected http:// or https://, e.g. https://kubeflow.example.com/pipeline"
        )
    # a URL copied from Kubeflow's dashboard has the path prefix /_
    path = parts.path.removeprefix("/_")
    return f"{parts.scheme}://{parts.netloc}{path}".rstrip("/")


def in_cluster_address(host: str) -> bool:
    """Return whether the host of this URL is a service in the cluster."""
    name = urlsplit(host).hostname or ""
    return name == "ml-pipeline" or name.endswith(".svc") or ".svc." in name


def credentials(
    host: str, token_file: str = "", cookie_file: str = ""
) -> tuple[Secret | None, Secret | None]:
    """Return the token and cookie from the files, or from KFP_TOKEN and KFP_COOKIE.

    If there is neither, the token is read from the file KF_PIPELINES_SA_TOKEN_PATH or, for a
    service in the cluster, from POD_TOKEN. Raises ValueError for invalid values.
    """
    token = named_secret("token", token_file, "KFP_TOKEN")
    cookie = named_secret("cookie", cookie_file, "KFP_COOKIE")
    pod = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "")
    if not pod and in_cluster_address(host) and POD_TOKEN.exists():
        pod = str(POD_TOKEN)
    if pod and not token and not cookie:
        token = renewed_secret("token", pod, "the pod's token")
    for secret in filter(None, (token, cookie)):
        secret.read()
    return token, cookie


def named_secret(kind: str, file: str, variable: str) -> Secret | None:
    """Return the token or cookie from a file ("-": standard input) or a variable, or None."""
    source = f"--{kind}-file" if file else variable
    value = read_secret(file, source) if file else os.environ.get(variable)
    if file and file != "-" and Path(file).is_file():  # a pipe can be read only once
        return renewed_secret(kind, file, source)
    if file or value:
        return Secret(source, lambda: validate_secret(kind, value or "", source))
    return None


def renewed_secret(kind: str, file: str, source: str) -> Secret:
    """Return a secret that is read from its file for each request.

    If a later read fails, e.g. because the file is being rewritten, the last valid value is used.
    """
    last = ""

    def read() -> str:
        nonlocal last
        try:
            last = validate_secret(kind, read_secret(file, source), source)
        except ValueError:
            if not last:
                raise
        return last

    return Secret(source, read, renewed=True)


def read_secret(file: str, source: str) -> str:
    """Read a secret from a file. Errors omit the file name, which could be the secret itself."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
    raise ValueError(f"{source}: the file cannot be read ({reason})")


def validate_secret(kind: str, text: str, source: str) -> str:
    """Return the stripped secret. Raises ValueError if it is invalid, without revealing it."""
    text = text.strip().removeprefix("Bearer ").removeprefix("Cookie: ").strip()
    if not re.fullmatch(r"[!-~]+" if kind == "token" else r"[ -~]+", text):
        found = "other content" if text else "nothing"
        raise ValueError(f"{source}: expected one line with a {kind}, got {found}")
    if kind == "cookie" and "=" not in text:
        raise ValueError(f"{source}: expected a cookie as NAME=VALUE, e.g. authservice_session=...")
    return text


class Transport(RESTClientObject):
    """The generated client's transport, with timeouts and safe retries; raises ServerError.

    Args:
        timeout: Timeout in seconds for connecting and for each read of the response.
        retries: Maximum number of retries. A request other than GET is retried only if it cannot
            have taken effect.
        report: Called with the reason for each retry.
    """

    backoff = 1.0  # seconds before the first retry, doubled for each further retry

    def __init__(
        self,
        configuration: Configuration,
        token: Secret | None,
        cookie: Secret | None,
        timeout: float,
        retries: int,
        report: Callable[[str], None],
    ) -> None:
        # urllib3's retries have no delay, exclude 5xx, and follow redirects to login pages
        configuration.retries = False
        super().__init__(configuration)
        self.host, self.timeout, self.retries = configuration.host, timeout, retries
        self.report = report
        self.token, self.cookie = token, cookie
        self.login = [secret for secret in (token, cookie) if secret]
        # whether a retry may succeed after a 401
        self.renewed = any(secret.renewed for secret in self.login)

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
        """Send a request with retries; `_request_timeout` is ignored."""
        timeouts = (self.timeout, self.timeout)  # the base class ignores a float
        attempt, read_again = 0, False
        while True:
            login = self.login_headers()
            try:
                sent = {**(headers or {}), **login}
                answer = super().request(
                    method, url, query_params, sent, body, post_params, _preload_content, timeouts
                )
                if answer.data.lstrip()[:1] in (b"{", b""):
                    return answer
                kind = "a web page" if answer.data.lstrip()[:1] == b"<" else "other text"
                failure = ServerError(
                    f"{self.host} returned {kind} instead of a Kubeflow Pipelines API response: "
                    f"{self.login_hint()}",
                    answer.status,
                )
            except ApiException as error:
                failure = self.response_error(error)
            except exceptions.HTTPError as error:
                failure = self.connection_error(error)
            if failure.status == 401 and not read_again and self.login_headers() != login:
                read_again = True  # the file has changed
                continue
            safe = method == "GET" or not failure.sent
            if attempt == self.retries or not failure.transient or not safe:
                break
            pause = self.backoff * 2**attempt
            self.report(f"{failure}; retrying in {pause:g} s")
            time.sleep(pause)
            attempt += 1
        raise failure  # outside `except`: the traceback must not contain the request's headers

    def login_headers(self) -> dict[str, str]:
        """Return request headers with the current token and cookie."""
        token = {"authorization": f"Bearer {self.token.read()}"} if self.token else {}
        return {**token, **({"Cookie": self.cookie.read()} if self.cookie else {})}

    def response_error(self, error: ApiException) -> ServerError:
        """Return the error for a response with an error status."""
        status = error.status or 0
        if not status:  # the base class reports TLS errors with status 0
            noise = r"SSLError|\(_ssl\.c:\d+\)|\[SSL: \w+\]"
            reason = " ".join(re.sub(noise, "", str(error.reason)).split())
            return ServerError(
                f"{self.host}: no TLS connection ({reason}); pass the certificate of a private "
                "certificate authority with --ca-file, or use http:// for a server without TLS",
                0,
                sent=False,
            )
        text, location = self.server_text(error), (error.headers or {}).get("location", "")
        if 300 <= status < 400:
            target, here = urlsplit(location)._replace(query="", fragment=""), urlsplit(self.host)
            moved = target.hostname == here.hostname and target.scheme != here.scheme
            return ServerError(
                f"{self.host} redirects to {target.geturl() or 'another page'}: "
                f"{'pass this URL as --host' if moved else self.login_hint()}",
                status,
            )
        if status == 401 and not self.login:
            return ServerError(f"{self.host} requires authentication (401): pass {LOGIN}", status)
        if status == 401:
            return ServerError(
                f"{self.host} does not accept the credentials from {self.login_sources()} (401): "
                f"they have expired or are for a different server{text}",
                status,
            )
        if status == 403:
            login = f"with the credentials from {self.login_sources()}" if self.login else ""
            used = login or "without a token or cookie"
            return ServerError(f"{self.host} forbids this request {used} (403){text}", status)
        unknown = refused_field((error.body or b"").decode(errors="replace").replace('\\"', '"'))
        return ServerError(
            f"{self.host} returned {status} {error.reason}{text}",
            status,
            transient=status in TRANSIENT and not unknown,
            sent=status != 429,
            field=unknown,
        )

    def connection_error(self, error: exceptions.HTTPError) -> ServerError:
        """Return the error for a request without a response."""
        if isinstance(error, exceptions.NameResolutionError):
            return ServerError(f"{self.host}: no such host", 0, sent=False)
        if isinstance(error, exceptions.LocationValueError):  # e.g. port 99999
            return ServerError(f"{self.host}: invalid host name or port", 0, sent=False)
        sent, reason = True, "the connection was closed before a response"
        if isinstance(error, exceptions.ConnectTimeoutError | exceptions.NewConnectionError):
            sent, reason = False, f"no connection within {self.timeout:g} s"
            reason = getattr(error.__cause__, "strerror", None) or reason
        elif isinstance(error, exceptions.ReadTimeoutError):
            reason = f"no response within {self.timeout:g} s"
        return ServerError(f"{self.host}: {reason}", 0, transient=True, sent=sent)

    def login_hint(self) -> str:
        """Return advice for a response that is not from the API, e.g. a login page."""
        path = "; in a full Kubeflow deployment the URL ends in /pipeline"
        if urlsplit(self.host).path:
            path = ""
        if not self.login:
            return f"it requires a login: pass {LOGIN}{path}"
        return f"the credentials from {self.login_sources()} have expired or are not accepted{path}"

    def login_sources(self) -> str:
        """Return the sources of the token and cookie, as text for messages."""
        return " and ".join(secret.source for secret in self.login)

    def server_text(self, error: ApiException) -> str:
        """Return the API's message on one line, with secrets masked."""
        body = (error.body or b"").decode(errors="replace")
        try:
            text = str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            # a proxy's response, e.g. Istio's "RBAC: access denied", unless it is a web page
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
    """Return a client for the service classes of kfp_server_api; see Transport for the arguments.

    Raises FileNotFoundError if ca_file does not exist. The client's requests raise ServerError.
    """
    if ca_file and not Path(ca_file).is_file():
        raise FileNotFoundError(f"--ca-file {ca_file}: no such file")
    configuration = Configuration(host=host)
    configuration.ssl_ca_cert = ca_file or None
    client = ApiClient(configuration)
    client.rest_client = Transport(configuration, token, cookie, timeout, retries, report)
    return client
