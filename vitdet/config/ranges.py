"""Types of settings with a range or pattern. Descriptions complete the message "KEY must ..."."""

import math
import re
from contextlib import suppress
from functools import cache
from types import GenericAlias
from typing import Annotated, Any, Literal, get_args, get_origin

from msgspec import Meta, ValidationError, convert

from vitdet.config.credentials import hide_credentials


def between(low: int, high: int) -> Meta:
    """Return the range of whole numbers from `low` to `high`, both included."""
    return Meta(ge=low, le=high, description=f"be between {low} and {high}")


# the upper bounds catch typos; they are far above realistic values
Seed = Annotated[int, between(0, 2**63 - 1)]
Count = Annotated[int, between(1, 2**31 - 1)]  # number of steps or files
Amount = Annotated[int, between(1, 1_000_000)]  # number of images, boxes or classes
Size = Annotated[int, between(1, 65_536)]  # side or width
Depth = Annotated[int, between(0, 1024)]  # number of layers
Workers = Annotated[int, between(0, 1024)]  # number of processes
NonNegative = Annotated[float, Meta(ge=0, description="not be negative")]
Positive = Annotated[float, Meta(gt=0, description="be above 0")]
Positives = Annotated[tuple[Positive, ...], Meta(min_length=1, description="not be empty")]
Fraction = Annotated[float, Meta(ge=0, le=1, description="be between 0 and 1")]
Percent = Annotated[float, Meta(ge=0, le=100, description="be between 0 and 100")]
# with 1,000 bootstrap resamples, the tails of a 99.9% interval contain no resample
Confidence = Annotated[float, Meta(ge=0, le=0.998, description="be between 0 and 0.998")]
Fractions = Annotated[tuple[Fraction, ...], Meta(min_length=1, description="not be empty")]
# MLflow accepts every name that matches the pattern (mlflow.utils.validation). Quotes and
# backslashes are excluded, since they would break the filter strings of model searches.
ModelName = Annotated[
    str,
    Meta(
        pattern=r"^(?=.*\S)(?!\.\Z|\.\.)[^/:'\"\\\x00-\x1f\x7f]{1,256}\Z",
        description="have 1 to 256 characters, none of them / : ' \" \\ or a control character, "
        "and must not be blank, equal . or begin with ..",
    ),
]
ExperimentName = Annotated[
    str,
    Meta(
        pattern=r"^(?=.*\S)[^\x00-\x1f\x7f]{1,256}\Z",
        description="have 1 to 256 characters, no control characters, and must not be blank",
    ),
]
# MLflow would read localhost:5000 as a folder or as the URI scheme localhost
TrackingUri = Annotated[
    str,
    Meta(
        pattern=r"^(?![^/\s]*:\d+(?:/|\Z))",
        description="begin with a scheme, as in http://HOST:PORT or sqlite:///FILE",
    ),
]
Alias = Annotated[
    str,
    Meta(
        pattern=r"^(?![lL][aA][tT][eE][sS][tT]\Z)(?![vV]\d+\Z)[\w\-]{1,255}\Z",
        description="have 1 to 255 letters, digits, _ or -, and not be latest or v1, v2, ...",
    ),
]
TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def check(key: str, hint: Any, value: Any) -> None:
    """Raise ValueError if the value is not finite or does not match its type annotation `hint`."""
    kind, got = without_ranges(hint), list(value) if isinstance(value, tuple) else value
    item, *rest = get_args(kind) if get_origin(kind) is tuple else (kind,)
    if rest and isinstance(got, list) and rest in ([...], [item] * (len(got) - 1)):
        for element in got:
            check(key, item, element)
    elif not _fits(value, kind) or isinstance(value, float) and not math.isfinite(value):
        if get_origin(kind) is Literal:
            expected = f"one of {', '.join(map(str, get_args(kind)))}"
        elif rest:
            count = "values" if rest == [...] else f"{1 + len(rest)} values"
            expected = f"a list of {count}, each {TYPES[item]}"
        else:
            expected = TYPES[kind]
        raise ValueError(f"{key}: expected {expected}, got {got!r}")
    if not _fits(value, hint):
        while get_origin(hint) is not Annotated:
            hint = get_args(hint)[0]
        raise ValueError(f"{key} must {hint.__metadata__[0].description}, got {got}")


def check_address(key: str, uri: str) -> None:
    """Raise ValueError for HOST:PORT without a scheme. The message hides credentials."""
    hidden = hide_credentials(uri) if "://" in uri else re.sub(r"^.*@", "***@", uri)
    check(key, TrackingUri, hidden)


def _fits(value: object, hint: Any) -> bool:
    with suppress(ValidationError):
        convert(value, hint)
        return True
    return False


@cache
def without_ranges(hint: Any) -> Any:
    """Return a setting's type without range and pattern."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        return GenericAlias(tuple, tuple(map(without_ranges, get_args(hint))))
    return hint
