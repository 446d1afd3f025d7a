"""`vitdet weights`: list, download, convert and pre-train initial weights."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.cli.arguments import add_folder, add_kind, given_path
from vitdet.cli.progress_bar import Bar

if TYPE_CHECKING:
    from vitdet.weights.catalogue import Entry

log = logging.getLogger(__name__)
FETCH = (
    "Download, verify and convert published weights. Backbones become DIR/NAME.safetensors, for "
    "train.init; detectors become DIR/NAME.pt, for evaluate, predict and train.init. Interrupted "
    "downloads are resumed. The proxies in http_proxy and https_proxy are used."
)


def add_weights(verb: argparse.ArgumentParser) -> None:
    """Add the subcommands of `vitdet weights`."""
    kinds = verb.add_subparsers(required=True, metavar="SUBCOMMAND")
    kind = add_kind(kinds, "list", "list the published weights: size, checksum, license, link")
    kind.add_argument("--json", action="store_true", help="print JSON instead of text")
    kind.set_defaults(run=run_list)

    kind = add_kind(kinds, "fetch", "download, verify and convert published weights", FETCH)
    help = "name from `vitdet weights list`, or a config file whose train.init is fetched"
    kind.add_argument("name", help=help)
    help = "folder for the weights (default: ~/.cache/vitdet, where train.init finds them)"
    add_folder(kind, "--output", help)
    help = "download from URL/PATH, where PATH is the path in the published URL"
    kind.add_argument("--mirror", default="", metavar="URL", help=help)
    help = "use this copy of the published file instead of downloading it"
    kind.add_argument("--from", metavar="FILE", type=given_path, dest="local", help=help)
    kind.set_defaults(run=run_fetch)

    kind = add_kind(kinds, "convert", "convert weights from or to another format")
    kind.add_argument("source", type=given_path, metavar="SRC", help="file to convert")
    kind.add_argument(
        "target",
        type=given_path,
        metavar="DST",
        help="output file: .safetensors for weights, or .pt for a detector, which needs --recipe; "
        "with --reverse, .pkl or .pth",
    )
    help = "format of SRC, as in train.init_format; with --reverse: of DST, detectron2 or mmdet"
    kind.add_argument("--format", required=True, help=help)
    help = "config of the model with these weights: name of a recipe, or a YAML file"
    kind.add_argument("--recipe", help=help)
    help = "convert to --format instead of from --format"
    kind.add_argument("--reverse", action="store_true", help=help)
    kind.set_defaults(run=run_convert)

    help = "train mae_vit_tiny, a masked autoencoder, on generated images without labels"
    kind = add_kind(kinds, "pretrain", help)
    kind.add_argument("output", type=given_path, help="output file (.safetensors)")
    help = "number of training steps, with 64 images each (default: %(default)s)"
    kind.add_argument("--steps", metavar="N", type=int, default=6000, help=help)
    kind.set_defaults(run=run_pretrain)


def run_list(args: argparse.Namespace) -> int:
    """Run `vitdet weights list`."""
    from vitdet.weights.catalogue import CATALOGUE

    if args.json:
        print(json.dumps([_record(entry) for entry in CATALOGUE.values()], indent=1))
        return 0
    for title, is_detector in (("Backbones, for train.init", False), ("Detectors", True)):
        print(f"{title}\n")
        for entry in CATALOGUE.values():
            if bool(entry.recipe) == is_detector:
                print(*_lines(entry), sep="\n", end="\n\n")
    print(
        "`vitdet weights fetch NAME` downloads and converts weights to a file in "
        "~/.cache/vitdet; --output selects another folder."
    )
    return 0


def _record(entry: Entry) -> dict:
    """Return a catalog entry as a dict for JSON; empty or unpublished properties are None."""
    from vitdet.weights.catalogue import NOT_PUBLISHED
    from vitdet.weights.fetch import is_here

    known = {
        key: None if value in ("", NOT_PUBLISHED) else value for key, value in asdict(entry).items()
    }
    return {**known, "fetched": is_here(entry)}


def _lines(entry: Entry) -> Iterator[str]:
    """Yield the lines that describe a catalog entry."""
    from vitdet.weights.catalogue import NOT_PUBLISHED
    from vitdet.weights.fetch import is_here

    ap = f": box/mask AP {entry.ap[0]}/{entry.ap[1]}" if entry.ap else ""
    here = "  [downloaded]" if entry.state != "packaged" and is_here(entry) else ""
    yield f"  {entry.name:32} {entry.what}{ap}{here}"
    remarks = {"page": " (a web page; open it in a browser)", "dead": " (dead link)"}
    remarks |= {"none": NOT_PUBLISHED, "packaged": "the vitdet package"}
    yield f"      from {entry.url}{remarks.get(entry.state, '')}"
    facts = [f"license {entry.license}"]
    if entry.state != "packaged":
        size = f"{entry.size:,} bytes" if entry.size else NOT_PUBLISHED
        cut = "..." if 0 < len(entry.sha256) < 64 else ""
        by_name = " (from the file name)" if entry.md5_of_name else ""
        md5 = [f"md5 {entry.md5}...{by_name}"] if entry.md5 else []
        sha256 = f"{entry.sha256 or NOT_PUBLISHED}{cut}"
        facts = [f"size {size}", f"sha256 {sha256}", *md5, *facts]
    yield f"      {' | '.join(facts)}"


def run_fetch(args: argparse.Namespace) -> int:
    """Run `vitdet weights fetch`."""
    from vitdet.config import load_config
    from vitdet.weights.catalogue import find
    from vitdet.weights.fetch import copy, fetch_published

    is_config = args.name.endswith((".yaml", ".yml"))
    name = load_config(args.name).train.init if is_config else args.name
    if not name:
        if args.output:  # DVC requires the outputs of a stage to exist
            args.output.mkdir(parents=True, exist_ok=True)
        print("train.init is empty: training starts from random weights")
    elif (source := Path(name)).suffix:  # a user's file
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such weights file")
        print(copy(source, args.output) if args.output else source)
    else:
        print(fetch_published(find(name), args.output, Bar, args.mirror, args.local))
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Run `vitdet weights convert`."""
    from vitdet.weights.convert import convert_file

    for line in convert_file(args.source, args.target, args.format, args.recipe, args.reverse):
        log.info(line)
    print(args.target)
    return 0


def run_pretrain(args: argparse.Namespace) -> int:
    """Run `vitdet weights pretrain`."""
    from vitdet.demo.mae import pretrain

    pretrain("tiny", args.output, steps=args.steps)
    print(args.output)
    return 0
