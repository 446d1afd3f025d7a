"""Detection of truncated files, and of files that are not weights, by signature and length."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

HEAD = 512  # bytes read to identify a file
LIMIT = 100 << 20  # maximum length of a safetensors header in bytes
PAGE = "an HTML page; the download may require a login or a different URL"
JSON = "a JSON document, such as a server's error or an index of other files"
# Descriptions of files that are not weights, by their first bytes (TEXTS: in lower case)
TEXTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull` in its "
    "repository",
    b"<!doctype html": PAGE,
    b"<html": PAGE,
    b"<?xml": "an XML document, such as a storage server's error; download the file again",
    b'{"': JSON,
    b"{\n": JSON,
    b"{\r\n": JSON,
}
BINARIES = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"BZh": "a bzip2 archive; unpack it first",
    b"\xfd7zXZ": "an xz archive; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
    b"\x89HDF": "an HDF5 file (Keras); expected PyTorch weights",
}
AGAIN = "copy or download it again"


def check_whole(path: Path) -> None:
    """Raise ValueError if the file is empty, truncated, or evidently not a weights file."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        raise ValueError(f"{path}: the file is empty; {AGAIN}")
    if not head.strip(b"\0"):
        raise ValueError(f"{path}: the file begins with zero bytes; {AGAIN}")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signatures, start in ((TEXTS, text), (BINARIES, head)):
        for signature, what in signatures.items():
            if start.startswith(signature):
                raise ValueError(f"{path}: this is {what}")
    if path.suffix == ".safetensors":
        _check_safetensors(path, head)
    elif head.startswith(b"PK"):
        _check_zip(path)


def _check_safetensors(path: Path, head: bytes) -> None:
    """Check the file's length against its header; the reader detects other damage."""
    size, length = path.stat().st_size, int.from_bytes(head[:8], "little")
    if length > LIMIT:
        what = "its first 8 bytes are not a valid header length"
        raise ValueError(f"{path}: not a safetensors file: {what}")
    expected = 8 + length
    if size >= expected:
        with open(path, "rb") as file:
            file.seek(8)
            content = file.read(length)
        try:
            header = json.loads(content)
            header.pop("__metadata__", None)
            expected += max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return
    if size < expected:
        raise ValueError(f"{path}: truncated to {size:,} of {expected:,} bytes; {AGAIN}")


def _check_zip(path: Path) -> None:
    """Check that a zip archive is complete and has weights; the reader detects other damage."""
    try:
        complete, names = zipfile.is_zipfile(path), list[str]()
        if complete:
            with zipfile.ZipFile(path) as file:
                names = file.namelist()
    except Exception:  # a damaged zip directory can raise any exception
        return
    if not complete:
        raise ValueError(f"{path}: truncated: the zip central directory is missing; {AGAIN}")
    if path.suffix != ".npz" and not any(name.endswith("data.pkl") for name in names):
        shown = ", ".join(names[:3]) or "no files"
        what = f"this is a zip archive with {shown}, not a weights file"
        raise ValueError(f"{path}: {what}; unpack it first")
    if any(name.endswith("constants.pkl") for name in names):
        raise ValueError(f"{path}: this is a TorchScript program; expected a state dict")
