"""The commands, options and settings that messages suggest exist and resolve the error."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from pipeline.cli import parser as pipeline_parser
from tests.cli.test_cli import Run
from tests.conftest import ROOT, minimal, options
from tests.data.test_odd_images import data_set
from tests.helpers.layers import PRODUCT
from vitdet.cli import parser
from vitdet.config import flatten, load_config
from vitdet.data.coco import ImageError, read_coco, read_image

COMMAND = re.compile(
    r"`(?:vitdet|python -m pipeline) ([^`]+)`|\(vitdet ((?:weights|train) [^`()]+)\)"
)
KEYS = tuple(flatten(load_config("mask_rcnn_vitdet_b_coco")))
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
# SECTION.KEY or SECTION.SECTION.KEY, optionally with =VALUE; file names do not match
SETTING = re.compile(
    rf"(?<![\w./*-])((?:{SECTIONS})(?:\.(?!(?:pt|yaml|txt|pkl)\b)[\w*]+)+)(?:=(%?[\w.+-]*\w))?"
)


@cache
def messages() -> tuple[tuple[str, str], ...]:
    """Return (location, text) for every string literal in the project's packages."""
    paths = [path for package in PRODUCT for path in sorted((ROOT / package).rglob("*.py"))]
    return tuple(
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path in paths
        for line, text in texts_of(path)
    )


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, string) for the string literals except docstrings, with X for formatted values."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    first = [node.body[0] for node in nodes if isinstance(node, documented) and node.body]
    left_out = {id(statement.value) for statement in first if isinstance(statement, ast.Expr)}
    inserted = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    left_out |= {id(part) for node in inserted for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in left_out:
                yield node.lineno, node.value


def commands() -> list[str]:
    """Return the commands in messages, without the program name; a|b yields both alternatives."""
    found = set()
    for _, text in messages():
        for match in COMMAND.finditer(text):
            command = match[1] or match[2]
            choices = re.search(r"(\w+)\|(\w+)", command)
            for choice in choices.groups() if choices else ("",):
                found.add(command.replace(choices[0], choice) if choices else command)
    return sorted(found)


def choices_of(kind: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (verbs for verbs in kind._actions if isinstance(verbs, argparse._SubParsersAction))
    return dict(action.choices)


def options_of(kind: argparse.ArgumentParser) -> set[str]:
    """Return all options of a command line and of its subcommands."""
    found = set(kind._option_string_actions)
    if kind._subparsers is not None:
        found.update(*map(options_of, choices_of(kind).values()))
    return found


@pytest.mark.parametrize("command", commands())
def test_a_suggested_command_is_accepted(command: str) -> None:
    """A subcommand without arguments, as in `vitdet train`, is only named; others must be complete."""
    words = ["1" if word in ("N", "X") else word for word in shlex.split(command)]
    if words[0] == "...":  # the user's own command with an additional option
        assert words[1] in options_of(pipeline_parser())
        return
    program = next(make() for make in (parser, pipeline_parser) if words[0] in choices_of(make()))
    known, kinds = words, program
    while known and kinds._subparsers is not None:
        kinds, known = choices_of(kinds)[known[0]], known[1:]
    if known:
        program.parse_args(words)


def test_options_in_messages_exist() -> None:
    known = options_of(parser()) | options_of(pipeline_parser())
    found = [
        (place, option)
        for place, text in messages()
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
        if not place.startswith("vitdet/tracking/naming.py")  # contains git options
    ]
    assert len(found) > 100 and [pair for pair in found if pair[1] not in known] == []


def test_settings_in_messages_exist_and_accept_the_value() -> None:
    found = {pair for _, text in messages() for pair in SETTING.findall(text)}
    assert len(dict(found)) > 50 and sum(bool(value) for _, value in found) > 8
    for key, value in found:
        pattern = re.sub(r"\bX\b", "*", key)
        assert any(fnmatch(name, pattern) or name.startswith(f"{key}.") for name in KEYS), key
        if value and not re.fullmatch(r"X|N|%\w", value):  # not a placeholder
            load_config("mask_rcnn_vitdet_b_coco", [f"{key}={value}"])


def train(root: Path, *settings: str) -> tuple:
    return ("train", "tiny", *options([*minimal(root), *settings]), "--output", "run")


def test_the_suggested_command_divides_a_single_split(vitdet: Run, own_tiny: Path) -> None:
    annotations = own_tiny / "annotations"
    shutil.rmtree(own_tiny / "val")
    (annotations / "instances_val.json").unlink()
    (annotations / "instances_train.json").rename(annotations / "instances_default.json")
    (own_tiny / "train").rename(own_tiny / "images")
    _, _, said = vitdet(*train(own_tiny))
    (command,) = re.findall(r"`vitdet ([^`]+)`", said)
    assert vitdet(*shlex.split(command.replace("DST", "made")))[0] == 0
    assert vitdet("data", "check", "made")[0] == 0
    assert vitdet(*train(Path("made"), "optim.steps=1"))[0] == 0


def test_the_suggested_settings_select_splits_of_other_names(vitdet: Run, own_tiny: Path) -> None:
    for split in ("train", "val"):
        (own_tiny / split).rename(own_tiny / f"{split}_a")
        path = own_tiny / "annotations" / f"instances_{split}.json"
        path.rename(path.with_name(f"instances_{split}_a.json"))
    _, _, said = vitdet(*train(own_tiny))
    first, second = re.findall(r"the splits are (\w+), (\w+); set", said)[0]
    named = re.findall(r"set (data.\w+) and (data.\w+) to two of them", said)[0]
    settings = [f"{key}={name}" for key, name in zip(named, (first, second), strict=True)]
    assert vitdet(*train(own_tiny, *settings, "optim.steps=1"))[0] == 0


@pytest.mark.parametrize(
    ("place", "images"),
    [
        ("annotations/instances_train.json", "train"),
        ("train/_annotations.coco.json", "train"),
        ("labels.json", "data"),
        ("own.json", "."),
    ],
)
def test_the_command_that_lists_all_problems_finds_the_file(
    vitdet: Run, tiny: Path, tmp_path: Path, place: str, images: str
) -> None:
    root = tmp_path / "own"
    tree = json.loads((tiny / "annotations" / "instances_train.json").read_text())
    for annotation in tree["annotations"][:3]:
        annotation["bbox"] = [1, 2, "x", 3]
    path = root / place
    path.parent.mkdir(parents=True)
    shutil.copytree(tiny / "train", root / images, dirs_exist_ok=True)
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="four finite numbers") as caught:
        read_coco(path, root / images)
    (command,) = re.findall(r"`vitdet ([^`]+)` lists all problems", str(caught.value))
    code, output, _ = vitdet(*shlex.split(command))
    assert code == 1 and "3 x bbox that is not four finite numbers" in output


def test_the_suggested_command_lists_a_damaged_image(vitdet: Run, tmp_path: Path) -> None:
    data_set(tmp_path, (64, 64))
    (tmp_path / "odd" / "odd.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "odd" / "odd.jpg")
    (command,) = re.findall(r"`vitdet ([^`]+)` lists all problems", str(caught.value))
    code, output, _ = vitdet(*shlex.split(command.replace("ROOT", str(tmp_path))))
    assert code == 1 and "truncated or invalid image file" in output


def test_the_suggested_option_sets_the_format_of_a_folder(vitdet: Run, own_tiny: Path) -> None:
    (own_tiny / "data.yaml").write_text("names: [a]\ntrain: train\nval: val\n")
    _, _, said = vitdet("data", "convert", own_tiny, "made")
    (flag,), (kinds,) = (
        re.findall(r"choose one with (--\w+)", said),
        re.findall(r"could be (.*);", said),
    )
    assert "coco" in kinds and vitdet("data", "convert", own_tiny, "made", flag, "coco")[0] == 0
