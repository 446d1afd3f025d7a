"""The data set and the initial weights of a pipeline run."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from vitdet.config import Config, load_config, save_config
from vitdet.files import sha256, write_json
from vitdet.stages.plan import EXPLICIT, check_comparable, read_configs
from vitdet.stages.workspace import weights_folder


class Data(NamedTuple):
    """The verified data of a pipeline run.

    names: the names of the training runs. notes: a line for each training run whose splits,
    classes or masks were read from the data.
    """

    fingerprint: str
    names: list[str]
    notes: list[str]


def prepare_data(
    settings: str, workspace: str, configs: str, manifest: str, fetch: str = ""
) -> Data:
    """Verify the data set; write its description, and configs with the splits and classes.

    Args:
        settings: The folder that `resolve_configs` wrote.
        configs: The folder of the configs to write.
        manifest: The JSON file for the description.
        fetch: How to fetch the data set, see `fetch_words`. If "", existing data is used, and the
            demo's data set is generated if it does not exist.

    Raises FileNotFoundError or ValueError if data is missing, is unusable or does not fit a config.
    """
    from vitdet.data.fingerprint import combined, describe
    from vitdet.data.layout import resolve, settings_text
    from vitdet.demo.tiny import make_tiny

    loaded = read_configs(settings)
    root = next(iter(loaded.values())).data.root
    demo = Path(workspace) / load_config("tiny").data.root
    if fetch:
        fetch_data(fetch, Path(root), Path(workspace))
    elif Path(root) == demo and not demo.exists():
        make_tiny(demo)
    explicit, notes = json.loads((Path(settings) / EXPLICIT).read_text()), []
    try:
        for name, config in loaded.items():
            loaded[name], found = resolve(config, explicit[name])
            if found:
                notes.append(f"{name}: {root} has {settings_text(found)}")
        first = next(iter(loaded))
        for name, config in loaded.items():
            check_comparable(loaded[first], config, first, name)
        described = describe(loaded[first].data)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; to fetch the data, set the pipeline's parameter `fetch` (--fetch) to "
            "coco, lvis or 'convert SOURCE', or, on a cluster, apply the Job in manifests/data"
        ) from error
    for name, config in loaded.items():
        expected, count = config.model.roi_heads.num_classes, len(described["classes"])
        if expected != count:
            classes = f"{count} class{'es' if count != 1 else ''}"
            raise ValueError(
                f"{root} has {classes}, but model.roi_heads.num_classes is {expected}; "
                f"set it to {count}"
            )
        save_config(config, Path(configs) / f"{name}.yaml")
    write_json(manifest, described)
    return Data(combined(described["fingerprints"]), list(loaded), notes)


def verified_config(folder: str, name: str, data: str) -> Config:
    """Return the config FOLDER/NAME.yaml with the splits and classes of the data.

    `data` is the expected fingerprint. Raises the errors of `vitdet.data.fingerprint.verify`.
    """
    from vitdet.data.fingerprint import verify
    from vitdet.data.layout import resolve

    config, explicit = load_config(Path(folder) / f"{name}.yaml"), Path(folder) / EXPLICIT
    if explicit.is_file():
        config, _ = resolve(config, json.loads(explicit.read_text())[name])
    verify(config.data, data)
    return config


def fetch_words(fetch: str, root: Path, workspace: Path) -> list[str]:
    """Return the arguments of `vitdet data` that fetch a data set to `root`.

    fetch: `coco`, `lvis` or `convert SOURCE`, followed by options of this command, if any. A
    relative SOURCE is resolved in the workspace. Raises ValueError for other values.
    """
    try:
        kind, *rest = shlex.split(fetch) or [""]
    except ValueError:
        kind, rest = "", []
    if kind in ("coco", "lvis") and (not rest or rest[0].startswith("-")):
        return [kind, str(root), *rest]
    if kind == "convert" and rest and not rest[0].startswith("-"):
        return [kind, str(workspace / rest[0]), str(root), *rest[1:]]
    raise ValueError(
        "fetch: expected coco, lvis or 'convert SOURCE', with options of `vitdet data`; "
        f"got {fetch!r}"
    )


def fetch_data(fetch: str, root: Path, workspace: Path) -> None:
    """Run `vitdet data` with the arguments of `fetch_words`; forward its output to stdout.

    An interrupted download resumes; a conversion is skipped if `root` is not empty. Raises
    ValueError with the last line of the output if the command fails.
    """
    words = fetch_words(fetch, root, workspace)
    if words[0] == "convert" and root.is_dir() and any(root.iterdir()):
        sys.stdout.write(f"fetch: {root} already exists; skipping conversion\n")
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
            sys.stdout.write(line)
    if command.returncode:
        raise ValueError(f"fetch {fetch}: {last.removeprefix('vitdet: ')}")


def fetch_weights(settings: str, workspace: str) -> str:
    """Fetch the published weights named in `train.init`; return a digest of all initial weights.

    Raises the errors of `vitdet.weights.fetch.fetch_published` and `vitdet.weights.resolve`.
    """
    from vitdet.weights import resolve
    from vitdet.weights.catalogue import find
    from vitdet.weights.fetch import fetch_published

    sums, folder = [], weights_folder(workspace)
    for init in sorted({config.train.init for config in read_configs(settings).values()}):
        if init and not Path(init).suffix and not (folder / find(init).file).is_file():
            fetch_published(find(init), folder)
        if file := resolve(init, folder):
            sums.append(f"{init} {sha256(file)}")
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]
