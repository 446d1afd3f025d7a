"""Finding and validating the training state to resume from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vitdet import distributed
from vitdet.checkpoint import TRAINING, Checkpoints, DamagedError, check_content, load_model_file
from vitdet.config import Config, from_dict
from vitdet.config.digest import difference, digest, legacy_digest
from vitdet.data import fingerprint
from vitdet.files import sha256
from vitdet.training.best import NAME
from vitdet.training.optim import lr_factor, scaled

# state entries that `Checkpoints.save_evaluation` writes to a separate file
EVALUATION = ("config", "metrics", "evaluated", "best")
log = logging.getLogger(__name__)


def states_folder(
    config: Config,
    output: Path,
    checkpoints: str | Path | None,
    prints: dict[str, str],
    source: str | Path | None,
) -> Path:
    """Return the folder of the training states: output/checkpoints or a subfolder of `checkpoints`.

    The subfolder's name is a digest of everything that determines the weights. If this subfolder
    has no states, another subfolder with states that this run can resume is used. It may have been
    named by vitdet 0.1, or contain a run with a different optim.steps or train.patience.

    Args:
        config: the settings of the run.
        output: the output folder; its subfolder `checkpoints` is used by default.
        checkpoints: the parent folder for the states of several training runs, or None.
        prints: the data fingerprint of each split.
        source: the file of initial weights, or None.
    """
    if checkpoints is None:
        return output / "checkpoints"
    initial = "" if source is None else sha256(source)

    def folder(settings: str, data: str) -> Path:
        text = f"{settings} {data} {initial}"
        return Path(checkpoints) / hashlib.sha256(text.encode()).hexdigest()[:12]

    def names(settings: Config) -> set[Path]:
        legacy = legacy_digest(settings)
        return {folder(digest(settings), data), *([folder(legacy, legacy_data)] if legacy else [])}

    data = fingerprint.combined(prints)
    found = folder(digest(config), data)
    others = {path.parent for path in Path(checkpoints).glob("*/step_*.pt")}
    if found in others or not others:
        return found
    legacy_data = fingerprint.legacy_dataset_digest(config.data)
    if named_by_legacy := names(config) & others:
        return named_by_legacy.pop()
    steps: dict[Path, int] = {}
    for other in others:
        try:
            state = Checkpoints(other, config.train.keep).latest(verify=False)
            if state is None:
                continue
            check_content(other, state, TRAINING)
            stored = from_dict(state["config"])
        except ValueError:
            continue  # a damaged state, or one from another version of vitdet
        if (
            other in names(stored)
            and _same_but_for_length(config, stored)
            and state["step"] <= config.optim.steps
            and not _changed_rate(config, stored, state["step"])
        ):
            steps[other] = state["step"]
    return max(steps, key=lambda other: steps[other], default=found)


def state_to_resume(
    config: Config, output: Path, prints: dict[str, str], states: Checkpoints
) -> dict | None:
    """Return the newest state that is intact on all ranks, or None; must be called on all ranks.

    Raises ValueError if the state does not match config and data, or the ranks' states differ.
    """
    newest = distributed.all_gather_objects(states.newest())
    # possible causes: a local folder on each machine, or a shared folder with delayed updates
    if len(set(newest)) > 1:
        raise ValueError(
            f"{states.folder}: the processes found states from different steps "
            f"({', '.join(map(str, newest))}); all processes must share one folder; "
            "if they do, run the same command again"
        )
    state = _agreed_state(states)
    distributed.reraise_on_all_ranks(
        lambda: _check_resumable(config, output, prints, state, states.folder)
    )
    return state


def _agreed_state(states: Checkpoints, up_to: int | None = None) -> dict | None:
    """Return the newest state up to step `up_to` that is intact on all ranks.

    Its EVALUATION entries are rank 0's. Adds the damaged states of all ranks to `states.damaged`.
    """
    state = distributed.reraise_on_all_ranks(lambda: states.latest(up_to=up_to))
    step = state["step"] if state else 0
    measured = {key: state[key] for key in EVALUATION if key in state} if state else {}
    found = distributed.all_gather_objects((step, measured, states.damaged))
    for _, _, damaged in found:
        states.damaged |= {path: why for path, why in damaged.items() if path.suffix == ".pt"}
    least = min(step for step, _, _ in found)
    if any(step > least for step, _, _ in found):  # newer states are damaged on some machines
        return _agreed_state(states, least)
    return None if state is None else state | found[0][1]


def _check_resumable(
    config: Config, output: Path, prints: dict[str, str], state: dict | None, folder: Path
) -> None:
    if state is None:
        if (output / "model.pt").exists():  # finished, but to be extended or without best.pt
            steps = load_model_file(output / "model.pt")["step"]
            lacking = "" if _has_best(config, output) else ", without best.pt"
            raise ValueError(
                f"{output}: the folder contains a finished run (step {steps}{lacking}), but "
                f"{folder} contains no training state to resume from; choose another --output or "
                f"remove {output}"
            )
        return
    step, remedy = state["step"], "choose another --output"
    check_content(folder / f"step_{step:08d}.pt", state, TRAINING)
    stored = from_dict(state["config"])
    steps, before = config.optim.steps, stored.optim.steps
    if not _same_but_for_length(config, stored):
        differing = "; ".join(difference(config, stored, affecting_weights=True))
        error = f"the folder contains a run with a different config ({differing})"
        remedy += ", or resume with the same settings"
    elif steps < step:
        error = f"the folder contains a run of {step} steps, more than optim.steps = {steps}"
    elif reason := _changed_rate(config, stored, step):
        error = f"optim.steps cannot change from {before} to {steps} after step {step}: {reason}"
    elif change := fingerprint.change(state, config.data, prints):
        error = f"the data set has changed since this run started ({change})"
    else:
        return
    raise ValueError(f"{folder}: {error}; {remedy}")


def is_complete(
    config: Config, output: Path, close_tracking: Callable[[str, str, int], None]
) -> bool:
    """Return whether `output` contains the result of this training run.

    If so, calls `close_tracking(data fingerprint, run ID, step)`, because the run may have been
    killed before all metrics were sent. Returns False if `config` extends the finished run, or if
    best.pt is missing. Raises ValueError for a damaged model.pt or a different finished run.
    """
    finished = output / "model.pt"
    if not finished.exists():
        return False
    try:
        done = load_model_file(finished)
    except DamagedError as error:
        raise DamagedError(f"{error}; remove the file and run the same command again") from error
    stored = from_dict(done["config"])
    remedy = f"choose another --output or remove {output}"
    patient = _with_patience(stored, config)
    more = config.optim.steps > stored.optim.steps
    more |= patient != stored and done["step"] < config.optim.steps
    reason = ""
    if more and _same_but_for_length(config, stored):
        reason = _changed_rate(config, stored, done["step"])
        if not reason:
            return False
        reason = f"{reason}; "
    if reason or difference(config, patient, affecting_weights=True):
        differing = "; ".join(difference(config, stored))
        raise ValueError(
            f"{output}: the folder contains a finished run with a different config ({differing}); "
            f"{reason}{remedy}"
        )
    prints = fingerprint.fingerprints(config.data)
    if change := fingerprint.change(done, config.data, prints):
        raise ValueError(
            f"{output}: the folder contains a finished run on different data ({change}); {remedy}"
        )
    if not _has_best(config, output):
        return False
    log.warning("%s: already complete, nothing to do", output)
    if done["run_id"]:
        close_tracking(fingerprint.combined(prints), done["run_id"], done["step"])
    return True


def _has_best(config: Config, output: Path) -> bool:
    """Return whether best.pt exists or is not needed."""
    return not config.train.keep_best or (output / NAME).exists()


def _same_but_for_length(config: Config, stored: Config) -> bool:
    """Return whether `config` can continue the run of `stored`, ignoring optim.steps."""
    optim = replace(stored.optim, steps=config.optim.steps)
    stored = replace(_with_patience(stored, config), optim=optim)
    return not difference(config, stored, affecting_weights=True)


def _with_patience(stored: Config, config: Config) -> Config:
    """Return `stored`, with the train.patience of `config` if a resumed run may change to it."""
    ours, theirs = config.train.patience, stored.train.patience
    if theirs and (ours == 0 or ours > theirs):
        return replace(stored, train=replace(stored.train, patience=ours))
    return stored


def _changed_rate(config: Config, stored: Config, done: int) -> str:
    """Describe the first of `done` steps whose learning rates differ; return '' if none differ."""
    ours, theirs = (scaled(c.optim, c.train.batch_size) for c in (config, stored))
    for step in range(done if ours.steps != theirs.steps else 0):
        new, old = lr_factor(step, ours), lr_factor(step, theirs)
        if new != old:
            rates = f"{ours.lr * new:.6g}, not {theirs.lr * old:.6g}"
            return f"the learning rate of step {step} would have been {rates}"
    return ""
