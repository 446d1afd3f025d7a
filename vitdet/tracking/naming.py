"""The name, description and tags of a run in MLflow."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from vitdet import __version__, distributed
from vitdet.config import Config, flatten, load_config, recipes
from vitdet.config.digest import difference
from vitdet.config.sections import list_settings

LONGEST = 120  # maximum length of a run's name; MLflow's limit is 250
FIRST = ("train", "optim", "data")  # sections listed first, as runs usually differ in these
RESOLVED = "config"  # stem of config.yaml, which training writes; not a recipe's name


def recipe_of(config: Config, name: str) -> tuple[str, str]:
    """Return (name of the recipe, built-in recipe with which the config is compared).

    name: the given recipe, or the stem of the config file. The built-in recipe is the one with this
    name or, if there is none, the one from which the fewest settings differ. If `name` is RESOLVED,
    the recipe is this built-in recipe.
    """
    builtin = recipes()
    if name in builtin:
        return name, name
    closest = min(builtin, key=lambda recipe: len(difference(config, load_config(recipe))))
    return (closest if name == RESOLVED else name), closest


def run_name(config: Config, recipe: str, builtin: str) -> str:
    """Return the recipe, and the changed settings that affect the weights.

    For example, `tiny optim.lr=0.0002 train.seed=1`. To stay within LONGEST characters, the last
    settings are replaced by their number, e.g. `+2 more`.
    """
    affecting = {key for key, (_, operational) in list_settings(config).items() if not operational}
    changes = [text for key, text in _changes(config, builtin) if key in affecting]
    for shown in range(len(changes), -1, -1):
        rest = [f"+{len(changes) - shown} more"] if shown < len(changes) else []
        name = " ".join([recipe[:LONGEST], *changes[:shown], *rest])
        if len(name) <= LONGEST:
            return name
    return recipe[:LONGEST]


def description(config: Config, builtin: str, output: Path) -> str:
    """Return a command line that repeats this training run, as a Markdown code block.

    `tracking.uri` is omitted, as it may contain a password.
    """
    changes = [text for key, text in _changes(config, builtin) if key != "tracking.uri"]
    options = [f"--set {shlex.quote(change)}" for change in changes]
    lines = [f"vitdet train {builtin}", *options, f"--output {shlex.quote(str(output))}"]
    return "    " + " \\\n        ".join(lines) + "\n"


def machine() -> dict[str, str]:
    """Return the tags `hostname`, `device`, `torch` (version) and `vitdet` (version)."""
    device = "CPU"
    if torch.cuda.is_available():
        count, name = distributed.world_size(), torch.cuda.get_device_name()
        device = name if count == 1 else f"{count} x {name}"
    return {
        "hostname": socket.gethostname(),
        "device": device,
        "torch": torch.__version__,
        "vitdet": __version__,
    }


def git_revision() -> str | None:
    """Return the working directory's git commit, with `-dirty` if tracked files were changed.

    Outside a repository, return the environment variable VITDET_REVISION, which the container image
    sets, or None.
    """
    commit = _git("rev-parse", "--verify", "-q", "HEAD")
    if not commit:
        return os.environ.get("VITDET_REVISION") or None
    return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*words: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()


def code_tags() -> dict[str, str]:
    """Return the tags `git_revision` and `image`, if they are known.

    The pod's manifest sets the environment variable VITDET_IMAGE, as a container cannot determine
    its image. Only an image name with a digest identifies the image exactly.
    """
    tags = {"git_revision": git_revision(), "image": os.environ.get("VITDET_IMAGE")}
    return {key: value for key, value in tags.items() if value}


def _changes(config: Config, builtin: str) -> Iterator[tuple[str, str]]:
    """Yield (setting, override) for each setting that differs from the built-in recipe."""
    defaults = flatten(load_config(builtin))
    sections = list(dict.fromkeys((*FIRST, *type(config).hints)))
    # the stable sort keeps the order within sections
    for key, value in sorted(
        flatten(config).items(), key=lambda item: sections.index(item[0].partition(".")[0])
    ):
        if value != defaults[key]:
            text = value if isinstance(value, str) else json.dumps(value).removesuffix(".0")
            if not text or text[0] in ("'", '"') or text != text.strip():
                text = json.dumps(text)  # other text is valid in an override without quotes
            yield key, f"{key}={text}"
