"""Commands and settings that error messages suggest parse, and resolve the error."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click import ClickException

from components.launcher.templates import KINDS, RUN
from pipeline.cli import parser as pipeline_parser
from tests.cli.test_cli import Run
from tests.conftest import minimal, options
from tests.data.test_odd_images import data_set
from tests.helpers.messages import ROOT, messages
from vitdet.cli import parser
from vitdet.config import flatten, load_config

COMMAND = re.compile(r"`(vitdet [^`]+)`|\((vitdet (?:weights|train) [^`()]+)\)")
# commands of other programs; one with a pipe is two
OTHER = re.compile(r"`((?:python -m|kubectl|mlflow|dvc) [^`]+)`")
BARE = re.compile(r"(?<![`\w])(?:python -m pipeline|kubectl|dvc) +[\w.]")
VERB = r"(?:config|data|weights|train|evaluate|predict|bench|register|compare|promote|rollback)"


def proposed() -> list[tuple[str, str]]:
    """(place, command) of every command in a message; alternatives as a|b one after another."""
    found = []
    for place, text in messages():
        for match in COMMAND.finditer(text):
            command = match[1] or match[2]
            choices = re.search(r"(\w+)\|(\w+)", command)
            for one in choices.groups() if choices else ("",):
                found.append((place, command.replace(choices[0], one) if choices else command))
    return found


def choices_of(kind: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (one for one in kind._actions if isinstance(one, argparse._SubParsersAction))
    return dict(action.choices)


def test_there_are_commands_in_messages() -> None:
    assert len(proposed()) > 12


@pytest.mark.parametrize("command", sorted({command for _, command in proposed()}))
def test_a_proposed_command_is_read_by_the_command_line(command: str) -> None:
    """The name of a verb alone, as in `vitdet train`, only says which; any other command is whole."""
    _, *words = shlex.split(command)
    assert re.fullmatch(VERB, words[0])
    if words[0] == "weights" and words[1] == "fetch":
        words = ["mae_vit_b" if word in ("X", "NAME") else word for word in words]
    words = ["1" if word in ("N", "X") else word for word in words]  # a number, or any name
    known, kinds = words, parser()
    while known and kinds._subparsers is not None:
        kinds, known = choices_of(kinds)[known[0]], known[1:]
    if known:
        parser().parse_args(words)


def read_pipeline(words: list[str]) -> None:
    """By the parser itself; `...`: the words of the user's command before, whichever verb has the option."""
    module, *words = words
    assert module == "pipeline"
    if words[0] != "...":
        pipeline_parser().parse_args(words)
        return
    verbs = [
        verb
        for verb, kind in choices_of(pipeline_parser()).items()
        if words[1] in kind._option_string_actions
    ]
    assert verbs
    for verb in verbs:
        pipeline_parser().parse_args([verb, "tiny", *words[1:]])


def read_kubectl(words: list[str]) -> None:
    """The verbs that we propose: whether their folders, kinds and labels are ours. NAME: each overlay."""
    reader = argparse.ArgumentParser("kubectl", exit_on_error=False)
    verbs = reader.add_subparsers(required=True)
    verbs.add_parser("kustomize").add_argument("folder")
    delete = verbs.add_parser("delete")
    delete.add_argument("kinds", type=lambda text: set(text.split(",")))
    delete.add_argument("-n", required=True)
    delete.add_argument("-l", required=True)
    given = reader.parse_args(words)
    if words[0] == "kustomize":
        for overlay in (ROOT / "manifests" / "overlays").iterdir():
            folder = ROOT / given.folder.replace("NAME", overlay.name)
            assert (folder / "kustomization.yaml").is_file()
    else:
        assert given.kinds == {kind.plural for kind in KINDS.values()}
        assert given.l.partition("=")[0] == RUN


def read_mlflow(words: list[str]) -> None:
    """By MLflow's own commands. X: a number."""
    from mlflow.cli import cli

    words = ["0" if word == "X" else word for word in words]
    command, context = cli, None
    while hasattr(command, "commands"):
        context = command.make_context(words[0], [], context, resilient_parsing=True)
        command, *words = command.get_command(context, words[0]), *words[1:]
        assert command is not None
    command.make_context(command.name, words, context)


READERS = {"python -m": read_pipeline, "kubectl": read_kubectl, "mlflow": read_mlflow}


def proposed_elsewhere() -> list[str]:
    """The commands of other programs in all messages."""
    return sorted(
        {
            part.strip()
            for _, text in messages()
            for match in OTHER.finditer(text)
            for part in match[1].split(" | ")
        }
    )


@pytest.mark.parametrize("command", proposed_elsewhere())
def test_a_proposed_command_of_another_program_is_read_by_it(command: str) -> None:
    (program,) = (one for one in READERS if command.startswith(f"{one} "))
    READERS[program](shlex.split(command.removeprefix(program)))


@pytest.mark.parametrize(
    "command",
    [
        "python -m pipeline finish X",
        "python -m pipeline status",
        "python -m pipelines status X",
        "python -m pipeline ... --jobs -",
        "kubectl kustomize manifests/overlay/NAME",
        "kubectl delete -n X pytorchjobs -l vitdet/run=X",
        "kubectl delete -n X pytorchjobs,trainjobs -l vitdet/runs=X",
        "mlflow experiments revive -x X",
        "mlflow experiments restore -y X",
    ],
)
def test_a_wrong_command_of_another_program_is_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit, argparse.ArgumentError, ClickException)):
        test_a_proposed_command_of_another_program_is_read_by_it(command)


def test_each_command_of_another_program_can_be_told_from_the_text() -> None:
    """In backticks, so that a person knows where it ends, and the test above reads it."""
    commands = proposed_elsewhere()
    assert {one for one in READERS if any(map(re.compile(f"{one} ").match, commands))} == {*READERS}
    bare = [(place, text) for place, text in messages() if BARE.search(re.sub("`[^`]*`", "", text))]
    assert not bare


def options_of(kind: argparse.ArgumentParser) -> set[str]:
    """All options of a command line and of its verbs."""
    found = set(kind._option_string_actions)
    if kind._subparsers is not None:
        found.update(*map(options_of, choices_of(kind).values()))
    return found


def test_an_option_that_a_message_names_is_one_of_ours() -> None:
    """But git's options."""
    others = ("vitdet/tracking/naming.py",)
    known = options_of(parser()) | options_of(pipeline_parser())
    found = [
        (place, option)
        for place, text in messages()
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
        if not place.startswith(others)
    ]
    assert len(found) > 100 and [one for one in found if one[1] not in known] == []


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
