"""Concurrent promotions by several machines: any order of requests makes the best version the champion."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.registered import DATA
from vitdet.config import GateConfig
from vitdet.tracking import champion, history
from vitdet.tracking.gate import Evaluation, Verdict


class Registry:
    """The part of MLflow's registry used by a promotion; version 1 is the champion with 40 AP."""

    def __init__(self, aps: list[float]) -> None:
        every = enumerate([40.0, *aps], start=1)
        self.tags = {str(n): {"box_ap": str(ap), **DATA.tags()} for n, ap in every}
        self.aliases = {"champion": "1"}

    def search_registered_models(self, query: str) -> list:
        return [SimpleNamespace(aliases=dict(self.aliases))]

    def search_model_versions(self, query: str) -> list:
        return [self.get_model_version("m", number) for number in self.tags]

    def get_model_version(self, name: str, number: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, version=number, tags=dict(self.tags[number]), source="")

    def set_model_version_tag(self, name: str, number: str, key: str, value: str) -> None:
        self.tags[number][key] = value

    def delete_model_version_tag(self, name: str, number: str, key: str) -> None:
        del self.tags[number][key]

    def set_registered_model_alias(self, name: str, alias: str, number: str) -> None:
        self.aliases[alias] = number


class Turns:
    """Lets one of several threads send one request at a time, in an order determined by the seed."""

    def __init__(self, seed: int, threads: int) -> None:
        self._random, self._condition = random.Random(seed), threading.Condition()
        self._running, self._waiting, self._turn = threads, [], None

    def request(self, call: Callable, *args: Any) -> Any:
        with self._condition:
            own = threading.current_thread().name
            self._waiting.append(own)
            self._choose()
            self._condition.wait_for(lambda: self._turn == own)
            self._turn = None
            return call(*args)

    def end(self) -> None:
        with self._condition:
            self._running -= 1
            self._choose()

    def _choose(self) -> None:
        if self._turn is None and self._waiting and len(self._waiting) == self._running:
            self._turn = self._random.choice(sorted(self._waiting))
            self._waiting.remove(self._turn)
            self._condition.notify_all()


class Client:
    """A machine's client of the registry."""

    def __init__(self, registry: Registry, turns: Turns) -> None:
        self._registry, self._turns = registry, turns

    def __getattr__(self, name: str) -> Callable:
        return lambda *args: self._turns.request(getattr(self._registry, name), *args)


def promoted(
    aps: list[float], seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch, forced: bool = False
) -> tuple[Registry, dict[str, Verdict]]:
    """Promote versions 2, 3, ..., each from its own machine; with `forced`, version 2 skips the gate."""
    registry, turns = Registry(aps), Turns(seed, len(aps))
    monkeypatch.setattr(champion, "connect", lambda *_: Client(registry, turns))
    verdicts: dict[str, Verdict] = {}

    def run(number: str, ap: float) -> None:
        try:
            if forced and number == "2":
                args = (Client(registry, turns), "m", number, history.FORCED, "1", "field test")
                history.set_champion(*args)
            else:
                verdicts[number] = champion.promote(
                    number,
                    Evaluation({"box_ap": ap}),
                    DATA,
                    GateConfig(),
                    uri="",
                    folder=folder / number,
                    model_name="m",
                )
        finally:
            turns.end()

    threads = [
        threading.Thread(target=run, args=(str(number), ap), name=str(number))
        for number, ap in enumerate(aps, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return registry, verdicts


@pytest.mark.parametrize("aps", [[42.0, 41.0], [41.0, 43.0, 42.0], [42.0, 42.0]])
def test_the_best_of_several_versions_is_champion_in_any_order(
    aps: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0
    for seed in range(150):
        registry, verdicts = promoted(aps, seed, tmp_path, monkeypatch)
        number = registry.aliases["champion"]
        assert aps[int(number) - 2] == max(aps), f"seed {seed}"
        assert verdicts[number].passed
        simultaneous = [v for v in verdicts.values() if "at the same time" in v.reason]
        refused += len(simultaneous)
        assert not any(verdict.passed for verdict in simultaneous)
        # only versions that became champion have an event, and rollbacks end at version 1
        recorded = history.events(Client(registry, Turns(0, 1)), "m")
        assert {event.version for event in recorded} == {n for n, v in verdicts.items() if v.passed}
        assert history.predecessors(recorded, number)[-1] == "1"
    assert refused > 0


def test_a_version_forced_in_the_meantime_stays_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stayed = 0
    for seed in range(100):
        registry, verdicts = promoted([39.0, 45.0], seed, tmp_path, monkeypatch, forced=True)
        meanwhile = "version 2 was made the champion" in verdicts["3"].reason
        assert registry.aliases["champion"] == ("2" if meanwhile else "3") or verdicts["3"].passed
        stayed += meanwhile
    assert stayed > 0
