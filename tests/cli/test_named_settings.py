"""Settings named in messages exist in the config and accept the suggested value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch

import pytest

from tests.helpers.messages import messages
from vitdet.config import flatten, load_config

KEYS = tuple(flatten(load_config("mask_rcnn_vitdet_b_coco")))
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
# SECTION.KEY or SECTION.SECTION.KEY, perhaps =VALUE and "or VALUE"; the ends of file names are none
SETTING = re.compile(
    rf"(?<![\w./*-])(?P<key>(?:{SECTIONS})(?:\.(?!(?:pt|yaml|txt|pkl)\b)[\w*]+)+)"
    r"(?:=(?P<value>%?[\w.+-]*\w)(?: or (?P<other>\w+)(?![\w.*]))?)?"
)
FILLED_IN = re.compile(r"X|N|%\w")  # by the code or by the reader


def named(text: str) -> Iterator[tuple[str, str]]:
    """(key, value) of each setting in a text; value "" where none is given, or one that is filled in."""
    for match in SETTING.finditer(text):
        value, other = match["value"] or "", match["other"]
        yield match["key"], "" if FILLED_IN.fullmatch(value) else value
        if other:
            yield match["key"], other


def check(key: str, value: str) -> None:
    """Raises AssertionError for a key that is none (X: any name; *: any letters), ValueError for a value."""
    pattern = re.sub(r"\bX\b", "*", key)
    assert any(fnmatch(one, pattern) or one.startswith(f"{key}.") for one in KEYS), key
    if value:
        load_config("mask_rcnn_vitdet_b_coco", [f"{key}={value}"])


def settings() -> list[tuple[str, str]]:
    """All that are named in a message of ours."""
    return sorted({one for _, text in messages() for one in named(text)})


def test_each_named_setting_is_one_and_takes_the_value() -> None:
    found, wrong = settings(), []
    assert len(dict(found)) > 50 and sum(bool(value) for _, value in found) > 8
    for key, value in found:
        try:
            check(key, value)
        except (AssertionError, ValueError) as error:
            wrong.append((key, value, str(error)))
    assert not wrong


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a smaller optim.lr, optim.clip=1.", [("optim.lr", ""), ("optim.clip", "1")]),
        (
            "train.precision=bf16 or fp32",
            [("train.precision", "bf16"), ("train.precision", "fp32")],
        ),
        ("train.accumulate=%d or data.*_split", [("train.accumulate", ""), ("data.*_split", "")]),
        ("model.backbone.X is not for X/model.pt or data.yaml", [("model.backbone.X", "")]),
        ("X.data.root and my-train.init", []),
    ],
)
def test_settings_are_found_in_a_text(text: str, found: list[tuple[str, str]]) -> None:
    assert list(named(text)) == found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lrate", ""),
        ("model.backbones.X", ""),
        ("data.*_splits", ""),
        ("train.precision", "bf8"),
        ("optim.clip", "-1"),
        ("data.redraw_empty", "never"),
    ],
)
def test_a_wrong_setting_is_found(key: str, value: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check(key, value)
