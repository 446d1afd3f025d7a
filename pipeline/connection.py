"""A connection to Kubeflow Pipelines: who asks, how long an answer may take, and what an answer that is none means.

The requests are those of kfp_server_api, the generated client on which kfp.Client stands. kfp.Client 2.17 itself is
passed over. Its constructor asks for /healthz without any time limit, then again every 5 s with a traceback each, reads
cookies from ~/.config/kfp and, told by an environment variable, prompts. It waits for ever on a server that stalls and
on a run that was cancelled, tries nothing twice after a 5xx, and prints an error's headers, cookies among them; its
`enable_caching=False` reaches no step inside an ExitHandler, a loop or a condition, thus none of ours.

A secret is read from a file, the environment or the pod, never from the command line, where everybody on the machine
sees it; it is in no message.
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
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # where kfp, too, looks for it
LOGIN = "a token (--token-file FILE or KFP_TOKEN) or a cookie (--cookie-file FILE or KFP_COOKIE)"
PASSING = (429, 500, 502, 503, 504)  # what a server says that will be well again


class Refusal(OSError):
    """What the server's answer means to the user. status: HTTP's, 0 without an answer; passing: ask again later;
    reached: the request may have had its effect."""

    def __init__(
        self, message: str, status: int, *, passing: bool = False, reached: bool = True
    ) -> None:
        super().__init__(message)
        self.status, self.passing, self.reached = status, passing, reached


@dataclass(frozen=True)
class Secret:
    """A token or cookie: where it comes from, which messages say, and how to read it, which is done anew for every
    request: tokens of pods and of login helpers are renewed in their files."""

    source: str
    read: Callable[[], str] = field(repr=False)


def address(host: str) -> str:
    """The API's address: `host`, else KF_PIPELINES_ENDPOINT, else in a pod that of the cluster's own service.

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
    path = parts.path.removeprefix(
        "/_"
    )  # Kubeflow's own pages show this one in a frame, and have more behind it
    return f"{parts.scheme}://{parts.netloc}{path}".rstrip("/")


def inside(host: str) -> bool:
    """Whether an address is one of the cluster's own services."""
    name = urlsplit(host).hostname or ""
    return name == "ml-pipeline" or name.endswith(".svc") or ".svc." in name


def secrets(
    host: str, token_file: str = "", cookie_file: str = ""
) -> tuple[Secret | None, Secret | None]:
    """Token and cookie: from the files, else from KFP_TOKEN and KFP_COOKIE, else the pod's own token.

    The pod's token goes to the cluster's services only, unless KF_PIPELINES_SA_TOKEN_PATH names it. Raises ValueError
    for what cannot be one.
    """
    token, cookie = (
        given("token", token_file, "KFP_TOKEN"),
        given("cookie", cookie_file, "KFP_COOKIE"),
    )
    pod = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "")
    if not pod and inside(host) and POD_TOKEN.exists():
        pod = str(POD_TOKEN)
    if pod and not token and not cookie:
        token = Secret(
            "the pod", lambda: checked("token", content(pod, "the pod's token"), "the pod")
        )
    for secret in filter(None, (token, cookie)):
        secret.read()
    return token, cookie


def given(kind: str, file: str, variable: str) -> Secret | None:
    """The token or cookie that the user names, if any; "-" is the standard input."""
    if file:
        source = f"--{kind}-file"
        text = content(file, source)
        once = file == "-" or not Path(file).is_file()  # a pipe
        return Secret(
            source, lambda: checked(kind, text if once else content(file, source), source)
        )
    if text := os.environ.get(variable):
        return Secret(variable, lambda: checked(kind, text, variable))
    return None


def content(file: str, source: str) -> str:
    """The text of a secret's file. Raises ValueError without its name: that may be the secret, put in the wrong place."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
    raise ValueError(f"{source}: cannot be read: {reason}")


def checked(kind: str, text: str, source: str) -> str:
    """The secret as a header can carry it; http.client would put a wrong one into its traceback."""
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
    """The generated client's requests with a time limit, tried again where that is safe, and `Refusal` for errors.

    timeout: seconds to connect, and again between two parts of the answer. retries: how often more. A request that
    changes something is only repeated when it cannot have arrived. `says` hears why it takes longer.
    """

    backoff = 1.0  # seconds before the first repetition; twice as long before each further one

    def __init__(
        self,
        configuration: Configuration,
        token: Secret | None,
        cookie: Secret | None,
        timeout: float,
        retries: int,
        says: Callable[[str], None],
    ) -> None:
        configuration.retries = (
            False  # urllib3's own: three at once, none after a 5xx; and follows to login pages
        )
        super().__init__(configuration)
        self.host, self.timeout, self.retries, self.says = (
            configuration.host,
            timeout,
            retries,
            says,
        )
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
        """As the base class; it takes a pair of limits only, and ignores a single float."""
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
                refusal = Refusal(
                    f"{self.host} answers with {kind}, not as the API of Kubeflow Pipelines does: "
                    f"{self.page()}",
                    answer.status,
                )
            except ApiException as error:
                refusal = self.answered(error)
            except exceptions.HTTPError as error:
                refusal = self.unanswered(error)
            safe = method == "GET" or not refusal.reached
            if attempt == self.retries or not refusal.passing or not safe:
                break
            pause = self.backoff * 2**attempt
            self.says(f"{refusal}; again in {pause:g} s")
            time.sleep(pause)
        raise refusal  # outside of `except`: no traceback leads to the request's headers

    def answered(self, error: ApiException) -> Refusal:
        """The meaning of an answer that is no success."""
        status = error.status or 0
        if not status:  # the base class makes this of TLS errors
            reason = " ".join(
                re.sub(r"SSLError|\(_ssl\.c:\d+\)|\[SSL: \w+\]", "", str(error.reason)).split()
            )
            return Refusal(
                f"{self.host}: no TLS connection ({reason}); the certificate of a private authority is given"
                " with --ca-file, and http:// is for a server without TLS",
                0,
                reached=False,
            )
        said, where = self.message(error), (error.headers or {}).get("location", "")
        if 300 <= status < 400:
            target, here = urlsplit(where)._replace(query="", fragment=""), urlsplit(self.host)
            moved = target.hostname == here.hostname and target.scheme != here.scheme
            return Refusal(
                f"{self.host} sends us to {target.geturl() or 'another page'}: "
                f"{'give that one as --host' if moved else self.page()}",
                status,
            )
        if status == 401 and not self.login:
            return Refusal(f"{self.host} wants to know who asks (401): give {LOGIN}", status)
        if status == 401:
            return Refusal(
                f"{self.host} does not accept the login of {self.sources()} (401): it has expired, or is for"
                f" another server{said}",
                status,
            )
        if status == 403:
            who = (
                f"the login of {self.sources()}"
                if self.login
                else "a request without token and cookie"
            )
            return Refusal(f"{self.host} forbids this to {who} (403){said}", status)
        return Refusal(
            f"{self.host} answers {status} {error.reason}{said}",
            status,
            passing=status in PASSING,
            reached=status != 429,
        )

    def unanswered(self, error: exceptions.HTTPError) -> Refusal:
        """The meaning of no answer."""
        if isinstance(error, exceptions.NameResolutionError):
            return Refusal(f"{self.host}: no such host", 0, reached=False)
        if isinstance(error, exceptions.ConnectTimeoutError | exceptions.NewConnectionError):
            reason = (
                getattr(error.__cause__, "strerror", None)
                or f"no connection within {self.timeout:g} s"
            )
            return Refusal(f"{self.host}: {reason}", 0, passing=True, reached=False)
        if isinstance(error, exceptions.ReadTimeoutError):
            return Refusal(f"{self.host}: no answer within {self.timeout:g} s", 0, passing=True)
        return Refusal(f"{self.host}: the connection broke off before an answer", 0, passing=True)

    def page(self) -> str:
        """What to do about a web page."""
        path = (
            ""
            if urlsplit(self.host).path
            else "; with a whole Kubeflow the address ends in /pipeline"
        )
        if not self.login:
            return f"it asks for a login: give {LOGIN}{path}"
        return f"the login of {self.sources()} has expired or is not accepted{path}"

    def sources(self) -> str:
        """Where the secrets came from."""
        return " and ".join(secret.source for secret in self.login)

    def message(self, error: ApiException) -> str:
        """What the API says itself, on one line, without our secrets should it repeat them."""
        body = (error.body or b"").decode(errors="replace")
        try:
            text = str(json.loads(body)["message"])
        except (
            ValueError,
            KeyError,
            TypeError,
        ):  # a proxy's words, as Istio's "RBAC: access denied"; no web page
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
    says: Callable[[str], None] = lambda _: None,
) -> ApiClient:
    """A client of the API at `host` for the service classes of kfp_server_api; see `Transport` for the numbers.

    Raises FileNotFoundError when ca_file is missing. Its requests raise `Refusal`.
    """
    if ca_file and not Path(ca_file).is_file():
        raise FileNotFoundError(f"--ca-file {ca_file}: no such file")
    configuration = Configuration(host=host)
    configuration.ssl_ca_cert = ca_file or None
    client = ApiClient(configuration)

    def renew(settings: Configuration) -> None:
        settings.api_key["authorization"] = token.read()

    if token:
        configuration.api_key, configuration.api_key_prefix = (
            {"authorization": ""},
            {"authorization": "Bearer"},
        )
        configuration.refresh_api_key_hook = renew
    client.rest_client = Transport(configuration, token, cookie, timeout, retries, says)
    return client
