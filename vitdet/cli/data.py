"""`vitdet data`: generate, download, check, report on or convert a data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitdet.cli.arguments import add_file, add_folder, add_kind, given_path
from vitdet.cli.overrides import add_reading, reading_with
from vitdet.cli.progress_bar import Bar

FETCH = (
    "Download and verify the published archives of {}, unpack them into COCO's layout, and write "
    "DIR/manifest.json. Run the same command again to resume after an interruption; existing files "
    "are neither downloaded again nor overwritten. The proxies in http_proxy and https_proxy are "
    "used."
)
# `vitdet data convert` uses only the sizes of images, so data.bit_depth has no effect
LARGEST_IMAGE = ("max_pixels",)


def add_data(verb: argparse.ArgumentParser) -> None:
    """Add the subcommands of `vitdet data`."""
    kinds = verb.add_subparsers(required=True, metavar="SUBCOMMAND")
    kind = add_kind(kinds, "tiny", "generate the small data set of the demo")
    add_folder(kind, "folder", "folder to create")
    for name, default, what in (("train", 4000, "training"), ("val", 200, "validation")):
        help = f"number of {what} images (default: %(default)s)"
        kind.add_argument(f"--{name}", metavar="N", type=int, default=default, help=help)
    kind.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    kind.set_defaults(run=run_data_tiny)
    for name, title in (("coco", "COCO 2017"), ("lvis", "LVIS v1 and COCO's images")):
        help = f"download, verify and unpack {title}"
        _add_fetch(add_kind(kinds, name, help, FETCH.format(title)), name)
    kind = add_kind(kinds, "check", "list all problems of a data set in COCO's layout")
    add_folder(kind, "folder", "folder of the data set")
    help = "also read all images and compare those of different splits; uses all CPU cores"
    kind.add_argument("--images", action="store_true", help=help)
    add_reading(kind)
    kind.set_defaults(run=run_data_check)
    help = "write an HTML page about a data set: counts, classes, sizes, sample images, problems"
    kind = add_kind(kinds, "report", help)
    add_folder(kind, "folder", "folder of the data set")
    help = "HTML file to write (default: NAME.html in the current folder; NAME is the name of DIR)"
    add_file(kind, "--output", help)
    help = "also read all images, like `vitdet data check DIR --images`"
    kind.add_argument("--images", action="store_true", help=help)
    add_reading(kind)
    kind.set_defaults(run=run_data_report)
    help = "convert a data set from another format to COCO's layout"
    _add_convert(add_kind(kinds, "convert", help))


def _add_fetch(kind: argparse.ArgumentParser, dataset: str) -> None:
    add_folder(kind, "folder", "folder of the data set")
    kind.add_argument(
        "--split",
        default="",
        choices=("train", "val"),
        help="download only this split; for LVIS, only its annotations, but the images of both "
        "(default: both splits)",
    )
    kind.add_argument(
        "--mirror",
        default="",
        metavar="URL",
        help="download all archives from URL/PATH, where PATH is the path in the published URL; "
        "COCO's archives, e.g., from https://s3.amazonaws.com/images.cocodataset.org",
    )
    help = "use the archives in this folder instead of downloading them"
    kind.add_argument("--from", metavar="DIR", type=given_path, dest="local", help=help)
    help = "keep the downloaded archives, which are about as large as the data set, in DIR/archives"
    kind.add_argument("--keep-archives", action="store_true", help=help)
    kind.set_defaults(run=run_data_fetch, dataset=dataset)


def _add_convert(kind: argparse.ArgumentParser) -> None:
    kind.add_argument(
        "source",
        type=given_path,
        metavar="SRC",
        help="data set in the format of YOLO, Pascal VOC, COCO (including exports from Roboflow, "
        "CVAT, Label Studio and FiftyOne), LabelMe or CVAT for images: its folder, or its "
        "data.yaml, JSON or XML file",
    )
    kind.add_argument("target", type=given_path, metavar="DST", help="folder to create")
    help = "format of SRC (default: detected automatically)"
    formats = ("yolo", "voc", "coco", "labelme", "cvat")
    kind.add_argument("--format", choices=formats, help=help)
    help = "convert only these splits (default: all)"
    kind.add_argument("--splits", type=_names, default=(), metavar="A,B", help=help)
    help = "share of the images of a single split to use as val, e.g. 0.1 (default: %(default)s)"
    kind.add_argument("--val-share", type=float, default=0.0, metavar="SHARE", help=help)
    help = "random seed of --val-share (default: %(default)s)"
    kind.add_argument("--seed", type=int, default=0, help=help)
    help = "YAML or JSON file that maps old to new class names; classes with equal names are merged"
    add_file(kind, "--rename", help)
    help = "keep only these classes, by new name and in this order (default: all)"
    kind.add_argument("--classes", type=_names, default=(), metavar="A,B", help=help)
    help = "copy the images instead of creating hard links"
    kind.add_argument("--copy", action="store_true", help=help)
    help = "if an object has no mask, use its box as its mask"
    kind.add_argument("--boxes-as-masks", action="store_true", help=help)
    add_reading(kind, LARGEST_IMAGE)
    kind.set_defaults(run=run_data_convert)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return list(dict.fromkeys(names))


def run_data_tiny(args: argparse.Namespace) -> int:
    """Run `vitdet data tiny`."""
    from vitdet.demo.tiny import make_tiny

    made = make_tiny(args.folder, args.train, args.val, args.seed)
    suffix = "" if made else ", already complete"
    print(f"{args.folder}: {args.train} + {args.val} images{suffix}")
    return 0


def run_data_check(args: argparse.Namespace) -> int:
    """Run `vitdet data check`."""
    from vitdet.data import download_record
    from vitdet.data.check import check
    from vitdet.data.images import DEFAULT

    reading = reading_with(args.overrides, DEFAULT)
    report = check(args.folder, images=args.images, reading=reading)
    try:
        if download_record.exists(args.folder):
            download_record.verify(args.folder, contents=args.images)
    except (ValueError, FileNotFoundError) as error:
        report.error(f"different from {download_record.NAME}", str(error))
    print(*report.lines(), sep="\n")
    return 0 if report.ok else 1


def run_data_fetch(args: argparse.Namespace) -> int:
    """Run `vitdet data coco` or `vitdet data lvis`."""
    from vitdet.data import download_record
    from vitdet.datasets.fetch import fetch
    from vitdet.datasets.published import archives

    if args.mirror and args.local:
        raise ValueError("--from and --mirror are mutually exclusive")
    wanted = archives(args.dataset, args.split)
    made = fetch(wanted, args.folder, Bar, args.mirror, args.local, args.keep_archives)
    paths = {path for archive in wanted for path in archive.paths}
    here = download_record.read(args.folder).only((), paths)
    parts = [f"{folder.path} {_count(folder.count, 'image')}" for folder in here.folders]
    parts += [file.path for file in here.files]
    print(f"{args.folder}: {', '.join(parts)}{'' if made else ', already complete'}")
    return 0


def run_data_convert(args: argparse.Namespace) -> int:
    """Run `vitdet data convert`."""
    from vitdet.data.images import DEFAULT
    from vitdet.datasets.classes import read_names
    from vitdet.datasets.convert import convert
    from vitdet.datasets.importers.dataset import SourceError

    try:
        made = convert(
            args.source,
            args.target,
            args.format or "",
            args.copy,
            args.boxes_as_masks,
            splits=args.splits,
            classes=args.classes,
            rename=read_names(args.rename) if args.rename else {},
            val_share=args.val_share,
            seed=args.seed,
            reading=reading_with(args.overrides, DEFAULT, LARGEST_IMAGE),
        )
    except SourceError as error:
        print(f"vitdet: {error}", file=sys.stderr)  # one line per problem
        return 1
    counts = [_count(len(made.class_names), "class", "classes")]
    for split, (images, objects) in made.splits.items():
        counts.append(f"{split} {_count(images, 'image')}, {_count(objects, 'object')}")
    print(f"{args.target}: {'; '.join(counts)}")
    for remark in made.remarks:
        print(f"  {remark}")
    for note, count in made.notes.items():
        print(f"  {count:,} x {note}")
    return 0


def run_data_report(args: argparse.Namespace) -> int:
    """Run `vitdet data report`."""
    from vitdet.data.images import DEFAULT
    from vitdet.datasets.report.page import write_page

    reading = reading_with(args.overrides, DEFAULT)
    output = args.output or Path(f"{args.folder.resolve().name}.html")
    images, objects, report = write_page(args.folder, output, args.images, reading)
    errors = sum(error.count for error in report.errors)
    warnings = sum(warning.count for warning in report.warnings)
    counted = {"image": images, "annotation": objects, "error": errors, "warning": warnings}
    print(f"{output}: {', '.join(_count(number, noun) for noun, number in counted.items())}")
    return 0


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
