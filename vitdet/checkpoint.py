"""Files of a training: the state to go on from, and the finished detector. Plain data and tensors, no code."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitdet.config import Config, from_dict
from vitdet.credentials import hide_credentials, without_credentials
from vitdet.files import FULL, damaged_record, remove_abandoned, write_json, written
from vitdet.locks import locked
from vitdet.models import Detector, build_detector

FORMAT = "vitdet detector, version 1"
STATE = "vitdet training state, version 4"
STATE_3 = "vitdet training state, version 3"  # without the best evaluation
STATE_2 = "vitdet training state, version 2"  # without the scaler of fp16
STATE_1 = "vitdet training state, version 1"  # as version 2; each step drew other random numbers
STATES = (STATE, STATE_3, STATE_2, STATE_1)
# torch's words where the disk takes less than all
TORN = ("PytorchStreamWriter failed writing file", "unexpected pos")
# what is read of each, and of which type
MODEL = {
    "config": dict,
    "class_names": list | tuple,
    "model": dict,
    "run_id": str | None,
    "step": int,
}
OPTIONAL: dict[str, Any] = {"run_id": None, "step": 0}  # of a detector that others wrote
TRAINING = {
    **{key: MODEL[key] for key in ("config", "model", "run_id", "step")},
    **dict.fromkeys(("optimizer", "average", "meter", "metrics"), dict),
}
HEADER = "vitdet_detector"  # metadata of a .safetensors file: all but the weights, as JSON
MISSING = object()
log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A file that was cut off, or differs from its checksums."""


def save(path: Path, content: dict) -> None:
    """Writes plain data and tensors, all or nothing. Raises OSError with one line if the disk does not take it."""
    try:
        with written(path, sync=True) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch hides the system's own error behind one of its archive
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        if not isinstance(cause, OSError) and not _is_torn(cause):
            raise  # not the disk's fault
        raise _unwritten(path, cause) from error


def load(path: Path, *expected: str, verify: bool = True) -> dict:
    """Reads a file of ours without running code from it; its tensors are read when they are first looked at.

    verify: compare the content with its checksums. Raises FileNotFoundError, DamagedError when it is cut off or damaged, and
    ValueError when it is something else than one of `expected`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; expected the model.pt that `vitdet train` wrote"
        )
    if not _is_zip(path):
        raise DamagedError(
            f"{path}: not a whole vitdet checkpoint (it was cut off, or is another kind of file)"
        )
    try:
        if verify and (record := damaged_record(path)):
            raise ValueError(f"{record} differs from its checksum: the file is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: not a vitdet checkpoint (it holds other things than numbers and text, "
            "and may not run code)"
        ) from error
    except OSError:
        raise  # e.g. too many open files: says nothing of the content
    except Exception as error:  # a damaged file raises anything
        kind = ValueError if _is_out_of_memory(error) else DamagedError
        raise kind(f"{path}: not a whole vitdet checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") not in expected:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a {expected[0]!r} file, got {found!r}")
    _remove_credentials(path, content)
    return content


def load_model_file(path: str | Path) -> dict:
    """{config, class_names, model, run_id, step, fingerprints} of a finished detector; raises as `load` does.

    A .safetensors file is one of `save_safetensors`. Files of version 0.1 hold a dataset_digest instead of fingerprints.
    """
    read = _load_safetensors if Path(path).suffix == ".safetensors" else load
    content = OPTIONAL | read(Path(path), FORMAT)
    check_content(path, content, MODEL)
    return content


def save_safetensors(path: Path, content: dict) -> None:
    """Write a finished detector as safetensors: the weights, and all else as JSON in the metadata.

    content: as `load_model_file` returns it, which also reads this file.
    """
    weights = {name: tensor.contiguous() for name, tensor in content["model"].items()}
    header = {key: value for key, value in content.items() if key != "model"}
    with written(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt", HEADER: json.dumps(header)})


def _load_safetensors(path: Path, expected: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; expected a detector in safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            content = {**header, "model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, TypeError) as error:
        raise DamagedError(f"{path}: not a whole detector ({_first_line(error)})") from error
    if content.get("format") != expected:
        raise ValueError(
            f"{path}: holds weights without their config; expected a {expected!r} file"
        )
    _remove_credentials(path, content)
    return content


def _remove_credentials(path: Path, content: dict) -> None:
    """Remove the user and password of the tracking server from a config that version 0.1 stored."""
    config = content.get("config")
    tracking = config.get("tracking") if isinstance(config, dict) else None
    uri = tracking.get("uri") if isinstance(tracking, dict) else None
    if isinstance(uri, str) and (kept := without_credentials(uri)) != uri:
        _warn_of_credentials(path, hide_credentials(uri))
        content["config"] = config | {"tracking": tracking | {"uri": kept}}


@cache
def _warn_of_credentials(path: Path, uri: str) -> None:
    log.warning(
        "%s: the user and password in its tracking.uri %s are not used; set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or the whole address as MLFLOW_TRACKING_URI",
        path,
        uri,
    )


def check_content(path: str | Path, content: dict, kinds: Mapping[str, Any]) -> None:
    """Raises ValueError for a file of ours that lacks one of these keys, or holds something else under it."""
    for key, kind in kinds.items():
        if not isinstance(content.get(key, MISSING), kind):
            found = f"is a {type(content[key]).__name__}" if key in content else "is missing"
            raise ValueError(
                f"{path}: {key!r} {found}; the file was changed after `vitdet train` wrote it, or not written by it"
            )


def read_detector_file(path: str | Path) -> tuple[dict[str, Tensor], Config, tuple[str, ...]]:
    """The weights of a finished detector, its config and its class names; raises as `load` does."""
    content = load_model_file(path)
    try:
        return content["model"], from_dict(content["config"]), tuple(content["class_names"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its config is not one of this version: {error}") from error


def restore_detector(path: str | Path) -> tuple[Detector, Config, tuple[str, ...]]:
    """The detector of a checkpoint (on the CPU, in evaluation mode), its config and its class names."""
    weights, config, names = read_detector_file(path)
    detector = build_detector(config.model, config.evaluate)
    load_weights(detector, weights, path)
    return detector.eval(), config, names


def load_weights(detector: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Puts all weights of a file into the detector of its config; raises ValueError when one does not fit."""
    strange = [
        name
        for name, one in weights.items()
        if not (isinstance(name, str) and isinstance(one, Tensor)) or one.is_complex()
    ]
    if strange:
        raise ValueError(
            f"{path}: {len(strange)} of its weights are not real tensors with a name, such as {strange[0]!r}; "
            "the file was changed after `vitdet train` wrote it, or not written by it"
        )
    try:
        detector.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: its weights do not fit its config: {' '.join(str(error).split())[:300]}"
        ) from error


class Checkpoints:
    """The training states in a folder, of which the last `keep` stay.

    damaged: the files that `latest` passed over, with the reasons.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.damaged: dict[Path, str] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While a process writes states here; raises ValueError in all others. The lock ends with the process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.folder / ".lock"))
            except BlockingIOError as error:
                raise ValueError(
                    f"{self.folder}: another training is writing here; wait for its end or choose "
                    "another --output"
                ) from error
            remove_abandoned(self.folder)
            yield

    def save(self, step: int, content: dict) -> Path:
        """Writes the state after `step` steps and removes those that are too old."""
        path = self.folder / f"step_{step:08d}.pt"
        _evaluation_of(path).unlink(missing_ok=True)  # of a state that was removed
        save(path, {"format": STATE, "step": step, **content})
        # a killed process left these
        for old in [*self.all()[: -self.keep], *self.folder.glob(".step_*.tmp")]:
            old.unlink()
            _evaluation_of(old).unlink(missing_ok=True)
        return path

    def save_evaluation(self, step: int, content: dict) -> None:
        """Writes what an evaluation adds to the state after `step` steps, instead of that once more.

        A small JSON file beside the state; `latest` returns both as one.
        """
        path = _evaluation_of(self.folder / f"step_{step:08d}.pt")
        try:
            write_json(path, content, sync=True)
        except OSError as error:
            raise _unwritten(path, error) from error

    def all(self) -> list[Path]:
        """The whole states, oldest first."""
        return sorted(
            p for p in self.folder.glob("step_*.pt") if re.fullmatch(r"step_\d{8}\.pt", p.name)
        )

    def newest(self) -> int:
        """The step of the newest state, whole or not; 0 without one."""
        return max(map(_step_of, self.all()), default=0)

    def latest(self, verify: bool = True, up_to: int | None = None) -> dict | None:
        """The newest whole state (up_to: of those after at most so many steps), or None if there are no states.

        Damaged ones are passed over; `set_aside` renames them. An evaluation that is damaged is left out. Raises as `load`
        does, for the newest one, if all are damaged, and says what to do.
        """
        states = [path for path in self.all() if up_to is None or _step_of(path) <= up_to]
        for path in reversed(states):
            try:
                state = load(path, *STATES, verify=verify)
            except DamagedError as error:
                self.damaged[path] = str(error)
                continue
            check_content(path, state, {"step": int})
            try:
                return state | _read_evaluation(path)
            except DamagedError as error:
                self.damaged[_evaluation_of(path)] = str(error)
                return state
        if not states:
            return None
        them = (
            "it" if len(states) == 1 else f"it and the {len(states) - 1} before, damaged as well,"
        )
        raise DamagedError(f"{self.damaged[states[-1]]}; remove {them} to begin anew")

    def set_aside(self, start: int) -> None:
        """Renames the files that are damaged, so that none is found again, when a training goes on from step `start`.

        To be called while `locked`. Warns of what is lost.
        """
        for path, reason in sorted(self.damaged.items()):
            kept, step = path.with_name(f"{path.name}.damaged"), _step_of(path)
            lost = (
                f"the training goes on from step {start}, and steps {start + 1} to {step} are repeated"
                if path.suffix == ".pt"
                else f"the metrics after step {step} are lost, and measured again if that is due"
            )
            path.replace(kept)
            if path.suffix == ".pt":
                _evaluation_of(path).unlink(missing_ok=True)
            log.warning("%s; it is kept as %s: %s", reason, kept.name, lost)
        self.damaged.clear()


def _is_zip(path: Path) -> bool:
    try:
        # of a path that may not be read, is_zipfile says that it is none
        with open(path, "rb") as file:
            return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # its end is damaged
        return False


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error)


def _step_of(path: Path) -> int:
    """The step of a state or its evaluation, from the file's name."""
    return int(path.stem.removeprefix("step_"))


def _evaluation_of(state: Path) -> Path:
    """The file that `Checkpoints.save_evaluation` writes beside this one."""
    return state.with_suffix(".json")


def _read_evaluation(state: Path) -> dict:
    path = _evaluation_of(state)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not a whole JSON file ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def _is_torn(cause: Exception) -> bool:
    return any(words in str(cause) for words in TORN)


def _unwritten(path: Path, cause: Exception) -> OSError:
    """The error, in one line, of a file that the disk did not take."""
    full = _is_torn(cause) or (isinstance(cause, OSError) and cause.errno in FULL)
    advice = "; free some space and run the same command again" if full else ""
    reason = _first_line(cause)
    if isinstance(cause, OSError) and cause.strerror:  # without the name, which comes first here
        reason = f"[Errno {cause.errno}] {cause.strerror}"
    return OSError(f"{path}: could not be written ({reason}){advice}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
