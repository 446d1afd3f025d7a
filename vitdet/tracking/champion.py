"""The gate: decides by box AP whether a detector replaces the best version of the model.

The registry's alias `champion` points to the best version. Its AP is comparable only if it was
measured on the same validation data with the same settings as the candidate's; otherwise the
champion is re-evaluated and the result is stored in a tag of the version. AP is compared with four
significant digits, the precision of the tags.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.data.protocol import Protocol
from vitdet.locks import locked
from vitdet.tracking.mlflow import connect, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

ALIAS = "champion"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate replaces the champion, and why, in one line."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a model version; `failure`: why there is no AP."""

    version: str
    box_ap: float | None
    failure: str = ""


Evaluate = Callable[[Path], float | None]  # checkpoint -> box AP


def is_known(protocol: Protocol, *, uri: str, folder: Path, model_name: str) -> bool:
    """Return False if there is a champion whose AP under this protocol is unknown.

    Raises ConnectionError if MLflow does not respond, like all functions of this module.
    """
    client, _ = connect(None, uri, folder)
    champion = _champion(client, model_name)
    return champion is None or _known_ap(champion, protocol) is not None


def evaluate_champion(
    protocol: Protocol, evaluate: Evaluate, *, uri: str, folder: Path, model_name: str
) -> Evaluated | None:
    """Evaluate the champion's checkpoint and store its AP under this protocol in the registry.

    Returns the AP or the reason for a failure; None if there is no champion. Any Exception during
    the download or in `evaluate` is a failure; unexpected ones are logged with their traceback.
    """
    client, _ = connect(None, uri, folder)
    champion = _champion(client, model_name)
    if champion is None:
        return None
    ap = _known_ap(champion, protocol)
    return (
        _evaluate(client, champion, protocol, evaluate, uri, folder)
        if ap is None
        else (Evaluated(str(champion.version), ap))
    )


def judge(
    ap: float | None,
    protocol: Protocol,
    *,
    uri: str,
    folder: Path,
    model_name: str,
    evaluated: Evaluated | None = None,
    evaluate: Evaluate | None = None,
    checkpoint_sha256: str = "",
) -> Verdict:
    """Compare a box AP in percent with the champion's under the same protocol.

    The first model passes; a tie does not. The champion itself passes: it is recognized by
    checkpoint_sha256, the checksum of the candidate. evaluated: an earlier result of
    `evaluate_champion`. evaluate: evaluates the champion if its AP is unknown; without it, the
    candidate is rejected in this case.
    """
    client, _ = connect(None, uri, folder)

    def again(champion: ModelVersion) -> Evaluated | None:
        if evaluate is None:
            return evaluated
        return _evaluate(client, champion, protocol, evaluate, uri, folder)

    def is_candidate(champion: ModelVersion) -> bool:
        return bool(checkpoint_sha256) and checkpoint_sha256 == champion.tags.get(
            "checkpoint_sha256"
        )

    return _judge(client, ap, protocol, model_name, again, is_candidate)


def promote(
    version: str,
    ap: float | None,
    protocol: Protocol,
    *,
    uri: str,
    folder: Path,
    model_name: str,
    evaluated: Evaluated | None = None,
) -> Verdict:
    """Make this version the champion if it still passes `judge`.

    Another version may have been promoted in the meantime. Processes that share `folder` promote
    one at a time.
    """
    client, _ = connect(None, uri, folder)
    with _locked(folder):
        verdict = _judge(
            client,
            ap,
            protocol,
            model_name,
            lambda _: evaluated,
            lambda champion: str(champion.version) == version,
        )
        if verdict.passed:
            champion = _champion(client, model_name)
            is_itself = champion is not None and str(champion.version) == version
            if champion is None or not is_itself or _known_ap(champion, protocol) is None:
                client.set_model_version_tag(model_name, version, protocol.tag, f"{ap:.4g}")
            client.set_registered_model_alias(model_name, ALIAS, version)
    return verdict


def update_tags(
    version: str,
    metrics: Mapping[str, float],
    protocol: Protocol,
    *,
    uri: str,
    folder: Path,
    model_name: str,
) -> None:
    """Update the tags of a version with metrics that were measured under this protocol.

    An AP under another protocol is kept in the tag of that protocol. A champion whose AP under this
    protocol is known keeps its tags. Does nothing if the protocol's data is unknown.
    """
    if not protocol.fingerprint or "box_ap" not in metrics:
        return
    client, _ = connect(None, uri, folder)
    with _locked(folder):
        found, champion = (
            client.get_model_version(model_name, version),
            _champion(client, model_name),
        )
        is_champion = champion is not None and champion.version == found.version
        if is_champion and _known_ap(found, protocol) is not None:
            return
        tags = found.tags
        new = {key: f"{value:.4g}" for key, value in metrics.items()} | protocol.tags()
        if protocol.tag in tags:
            new[protocol.tag] = new["box_ap"]
        before = Protocol(tags.get("val_fingerprint", ""), tags.get("evaluate_settings", ""))
        if before != protocol and (known := _known_ap(found, before)) is not None:
            new[before.tag] = f"{known:.4g}"
        for key, value in new.items():
            if tags.get(key) != value:
                client.set_model_version_tag(model_name, version, key, value)


def _judge(
    client: MlflowClient,
    ap: float | None,
    protocol: Protocol,
    model_name: str,
    evaluate: Callable[[ModelVersion], Evaluated | None],
    is_candidate: Callable[[ModelVersion], bool],
) -> Verdict:
    if ap is None or not 0 <= ap <= 100:
        return Verdict(False, f"box AP is {ap}: cannot be compared")
    champion = _champion(client, model_name)
    if champion is None:
        return Verdict(True, f"box AP {ap:.4g}: the first champion")
    if is_candidate(champion):
        return Verdict(
            True, f"box AP {ap:.4g}: is already the champion, version {champion.version}"
        )
    before, failure = _known_ap(champion, protocol), ""
    if before is None:
        again = evaluate(champion)
        if again is not None and again.version == str(champion.version):
            before, failure = again.box_ap, again.failure
    name = f"the champion, version {champion.version}"
    if before is None:
        return Verdict(
            False,
            f"box AP {ap:.4g}: {name}, has no AP on this validation data with these settings "
            f"({failure or 'it was not evaluated on them; run this again'})",
        )
    better = float(f"{ap:.4g}") > float(f"{before:.4g}")
    relation = "above" if better else "no better than"
    return Verdict(better, f"box AP {ap:.4g}, {relation} the {before:.4g} of {name}")


def _champion(client: MlflowClient, model_name: str) -> ModelVersion | None:
    models = client.search_registered_models(f"name = '{model_name}'")
    number = models[0].aliases.get(ALIAS) if models else None
    return None if number is None else client.get_model_version(model_name, number)


def _known_ap(version: ModelVersion, protocol: Protocol) -> float | None:
    tags, own = version.tags, protocol.tags()
    if not own:
        return None
    ap = tags.get(protocol.tag)  # set when it was promoted or re-evaluated
    if ap is None and own == {key: tags.get(key) for key in own}:
        ap = tags.get("box_ap")
    return None if ap is None else float(ap)


def _evaluate(
    client: MlflowClient,
    champion: ModelVersion,
    protocol: Protocol,
    evaluate: Evaluate,
    uri: str,
    folder: Path,
) -> Evaluated:
    from mlflow.exceptions import MlflowException

    from vitdet.tracking.packaged_model import download_checkpoint

    number = str(champion.version)
    try:
        with tempfile.TemporaryDirectory(prefix="vitdet-champion-") as work:
            server = tracking_uri(uri, folder)
            ap = evaluate(download_checkpoint(server, champion.name, number, Path(work)))
        if ap is None or not 0 <= ap <= 100:
            raise ValueError(f"its box AP is {ap}")
    except Exception as error:  # also errors of storage clients, or out of memory
        connect(None, uri, folder)  # not a failure of the champion if the server does not respond
        line, kind = next(iter(str(error).splitlines()), ""), type(error).__name__
        expected = isinstance(error, MlflowException | OSError | ValueError | LookupError)
        if not expected or isinstance(error, KeyError | IndexError):
            log.warning("the champion, version %s, cannot be evaluated", number, exc_info=True)
            line = f"{kind}: {line}" if line else ""
        line = line or kind
        return Evaluated(number, None, f"it cannot be evaluated: {line}")
    client.set_model_version_tag(champion.name, number, protocol.tag, f"{ap:.4g}")
    return Evaluated(number, ap)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".champion.lock"
    with locked(path, waiting=f"{path}: waiting for another process that updates the champion"):
        yield
