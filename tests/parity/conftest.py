"""Copies of golden cases with one changed file."""

import json
from pathlib import Path

import numpy as np
import pytest

import tests.parity.__main__ as parity
from tests.parity.case import load


def read(path):
    return load(path) if path.suffix == ".npz" else json.loads(path.read_text())


def write(path, content):
    assert not path.is_symlink(), "this would change the golden case itself"
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        path.write_text(json.dumps(content))


def link(folder, source, *names):
    """Link these files of a case into another folder."""
    for name in names:
        (folder / name).symlink_to(source / name)


def disturbed(array):
    """Change one element; of bytes, invert the first half, since one packed bit is within tolerance."""
    array = np.array(array)
    flat = array.reshape(-1)
    if array.dtype == np.uint8:
        flat[: max(len(flat) // 2, 1)] ^= 255
    elif array.dtype.kind == "f":
        flat[0] += 0.05 + 0.05 * abs(flat[0])
    else:
        flat[0] += 1
    return array


def shared_case_holds(folder: Path) -> None:
    if not folder.exists():
        pytest.skip("needs ../shared")
    assert parity.main([str(folder)]) == 0


@pytest.fixture
def altered(tmp_path, monkeypatch, capsys):
    """Return altered(case, file, content), which runs a changed copy of a case: exit code and output.

    kept: the only other files of the copy; compute: replaces the kind's `compute`.
    """

    def check(case, file, content, kept=None, compute=None):
        folder = tmp_path / case.name
        folder.mkdir()
        names = {path.name for path in case.iterdir()} - {file}
        link(folder, case, *(names if kept is None else names & kept))
        if file is not None:
            write(folder / file, content)
        if compute:
            kinds = tuple(kind._replace(compute=compute) for kind in parity.KINDS)
            monkeypatch.setattr(parity, "KINDS", kinds)
        return parity.main([str(folder)]), capsys.readouterr().out

    return check
