"""Fixtures of downloads: a server with small archives, and a function that fetches them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.archives import miniatures
from tests.helpers.web import Web, serve
from tests.weights.test_download import QUICK, Seen
from vitdet.datasets.fetch import fetch
from vitdet.datasets.published import Archive


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which is slow on a loaded machine."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def web() -> Iterator[Web]:
    """Return a mirror with small versions of both data sets."""
    with serve() as web:
        web.files = {**miniatures("coco")[1], **miniatures("lvis")[1]}
        yield web


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def get(web: Web, root: Path) -> Callable[..., bool]:
    def run(
        dataset: str = "coco",
        split: str = "",
        wanted: list[Archive] | None = None,
        mirror: str = web.url,
        **options: object,
    ) -> bool:
        archives = wanted or miniatures(dataset, split)[0]
        return fetch(archives, root, lambda _: Seen(), mirror, patience=QUICK, **options)

    return run
