"""The running package as a wheel, which becomes part of a registered model.

A wheel is a zip archive of the package and four text files. This module builds the wheel without
pip, a build backend or network access. The same files and metadata result in the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

from vitdet.files import atomic_write

PACKAGE = Path(__file__).parents[1]
# the zip format's earliest date, for reproducible archives
STAMP = (1980, 1, 1, 0, 0, 0)


def build_wheel(folder: Path) -> Path:
    """Write FOLDER/vitdet-VERSION-py3-none-any.whl; return its path.

    Raises ValueError if the package's metadata cannot be found.
    """
    version, description = _metadata()
    info = f"vitdet-{version}.dist-info"
    files = {
        f"vitdet/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes()
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    files[f"{info}/METADATA"] = description.encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: vitdet\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nvitdet = vitdet.cli:main\n"
    rows = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    path = Path(folder) / f"vitdet-{version}-py3-none-any.whl"
    with (
        atomic_write(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, STAMP)
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return path


def requirements(extra: tuple[str, ...] = ()) -> list[str]:
    """Return vitdet's dependencies and `extra`, pinned to the installed versions."""
    _, description = _metadata()
    names = re.findall(r"(?m)^Requires-Dist: ([\w.-]+)[^;\n]*$", description)
    # without the local version (+cpu, +cu132), which public indexes do not offer
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in [*names, *extra]]


def _metadata() -> tuple[str, str]:
    """Return (version, content of METADATA) from the source tree or the installed package."""
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text())["project"]
        lines = [
            "Metadata-Version: 2.1",
            "Name: vitdet",
            f"Version: {table['version']}",
            f"Summary: {table['description']}",
            f"Requires-Python: {table['requires-python']}",
            *(f"Requires-Dist: {need}" for need in table["dependencies"]),
        ]
        return table["version"], "\n".join(lines) + "\n"
    try:
        installed = metadata.distribution("vitdet")
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{PACKAGE} is neither installed nor next to a pyproject.toml; install vitdet"
        ) from error
    return installed.version, installed.read_text("METADATA") or ""


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
