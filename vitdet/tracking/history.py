"""Which versions of a model were its champion: one tag of a version each time that it became champion.

MLflow has no transactions. A tag of its own for each event is never overwritten by another process,
and is written before the alias, so that processes that promote at the same time see each other, see
`vitdet.tracking.champion.promote`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
PREFIX = "champion_at_"  # of the tags; then the time in UTC
PROMOTED, FORCED, ROLLED_BACK = "promoted", "forced", "rolled back"
RECENT = timedelta(minutes=10)  # longer than a promotion takes, with the clocks of two machines


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
    record(client, model_name, version, action, before, reason)
    client.set_registered_model_alias(model_name, ALIAS, version)


def record(
    client: MlflowClient, model_name: str, version: str, action: str, before: str, reason: str
) -> Event:
    """Record that a version becomes champion now, before its alias is set; return the event."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    event = Event(now, version, action, before, reason)
    value = asdict(event)
    del value["time"], value["version"]
    client.set_model_version_tag(model_name, version, f"{PREFIX}{event.time}", json.dumps(value))
    return event


def withdraw(client: MlflowClient, model_name: str, event: Event) -> None:
    """Remove the record of an event that had no effect."""
    client.delete_model_version_tag(model_name, event.version, f"{PREFIX}{event.time}")


def predecessors(recorded: Sequence[Event], current: str) -> list[str]:
    """Return the versions that were champion before the current one, the last one first.

    Each event names the version that it replaced; a rollback undoes the promotions since its version
    was champion. Times are of the clocks of several machines: they order the events of one version,
    and are followed where a version has no event, as it was deleted or made champion in MLflow's UI.
    """
    left, found, version = sorted(recorded, key=lambda event: event.time), [], current
    while version:
        own = [event for event in left if event.version == version]
        if own:
            left.remove(own[-1])
            version = version if own[-1].action == ROLLED_BACK else own[-1].before
        else:
            replaced = min((one.time for one in recorded if one.before == version), default=None)
            earlier = [one.version for one in left if replaced is None or one.time < replaced]
            version = earlier[-1] if earlier else ""
        found.append(version)
    return list(dict.fromkeys(one for one in found if one not in ("", current)))


def rolled_back(recorded: Sequence[Event], version: str) -> Event | None:
    """Return the rollback that replaced this version, if that was the last event of the version."""
    own = [event for event in recorded if version == event.version or _is_away(event, version)]
    last = max(own, key=lambda event: event.time, default=None)
    return last if last and _is_away(last, version) else None


def _is_away(event: Event, version: str) -> bool:
    return event.action == ROLLED_BACK and event.before == version


def rivals(recorded: Sequence[Event], own: Event) -> list[Event]:
    """Return the events of other versions at about the same time as `own`, which may not know of each other.

    Without those that a user has undone since: by a rollback, or by forcing another version.
    """
    time, found = datetime.fromisoformat(own.time), []
    for event in recorded:
        undone = any(
            one.before == event.version and one.action != PROMOTED and one.time > event.time
            for one in recorded
        )
        is_recent = abs(time - datetime.fromisoformat(event.time)) < RECENT
        if event.version != own.version and is_recent and not undone:
            found.append(event)
    return found
