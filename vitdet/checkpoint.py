"""Checkpoints of training runs and detectors; they contain only plain data and tensors."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
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
from vitdet.config.credentials import hide_credentials, without_credentials
from vitdet.files import (
    FULL,
    atomic_write,
    damaged_record,
    first_line,
    locked,
    remove_abandoned,
    write_json,
)
from vitdet.models import Detector, build_detector

FORMAT = "vitdet detector, version 1"
STATE = "vitdet training state, version 4"
# Version 3 lacks the best evaluation. Versions 1 and 2 also lack the fp16 gradient scaler; in
# version 1, the random numbers were derived differently.
STATE_3 = "vitdet training state, version 3"
STATE_2 = "vitdet training state, version 2"
STATE_1 = "vitdet training state, version 1"
STATES = (STATE, STATE_3, STATE_2, STATE_1)
# torch's messages after an incomplete write
TORN = ("PytorchStreamWriter failed writing file", "unexpected pos")
# keys of a detector's file and their types
MODEL = {
    "config": dict,
    "class_names": list | tuple,
    "model": dict,
    "run_id": str | None,
    "step": int,
}
OPTIONAL: dict[str, Any] = {"run_id": None, "step": 0}  # defaults of optional keys
TRAINING = {
    **{key: MODEL[key] for key in ("config", "model", "run_id", "step")},
    **dict.fromkeys(("optimizer", "average", "meter", "metrics"), dict),
}
HEADER = "vitdet_detector"  # .safetensors metadata key: all content except the weights, as JSON
MISSING = object()
MODIFIED = "the file was modified after `vitdet train` wrote it, or written by another program"
log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """Raised for a truncated or damaged file."""


def save(path: Path, content: dict) -> None:
    """Write plain data and tensors atomically. Raises OSError with a one-line message."""
    try:
        with atomic_write(path, sync=True) as temporary, open(temporary, "wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch replaces the system error with an error about its archive
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        if not isinstance(cause, OSError) and not _is_torn(cause):
            raise  # not an I/O error
        raise _write_error(path, cause) from error


def load(path: Path, *expected: str, verify: bool = True) -> dict:
    """Read a checkpoint without running code from it; tensors are memory-mapped.

    expected: accepted values of the key `format`. verify: whether to verify the checksums.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedError: the file is truncated, damaged or not a zip archive.
        ValueError: the file has an unexpected format, could run code, or does not fit in memory.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; expected a model.pt written by `vitdet train`"
        )
    if not _is_zip(path):
        raise DamagedError(
            f"{path}: not a complete vitdet checkpoint (truncated, or a different kind of file)"
        )
    try:
        if verify and (record := damaged_record(path)):
            raise ValueError(f"the checksum of {record} does not match: the file is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: not a vitdet checkpoint (it contains objects other than tensors and plain "
            "data, which could run code)"
        ) from error
    except OSError:
        raise  # e.g. too many open files: unrelated to the content
    except Exception as error:  # a damaged file can cause any exception
        if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in str(error):
            raise ValueError(f"{path}: does not fit in memory ({first_line(error)})") from error
        text = f"{path}: not a complete vitdet checkpoint ({first_line(error)})"
        raise DamagedError(text) from error
    if not isinstance(content, dict) or content.get("format") not in expected:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a {expected[0]!r} file, got {found!r}")
    _remove_credentials(path, content)
    return content


def load_model_file(path: str | Path) -> dict:
    """Return a dict of a trained detector's config, class_names, model (weights), run_id and step.

    The dict also contains other keys of the file. Reads .pt files, and .safetensors files that
    `save_safetensors` wrote. Raises the errors of `load`.
    """
    read = _load_safetensors if Path(path).suffix == ".safetensors" else load
    content = OPTIONAL | read(Path(path), FORMAT)
    check_content(path, content, MODEL)
    return content


def save_safetensors(path: Path, content: dict) -> None:
    """Write a trained detector as safetensors: the weights, and the rest as JSON in the metadata.

    content: as returned by `load_model_file`, which can also read the written file.
    """
    header = {key: value for key, value in content.items() if key != "model"}
    with atomic_write(path) as temporary:
        metadata = {"format": "pt", HEADER: json.dumps(header)}
        write_tensors(temporary, content["model"], metadata)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file whose bytes depend only on the tensors and the metadata.

    safetensors writes the metadata in random order; this function sorts it in the written file.
    """
    whole = {  # copies, since safetensors rejects tensors that share memory
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(whole, path, metadata=metadata)
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(size))  # safetensors pads the header with spaces


def _load_safetensors(path: Path, expected: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; expected a .safetensors detector")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            names = list(file.keys())
            content = {**header, "model": {name: file.get_tensor(name) for name in names}}
    except (SafetensorError, ValueError, TypeError) as error:
        raise DamagedError(f"{path}: not a complete detector ({first_line(error)})") from error
    if content.get("format") != expected:
        raise ValueError(
            f"{path}: contains weights without their config; expected a {expected!r} file"
        )
    _remove_credentials(path, content)
    return content


def _remove_credentials(path: Path, content: dict) -> None:
    """Remove the tracking server's user name and password, which vitdet 0.1 stored in files."""
    match content:
        case {"config": {"tracking": {"uri": str(uri)} as tracking} as config}:
            if (kept := without_credentials(uri)) != uri:
                _warn_of_credentials(path, hide_credentials(uri))
                content["config"] = {**config, "tracking": {**tracking, "uri": kept}}


@cache
def _warn_of_credentials(path: Path, uri: str) -> None:
    log.warning(
        f"{path}: the user name and password in its tracking.uri {uri} are not used; set "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address as "
        "MLFLOW_TRACKING_URI"
    )


def check_content(path: str | Path, content: dict, kinds: Mapping[str, Any]) -> None:
    """Raise ValueError if a key of a checkpoint is missing or its value has the wrong type."""
    for key, kind in kinds.items():
        if not isinstance(content.get(key, MISSING), kind):
            found = f"has type {type(content[key]).__name__}" if key in content else "is missing"
            raise ValueError(f"{path}: {key!r} {found}; {MODIFIED}")


def read_detector_file(path: str | Path) -> tuple[dict[str, Tensor], Config, tuple[str, ...]]:
    """Return a trained detector's weights, config and class names; raises the errors of `load`."""
    content = load_model_file(path)
    try:
        return content["model"], from_dict(content["config"]), tuple(content["class_names"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its config is not valid in this version: {error}") from error


def restore_detector(path: str | Path) -> tuple[Detector, Config, tuple[str, ...]]:
    """Return a checkpoint's detector (on the CPU, in evaluation mode), config and class names."""
    weights, config, names = read_detector_file(path)
    detector = build_detector(config.model, config.evaluate)
    load_weights(detector, weights, path)
    return detector.eval(), config, names


def load_weights(detector: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load weights, read from `path`, into a detector; raises ValueError if they do not fit."""
    invalid = [
        name
        for name, weight in weights.items()
        if not (isinstance(name, str) and isinstance(weight, Tensor)) or weight.is_complex()
    ]
    if invalid:
        found = f"the weight {invalid[0]!r} is not a real-valued tensor with a string key"
        raise ValueError(f"{path}: {found} (invalid weights: {len(invalid)}); {MODIFIED}")
    try:
        detector.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: its weights do not fit its config: {reason}") from error


class Checkpoints:
    """A folder of training states; only the last `keep` states are kept.

    The attribute `damaged` contains {path: reason} for the files that `latest` skipped.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.damaged: dict[Path, str] = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for writing states; raises ValueError if it is already locked."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / ".lock"))
            except BlockingIOError as error:
                raise ValueError(
                    f"{self.folder}: another training run is writing to this folder; wait until "
                    "that run ends, or choose another --output"
                ) from error
            remove_abandoned(self.folder)
            yield

    def save(self, step: int, content: dict) -> Path:
        """Write the state after `step` steps and remove all but the last `keep` states."""
        path = self.folder / f"step_{step:08d}.pt"
        _evaluation_of(path).unlink(missing_ok=True)  # left by an earlier state of this step
        save(path, {"format": STATE, "step": step, **content})
        # .step_*.tmp: left by a killed process of vitdet 0.1
        for old in [*self.all()[: -self.keep], *self.folder.glob(".step_*.tmp")]:
            old.unlink()
            _evaluation_of(old).unlink(missing_ok=True)
        return path

    def save_evaluation(self, step: int, content: dict) -> None:
        """Write the entries that an evaluation adds to the state after `step` steps.

        The entries are stored in a small JSON file next to the state, so that the state is not
        rewritten; `latest` merges the two files.
        """
        path = _evaluation_of(self.folder / f"step_{step:08d}.pt")
        try:
            write_json(path, content, sync=True)
        except OSError as error:
            raise _write_error(path, error) from error

    def all(self) -> list[Path]:
        """Return the paths of the states, oldest first."""
        return sorted(self.folder.glob(f"step_{'[0-9]' * 8}.pt"))

    def newest(self) -> int:
        """Return the step of the newest state, damaged or not; 0 if there are no states."""
        return max(map(_step_of, self.all()), default=0)

    def latest(self, verify: bool = True, up_to: int | None = None) -> dict | None:
        """Return the newest state that is not damaged; None if there are no states.

        up_to: the last step to consider. Skips damaged states, which `set_aside` renames, and
        ignores damaged evaluations. Raises DamagedError if all states are damaged."""
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
        earlier = " and all earlier states, which are damaged too," if len(states) > 1 else ""
        raise DamagedError(f"{self.damaged[states[-1]]}; remove this file{earlier} to start over")

    def set_aside(self, start: int) -> None:
        """Rename the damaged files and log what is lost when training resumes from step `start`.

        Must be called within the context of `locked`.
        """
        for path, reason in sorted(self.damaged.items()):
            kept, step = path.with_name(f"{path.name}.damaged"), _step_of(path)
            lost = f"the metrics of step {step} are lost; the evaluation is repeated"
            path.replace(kept)
            if path.suffix == ".pt":
                lost = f"resuming from step {start}; the steps up to {step} are repeated"
                _evaluation_of(path).unlink(missing_ok=True)
            log.warning("%s; renamed to %s; %s", reason, kept.name, lost)
        self.damaged.clear()


def _is_zip(path: Path) -> bool:
    try:
        # open first: is_zipfile(path) returns False for an unreadable file
        with open(path, "rb") as file:
            return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # damaged central directory of the archive
        return False


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _evaluation_of(state: Path) -> Path:
    return state.with_suffix(".json")


def _read_evaluation(state: Path) -> dict:
    path = _evaluation_of(state)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not a complete JSON file ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def _is_torn(cause: Exception) -> bool:
    return any(words in str(cause) for words in TORN)


def _write_error(path: Path, cause: Exception) -> OSError:
    full = _is_torn(cause) or (isinstance(cause, OSError) and cause.errno in FULL)
    advice = "; free some space and run the same command again" if full else ""
    reason = first_line(cause)
    if isinstance(cause, OSError) and cause.strerror:  # the system's message without the file name
        reason = f"[Errno {cause.errno}] {cause.strerror}"
    return OSError(f"{path}: could not be written ({reason}){advice}")
