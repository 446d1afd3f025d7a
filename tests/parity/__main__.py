"""`python -m tests.parity DIR...`: compare our numbers with golden cases; exit code 1 if one is out of tolerance.

With `--device cuda`, networks and functions run on the current GPU; their results are compared on the CPU.
Each case is first computed from its inputs alone, and then compared with its stored results.
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
    """A kind of case: how it is recognized, computed from its inputs, and compared with its stored results.

    It is recognized by a file in the folder and by config.json ({} if missing). `compute` takes the folder and, with
    `on_gpu`, the device; other cases are computed on the CPU.
    """

    file: str
    compute: Callable[..., Any]
    compare: Callable[[Path, Any, Report], None]
    config: Callable[[dict], bool] = lambda config: True
    on_gpu: bool = True


def says(kind: str) -> Callable[[dict], bool]:
    """Return a predicate: config.json names this kind."""
    return lambda config: config.get("kind") == kind


def lists(entry: str) -> Callable[[dict], bool]:
    """Return a predicate: config.json lists several small cases, {tag: {entry: ...}}."""
    has = lambda one: isinstance(one, dict) and entry in one  # noqa: E731
    return lambda config: bool(config) and all(map(has, config.values()))


# The first matching row applies.
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
    """Return the kind of a case folder. Raises ValueError for any other folder."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    for kind in KINDS:
        if (folder / kind.file).exists() and kind.config(config):
            return kind
    files = ", ".join(sorted({kind.file for kind in KINDS}))
    raise ValueError(
        f"{folder} is not a known case: expected one of {files} and the matching config.json"
    )


def run(folder: Path, device: torch.device) -> Report:
    """Return the report of one case folder; a case that cannot be read or run has failed."""
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
    except Exception as error:  # any exception: a broken case must not hide the others
        traceback.print_exc()
        report.out("the case", f"stopped by {type(error).__name__}: {error}")
    return report


def main(arguments: Sequence[str]) -> int:
    """Print one line per quantity of each folder; return 0 if all are within tolerance."""
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
        if Path(folder).is_file():  # `.../golden/*` includes the README
            print(f"{folder}: skipped, a file and not a case folder")
            continue
        report = run(Path(folder), device)
        verdict = f"{report.failures} out" if report.failures else "all hold"
        print(report.title, *report.lines, f"{report.title}: {verdict}", sep="\n", flush=True)
        failures += report.failures
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
