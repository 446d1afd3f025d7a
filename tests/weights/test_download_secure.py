"""Downloads over TLS and a proxy: untrusted certificates are rejected, as are redirects that leave TLS."""

from __future__ import annotations

import datetime
import ipaddress
import random
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.helpers.runs import refused
from tests.helpers.web import Web, serve, status
from tests.weights.test_download import QUICK, Seen
from vitdet.datasets.download import download

CONTENT = random.Random(0).randbytes(30_000)


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(
        "urllib.request._opener", None
    )  # the opener caches certificates and proxies


def certificate(folder: Path) -> Path:
    """Write a key and a self-signed certificate for 127.0.0.1; return the file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "here")])
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([address]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    path.write_bytes(private + made.public_bytes(pem))
    return path


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[Web, str, Path]]:
    """Return a TLS server, its address and its certificate."""
    pem = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with Web() as web:
        web.content = CONTENT
        web.socket = context.wrap_socket(web.socket, server_side=True)
        thread = threading.Thread(
            target=web.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        thread.start()
        yield web, web.url.replace("http:", "https:"), pem
        web.shutdown()
        thread.join()


def test_an_untrusted_certificate_is_rejected_without_a_retry(
    secure: tuple[Web, str, Path], tmp_path: Path
) -> None:
    web, url, _ = secure
    with refused(f"^{url}/a: .*certificate verify failed", ConnectionError) as caught:
        download(f"{url}/a", tmp_path / "part", Seen(), QUICK)
    assert "times in a row" not in str(caught.value)
    assert not web.asked and not (tmp_path / "part").exists()


def test_a_private_certificate_authority_is_trusted(
    secure: tuple[Web, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url, pem = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    download(f"{url}/a", tmp_path / "part", Seen(), QUICK, len(CONTENT))
    assert (tmp_path / "part").read_bytes() == CONTENT


def test_a_redirect_from_https_to_http_is_rejected(
    secure: tuple[Web, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web, url, pem = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    with serve() as plain:
        plain.content = CONTENT
        web.plan = [status(302, Location=f"{plain.url}/a")]
        says = "redirects to an unencrypted address .*, whose content was not used"
        with pytest.raises(ValueError, match=says):
            download(f"{url}/a", tmp_path / "part", Seen(), QUICK)
    assert not (tmp_path / "part").exists()


def test_the_proxy_of_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as proxy:
        proxy.content = CONTENT
        monkeypatch.setenv("http_proxy", proxy.url)
        url = "http://images.example.org/zips/a.zip"
        download(url, tmp_path / "part", Seen(), QUICK, len(CONTENT))
        assert [path for path, _ in proxy.asked] == [url]
    assert (tmp_path / "part").read_bytes() == CONTENT
