"""What is to be run, looked through before anything of it is sent."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

IMAGE = "vitdet"  # in manifests/ before an overlay names the registry
BARE = (
    f"the steps' image is {IMAGE!r}, of no registry: no cluster can pull it. Give your cluster's job: kubectl "
    "kustomize manifests/overlays/NAME | python -m pipeline ... --job - (or set VITDET_IMAGE)"
)


@dataclass(frozen=True)
class Order:
    """A run to start: the pipeline (see `specification`) and its parameters; "" leaves a choice to the server."""

    pipeline: dict
    parameters: dict[str, object]
    name: str
    experiment: str
    account: str = ""
    root: str = ""


@dataclass(frozen=True)
class Schedule:
    """When to start it again and again: see `cron`; max_concurrency: runs at one time, 1..10 as servers allow."""

    expression: str
    max_concurrency: int = 1
    catch_up: bool = True


def jobs(file: str) -> str:
    """The text of a --job file, "-" for the standard input; "" without one. Raises ValueError when it is empty."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text() if file else ""
    if file and not text.strip():
        raise ValueError(f"--job {file}: empty")
    return text


def specification(package: Path, parameters: dict[str, object], caching: bool) -> dict:
    """The body of a request from a compiled pipeline. Without caching no step, at whatever depth, takes old results.

    With it step `configs` does not either where a recipe is a file: the file may have changed, its name has not.

    Raises ValueError when it is no pipeline or its parameters are others.
    """
    if not Path(package).is_file():
        raise FileNotFoundError(f"{package}: no such file")
    try:
        documents = list(
            yaml.load_all(Path(package).read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        )
    except (yaml.YAMLError, UnicodeDecodeError):
        documents = []
    if not documents or not isinstance(documents[0], dict) or "root" not in documents[0]:
        raise ValueError(f"{package}: no compiled pipeline")
    spec, *platforms = documents
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    if wrong := parameters.keys() - known.keys():
        raise ValueError(f"{package}: the pipeline has no parameter {', '.join(sorted(wrong))}")
    needed = {
        name
        for name, about in known.items()
        if "defaultValue" not in about and not about.get("isOptional")
    }
    if missing := needed - parameters.keys():
        raise ValueError(f"{package}: the pipeline also needs {', '.join(sorted(missing))}")
    files = any(is_file(str(recipe)) for recipe in parameters.get("recipes") or ())
    for group in (spec["root"], *spec.get("components", {}).values()):
        for name, task in group.get("dag", {}).get("tasks", {}).items():
            if not caching or (files and name == "configs"):
                task["cachingOptions"] = {}
    return {"pipeline_spec": spec, "platform_spec": platforms[0]} if platforms else spec


def bare(pipeline: dict) -> str:
    """What to say of a pipeline in the image of manifests/ as they are, which no cluster can pull; "" of another."""
    executors = (
        pipeline.get("pipeline_spec", pipeline).get("deploymentSpec", {}).get("executors", {})
    )
    images = {one.get("container", {}).get("image") for one in executors.values()}
    return BARE if images == {IMAGE} else ""


def is_file(recipe: str) -> bool:
    """Whether a recipe is named by its file."""
    return recipe.endswith((".yaml", ".yml"))


def cron(expression: str) -> str:
    """A schedule in Kubeflow's notation, which begins with seconds.

    It takes the five fields of a crontab for seconds..months, so that "0 3 * * *" would start a training every hour;
    they get second 0. Six fields and @daily, @every 12h pass. Raises ValueError for anything else.
    """
    fields = expression.split()
    if expression.startswith("@") and re.fullmatch(
        r"@(yearly|monthly|weekly|daily|hourly|every \w+)", expression
    ):
        return expression
    if len(fields) not in (5, 6) or not all(re.fullmatch(r"[\w*/,?-]+", one) for one in fields):
        raise ValueError(
            f"schedule {expression!r}: expected five fields as in a crontab (minute hour day month "
            "weekday), six with seconds first, or @daily, @weekly, @every 12h"
        )
    return " ".join(fields if len(fields) == 6 else ["0", *fields])


def pool(name: str | None) -> None:
    """Refuses, by ValueError, what no label of a node can be: no pod could be made that asks for it."""
    if name and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name):
        raise ValueError(
            f"--pool {name!r}: expected a label's value: letters, digits, - _ . inside, at most 63"
        )


def check(recipes: Sequence[str], overrides: Sequence[str]) -> bool:
    """Refuses, by ValueError, what the pipeline's first step would; False where this machine cannot tell.

    `vitdet config` answers, as a process of its own: pipeline/ knows nothing of settings and runs without vitdet,
    which only the image needs. Without it the first step refuses, before data or GPUs are touched.
    """
    if len(set(recipes)) < len(recipes):
        raise ValueError(f"a recipe is named twice: {' '.join(recipes)}")
    for override in overrides:
        if re.search(r"://[^/@\s]*:[^/@\s]*@", override):
            raise ValueError(
                f"--set {override.partition('=')[0]}: a password would stand in the run's parameters for "
                "everybody to read; it belongs into the cluster's Secret"
            )
    package = importlib.util.find_spec("vitdet")
    if package is None or not package.origin:
        return False
    told = True
    for recipe in recipes:
        if is_file(recipe) and not Path(recipe).is_absolute():
            raise ValueError(
                f"{recipe}: a file of this machine; the cluster knows recipes by name and files by their "
                "absolute path on the shared volume"
            )
        if is_file(recipe) and not Path(recipe).exists():
            told = False
            continue
        words = [sys.executable, "-m", "vitdet", "config", recipe]
        words += [word for override in overrides for word in ("--set", override)]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=Path(package.origin).parents[1]
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["vitdet config failed"])[
                -1
            ].removeprefix("vitdet: ")
            raise ValueError(reason)
    return told
