"""The gate: which version of the registered model is the best, by box AP on one and the same data.

The registry's alias `champion` points to it. What was measured on other data cannot be compared and does not count.
AP is compared in the four digits that a version's tags hold.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.tracking.mlflow import connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate takes the champion's place, and why, in one line."""

    passed: bool
    reason: str


def judge(
    ap: float | None, dataset_digest: str, *, uri: str, folder: Path, model_name: str
) -> Verdict:
    """Holds a box AP in percent, measured on this data, against the champion of a registered model.

    The first model wins, a tie does not. Raises ConnectionError where MLflow does not answer.
    """
    client, _ = connect(None, uri, folder)
    return _judge(client, ap, dataset_digest, model_name)


def promote(
    version: str, ap: float | None, dataset_digest: str, *, uri: str, folder: Path, model_name: str
) -> Verdict:
    """Makes this version the champion if it is still better: another may have been promoted since it was judged.

    Of several processes that share `folder` one promotes at a time.
    """
    client, _ = connect(None, uri, folder)
    with _alone(folder):
        verdict = _judge(client, ap, dataset_digest, model_name)
        if verdict.passed:
            client.set_registered_model_alias(model_name, ALIAS, version)
    return verdict


def _judge(client: MlflowClient, ap: float | None, dataset_digest: str, model_name: str) -> Verdict:
    if ap is None or not 0 <= ap <= 100:
        return Verdict(False, f"box AP is {ap}: nothing to compare")
    models = client.search_registered_models(f"name = '{model_name}'")
    number = models[0].aliases.get(ALIAS) if models else None
    if number is None:
        return Verdict(True, f"box AP {ap:.4g}: the first champion")
    champion = client.get_model_version(model_name, number)
    before, data = champion.tags.get("box_ap"), champion.tags.get("dataset_digest")
    if data != dataset_digest or before is None:
        return Verdict(
            True,
            f"box AP {ap:.4g}: the champion, version {number}, does not count: it was measured "
            f"on other data ({data}, not {dataset_digest})",
        )
    better = float(f"{ap:.4g}") > float(before)
    relation = "above" if better else "no better than"
    return Verdict(
        better, f"box AP {ap:.4g}, {relation} the {before} of the champion, version {number}"
    )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".champion.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
