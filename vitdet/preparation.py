"""The first steps of a pipeline run: its configs, data and initial weights.

Imports are inside the functions: configs need neither torch nor MLflow.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from vitdet.config import Config, flatten, load_config, save_config
from vitdet.config.digest import difference, digest
from vitdet.data.protocol import SETTINGS
from vitdet.files import sha256, write_json
from vitdet.sweep import SEED, check_count, combinations, with_seeds
from vitdet.workspace import resolve_paths, weights_folder

EXPLICIT = "explicit.json"  # beside the configs of a run: the settings of each that a user chose
DATA = ("data.root", "data.train_split", "data.val_split", "data.max_images")
PLACE = ("tracking.uri", "tracking.experiment", "tracking.model_name")
FETCHED = ("coco", "lvis")


class Data(NamedTuple):
    """The verified data of a run: its fingerprint, the names of the configs, a line for each that
    it changed.
    """

    fingerprint: str
    names: list[str]
    notes: list[str]


def check_comparable(
    first: Config, other: Config, name: str, other_name: str, unknown: Collection[str] = ()
) -> None:
    """Check that two configs can be compared in one table. unknown: settings that are unresolved.

    Raises ValueError if they have different data, evaluation settings or MLflow destinations.
    """
    ours, theirs = flatten(first), flatten(other)
    differing = [
        f"{key} is {theirs[key]}, not {ours[key]}"
        for key in (*DATA, *SETTINGS, *PLACE)
        if ours[key] != theirs[key] and key not in unknown
    ]
    if differing:
        raise ValueError(
            f"{other_name} and {name} cannot be compared: in {other_name}, {'; '.join(differing)}; "
            "run them one by one, or set the same for both"
        )


def plan_trainings(
    recipes: Sequence[str],
    overrides: Sequence[str],
    workspace: str,
    sweep: Sequence[str] = (),
    seeds: int = 1,
) -> dict[str, tuple[Config, list[str]]]:
    """Return {name: (config, the settings that a user chose)} of each training; nothing is written.

    Every recipe is trained with every combination of `sweep` (`vitdet.sweep`) and each with `seeds`
    seeds. Raises ValueError or FileNotFoundError, in one line, for a recipe or setting that is
    wrong, for the same experiment twice, and for recipes that one table could not compare: of other
    data or another place in MLflow.
    """
    from vitdet.data.layout import SPLITS, explicit_settings

    if not recipes:
        raise ValueError("name at least one recipe")
    settings = combinations(sweep, overrides)
    if seeds > 1 and any(one.startswith(f"{SEED}=") for one in sweep):
        raise ValueError(f"the sweep has {SEED} already; leave out the number of seeds")
    check_count(len(recipes), [len(settings)] if sweep else [], seeds)
    planned: dict[str, tuple[Config, list[str]]] = {}
    labels: dict[str, str] = {}
    for recipe, chosen in ((recipe, chosen) for recipe in recipes for chosen in settings):
        resolved = resolve_paths(load_config(recipe, [*overrides, *chosen]), Path(workspace))
        for config, seed in with_seeds(resolved, seeds):
            label = " ".join([recipe, *chosen, *seed])
            name = f"{Path(recipe).stem}-{digest(config)[:8]}"
            if name in planned:
                differing = "; ".join(difference(config, planned[name][0]))
                raise ValueError(
                    f"{label} is given twice with the same settings"
                    + (f" for the training, only others differ ({differing})" if differing else "")
                    + ": there is nothing to compare"
                )
            explicit = sorted(explicit_settings(recipe, [*overrides, *chosen, *seed]))
            first = next(iter(planned), name)
            other, theirs = planned.get(first, (config, explicit))
            named = set(theirs) & set(explicit)
            open_ = () if "data.root" not in named else [key for key in SPLITS if key not in named]
            check_comparable(other, config, labels.get(first, label), label, open_)
            planned[name], labels[name] = (config, explicit), label
    return planned


def resolve_configs(
    recipes: Sequence[str],
    overrides: Sequence[str],
    workspace: str,
    folder: str,
    sweep: Sequence[str] = (),
    seeds: int = 1,
) -> list[str]:
    """Write folder/NAME.yaml for each training, all settings but those that depend on the data, and
    return the names.

    Raises as `plan_trainings` does.
    """
    planned = plan_trainings(recipes, overrides, workspace, sweep, seeds)
    for name, (config, _) in planned.items():
        save_config(config, Path(folder) / f"{name}.yaml")
    write_json(Path(folder) / EXPLICIT, {name: chosen for name, (_, chosen) in planned.items()})
    return list(planned)


def prepare_data(
    settings: str, workspace: str, configs: str, manifest: str, fetch: str = ""
) -> Data:
    """Verify the data and write the configs with what depends on it, and a description of the data.

    fetch: as of `fetch_data`, called first; "": the data is there. The demo's data set is drawn if
    it is not there. Raises FileNotFoundError or ValueError, in one line, for data that is missing
    or that training could not use.
    """
    from vitdet.data.fingerprint import combined, describe
    from vitdet.data.layout import resolve, settings_text
    from vitdet.demo.tiny import make_tiny

    every = read_configs(settings)
    root = next(iter(every.values())).data.root
    demo = Path(workspace) / load_config("tiny").data.root
    if fetch:
        fetch_data(fetch, Path(root), Path(workspace))
    elif Path(root) == demo and not demo.exists():
        make_tiny(demo)
    explicit, notes = json.loads((Path(settings) / EXPLICIT).read_text()), []
    try:
        for name, config in every.items():
            every[name], found = resolve(config, explicit[name])
            if found:
                notes.append(f"{name}: {root} has {settings_text(found)}")
        first = next(iter(every))
        for name, config in every.items():
            check_comparable(every[first], config, first, name)
        described = describe(every[first].data)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; to bring the data there, set the pipeline's parameter `fetch` (--fetch) to "
            "coco, lvis or 'convert SOURCE', or on a cluster apply the Job in manifests/data"
        ) from error
    for name, config in every.items():
        expected, count = config.model.roi_heads.num_classes, len(described["classes"])
        if expected != count:
            raise ValueError(
                f"{root} has {count} classes, but model.roi_heads.num_classes is {expected}; "
                f"set it to {count}"
            )
        save_config(config, Path(configs) / f"{name}.yaml")
    write_json(manifest, described)
    return Data(combined(described["fingerprints"]), list(every), notes)


def fetch_words(fetch: str, root: Path, workspace: Path) -> list[str]:
    """Return the arguments of `vitdet data` that bring a data set to `root`.

    fetch: `coco`, `lvis` or `convert SOURCE`, with options of that command; a relative SOURCE is
    below the workspace. Raises ValueError for anything else.
    """
    try:
        kind, *rest = shlex.split(fetch) or [""]
    except ValueError:
        kind, rest = "", []
    if kind in FETCHED and (not rest or rest[0].startswith("-")):
        return [kind, str(root), *rest]
    if kind == "convert" and rest and not rest[0].startswith("-"):
        return [kind, str(workspace / rest[0]), str(root), *rest[1:]]
    raise ValueError(
        "fetch: expected coco, lvis or 'convert SOURCE', with options of `vitdet data`; "
        f"got {fetch!r}"
    )


def fetch_data(
    fetch: str, root: Path, workspace: Path, out: Callable[[str], object] = print
) -> None:
    """Run `vitdet data` with `fetch_words`; out is called with each line that it prints.

    What is there is kept: a repeated download goes on where it ended, and nothing is converted into
    a folder that is not empty. Raises ValueError, with its last line, if the command fails.
    """
    words = fetch_words(fetch, root, workspace)
    if words[0] == "convert" and root.is_dir() and any(root.iterdir()):
        out(f"fetch: {root} already exists; skipping conversion")
        return
    last = ""
    with subprocess.Popen(
        [sys.executable, "-m", "vitdet", "data", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as command:
        assert command.stdout is not None
        for line in command.stdout:
            last = line.strip() or last
            out(line.rstrip("\n"))
    if command.returncode:
        raise ValueError(f"fetch {fetch}: {last.removeprefix('vitdet: ')}")


def fetch_weights(configs: str, workspace: str) -> str:
    """Fetch what train.init of each config names into WORKSPACE/weights; returns a digest of all
    these files.

    Raises what `vitdet weights fetch` raises.
    """
    from vitdet.weights import resolve
    from vitdet.weights.catalogue import find
    from vitdet.weights.fetch import fetch_published

    sums, folder = [], weights_folder(workspace)
    for init in sorted({config.train.init for config in read_configs(configs).values()}):
        if init and not Path(init).suffix and not (folder / find(init).file).is_file():
            fetch_published(find(init), folder)
        if file := resolve(init, folder):
            sums.append(f"{init} {sha256(file)}")
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]


def read_configs(folder: str | Path) -> dict[str, Config]:
    """Return the configs that `resolve_configs` or `prepare_data` wrote to a folder, by name."""
    return {path.stem: load_config(path) for path in sorted(Path(folder).glob("*.yaml"))}
