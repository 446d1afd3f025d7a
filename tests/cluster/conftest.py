"""Fixtures: namespaces on the test API server, a copy of the manifests, a fake clock."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.launcher import client, follower, logs
from tests.conftest import ROOT
from tests.helpers.cluster import Scene, namespace_for, scene


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Return a scene whose pods run."""
    with scene(tmp_path_factory.mktemp("live"), reasons={137: "OOMKilled"}) as made:
        yield made


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Return a scene whose pods are created and stay Pending."""
    with scene(tmp_path_factory.mktemp("still"), node=False) as made:
        yield made


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    yield from namespace_for("test")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(ROOT / "manifests", tmp_path / "manifests")


class Clock:
    """Replaces the module `time`: only `sleep`, which returns at once, advances the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def use_clock(patch: pytest.MonkeyPatch) -> Clock:
    """Replace the launcher's clock, so that timeouts do not depend on the machine's load."""
    clock = Clock()
    for module in (client, follower, logs):
        patch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return use_clock(monkeypatch)
