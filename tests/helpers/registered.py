"""A registered model in a folder's default store, whose versions have an AP but no detector."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient

from vitdet.config import GateConfig, load_config
from vitdet.data.protocol import Protocol
from vitdet.tracking import champion
from vitdet.tracking.gate import Evaluation

DATA = Protocol.of(load_config("tiny"), "0123456789abcdef")


class RegisteredModel:
    """The functions of `vitdet.tracking.champion` with the default gate, for versions given by their AP."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, uri = folder, name, f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(uri, uri)
        self.client.create_registered_model(name)
        self.place = {"uri": "", "folder": folder, "model_name": name}

    def add(self, ap: float, tags: dict[str, str] | None = None) -> str:
        """Add a version with this AP, by default on DATA; return its number."""
        tags = {"box_ap": f"{ap:.4g}"} | (DATA.tags() if tags is None else tags)
        source = (self.folder / "model").as_uri()
        return str(self.client.create_model_version(self.name, source, tags=tags).version)

    def set(self, number: str, alias: str = champion.ALIAS) -> None:
        self.client.set_registered_model_alias(self.name, alias, number)

    @property
    def champion(self) -> str:
        return str(self.client.get_registered_model(self.name).aliases[champion.ALIAS])

    def tags(self, number: str) -> dict[str, str]:
        return self.client.get_model_version(self.name, number).tags

    def judge(self, ap: float | None, protocol: Protocol, **more: object) -> champion.Verdict:
        evaluation = Evaluation({"box_ap": ap})
        return champion.judge(evaluation, protocol, GateConfig(), **self.place, **more)

    def promote(
        self, number: str, ap: float, protocol: Protocol = DATA, **more: object
    ) -> champion.Verdict:
        evaluation, place = Evaluation({"box_ap": ap}), self.place | more
        return champion.promote(number, evaluation, protocol, GateConfig(), **place)

    def is_known(self, protocol: Protocol) -> bool:
        return champion.is_known(protocol, GateConfig(), **self.place)

    def evaluate(self, protocol: Protocol, function: object) -> champion.Evaluated | None:
        return champion.evaluate_champion(protocol, GateConfig(), function, **self.place)

    def update(self, number: str, metrics: dict[str, float], protocol: Protocol) -> None:
        version = self.client.get_model_version(self.name, number)
        champion.update_tags(self.client, self.folder, version, metrics, protocol)
