"""Which versions of a model were its champion: one tag of a version each time that it became champion.

MLflow has no transactions. A tag of its own for each event is never overwritten by another process,
and is written before the alias, so that processes that promote at the same time see each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
PREFIX = "champion_at_"  # of the tags; then the time in UTC
PROMOTED, FORCED, ROLLED_BACK = "promoted", "forced", "rolled back"


@dataclass(frozen=True)
class Event:
    """A version became champion at a time (ISO 8601, UTC) in place of version `before` ("": none)."""

    time: str
    version: str
    action: str
    before: str
    reason: str


def champion_of(client: MlflowClient, model_name: str) -> str | None:
    """Return the number of the champion's version."""
    models = client.search_registered_models(f"name = '{model_name}'")
    number = models[0].aliases.get(ALIAS) if models else None
    return None if number is None else str(number)


def events(client: MlflowClient, model_name: str) -> list[Event]:
    """Return what the tags of all versions record, the oldest event first."""
    found = []
    for version in client.search_model_versions(f"name = '{model_name}'"):
        for key, value in version.tags.items():
            if key.startswith(PREFIX):
                time = key.removeprefix(PREFIX)
                found.append(Event(time, str(version.version), **json.loads(value)))
    return sorted(found, key=lambda event: event.time)


def set_champion(
    client: MlflowClient, model_name: str, version: str, action: str, before: str, reason: str
) -> None:
    """Record the event and set the alias."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    event = Event(now, version, action, before, reason)
    value = asdict(event)
    del value["time"], value["version"]
    client.set_model_version_tag(model_name, version, f"{PREFIX}{event.time}", json.dumps(value))
    client.set_registered_model_alias(model_name, ALIAS, version)


def predecessors(recorded: Sequence[Event], current: str) -> list[str]:
    """Return the versions that were champion before the current one, the last one first.

    A rollback undoes the promotions since its version was champion. The current champion need not be
    the last that was recorded: the alias can also be moved in MLflow's UI.
    """
    stack: list[str] = []
    for event in recorded:
        if event.action == ROLLED_BACK and event.version in stack:
            del stack[len(stack) - stack[::-1].index(event.version) :]
            continue
        stack += [one for one in (event.before, event.version) if one and one not in stack[-1:]]
    if current in stack[-1:]:
        stack.pop()
    return list(dict.fromkeys(one for one in reversed(stack) if one != current))


def rivals(before: Sequence[Event], now: Sequence[Event], version: str) -> list[str]:
    """Return the other versions that were promoted over the same champion at the same time.

    before: the events when this version was compared with the champion.
    """
    new = [event for event in now if event not in before and event.action == PROMOTED]
    replaced = {event.before for event in new if event.version == version}
    return [event.version for event in new if event.version != version and event.before in replaced]
