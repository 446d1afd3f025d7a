"""What to suggest for a name that is unknown."""

import difflib
from collections.abc import Sequence

MANY = 16  # more names than this are not listed in an error message


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for an unknown name: the known ones, or those nearest to it if there are many."""
    inside = [one for one in known if name and name in one] if len(known) > MANY else []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close and inside in ([], close):
        return f"did you mean '{close[0]}'?"
    if len(known) <= MANY:
        return f"known: {', '.join(known)}"
    like = difflib.get_close_matches(name, inside or known, n=3, cutoff=0)
    return f"of {len(known)} the nearest are {', '.join(like)}"
