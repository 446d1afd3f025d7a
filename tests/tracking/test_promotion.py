"""`vitdet promote` and `vitdet rollback`: aliases, history and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.registered import RegisteredModel
from vitdet.config import load_config, save_config
from vitdet.tracking import history

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(model: RegisteredModel, vitdet: Callable[..., tuple[int, str, str]]) -> Run:
    """Return run(verb, *words), which runs a command on the model: (exit code, printed line)."""

    def run(verb: str, *words: object, name: str = model.name) -> tuple[int, str]:
        code, out, err = vitdet(verb, name, "--runs", model.folder, *words)
        (line,) = [line for line in (out + err).splitlines() if "alembic" not in line]
        return code, line

    return run


@pytest.fixture
def promote(run: Run, tmp_path: Path) -> Run:
    save_config(load_config("tiny"), tmp_path / "config.yaml")
    return lambda *words: run("promote", "--config", tmp_path / "config.yaml", *words)


def test_promote_applies_the_gate_and_rollback_undoes_it(
    model: RegisteredModel, run: Run, promote: Run
) -> None:
    for ap in (40.0, 41.0, 39.0):
        model.set(model.add(ap), "candidate")
    name = model.name
    line = f"{name}, version 1 (champion): box AP 40: the first champion"
    assert promote("--version", 1) == (0, line)
    assert promote("--version", "2")[0] == 0 and model.champion == "2"
    code, line = promote()  # the candidate is version 3
    assert code == 1 and "version 3, is not promoted: box AP 39, no better than the 41" in line
    assert model.champion == "2"
    assert promote("--force", "field test")[1].endswith(
        "version 3 (champion): without the gate (field test)"
    )
    line = f"{name}, version 2 (champion): replaces version 3"
    assert run("rollback", "--reason", "misses rings") == (0, line)
    assert run("rollback")[0] == 0 and model.champion == "1"
    code, line = run("rollback")
    assert code == 1 and "no existing version was champion before version 1" in line
    assert model.champion == "1"
    recorded = history.events(model.client, name)
    assert [(event.action, event.before, event.version) for event in recorded] == [
        ("promoted", "", "1"), ("promoted", "1", "2"), ("forced", "2", "3"),
        ("rolled back", "3", "2"), ("rolled back", "2", "1"),
    ]  # fmt: skip
    assert [event.reason for event in recorded[2:4]] == ["field test", "misses rings"]
    assert all(event.time.endswith("Z") for event in recorded)


def test_invalid_requests_are_rejected_in_one_line(
    model: RegisteredModel, run: Run, promote: Run, vitdet: Callable, tmp_path: Path
) -> None:
    for verb in ("promote", "rollback"):
        code, line = run(verb)
        assert code == 1 and "no version has the alias" in line
    model.set(model.add(40.0, {}), "candidate")
    code, line = promote("--version", 7)
    assert code == 1 and f"{model.name}: no version 7" in line
    code, line = promote()
    assert code == 1 and "the data that its metrics were measured on is unknown" in line
    model.set(model.add(41.0), "candidate")
    code, line = run("promote")
    assert code == 1 and "was registered without its config" in line
    code, line = run("promote", name="nobody")
    assert code == 1 and "nobody: no such registered model" in line
    code, out, err = vitdet("promote", "nobody", "--runs", tmp_path / "none")
    assert code == 1 and "no such MLflow store" in err and not (tmp_path / "none").exists()
    assert vitdet("promote", "x", "--force", " ")[0] == 2
    assert vitdet("promote", "x", "--version", "new")[0] == 2
    assert "champion" not in model.client.get_registered_model(model.name).aliases


def test_a_rollback_skips_a_deleted_version(model: RegisteredModel, run: Run, promote: Run) -> None:
    for ap in (40.0, 41.0, 42.0):
        assert promote("--version", model.add(ap))[0] == 0
    model.client.delete_model_version(model.name, "2")
    assert run("rollback")[0] == 0 and model.champion == "1"


def test_without_a_shared_folder_the_better_of_two_versions_stays_champion(
    model: RegisteredModel, run: Run, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines replace the same champion; the alias is last set to the worse version."""
    for ap in (40.0, 42.0, 41.0):
        model.add(ap)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert model.promote("1", 40.0, folder=tmp_path / "a").passed
    other_machine, record = iter(["2"]), history.record

    def meanwhile(*args: object) -> history.Event:
        for number in other_machine:
            assert model.promote(number, 42.0, folder=tmp_path / "b").passed
        return record(*args)

    monkeypatch.setattr(history, "record", meanwhile)
    verdict = model.promote("3", 41.0, folder=tmp_path / "a")
    assert not verdict.passed
    assert "version 2 with box AP 42 was promoted at the same time" in verdict.reason
    assert model.champion == "2"
    recorded = history.events(model.client, model.name)
    assert [event.version for event in recorded] == ["1", "2"]
    assert run("rollback")[0] == 0 and model.champion == "1"


def test_a_version_that_was_rolled_back_needs_force(
    model: RegisteredModel, run: Run, promote: Run
) -> None:
    for ap in (40.0, 41.0):
        assert promote("--version", model.add(ap))[0] == 0
    assert run("rollback", "--reason", "misses rings")[0] == 0
    code, line = promote("--version", 2)
    assert code == 1 and model.champion == "1"
    assert "version 2 was rolled back to version 1 at 20" in line and "(misses rings)" in line
    assert f"`vitdet promote {model.name} --version 2 --force REASON`" in line
    assert promote("--version", 2, "--force", "fixed")[0] == 0
    assert promote("--version", 2)[0] == 0  # already the champion
    assert model.champion == "2"
