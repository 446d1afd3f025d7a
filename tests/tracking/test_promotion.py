"""`vitdet promote` and `vitdet rollback`: aliases, history and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vitdet.config import GateConfig, load_config, save_config
from vitdet.data.protocol import Protocol
from vitdet.tracking import champion, history
from vitdet.tracking.gate import Evaluation
from vitdet.tracking.mlflow import tracking_uri

Run = Callable[..., tuple[int, str, str]]
DATA = Protocol.of(load_config("tiny"), "0123456789abcdef")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("store")
        client_of(folder).search_experiments()
    return folder


def client_of(folder: Path) -> MlflowClient:
    uri = tracking_uri("", folder)
    return MlflowClient(uri, uri)


class Registry:
    """A registered model with versions of these AP, and the command line."""

    def __init__(self, folder: Path, name: str, run: Run) -> None:
        self.folder, self.name, self._run = folder, name, run
        self.client = client_of(folder)
        self.client.create_registered_model(name)
        self.config = folder / "config.yaml"
        save_config(load_config("tiny"), self.config)

    def add(self, *aps: float, protocol: Protocol = DATA) -> None:
        for ap in aps:
            tags = {"box_ap": str(ap), **protocol.tags()}
            made = self.client.create_model_version(
                self.name, (self.folder / "model").as_uri(), tags=tags
            )
            self.client.set_registered_model_alias(self.name, "candidate", made.version)

    def run(self, verb: str, *words: object) -> tuple[int, str]:
        """(exit code, the one line that is printed)."""
        code, out, err = self._run(verb, self.name, "--runs", self.folder, *words)
        (line,) = [line for line in (out + err).splitlines() if "alembic" not in line]
        return code, line

    def promote(self, *words: object) -> tuple[int, str]:
        return self.run("promote", "--config", self.config, *words)

    def champion(self) -> str:
        return str(self.client.get_registered_model(self.name).aliases["champion"])


@pytest.fixture
def registry(request: pytest.FixtureRequest, store: Path, vitdet: Run) -> Registry:
    return Registry(store, request.node.name, vitdet)


def test_promote_applies_the_gate_and_rollback_undoes_it(registry: Registry) -> None:
    registry.add(40.0, 41.0, 39.0)
    name = registry.name
    assert registry.promote("--version", 1) == (
        0, f"{name}, version 1 (champion): box AP 40: the first champion"
    )  # fmt: skip
    assert registry.promote("--version", "2")[0] == 0 and registry.champion() == "2"
    code, line = registry.promote()  # the candidate: version 3
    assert code == 1 and "version 3: not the champion: box AP 39, no better than the 41" in line
    assert registry.champion() == "2"
    assert registry.promote("--force", "field test")[1].endswith(
        "version 3 (champion): without the gate (field test)"
    )
    assert registry.run("rollback", "--reason", "misses rings") == (
        0, f"{name}, version 2 (champion): replaces version 3"
    )  # fmt: skip
    assert registry.run("rollback")[0] == 0 and registry.champion() == "1"
    code, line = registry.run("rollback")
    assert code == 1 and "no existing version was champion before version 1" in line
    assert registry.champion() == "1"
    recorded = history.events(registry.client, name)
    assert [(one.action, one.before, one.version) for one in recorded] == [
        ("promoted", "", "1"), ("promoted", "1", "2"), ("forced", "2", "3"),
        ("rolled back", "3", "2"), ("rolled back", "2", "1"),
    ]  # fmt: skip
    assert [one.reason for one in recorded[2:4]] == ["field test", "misses rings"]
    assert all(one.time.endswith("Z") for one in recorded)


def test_what_cannot_be_is_refused_in_one_line(registry: Registry, tmp_path: Path) -> None:
    for verb in ("promote", "rollback"):
        code, line = registry.run(verb)
        assert code == 1 and "no version has the alias" in line
    registry.add(40.0, protocol=Protocol("", ""))
    code, line = registry.promote("--version", 7)
    assert code == 1 and f"{registry.name}: no version 7" in line
    code, line = registry.promote()
    assert code == 1 and "the data of its metrics is unknown" in line
    registry.add(41.0)
    code, line = registry.run("promote")
    assert code == 1 and "was registered without its config" in line
    code, out, err = registry._run("promote", "nobody", "--runs", registry.folder)
    assert code == 1 and "nobody: no such registered model" in err
    code, out, err = registry._run("promote", "nobody", "--runs", tmp_path / "none")
    assert code == 1 and "no such MLflow store" in err and not (tmp_path / "none").exists()
    assert registry._run("promote", "x", "--force", " ")[0] == 2
    assert registry._run("promote", "x", "--version", "new")[0] == 2
    assert "champion" not in registry.client.get_registered_model(registry.name).aliases


def test_a_version_that_was_deleted_is_not_rolled_back_to(registry: Registry) -> None:
    registry.add(40.0, 41.0, 42.0)
    for number in (1, 2, 3):
        assert registry.promote("--version", number)[0] == 0
    registry.client.delete_model_version(registry.name, "2")
    assert registry.run("rollback")[0] == 0 and registry.champion() == "1"


def test_without_a_common_folder_the_better_of_two_keeps_the_alias(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines compare with the same champion; the one with the worse version sets the alias last."""
    registry.add(40.0, 42.0, 41.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri("", registry.folder))
    gate, uri = GateConfig(), tracking_uri("", registry.folder)

    def promote(number: str, ap: float, machine: str) -> champion.Verdict:
        return champion.promote(
            number,
            Evaluation({"box_ap": ap}),
            DATA,
            gate,
            uri=uri,
            folder=tmp_path / machine,
            model_name=registry.name,
        )

    assert promote("1", 40.0, "a").passed
    other_machine, record = iter(["2"]), champion.record

    def meanwhile(*args: object) -> history.Event:
        for number in other_machine:
            assert promote(number, 42.0, "b").passed
        return record(*args)

    monkeypatch.setattr(champion, "record", meanwhile)
    verdict = promote("3", 41.0, "a")
    assert (
        not verdict.passed and "version 2 with 42 was promoted at the same time" in verdict.reason
    )
    assert registry.champion() == "2"
    recorded = history.events(registry.client, registry.name)
    assert [one.version for one in recorded] == ["1", "2"]
    assert registry.run("rollback")[0] == 0 and registry.champion() == "1"


def test_a_version_that_was_rolled_back_needs_force(registry: Registry) -> None:
    registry.add(40.0, 41.0)
    for number in (1, 2):
        assert registry.promote("--version", number)[0] == 0
    assert registry.run("rollback", "--reason", "misses rings")[0] == 0
    code, line = registry.promote("--version", 2)
    assert code == 1 and registry.champion() == "1"
    assert "version 2 was rolled back to version 1 at 20" in line and "(misses rings)" in line
    assert f"`vitdet promote {registry.name} --version 2 --force REASON`" in line
    assert registry.promote("--version", 2, "--force", "fixed")[0] == 0
    assert registry.promote("--version", 2)[0] == 0  # the champion itself
    assert registry.champion() == "2"
