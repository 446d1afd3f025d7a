"""The champion: the version of a model with the alias `champion`, which the gate protects.

Metrics are comparable only if they were measured on the same validation data with the same
settings. Otherwise, the champion is evaluated again with the candidate's data and settings, and the
result is stored with the champion's version.

Processes that share a folder promote one after the other. Other processes can promote at the same
time, as MLflow cannot set an alias conditionally. Each process first records its promotion in a
tag. If its version is the best of all recently recorded versions, the process sets the alias, reads
the records again, and corrects the alias until it refers to the best version. A version that a user
forced or restored in place of the same champion counts as the best. If a process is killed before
it has corrected the alias, promote the best version again.
"""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.config import Config, GateConfig
from vitdet.data.protocol import Protocol
from vitdet.files import locked
from vitdet.tracking import gate as gates
from vitdet.tracking import history
from vitdet.tracking.address import hide_credentials
from vitdet.tracking.client import Client, first_line
from vitdet.tracking.evaluations import known_metrics, read_evaluation, save_evaluation, tags_of
from vitdet.tracking.experiments import check_server
from vitdet.tracking.gate import Evaluation, Verdict, compare, flaw, label, missing
from vitdet.tracking.history import ALIAS as ALIAS
from vitdet.tracking.history import PROMOTED, Event, champion_of, events
from vitdet.tracking.mlflow import connect

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

# Evaluates a checkpoint; writes plots and matches to the folder and returns the metrics.
Evaluate = Callable[[Path, Path], Mapping[str, float | None]]


@dataclass(frozen=True)
class Evaluated:
    """The metrics of a model version, or the reason why its evaluation failed (`failure`)."""

    version: str
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    failure: str = ""


def evaluation_like(config: Config, class_names: Sequence[str], protocol: Protocol) -> Evaluate:
    """Return a function that evaluates a champion with a candidate's config, classes and data."""
    from vitdet.evaluation.evaluator import evaluate_alike

    data = protocol.fingerprint
    return partial(evaluate_alike, config=config, class_names=class_names, val_fingerprint=data)


def is_known(
    protocol: Protocol, gate: GateConfig, *, uri: str, folder: Path, model_name: str
) -> bool:
    """Return True if the champion's evaluation under this protocol is stored or no champion exists.

    Raises ConnectionError if MLflow does not respond, like the other functions of this module.
    """
    model = _Model(connect(uri, folder), model_name, protocol, gate)
    champion = model.champion()
    return champion is None or not missing(gate, model.read(champion))


def evaluate_champion(
    protocol: Protocol,
    gate: GateConfig,
    evaluate: Evaluate,
    *,
    uri: str,
    folder: Path,
    model_name: str,
) -> Evaluated | None:
    """Evaluate the champion under this protocol and store the result, unless it is already stored.

    Returns None if there is no champion. An exception during the download or in `evaluate` becomes
    the result's `failure`; unexpected exceptions are also logged with their traceback.
    """
    model = _Model(connect(uri, folder), model_name, protocol, gate)
    champion = model.champion()
    if champion is None:
        return None
    known = model.read(champion)
    if not missing(gate, known):
        return Evaluated(str(champion.version), known.metrics)
    return model.evaluate(evaluate, champion)


def judge(
    candidate: Evaluation,
    protocol: Protocol,
    gate: GateConfig,
    *,
    uri: str,
    folder: Path,
    model_name: str,
    evaluated: Evaluated | None = None,
    evaluate: Evaluate | None = None,
    version: str = "",
) -> Verdict:
    """Compare a candidate with the champion under the same protocol.

    A candidate passes if `flaw` finds no reason against it and there is no champion, it is already
    the champion, or `compare` prefers it. A version that was rolled back does not pass.

    Args:
        evaluated: An earlier result of `evaluate_champion`, used if `evaluate` is not passed.
        evaluate: Evaluates the champion if no evaluation under this protocol is stored. If neither
            `evaluate` nor `evaluated` is passed, the candidate does not pass in this case.
        version: The candidate's version; "" if it is not registered.
    """
    model = _Model(connect(uri, folder), model_name, protocol, gate)
    reevaluate = partial(model.evaluate, evaluate) if evaluate else lambda _: evaluated
    return model.judge(model.champion(), candidate, version, reevaluate)


def promote(
    version: str,
    candidate: Evaluation,
    protocol: Protocol,
    gate: GateConfig,
    *,
    uri: str,
    folder: Path,
    model_name: str,
    evaluated: Evaluated | None = None,
) -> Verdict:
    """Make this version the champion if it still passes the gate.

    Another version may have been promoted since `judge` accepted this one.
    """
    client = connect(uri, folder)
    model = _Model(client, model_name, protocol, gate)
    with promoting(folder):
        champion = model.champion()
        verdict = model.judge(champion, candidate, version, lambda _: evaluated)
        if not verdict.passed:
            return verdict
        is_champion = champion is not None and str(champion.version) == version
        known = known_metrics(client.get_model_version(model_name, version), protocol)
        if not is_champion or gate.metric not in known:
            stored = tags_of(known)
            for key, value in tags_of(candidate.metrics).items():
                if key == gate.metric or stored.get(key) != value:
                    client.set_model_version_tag(model_name, version, protocol.tag(key), value)
        if is_champion:
            return verdict
        before = "" if champion is None else str(champion.version)
        event = history.record(client, model_name, version, PROMOTED, before, verdict.reason)
        ap = float(tags_of(candidate.metrics)[gate.metric])
        best = model.best(event, ap)
        # if another version is better, the process that promotes it sets the alias
        previous = None if best[1] == version else best
        while best != previous:
            client.set_registered_model_alias(model_name, ALIAS, best[1])
            previous, best = best, model.best(event, ap)
        if best[1] != version and all(e.before != version for e in events(client, model_name)):
            history.withdraw(client, model_name, event)
            shown = f"with {label(gate)} {best[0]:.4g} was promoted"
            shown = shown if best[0] <= 100 else "was made the champion"
            return Verdict(False, f"{verdict.reason}; version {best[1]} {shown} at the same time")
    return verdict


def update_tags(
    client: Client,
    folder: Path,
    version: ModelVersion,
    metrics: Mapping[str, float | None],
    protocol: Protocol,
) -> bool:
    """Update a version's tags with metrics that were measured under this protocol.

    Stored metrics of another protocol move to the tags for that protocol. Nothing changes if the
    protocol's data or the box AP is unknown, or if the version is the champion and already has a
    box AP under this protocol. Returns whether the tags were updated.
    """
    if not protocol.fingerprint or metrics.get("box_ap") is None:
        return False
    name, number = version.name, str(version.version)
    with promoting(folder):
        version = client.get_model_version(name, number)
        is_champion = champion_of(client, name) == number
        if is_champion and "box_ap" in known_metrics(version, protocol):
            return False
        tags, new = version.tags, tags_of(metrics)
        new |= {protocol.tag(key): new[key] for key in list(new) if protocol.tag(key) in tags}
        new |= protocol.tags()
        before = Protocol(tags.get("val_fingerprint", ""), tags.get("evaluate_settings", ""))
        if before != protocol:
            known = tags_of(known_metrics(version, before))
            new |= {before.tag(key): value for key, value in known.items()}
            for key in (known.keys() & tags.keys()) - new.keys():  # not measured in this evaluation
                client.delete_model_version_tag(name, number, key)
        for key, value in new.items():
            if tags.get(key) != value:
                client.set_model_version_tag(name, number, key, value)
    return True


@contextmanager
def promoting(folder: Path) -> Iterator[None]:
    """Lock the champion's alias and tags against other processes that share `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".champion.lock"
    with locked(path, waiting=f"{path}: waiting for another process that updates the registry"):
        yield


@dataclass(frozen=True)
class _Model:
    """A registered model whose champion is compared with candidates under a protocol."""

    client: Client
    model_name: str
    protocol: Protocol
    gate: GateConfig

    def champion(self) -> ModelVersion | None:
        number = champion_of(self.client, self.model_name)
        return None if number is None else self.client.get_model_version(self.model_name, number)

    def read(self, version: ModelVersion) -> Evaluation:
        matches = gates.compares_matches(self.gate)
        return read_evaluation(self.client, version, self.protocol, matches)

    def evaluate(self, evaluate: Evaluate, champion: ModelVersion) -> Evaluated:
        """Evaluate the champion and store the result; see `evaluate_champion`."""
        from mlflow.exceptions import MlflowException

        from vitdet.tracking.packaged_model import download_checkpoint

        uri, name, number = self.client.uri, champion.name, str(champion.version)
        try:
            with tempfile.TemporaryDirectory(prefix="vitdet-champion-") as work:
                plots = Path(work) / "plots"
                metrics = evaluate(download_checkpoint(uri, name, number, Path(work)), plots)
                ap = metrics.get(self.gate.metric)
                if ap is None or not 0 <= ap <= 100:
                    raise ValueError(f"{label(self.gate)} is {ap}")
                save_evaluation(self.client, champion, self.protocol, metrics, plots)
        except Exception as error:  # includes errors of storage clients and out-of-memory errors
            check_server(self.client)  # raises if the server, not the champion, is the cause
            line, kind = first_line(error) if str(error).strip() else "", type(error).__name__
            expected = isinstance(error, MlflowException | OSError | ValueError | LookupError)
            if not expected or isinstance(error, KeyError | IndexError):
                shown = hide_credentials(traceback.format_exc())
                log.warning("the champion, version %s, cannot be evaluated\n%s", number, shown)
                line = f"{kind}: {line}" if line else ""
            return Evaluated(number, failure=f"cannot be evaluated: {line or kind}")
        return Evaluated(number, metrics)

    def judge(
        self,
        champion: ModelVersion | None,
        candidate: Evaluation,
        version: str,
        evaluate: Callable[[ModelVersion], Evaluated | None],
    ) -> Verdict:
        """Compare a candidate with the champion; see the function `judge`."""
        client, gate = self.client, self.gate
        if reason := flaw(gate, candidate):
            return Verdict(False, reason)
        shown = f"{label(gate)} {candidate.metrics[gate.metric]:.4g}"
        if champion is None:
            return Verdict(True, f"{shown}: the first champion")
        model, number = champion.name, str(champion.version)
        name = f"the champion, version {number}"
        if number == version:
            return Verdict(True, f"{shown}: already {name}")
        if undone := history.rolled_back(events(client, model), version):
            because = undone.reason and f" ({undone.reason})"
            return Verdict(
                False,
                f"version {version} was rolled back to version {undone.version} at {undone.time}"
                f"{because}; `vitdet promote {model} --version {version} --force REASON` makes it "
                "the champion again",
            )
        before, failure = self.read(champion), ""
        if missing(gate, before):
            evaluated = evaluate(champion)
            if evaluated is not None and evaluated.version == number:
                failure = evaluated.failure
                stored = self.read(client.get_model_version(model, number))
                before = Evaluation({**evaluated.metrics, **stored.metrics}, stored.matches)
        if what := missing(gate, before):
            return Verdict(
                False,
                f"{shown}: {name}, has no {what} on this validation data with these settings "
                f"({failure or 'not evaluated; run the command or pipeline again'})",
            )
        return compare(gate, candidate, before, name)

    def best(self, event: Event, ap: float) -> tuple[float, str]:
        """Return (AP, version) of the best version: the promoted version or one of its rivals.

        In a tie, the version with the lowest number is the best. A version that a user forced or
        restored in place of the same champion has infinite AP.
        """
        found = [(ap, event.version)]
        for rival in history.rivals(events(self.client, self.model_name), event):
            other = self.client.get_model_version(self.model_name, rival.version)
            known = known_metrics(other, self.protocol).get(self.gate.metric, -1.0)
            by_user = rival.action != PROMOTED and rival.before == event.before
            found.append((float("inf") if by_user else known, rival.version))
        return max(found, key=lambda pair: (pair[0], -int(pair[1])))
