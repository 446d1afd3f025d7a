"""Commands and settings that an error proposes: each is read by the command line, and cures what was wrong."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import minimal, options
from tests.test_cli import Run
from tests.test_odd_images import data_set
from vitdet.cli import parser
from vitdet.config import flatten, load_config

SOURCES = Path(__file__).parents[1]
COMMAND = re.compile(r"`(vitdet [^`]+)`|\((vitdet (?:weights|train) [^`()]+)\)")
VERB = r"(?:config|data|weights|train|evaluate|predict|bench|register)"


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Texts in the code, but no docstrings; what is filled in stands as X."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docs | inside:
                yield node.lineno, node.value


def proposed() -> list[tuple[str, str]]:
    """(place, command) of every command in a message; alternatives as a|b one after another."""
    found = []
    for path in sorted((SOURCES / "vitdet").rglob("*.py")):
        for line, text in texts_of(path):
            for match in COMMAND.finditer(text):
                command = match[1] or match[2]
                choices = re.search(r"(\w+)\|(\w+)", command)
                for one in choices.groups() if choices else ("",):
                    whole = command.replace(choices[0], one) if choices else command
                    found.append((f"{path.relative_to(SOURCES)}:{line}", whole))
    return found


def test_there_are_commands_in_messages() -> None:
    assert len(proposed()) > 12


@pytest.mark.parametrize("command", sorted({command for _, command in proposed()}))
def test_a_proposed_command_is_read_by_the_command_line(command: str) -> None:
    """The name of a verb alone, as in `vitdet train`, only says which; any other command is whole."""
    _, *words = shlex.split(command)
    assert re.fullmatch(VERB, words[0])
    if words[0] == "weights" and words[1] == "fetch":
        words = ["mae_vit_b" if word in ("X", "NAME") else word for word in words]
    known, kinds = words, parser()
    while known and kinds._subparsers is not None:
        (choice,) = (a for a in kinds._actions if isinstance(a, argparse._SubParsersAction))
        kinds, known = choice.choices[known[0]], known[1:]
    if known:
        parser().parse_args(words)


# what is wrong: makes it below a folder, and gives the command that fails
Make = Callable[[Path, Path], tuple]


def train(root: Path, *settings: str) -> tuple:
    return ("train", "tiny", *options([*minimal(root), *settings]), "--output", "run")


def copied(tiny: Path, root: Path) -> Path:
    shutil.copytree(tiny, root)
    return root


def one_split(tiny: Path, folder: Path) -> tuple:
    root = copied(tiny, folder / "own")
    shutil.rmtree(root / "val")
    (root / "annotations" / "instances_val.json").unlink()
    (root / "annotations" / "instances_train.json").rename(
        root / "annotations" / "instances_default.json"
    )
    (root / "train").rename(root / "images")
    return train(root)


def other_names(tiny: Path, folder: Path) -> tuple:
    root = copied(tiny, folder / "own")
    for split in ("train", "val"):
        (root / split).rename(root / f"{split}_a")
        path = root / "annotations" / f"instances_{split}.json"
        path.rename(path.with_name(f"instances_{split}_a.json"))
    return train(root)


def test_one_split_is_divided_by_the_command(vitdet: Run, tiny: Path, tmp_path: Path) -> None:
    _, _, said = vitdet(*one_split(tiny, tmp_path))
    (command,) = re.findall(r"`vitdet ([^`]+)`", said)
    assert vitdet(*shlex.split(command.replace("DST", "made")))[0] == 0
    assert vitdet("data", "check", "made")[0] == 0
    assert vitdet(*train(tmp_path / "made", "optim.steps=1"))[0] == 0


def test_splits_of_other_names_are_set(vitdet: Run, tiny: Path, tmp_path: Path) -> None:
    words = other_names(tiny, tmp_path)
    _, _, said = vitdet(*words)
    first, second = re.findall(r"there are the splits (\w+), (\w+); set", said)[0]
    named = re.findall(r"set (data.\w+) and (data.\w+) to two of them", said)[0]
    settings = [f"{key}={name}" for key, name in zip(named, (first, second), strict=True)]
    assert vitdet(*train(tmp_path / "own", *settings, "optim.steps=1"))[0] == 0


@pytest.mark.parametrize(
    "place",
    ["annotations/instances_train.json", "train/_annotations.coco.json", "labels.json", "own.json"],
)
def test_the_command_that_lists_all_problems_finds_the_file(
    vitdet: Run, tiny: Path, tmp_path: Path, place: str
) -> None:
    root = tmp_path / "own"
    tree = json.loads((tiny / "annotations" / "instances_train.json").read_text())
    for one in tree["annotations"][:3]:
        one["bbox"] = [1, 2, "x", 3]
    path = root / place
    path.parent.mkdir(parents=True)
    images = {"labels.json": "data", "own.json": "."}.get(place, "train")
    shutil.copytree(tiny / "train", root / images, dirs_exist_ok=True)
    path.write_text(json.dumps(tree))
    from vitdet.data.coco import read_coco

    with pytest.raises(ValueError, match="four finite numbers") as caught:
        read_coco(path, root / images)
    (command,) = re.findall(r"`vitdet ([^`]+)` lists all problems", str(caught.value))
    code, output, _ = vitdet(*shlex.split(command))
    assert code == 1 and "3 x bbox that is not four finite numbers" in output


def test_a_damaged_image_is_listed(vitdet: Run, tmp_path: Path) -> None:
    data_set(tmp_path, (64, 64))
    (tmp_path / "odd" / "odd.jpg").write_bytes(b"no image")
    from vitdet.data.coco import ImageError, read_image

    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "odd" / "odd.jpg")
    (command,) = re.findall(r"`vitdet ([^`]+)` lists all such files", str(caught.value))
    code, output, _ = vitdet(*shlex.split(command.replace("ROOT", str(tmp_path))))
    assert code == 1 and "image file that is truncated or no image" in output


@pytest.mark.parametrize("name", ["tinny", "mask_rcnn"])
def test_an_unknown_recipe_leads_to_one(vitdet: Run, name: str) -> None:
    _, _, said = vitdet("config", name)
    (command,) = re.findall(r"`vitdet ([^`]+)` lists all recipes", said)
    code, output, _ = vitdet(*shlex.split(command))
    assert code == 0 and "tiny" in output.split()
    found = re.findall(r"did you mean '([^']+)'|nearest are ([^,( ]+)", said)[0]
    assert vitdet("config", found[0] or found[1])[0] == 0


@pytest.mark.parametrize("override", ["optim.lrr=1", "data.worker=1", "lr=1", "optim.flip=1"])
def test_an_unknown_setting_leads_to_one(vitdet: Run, override: str) -> None:
    _, _, said = vitdet("config", "tiny", "--set", override)
    (name,) = re.findall(r"did you mean '([^']+)'", said)
    keys = list(flatten(load_config("tiny")))
    assert any(key == name or key.endswith(f".{name}") for key in keys)


def test_kinds_that_look_alike_are_told_apart_by_the_flag(
    vitdet: Run, tiny: Path, tmp_path: Path
) -> None:
    root = copied(tiny, tmp_path / "own")
    (root / "data.yaml").write_text("names: [a]\ntrain: train\nval: val\n")
    _, _, said = vitdet("data", "convert", root, "made")
    flag, kinds = re.findall(r"(--\w+) says which", said)[0], re.findall(r"looks like (.*);", said)
    assert "coco" in kinds[0]
    assert vitdet("data", "convert", root, "made", flag, "coco")[0] == 0
