"""Suggestions for unknown names."""

import difflib
from collections.abc import Sequence

MAX_LISTED = 16  # a hint lists at most this many names


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: a similar name, all names, or the three nearest."""
    many = len(known) > MAX_LISTED
    inside = [item for item in known if name and name in item] if many else []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close and inside in ([], close):
        return f"did you mean '{close[0]}'?"
    if not many:
        return f"known: {', '.join(known)}"
    like = difflib.get_close_matches(name, inside or known, n=3, cutoff=0)
    return f"the nearest of {len(known)} are {', '.join(like)}"
