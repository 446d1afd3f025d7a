"""Fixtures: a fake Kubeflow Pipelines server, and the command line that talks to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.kubeflow import Kubeflow, Run, command, serving


@pytest.fixture
def kubeflow() -> Iterator[Kubeflow]:
    with serving(Kubeflow()) as server:
        yield server


@pytest.fixture
def cli(
    kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Return `python -m pipeline`, run in this process."""
    return command(kubeflow, monkeypatch, capsys)


@pytest.fixture
def run(cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return `cli` with an empty pipeline for submit, and a polling interval of 10 ms."""
    package = tmp_path / "package.yaml"
    parameters = {name: {"parameterType": "LIST"} for name in ("recipes", "overrides")}
    package.write_text(yaml.safe_dump({"root": {"inputDefinitions": {"parameters": parameters}}}))
    # `test_submit` covers this check
    monkeypatch.setattr("pipeline.cli.submit.check_recipes", lambda *_: True)
    return lambda verb, *words: cli(
        verb, *words, "--every", 0.01, *(["--package", package] if verb == "submit" else [])
    )
