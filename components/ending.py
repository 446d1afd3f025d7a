"""What becomes of a training job that has ended: how long it is there, and with it the logs of its pods."""

from __future__ import annotations

from datetime import datetime, timedelta

from components.jobs import Kind, state


def stay(kind: Kind, job: dict) -> str:
    """Of a job that has ended: what it is, and how long it and its pods are there; "" while it has not ended."""
    phase, spec, status = state(kind, job)[0], job["spec"], job.get("status") or {}
    if phase not in ("failed", "succeeded"):
        return ""
    seconds = (spec.get("runPolicy") or spec).get("ttlSecondsAfterFinished")
    ended = status.get("completionTime") or max(
        one.get("lastTransitionTime") or "" for one in status["conditions"]
    )
    until = []
    if seconds is not None and ended:
        until.append(
            f"{datetime.fromisoformat(ended) + timedelta(seconds=seconds):%Y-%m-%d %H:%M} UTC"
        )
    if job["metadata"].get("ownerReferences"):
        until.append("the pod of its step is deleted")
    return f"{phase}; stays, with the logs of pods that are left, until {' or '.join(until) or 'somebody deletes it'}"
