"""Memory of a resumed training run, repeated evaluations, and reuse of finished runs."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest

from tests.conftest import Recorder, minimal
from tests.helpers.runs import cut, cut_at, go, refused, same_bits, stop_at
from vitdet.checkpoint import Checkpoints
from vitdet.config import load_config
from vitdet.training import train, trainer


@pytest.mark.slow
def test_the_loaded_state_is_freed_once_applied(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(2, tiny, tmp_path)
    alive: list[weakref.ref] = []

    class Watched(Checkpoints):
        def latest(self, *given: bool, **named: int | None) -> dict | None:
            state = super().latest(*given, **named)
            moments = state["optimizer"]["state"].values()
            for tensors in (state["model"], state["average"], *moments):
                alive.extend(map(weakref.ref, tensors.values()))
            return state

    left = []

    def count(values: dict[str, float], step: int) -> None:
        gc.collect()
        left.append(sum(reference() is not None for reference in alive))

    monkeypatch.setattr(trainer, "Checkpoints", Watched)
    go(tiny, tmp_path, Recorder(count))
    assert len(alive) > 500 and set(left) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8])
def test_a_killed_evaluation_is_repeated_without_repeating_steps(
    tiny: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The interruption precedes the first metric."""
    evaluate = trainer.evaluate_detector
    calls = []

    def killed(*given: object) -> object:
        calls.append(given)
        return cut() if len(calls) == step // 4 else evaluate(*given)

    monkeypatch.setattr(trainer, "evaluate_detector", killed)
    before = Recorder()
    with pytest.raises(KeyboardInterrupt):
        go(tiny, tmp_path, before)
    assert max(before.points) == step and "box_ap" not in before.points[step]
    monkeypatch.setattr(trainer, "evaluate_detector", evaluate)
    rest = go(tiny, tmp_path)
    assert min(rest.points) == step and "loss" not in rest.points[step]
    assert {"box_ap", "box_ap50", "box_ap75"} <= rest.points[step].keys()
    same_bits(tmp_path, trained)


def test_a_run_whose_only_state_is_damaged_is_refused(tiny: Path, tmp_path: Path) -> None:
    cut_at(1, tiny, tmp_path)
    (state,) = (tmp_path / "checkpoints").glob("*.pt")
    state.write_bytes(b"")
    with refused("step_00000000.pt: .*; remove this file to start over"):
        go(tiny, tmp_path)
    state.unlink()
    assert min(go(tiny, tmp_path, optim__steps=1).points) == 1


def test_initial_weights_are_hashed_without_being_read_into_memory(
    tiny: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def listed(path: Path) -> bytes:
        assert path.suffix != ".pt", path
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", listed)
    config, states = load_config("tiny", minimal(tiny, optim__steps=1)), tmp_path / "states"
    train(config, tmp_path / "run", checkpoints=states, weights=trained / "model.pt")
    assert len(list((tmp_path / "states").iterdir())) == 1


def test_a_finished_run_is_reused_only_for_equal_config_and_data(
    own_tiny: Path, tmp_path: Path
) -> None:
    output, heard = tmp_path / "run", []
    go(own_tiny, output, optim__steps=1)
    before = (output / "model.pt").read_bytes()

    def start_tracking(*given: object) -> Recorder:
        heard.append((*given, Recorder()))
        return heard[-1][-1]

    def again(**changes: object) -> Path:
        config = load_config("tiny", minimal(own_tiny, optim__steps=1, **changes))
        return train(config, output, start_tracking=start_tracking)

    assert again() == output / "model.pt" and (output / "model.pt").read_bytes() == before
    ((_, run_id, step, tracker),) = heard  # missing artifacts are logged, and the run is closed
    assert (run_id, step, tracker.status, tracker.points) == ("recorded", 1, "FINISHED", {})
    with refused(r"finished run with a different config \(optim.lr: 0.1, not 0.001\)"):
        again(optim__lr=0.1)
    path = own_tiny / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    with refused(r"contains a finished run on different data \(train split \w+, now \w+\)"):
        again()
    assert len(heard) == 1
