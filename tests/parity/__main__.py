"""`python -m tests.parity DIR...`: hold our numbers against golden cases; exit code 1 when one is out of tolerance.

With `--device cuda` networks and functions run on the current GPU, and their results are compared on the CPU.
Every kind of case is computed first, from its inputs alone, and then compared with its stored results.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.parity import (
    backbone,
    compare_detector,
    compare_fork,
    detector,
    dynamics,
    fingerprints,
    fork_detector,
    loading,
    pipeline,
    resize,
    unit,
)
from tests.parity.device import CPU, described, device_named, moved, without_tf32
from tests.parity.report import Report


class Kind(NamedTuple):
    """A kind of case: what tells it, computing from the inputs, comparing with the results.

    It is told by a file that the folder holds and by what config.json says ({} where there is none). Computing takes
    the folder and, with `on_gpu`, the device; without it, all of the case is the CPU's work.
    """

    file: str
    compute: Callable[..., Any]
    compare: Callable[[Path, Any, Report], None]
    config: Callable[[dict], bool] = lambda config: True
    on_gpu: bool = True


def says(kind: str) -> Callable[[dict], bool]:
    """Holds for a config.json that names this kind itself."""
    return lambda config: config.get("kind") == kind


def lists(entry: str) -> Callable[[dict], bool]:
    """Holds for a config.json of several small cases, {tag: {entry: ...}}."""
    has = lambda value: isinstance(value, dict) and entry in value  # noqa: E731
    return lambda config: bool(config) and all(map(has, config.values()))


# The first row that fits.
KINDS = (
    Kind("state_dict.npz", detector.compute, compare_detector.compare),
    Kind("unit.npz", unit.compute, unit.compare),
    Kind("io.npz", resize.compute, resize.compare, lambda config: not config, on_gpu=False),
    Kind("io.npz", backbone.compute, backbone.compare, says("backbone")),
    Kind("io.npz", pipeline.compute, pipeline.compare, lists("img_shape"), on_gpu=False),
    Kind("io.npz", loading.compute, loading.compare, lists("loaded"), on_gpu=False),
    Kind("losses.json", dynamics.compute, dynamics.compare),
    Kind("io.npz", fork_detector.compute, compare_fork.compare, says("detector")),
    Kind("fingerprints.json", fingerprints.compute, fingerprints.compare),
)


def kind_of(folder: Path) -> Kind:
    """The kind of a case folder. Raises ValueError for any other folder."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    for kind in KINDS:
        if (folder / kind.file).exists() and kind.config(config):
            return kind
    files = ", ".join(sorted({kind.file for kind in KINDS}))
    raise ValueError(
        f"{folder} is no case that is known here: it needs one of {files} and the config.json of its kind"
    )


def run(folder: Path, device: torch.device) -> Report:
    """The report of one case folder; what cannot be read or run is a failure of it."""
    report = Report(str(folder))
    try:
        kind = kind_of(folder)
        if not kind.on_gpu and device != CPU:
            report.skip("the case", "all of it is the CPU's work")
            return report
        if device != CPU:
            report.inform("device", described())
        with without_tf32():
            found = kind.compute(folder, device) if kind.on_gpu else kind.compute(folder)
        kind.compare(folder, moved(found, CPU), report)
    except Exception as error:  # whatever it is: a broken case must not hide the others
        traceback.print_exc()
        report.out("the case", f"stopped by {type(error).__name__}: {error}")
    return report


def main(arguments: Sequence[str]) -> int:
    """Prints a line for each quantity of each folder; 0 if all hold."""
    parser = argparse.ArgumentParser("python -m tests.parity")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: the current GPU")
    parser.add_argument("folders", nargs="*", metavar="DIR", help="a folder with a golden case")
    given = parser.parse_args(arguments)
    if not given.folders:
        parser.print_usage(sys.stderr)
        return 2
    try:
        device = device_named(given.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failures = 0
    for folder in given.folders:
        if Path(folder).is_file():  # `.../golden/*` names the README too
            print(f"{folder}: skipped, a file and not a case folder")
            continue
        report = run(Path(folder), device)
        verdict = f"{report.failures} out" if report.failures else "all hold"
        print(report.title, *report.lines, f"{report.title}: {verdict}", sep="\n", flush=True)
        failures += report.failures
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
