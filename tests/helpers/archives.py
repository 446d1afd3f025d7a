"""Small archives in the shape of the published ones, and malicious variants."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import replace

from vitdet.datasets.published import SPLITS, Archive, archives

PICTURES = 12


def zipped(
    files: Mapping[str, bytes],
    method: int = zipfile.ZIP_DEFLATED,
    kinds: Mapping[str, int] | None = None,
) -> bytes:
    """Return a ZIP archive of the files; `kinds` sets the st_mode file type of some of them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        for name, content in files.items():
            info = zipfile.ZipInfo(name, (2017, 9, 1, 12, 0, 0))
            info.compress_type = method
            info.external_attr = ((kinds or {}).get(name, 0o100000) | 0o644) << 16
            opened.writestr(info, content)
    return buffer.getvalue()


def patched(archive: bytes, name: str, local: int, central: int, value: bytes) -> bytes:
    """Return the archive with bytes of a file's two headers replaced at these offsets (APPNOTE.TXT 4.3.7, 4.3.12)."""
    content = bytearray(archive)
    for signature, offset, start in ((b"PK\3\4", local, 30), (b"PK\1\2", central, 46)):
        at = content.find(signature)
        while content[at + start : at + start + len(name)] != name.encode():
            at = content.find(signature, at + 1)
            assert at >= 0
        content[at + offset : at + offset + len(value)] = value
    return bytes(content)


def declared(archive: bytes, name: str, size: int) -> bytes:
    """Return the archive with a false uncompressed size of the file."""
    return patched(archive, name, 22, 24, struct.pack("<I", size))


def encrypted(archive: bytes, name: str) -> bytes:
    """Return the archive with the file's encryption flag set."""
    return patched(archive, name, 6, 8, b"\1\0")


def renamed(archive: bytes, name: str, other: bytes) -> bytes:
    """Return the archive with a file renamed to a name of equal length, even one that zipfile rejects."""
    assert len(name) == len(other)
    return patched(archive, name, 30, 46, other)


def miniature(archive: Archive) -> tuple[Archive, bytes]:
    """Return a small version of a published archive, and its content: files of random bytes."""
    rng = random.Random(archive.name)
    if archive.prefix == "annotations/":
        kinds = [f"{kind}_{split}2017" for kind in ("captions", "instances") for split in SPLITS]
        names = [f"annotations/{kind}.json" for kind in kinds]
    else:
        pictures = [f"{archive.prefix}{number:012}.jpg" for number in range(PICTURES)]
        names = list(archive.members) or pictures
    files = {name: rng.randbytes(rng.randint(500, 3000)) for name in names}
    content = zipped({**({} if archive.members else {archive.prefix: b""}), **files})
    sizes = [len(files[name]) for name in names if archive.choose(name)]
    about = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return replace(archive, **about, count=len(sizes), unpacked=sum(sizes)), content


def miniatures(dataset: str, split: str = "") -> tuple[list[Archive], dict[str, bytes]]:
    """Return small versions of the archives, and their contents by path on a server."""
    made = [miniature(archive) for archive in archives(dataset, split)]
    return [archive for archive, _ in made], {path(archive): content for archive, content in made}


def path(archive: Archive) -> str:
    """Return the path of the archive's URL, e.g. /zips/val2017.zip."""
    return "/" + archive.url.split("/", 3)[3]
