"""Read the inputs of a comparison from MLflow runs, checkpoints and COCO results files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.checkpoint import load_model_file
from vitdet.config import flatten, from_dict
from vitdet.data.protocol import Protocol
from vitdet.evaluation.evaluator import OF_FILES
from vitdet.evaluation.matches import MATCHES, Matches, load_matches
from vitdet.evaluation.results import Truth, kinds_of, read_results, read_truth
from vitdet.files import sha256
from vitdet.stages.workspace import result
from vitdet.tracking.measured import Measured, beside, read_measured
from vitdet.tracking.runs import MATCHES_FOLDER, default_folder, has_mlflow, require_mlflow

if TYPE_CHECKING:
    from vitdet.tracking.lookup import StoredRun


@dataclass(frozen=True)
class Compared:
    """An input of a comparison.

    Attributes:
        matches: matches by kind ("bbox", "segm").
        protocol: data and settings of the evaluation; None for a results file.
        settings: settings of the training run as text, by key; {} for a results file.
        metrics: last values of the MLflow run's metrics; {} if no run was read.
    """

    name: str
    matches: Mapping[str, Matches]
    protocol: Protocol | None
    settings: Mapping[str, str]
    metrics: Mapping[str, float]


class Reader:
    """Reads inputs. annotations, dataset: options for results files."""

    def __init__(self, annotations: Path | None, dataset: str) -> None:
        self.annotations, self.dataset = annotations, dataset

    def read(self, name: str) -> Compared:
        """Read an MLflow run, a checkpoint, a training run's output folder or a results file.

        Raises ValueError, OSError or LookupError if the input cannot be read or has no matches.
        """
        path = Path(name)
        if path.suffix == ".json":
            return self._results(path)
        if (path / "config.yaml").is_file():
            return self._checkpoint(result(path))
        if path.suffix == ".pt" or path.is_file():  # a run's name may contain dots
            return self._checkpoint(path)
        return self._run(name)

    @cached_property
    def _truth(self) -> Truth:
        if self.annotations is None:
            raise ValueError("a results file requires --annotations FILE")
        return read_truth(self.annotations, self.dataset == "lvis")

    def _results(self, path: Path) -> Compared:
        truth, found = self._truth, read_results(path)
        try:
            finished = OF_FILES[self.dataset](truth, found, kinds_of(found))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        matches = {kind: comparison.matches for kind, comparison in finished.items()}
        return Compared(str(path), matches, None, {}, {})

    def _checkpoint(self, path: Path) -> Compared:
        stored = load_model_file(path)
        config, digest = from_dict(stored["config"]), sha256(path)
        metrics: Mapping[str, float] = {}
        problem = ""
        with tempfile.TemporaryDirectory(prefix="vitdet-compare-") as work:
            candidates: list[Path] = []
            for parent in (path.absolute().parent, path.resolve().parent):  # path may be a link
                candidates += [parent, parent / "plots", parent / "evaluation"]
                candidates.append(parent.parent / "plots")
            if stored["run_id"] and has_mlflow():
                uri, folder = config.tracking.uri, default_folder(path.parent)
                try:
                    run, downloaded = _fetch(stored["run_id"], uri, folder, Path(work), tries=1)
                    metrics, candidates = run.metrics, [*candidates, downloaded]
                except (OSError, LookupError, ValueError) as error:  # local files may suffice
                    problem = f", and its MLflow run could not be read ({error})"
            for candidate in candidates:
                measured = _read_measured(candidate / MATCHES)
                if measured and measured.checkpoint_sha256 == digest:
                    matches = load_matches(candidate / MATCHES)
                    settings = {key: str(value) for key, value in flatten(config).items()}
                    return Compared(str(path), matches, measured.protocol, settings, metrics)
        raise ValueError(
            f"{path}: no per-image matches are stored for this checkpoint{problem}; run `vitdet "
            f"evaluate {path} --plots {path.parent / 'plots'}`"
        )

    def _run(self, name: str) -> Compared:
        require_mlflow()
        with tempfile.TemporaryDirectory(prefix="vitdet-compare-") as work:
            run, downloaded = _fetch(name, "", Path(), Path(work))
            measured = _read_measured(downloaded / MATCHES)
            if measured is None:
                raise ValueError(
                    f"{run.name} ({run.run_id}): the MLflow run has no per-image matches; use "
                    "`vitdet evaluate CHECKPOINT --plots FOLDER` with the run's checkpoint to log "
                    "them"
                )
            matches = load_matches(downloaded / MATCHES)
        return Compared(run.name, matches, measured.protocol, run.params, run.metrics)


def check_comparable(compared: Sequence[Compared]) -> None:
    """Raise ValueError if the known validation data or evaluation settings of inputs differ."""
    known = [(item.name, item.protocol) for item in compared if item.protocol is not None]
    for name, protocol in known[1:]:
        first, expected = known[0]
        for what, ours, theirs in (
            ("validation data (fingerprint)", expected.fingerprint, protocol.fingerprint),
            ("evaluate settings", expected.settings, protocol.settings),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{name} and {first} have different {what}: {theirs} and {ours}; evaluate "
                    "both on the same data with the same settings"
                )


def _fetch(
    name: str, uri: str, folder: Path, target: Path, tries: int | None = None
) -> tuple[StoredRun, Path]:
    """Download the matches of a run to `target`; return the run and the folder of the files."""
    from vitdet.tracking.lookup import download_file, find_run, open_store

    client = open_store(uri, folder, tries)
    run = find_run(client, name)
    downloaded = target
    for file in (MATCHES, beside(Path(MATCHES)).name):
        path = download_file(client, uri, folder, run.run_id, f"{MATCHES_FOLDER}/{file}", target)
        downloaded = path.parent if path else downloaded  # the store may create subfolders
    return run, downloaded


def _read_measured(path: Path) -> Measured | None:
    return read_measured(path) if path.is_file() else None
