"""The pipeline client's connection: authentication, server errors, and secrecy of credentials."""

from __future__ import annotations

import datetime
import io
import os
import socket
import traceback
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from pipeline import connection
from pipeline.connection import ServerError, connect, credentials, server_address
from pipeline.graph import compile_pipeline
from tests.helpers.kubeflow import Kubeflow, Run, cut, failing, page, serving, stalling

SECRET = "eyJhbGciOiJSUzI1NiJ9.c2VjcmV0"


def certificate(folder: Path) -> Path:
    """Return a self-signed certificate for 127.0.0.1."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    made = (
        x509.CertificateBuilder(
            name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1)
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    path, encoding = folder / "server.pem", serialization.Encoding.PEM
    path.write_bytes(
        made.public_bytes(encoding)
        + key.private_bytes(
            encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{SECRET}\n")
    return path


def test_a_token_is_read_from_a_file_pipe_stdin_environment_or_pod(
    kubeflow: Kubeflow, cli: Run, token: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kubeflow.token = SECRET
    assert cli("status", "x")[0] == 1
    assert "0000" not in cli("status", "x", "--token-file", token)[2]
    monkeypatch.setattr("sys.stdin", io.StringIO(SECRET))
    read, write = os.pipe()
    os.write(write, SECRET.encode())
    os.close(write)
    for words, variables in [
        (["--token-file", token], {}),
        (["--token-file", "-"], {}),
        (["--token-file", f"/dev/fd/{read}"], {}),
        ([], {"KFP_TOKEN": SECRET}),
        ([], {"KF_PIPELINES_SA_TOKEN_PATH": str(token)}),
    ]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert "has no run or schedule x" in cli("status", "x", *words)[2]
    os.close(read)


def test_a_secret_is_sent_only_in_its_header(
    kubeflow: Kubeflow, cli: Run, token: Path, tmp_path: Path
) -> None:
    package = compile_pipeline(tmp_path / "pipeline.yaml")
    code, out, said = cli("submit", "tiny", "--package", package, "--token-file", token)
    assert code == 0 and SECRET not in out + said and len(kubeflow.requests) == 4
    for request in kubeflow.requests:
        assert request.headers.pop("authorization") == f"Bearer {SECRET}"
        assert SECRET not in repr(request)


def test_credentials_without_encryption_cause_a_warning(cli: Run, token: Path) -> None:
    said = cli("status", "x", "--host", "http://kf.invalid", "--token-file", token)[2]
    assert said.startswith(
        "pipeline: http://kf.invalid: without https the credentials are sent unencrypted\n"
    )


def test_a_cookie_replaces_a_login(
    kubeflow: Kubeflow, cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kubeflow.cookie = "authservice_session=MTY5"
    code, _, said = cli("status", "x")
    assert code == 1 and "hidden" not in said
    assert "redirects to https://dex.example.com/auth: it requires a login" in said
    (tmp_path / "cookie").write_text(f"Cookie: {kubeflow.cookie}\n")
    assert "has no run" in cli("status", "x", "--cookie-file", tmp_path / "cookie")[2]
    monkeypatch.setenv("KFP_COOKIE", kubeflow.cookie)
    assert "has no run" in cli("status", "x")[2]


def test_a_redirect_to_https_is_an_error_with_the_url(kubeflow: Kubeflow, cli: Run) -> None:
    kubeflow.plan["GET /runs/x"] = [
        lambda handler: handler.send(308, "", Location="https://127.0.0.1/apis?a=b")
    ]
    assert cli("status", "x")[2].endswith(
        "redirects to https://127.0.0.1/apis: pass this URL as --host\n"
    )


def test_a_renewed_token_file_is_used_at_once(kubeflow: Kubeflow, token: Path) -> None:
    from kfp_server_api import HealthzServiceApi

    client = connect(kubeflow.url, *credentials(kubeflow.url, str(token)))
    HealthzServiceApi(client).healthz_service_get_healthz()
    token.write_text("renewed")
    HealthzServiceApi(client).healthz_service_get_healthz()
    sent = [request.headers["authorization"] for request in kubeflow.requests]
    assert sent == [f"Bearer {SECRET}", "Bearer renewed"]


def test_the_pods_token_is_sent_only_to_cluster_services(
    monkeypatch: pytest.MonkeyPatch, token: Path
) -> None:
    monkeypatch.setattr(connection, "POD_TOKEN", token)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert server_address("") == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
    assert credentials(server_address(""))[0].read() == SECRET
    assert credentials("https://kubeflow.example.com/pipeline") == (None, None)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("https://kf.example.com/pipeline/#/experiments", "https://kf.example.com/pipeline"),
        ("https://kf.example.com/_/pipeline/?ns=team-a#/runs", "https://kf.example.com/pipeline"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
    ],
)
def test_a_browser_link_is_accepted_as_host(given: str, wanted: str) -> None:
    assert server_address(given) == wanted


@pytest.mark.parametrize("host", ["", "kf.example.com", "ftp://kf", "https://"])
def test_an_invalid_address_is_rejected(host: str) -> None:
    with pytest.raises(ValueError, match="https://kubeflow.example.com/pipeline"):
        server_address(host)


@pytest.mark.parametrize(
    "words",
    [
        ["--token", SECRET],
        [f"--token={SECRET}"],
        ["--cookie", f"a={SECRET}"],
        ["--existing-token", SECRET],
        ["--token-file", SECRET],
        ["--token-file", SECRET * 20],
        ["--cookie-file", f"a={SECRET}"],
        ["--host", f"https://me:{SECRET}@kf.example.com"],
    ],
    ids=lambda words: words[0],
)
def test_a_misplaced_secret_is_rejected(kubeflow: Kubeflow, cli: Run, words: list[str]) -> None:
    code, out, said = cli("status", "x", *words)
    assert code == 1 and len(said.splitlines()) == 1 and SECRET not in out + said
    assert not kubeflow.requests


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("token", f"{SECRET}\nX-Evil: 1"),
        ("token", f"{SECRET} {SECRET}"),
        ("token", ""),
        ("token", f"{SECRET}é"),
        ("cookie", SECRET),
        ("cookie", f"a={SECRET}\nb=c"),
        ("token", "\udcff"),
    ],
)
def test_an_invalid_secret_file_is_rejected(cli: Run, tmp_path: Path, kind: str, text: str) -> None:
    (tmp_path / "file").write_bytes(text.encode(errors="surrogateescape"))
    code, _, said = cli("status", "x", f"--{kind}-file", tmp_path / "file")
    assert code == 1 and len(said.splitlines()) == 1 and f"--{kind}-file: " in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            failing(401, f"bad {SECRET}"),
            "does not accept the credentials from --token-file (401): they have expired",
        ),
        (
            failing(403, f"user with {SECRET} cannot get runs\nin team-a"),
            "(403): user with *** cannot get runs in team-a",
        ),
        (lambda handler: handler.send(403, "RBAC: access denied"), "(403): RBAC: access denied"),
        (failing(400, f"Invalid {SECRET}"), "returned 400 Bad Request: Invalid ***"),
        (
            page,
            "returned a web page instead of a Kubeflow Pipelines API response: the credentials from --token-file have expired",
        ),
        (
            lambda handler: handler.send(200, "ok"),
            "returned other text instead of a Kubeflow Pipelines API response",
        ),
        (lambda handler: handler.send(502, "<html>nginx</html>"), "returned 502 Bad Gateway"),
    ],
)
def test_an_error_is_reported_in_one_line_without_secrets(
    kubeflow: Kubeflow, cli: Run, token: Path, answer: Callable, said: str
) -> None:
    kubeflow.plan["GET /runs/x"] = [answer]
    code, out, line = cli("status", "x", "--token-file", token, "--retries", 0)
    assert code == 1 and not out and len(line.splitlines()) == 1
    assert said in line and SECRET not in line


def test_a_traceback_contains_no_secret(kubeflow: Kubeflow, token: Path) -> None:
    from kfp_server_api import HealthzServiceApi

    both = credentials(kubeflow.url, str(token))
    client = connect(kubeflow.url, *both, retries=0)
    for answer in (failing(500, SECRET), failing(401, SECRET), cut):
        kubeflow.plan["GET /healthz"] = [answer]
        with pytest.raises(ServerError) as caught:
            HealthzServiceApi(client).healthz_service_get_healthz()
        assert caught.value.__context__ is None
        assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(both)


def test_credentials_are_required_only_if_the_server_requests_them(
    kubeflow: Kubeflow, cli: Run
) -> None:
    kubeflow.token = SECRET
    text = "requires authentication (401): pass a token (--token-file FILE or KFP_TOKEN)"
    assert text in cli("status", "x")[2]


@pytest.mark.parametrize("trouble", [failing(503), failing(429), failing(500), cut, stalling])
def test_a_failed_read_is_retried(kubeflow: Kubeflow, cli: Run, trouble: Callable) -> None:
    kubeflow.kept["experiments"].append({"experiment_id": "e"})
    kubeflow.kept["runs"].append(
        {"run_id": "x", "experiment_id": "e", "display_name": "a run", "state": "RUNNING"}
    )
    kubeflow.plan["GET /runs/x"] = [trouble, trouble]
    code, out, said = cli("status", "x", "--timeout", 1 if trouble is stalling else 60)
    assert code == 0 and "state RUNNING" in out
    assert kubeflow.words().count("GET /runs/x") == 3 and said.count("; retrying in") == 2


def test_a_permanent_server_error_ends_the_retries(kubeflow: Kubeflow, cli: Run) -> None:
    kubeflow.plan["GET /runs/x"] = [failing(503, "no database")] * 9
    code, _, said = cli("status", "x", "--retries", 2)
    assert code == 1 and len(kubeflow.requests) == 3
    last = f"pipeline: {kubeflow.url} returned 503 Service Unavailable: no database"
    assert said.splitlines()[-1] == last


def test_a_stalled_connection_ends_at_its_timeout(kubeflow: Kubeflow, cli: Run) -> None:
    kubeflow.plan["GET /runs/x"] = [stalling] * 2
    code, _, said = cli("status", "x", "--timeout", 0.3, "--retries", 1)
    assert code == 1 and "no response within 0.3 s" in said and len(kubeflow.requests) == 2


def test_a_refused_connection_is_retried_but_an_unknown_host_is_not(cli: Run) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code, _, said = cli("status", "x", "--host", f"http://127.0.0.1:{port}", "--retries", 1)
    assert code == 1 and "retrying in" in said.splitlines()[0]
    assert said.endswith("Connection refused\n")
    code, _, said = cli("status", "x", "--host", "http://nowhere.invalid", "--retries", 5)
    assert code == 1 and said == "pipeline: http://nowhere.invalid: no such host\n"
    for host in ("https://kf:99999", "https://kf:port", "http://kf..example.com"):
        code, _, said = cli("status", "x", "--host", host, "--retries", 5)
        assert code == 1 and said == f"pipeline: {host}: invalid host name or port\n"


def test_an_untrusted_certificate_is_rejected(cli: Run, tmp_path: Path) -> None:
    path = certificate(tmp_path)
    with serving(Kubeflow(path)) as secure:
        code, _, said = cli("status", "x", "--host", secure.url)
        assert code == 1 and "no TLS connection" in said and "certificate" in said
        assert "--ca-file" in said
        assert len(said.splitlines()) == 1 and not secure.requests
        assert "has no run" in cli("status", "x", "--host", secure.url, "--ca-file", path)[2]
        plain = secure.url.replace("https", "http")
        assert cli("status", "x", "--host", plain, "--retries", 0)[0] == 1
    code, _, said = cli("status", "x", "--ca-file", tmp_path / "none.pem")
    assert code == 1 and said.endswith("none.pem: no such file\n")


def test_https_to_a_server_without_tls_suggests_http(kubeflow: Kubeflow, cli: Run) -> None:
    code, _, said = cli("status", "x", "--host", kubeflow.url.replace("http", "https"))
    assert code == 1 and len(said.splitlines()) == 1
    assert "use http:// for a server without TLS" in said
