"""`vitdet weights`: list, fetch, convert and pre-train initial weights."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.cli.paths import given_path
from vitdet.cli.progress_bar import Bar

if TYPE_CHECKING:
    from vitdet.weights.catalogue import Entry

log = logging.getLogger(__name__)


def add_weights(verb: argparse.ArgumentParser) -> None:
    """The kinds of the verb `weights`."""
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser(
        "list", help="list the published weights: size, checksum, license, link"
    )
    kind.add_argument("--json", action="store_true", help="print JSON")
    kind.set_defaults(run=run_list)

    kind = kinds.add_parser(
        "fetch",
        help="download, verify and convert published weights",
        description=(
            "Download, verify and convert published weights. Backbones become "
            "DIR/NAME.safetensors, for train.init; "
            "detectors become DIR/NAME.pt, for evaluate, predict and train.init. Interrupted "
            "downloads are resumed. "
            "The proxies in http_proxy and https_proxy are used."
        ),
    )
    kind.add_argument(
        "name", help="name in `vitdet weights list`, or a config file with train.init"
    )
    kind.add_argument(
        "--output",
        type=given_path,
        metavar="DIR",
        help="folder for the weights (default: ~/.cache/vitdet, where train.init finds them)",
    )
    kind.add_argument(
        "--mirror",
        default="",
        metavar="URL",
        help="download URL/PATH, where PATH is the path of the published URL",
    )
    kind.add_argument(
        "--from",
        type=given_path,
        metavar="FILE",
        dest="local",
        help="use this copy of the published file",
    )
    kind.set_defaults(run=run_fetch)

    kind = kinds.add_parser("convert", help="convert weights from or to another format")
    kind.add_argument("source", type=given_path, metavar="SRC", help="file to convert")
    kind.add_argument(
        "target",
        type=given_path,
        metavar="DST",
        help=".safetensors for weights, .pt for a detector of --recipe; with --reverse .pkl or "
        ".pth",
    )
    kind.add_argument(
        "--format",
        required=True,
        help="format of SRC, or of DST with --reverse: detectron2, mmdet, mae, vitae, ...",
    )
    kind.add_argument("--recipe", help="model of the weights: name of a recipe, or a YAML file")
    kind.add_argument(
        "--reverse", action="store_true", help="convert to --format instead of from it"
    )
    kind.set_defaults(run=run_convert)

    kind = kinds.add_parser(
        "pretrain",
        help="train mae_vit_tiny, a masked autoencoder, on generated images without labels",
    )
    kind.add_argument("output", type=given_path, help="output file (.safetensors)")
    kind.add_argument(
        "--steps",
        metavar="N",
        type=int,
        default=6000,
        help="steps of 64 images (default: %(default)s)",
    )
    kind.set_defaults(run=run_pretrain)


def run_list(given: argparse.Namespace) -> int:
    """vitdet weights list"""
    from vitdet.weights.catalogue import CATALOGUE

    if given.json:
        print(json.dumps([as_dict(entry) for entry in CATALOGUE.values()], indent=1))
        return 0
    for title, kind in (("Pre-trainings, for train.init", False), ("Detectors", True)):
        print(f"{title}\n")
        for entry in CATALOGUE.values():
            if bool(entry.recipe) == kind:
                print(*lines(entry), sep="\n", end="\n\n")
    print(
        "vitdet weights fetch NAME converts a file and puts it into ~/.cache/vitdet (--output: "
        "elsewhere)."
    )
    return 0


def as_dict(entry: Entry) -> dict:
    """All that is known of a file, for programs; what is not published is null."""
    from vitdet.weights.catalogue import NOT_PUBLISHED
    from vitdet.weights.fetch import is_here

    known = {
        key: None if value in ("", NOT_PUBLISHED) else value for key, value in asdict(entry).items()
    }
    return {**known, "fetched": is_here(entry)}


def lines(entry: Entry) -> Iterator[str]:
    """A file in three lines: what, where from, what is known of its bytes."""
    from vitdet.weights.catalogue import NOT_PUBLISHED
    from vitdet.weights.fetch import is_here

    ap = f": box/mask AP {entry.ap[0]}/{entry.ap[1]}" if entry.ap else ""
    yield f"  {entry.name:32} {entry.what}{ap}{'  [here]' if is_here(entry) else ''}"
    remarks = {
        "page": " (a page, for a browser)",
        "dead": " (dead link)",
        "none": NOT_PUBLISHED,
        "packaged": "ships with vitdet",
    }
    yield f"      from {entry.url}{remarks.get(entry.state, '')}"
    if entry.state == "packaged":
        yield f"      license {entry.license}"
        return
    size = f"{entry.size:,} bytes" if entry.size else NOT_PUBLISHED
    sha256 = (
        f"{entry.sha256}{'...' if len(entry.sha256) < 64 else ''}"
        if entry.sha256
        else NOT_PUBLISHED
    )
    md5 = f" | md5 {entry.md5}...{' by its name' if entry.md5_of_name else ''}" if entry.md5 else ""
    yield f"      size {size} | sha256 {sha256}{md5} | license {entry.license}"


def run_fetch(given: argparse.Namespace) -> int:
    """vitdet weights fetch"""
    from vitdet.config import load_config
    from vitdet.weights.catalogue import find
    from vitdet.weights.fetch import fetch_published

    is_config = given.name.endswith((".yaml", ".yml"))
    name = load_config(given.name).train.init if is_config else given.name
    if not name:
        if given.output:
            # a stage of a pipeline has to leave something
            given.output.mkdir(parents=True, exist_ok=True)
        print("train.init is empty: training starts from random weights")
    elif Path(name).suffix:
        print(own_file(Path(name), given.output))
    else:
        print(fetch_published(find(name), given.output, Bar, given.mirror, given.local))
    return 0


def own_file(source: Path, folder: Path | None) -> Path:
    """A file of the user's: copied, if a folder is given."""
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such weights file")
    from vitdet.weights.fetch import copy

    return copy(source, folder) if folder else source


def run_convert(given: argparse.Namespace) -> int:
    """vitdet weights convert"""
    from vitdet.weights.convert import convert_file

    for line in convert_file(given.source, given.target, given.format, given.recipe, given.reverse):
        log.info(line)
    print(given.target)
    return 0


def run_pretrain(given: argparse.Namespace) -> int:
    """vitdet weights pretrain"""
    from vitdet.demo.mae import pretrain

    pretrain("tiny", given.output, steps=given.steps)
    print(given.output)
    return 0
