"""The history of a model's champions: one tag for each time that a version became champion.

As MLflow has no transactions, each event is a separate tag, which no other process overwrites. The
tag is written before the alias is set, so that processes that promote at the same time see each
other's events (see `vitdet.tracking.champion.promote`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from vitdet.tracking.client import Client

ALIAS = "champion"
PREFIX = "champion_at_"  # prefix of the tags, followed by the time in UTC
PROMOTED, FORCED, ROLLED_BACK = "promoted", "forced", "rolled back"
# longer than a promotion plus the difference between the clocks of two machines
RECENT = timedelta(minutes=10)


@dataclass(frozen=True)
class Event:
    """A version became champion at `time` (ISO 8601, UTC) and replaced `before` ("" if none)."""

    time: str
    version: str
    action: str
    before: str
    reason: str

    def is_rollback_from(self, version: str) -> bool:
        """Return whether this event is a rollback that replaced `version`."""
        return self.action == ROLLED_BACK and self.before == version


def champion_of(client: Client, model_name: str) -> str | None:
    """Return the version number of the champion; None if there is no champion."""
    models = client.search_registered_models(f"name = '{model_name}'")
    number = models[0].aliases.get(ALIAS) if models else None
    return None if number is None else str(number)


def events(client: Client, model_name: str) -> list[Event]:
    """Return the events in the tags of all versions, oldest first."""
    found = [
        Event(key.removeprefix(PREFIX), str(version.version), **json.loads(value))
        for version in client.search_model_versions(f"name = '{model_name}'")
        for key, value in version.tags.items()
        if key.startswith(PREFIX)
    ]
    return sorted(found, key=lambda event: event.time)


def set_champion(
    client: Client, model_name: str, version: str, action: str, before: str, reason: str
) -> None:
    """Record the event and set the alias."""
    record(client, model_name, version, action, before, reason)
    client.set_registered_model_alias(model_name, ALIAS, version)


def record(
    client: Client, model_name: str, version: str, action: str, before: str, reason: str
) -> Event:
    """Record that a version becomes champion, before the alias is set; return the event."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    event = Event(now, version, action, before, reason)
    value = asdict(event)
    del value["time"], value["version"]
    client.set_model_version_tag(model_name, version, f"{PREFIX}{now}", json.dumps(value))
    return event


def withdraw(client: Client, model_name: str, event: Event) -> None:
    """Remove the record of an event that had no effect."""
    client.delete_model_version_tag(model_name, event.version, f"{PREFIX}{event.time}")


def predecessors(recorded: Sequence[Event], current: str) -> list[str]:
    """Return the versions that were champion before the current one, most recent first.

    Events are followed from each version to the version that it replaced; a rollback undoes all
    promotions since the restored version was last champion. The times come from the clocks of
    several machines. They are used to order the events of one version, and to find the predecessor
    of a version that has no events because it was deleted or made champion in MLflow's UI.
    """
    remaining, found, version = sorted(recorded, key=lambda event: event.time), [], current
    while version:
        of_version = [event for event in remaining if event.version == version]
        if of_version:
            last = of_version[-1]
            remaining.remove(last)
            version = version if last.action == ROLLED_BACK else last.before
        else:
            times = [event.time for event in recorded if event.before == version]
            earlier = [e.version for e in remaining if not times or e.time < min(times)]
            version = earlier[-1] if earlier else ""
        found.append(version)
    return list(dict.fromkeys(number for number in found if number not in ("", current)))


def rolled_back(recorded: Sequence[Event], version: str) -> Event | None:
    """Return the last rollback that replaced this version; None if a later event restored it."""
    related = [e for e in recorded if e.version == version or e.is_rollback_from(version)]
    last = max(related, key=lambda event: event.time, default=None)
    return last if last and last.is_rollback_from(version) else None


def rivals(recorded: Sequence[Event], own: Event) -> list[Event]:
    """Return the events of other versions less than RECENT before or after the event `own`.

    Events that a user undid later, by a rollback or by forcing another version, are excluded.
    """
    found, now = [], datetime.fromisoformat(own.time)
    for event in recorded:
        undone = any(
            later.before == event.version and later.action != PROMOTED and later.time > event.time
            for later in recorded
        )
        is_recent = abs(now - datetime.fromisoformat(event.time)) < RECENT
        if event.version != own.version and is_recent and not undone:
            found.append(event)
    return found
