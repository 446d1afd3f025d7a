"""A request for a run: the compiled pipeline and its parameters, validated before it is sent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.versions import Version, fit

MOUNT = "/data"  # mount path of the shared volume in the steps
DEFAULT_IMAGE = "vitdet"  # the placeholder in manifests/, which overlays replace
DEFAULT_IMAGE_WARNING = (
    f"the steps' image {DEFAULT_IMAGE!r} has no registry, so no cluster can pull it. Pass your "
    "cluster's job: `kubectl kustomize manifests/overlays/NAME | python -m pipeline ... --job -` "
    "(or set VITDET_IMAGE)"
)


@dataclass(frozen=True)
class RunRequest:
    """A run to start."""

    pipeline: dict  # the result of `load_package`
    parameters: dict[str, object]
    name: str
    experiment: str
    account: str = ""  # service account of the steps; "": the server's default
    root: str = ""  # URL of the storage for artifacts; "": the server's default


@dataclass(frozen=True)
class Schedule:
    """A schedule for starting runs."""

    expression: str  # see `kubeflow_cron`
    max_concurrency: int = 1  # maximum number of concurrent runs, 1..10
    catch_up: bool = True  # whether to start missed runs


def load_package(
    package: Path, parameters: dict[str, object], caching: bool, parallel: int | None = None
) -> dict:
    """Read a compiled pipeline and set its caching options and parallelism.

    parallel: maximum number of concurrent training runs; None keeps the number in the package.

    If `caching` is False, no step reuses cached results. If a recipe is a file, step `configs`
    does not reuse cached results, because the file may have changed. Raises FileNotFoundError, and
    ValueError if the file is not a compiled pipeline or does not match the parameters.
    """
    spec, *platforms = read_package(package)
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    if wrong := parameters.keys() - known.keys():
        raise ValueError(f"{package}: the pipeline has no parameter {' or '.join(sorted(wrong))}")
    optional = [name for name, p in known.items() if "defaultValue" in p or p.get("isOptional")]
    if missing := known.keys() - {*optional, *parameters}:
        raise ValueError(f"{package}: missing pipeline parameters: {', '.join(sorted(missing))}")
    recipes = parameters.get("recipes")
    files = isinstance(recipes, list) and any(is_file(str(recipe)) for recipe in recipes)
    for group in (spec["root"], *spec.get("components", {}).values()):
        for name, task in group.get("dag", {}).get("tasks", {}).items():
            if not caching or (files and name == "configs"):
                task["cachingOptions"] = {}
            if parallel and "parameterIterator" in task:
                task["iteratorPolicy"] = {"parallelismLimit": parallel}
    return {"pipeline_spec": spec, "platform_spec": platforms[0]} if platforms else spec


def read_package(package: Path) -> list[dict]:
    """Return the pipeline and, if present, its Kubernetes part. For errors, see `load_package`."""
    if not Path(package).is_file():
        raise FileNotFoundError(f"{package}: no such file")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        documents = list(yaml.load_all(Path(package).read_text(), loader))
    except (yaml.YAMLError, UnicodeDecodeError):
        documents = []
    if not documents or not isinstance(documents[0], dict) or "root" not in documents[0]:
        raise ValueError(f"{package}: not a compiled pipeline")
    return documents


def fit_package(package: Path, version: Version) -> list[str]:
    """Apply `versions.fit` to a package file; return the messages of `fit`."""
    documents = read_package(package)
    lines = fit(documents, version)
    if lines:
        head = [line for line in package.read_text().splitlines() if line.startswith("#")]
        body = yaml.safe_dump_all(documents, sort_keys=True)
        package.write_text("\n".join([*head, body]))
    return lines


def default_image_warning(pipeline: dict) -> str:
    """Return a warning if a pipeline uses the placeholder image of manifests/, else ""."""
    spec = pipeline.get("pipeline_spec", pipeline)
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    images = {item.get("container", {}).get("image") for item in executors.values()}
    return DEFAULT_IMAGE_WARNING if images == {DEFAULT_IMAGE} else ""


def is_file(recipe: str) -> bool:
    """Return whether a recipe is given as a file."""
    return recipe.endswith((".yaml", ".yml"))


def kubeflow_cron(expression: str) -> str:
    """Convert a schedule to Kubeflow's notation, whose first field is seconds.

    Kubeflow interprets the five fields of a crontab as seconds..months, so "0 3 * * *" would start
    a run every hour; second 0 is therefore prepended. Schedules of six fields, and
    expressions such as @daily or @every 12h, are kept. Raises ValueError for anything else.
    """
    if re.fullmatch(r"@(yearly|monthly|weekly|daily|hourly|every \w+)", expression):
        return expression
    fields = expression.split()
    if len(fields) not in (5, 6) or not all(re.fullmatch(r"[\w*/,?-]+", item) for item in fields):
        raise ValueError(
            f"schedule {expression!r}: expected five fields as in a crontab (minute hour day month "
            "weekday), six with seconds first, or @daily, @weekly, @every 12h"
        )
    return " ".join(fields if len(fields) == 6 else ["0", *fields])


# Script that resolves the training runs like the first step, but without a workspace.
CHECK = """
import json, sys
from pathlib import Path
from vitdet import stages
recipes, overrides, sweep, seeds, fetch = json.load(sys.stdin)
try:
    stages.plan_trainings(recipes, overrides, "", sweep, seeds)
    if fetch: stages.fetch_words(fetch, Path(), Path())
except (ValueError, OSError) as error:
    sys.exit(str(error))
"""


def check_recipes(
    recipes: Sequence[str],
    overrides: Sequence[str],
    sweep: Sequence[str] = (),
    seeds: int = 1,
    fetch: str = "",
) -> bool:
    """Raise ValueError for invalid settings; return whether all recipes were checked.

    vitdet checks the settings in a new process, because pipeline/ must not import vitdet.stages.
    Recipe files that exist only on the cluster are checked by the first step, before data is
    prepared or GPUs are requested. In this case, the result is False.
    """
    import vitdet
    from vitdet.config.credentials import has_credentials, hide_credentials

    if len(set(recipes)) < len(recipes):
        twice = next(recipe for recipe in recipes if recipes.count(recipe) > 1)
        raise ValueError(f"a recipe is given twice: {twice}")
    settings = [f"--set {text}" for text in overrides] + [f"--sweep {text}" for text in sweep]
    for text in [*settings, f"--fetch={fetch}"]:
        if has_credentials(text):
            raise ValueError(
                f"{hide_credentials(text.partition('=')[0])}: the credentials would be visible in "
                "the run's parameters; pass MLflow's in the environment or the cluster's Secret"
            )
    for recipe in recipes:
        if is_file(recipe) and not Path(recipe).is_absolute():
            raise ValueError(
                f"{recipe} is a relative path; pass a recipe's name, or the absolute path of "
                "a file on the cluster's shared volume"
            )
    here = [recipe for recipe in recipes if not is_file(recipe) or Path(recipe).exists()]
    if here:
        done = subprocess.run(
            [sys.executable, "-c", CHECK],
            input=json.dumps([here, list(overrides), list(sweep), seeds, fetch]),
            capture_output=True,
            text=True,
            cwd=Path(vitdet.__file__).parents[1],
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["the recipes could not be checked"]
            raise ValueError(lines[-1])
    return len(here) == len(recipes)
