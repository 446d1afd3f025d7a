"""Fixtures: a fake Kubeflow Pipelines server, and the command line that talks to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.kubeflow import Kubeflow, serving, waiting


@pytest.fixture
def kubeflow() -> Iterator[Kubeflow]:
    with serving(Kubeflow()) as server:
        yield server


@pytest.fixture
def pipeline(
    kubeflow: Kubeflow,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Callable[..., tuple[int, str, str]]:
    return waiting(kubeflow, monkeypatch, capsys, tmp_path)
