"""Files of a training: the state to go on from, and the finished detector. Plain data and tensors, no code."""

from __future__ import annotations

import errno
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vitdet.config import Config, from_dict
from vitdet.files import damaged_record, remove_abandoned, write_json, written
from vitdet.locks import locked
from vitdet.models import Detector, build_detector

FORMAT = "vitdet detector, version 1"
STATE = "vitdet training state, version 2"
STATE_1 = (
    "vitdet training state, version 1"  # the same content; each step drew other random numbers
)
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# torch's words where the disk takes less than all
TORN = ("PytorchStreamWriter failed writing file", "unexpected pos")


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

    verify: compare the content with its checksums. Raises FileNotFoundError, and ValueError when it is cut off, damaged or
    something else than one of `expected`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; expected the model.pt that `vitdet train` wrote"
        )
    if not _is_zip(path):
        raise ValueError(
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
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path}: not a whole vitdet checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") not in expected:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a {expected[0]!r} file, got {found!r}")
    return content


def load_model_file(path: str | Path) -> dict:
    """{config, class_names, model, run_id, step, fingerprints} of a finished detector; raises as `load` does.

    Files of version 0.1 hold a dataset_digest instead of fingerprints.
    """
    return load(Path(path), FORMAT)


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
    try:
        detector.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: its weights do not fit its config: {' '.join(str(error).split())[:300]}"
        ) from error


class Checkpoints:
    """The training states in a folder, of which the last `keep` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

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

    def latest(self, verify: bool = True) -> dict | None:
        """The newest state, or None; raises as `load` does, and says what there is to go on from without it."""
        states = self.all()
        if not states:
            return None
        try:
            state = load(states[-1], STATE, STATE_1, verify=verify)
            return state | _read_evaluation(states[-1])
        except ValueError as error:
            rest = f"to go on from {states[-2].name}" if states[1:] else "to begin anew"
            raise ValueError(f"{error}; remove it {rest}") from error


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its end is damaged
        return False


def _evaluation_of(state: Path) -> Path:
    """The file that `Checkpoints.save_evaluation` writes beside this one."""
    return state.with_suffix(".json")


def _read_evaluation(state: Path) -> dict:
    path = _evaluation_of(state)
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a whole JSON file ({_first_line(error)})") from error


def _is_torn(cause: Exception) -> bool:
    return any(words in str(cause) for words in TORN)


def _unwritten(path: Path, cause: Exception) -> OSError:
    """The error, in one line, of a file that the disk did not take."""
    full = _is_torn(cause) or (isinstance(cause, OSError) and cause.errno in FULL)
    advice = "; free some space and run the same command again" if full else ""
    return OSError(f"{path}: could not be written ({_first_line(cause)}){advice}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
