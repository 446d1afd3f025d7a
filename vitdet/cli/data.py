"""`vitdet data`: make, fetch, check, report or convert a data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitdet.cli.overrides import add_reading, reading_with
from vitdet.cli.paths import given_path
from vitdet.cli.progress_bar import Bar

DATA = (
    "Download and verify the published archives, unpack them into COCO's layout, and write "
    "DIR/manifest.json. The same "
    "command resumes after an interruption; existing files are neither downloaded again nor "
    "overwritten. The proxies in "
    "http_proxy and https_proxy are used."
)

LARGEST_IMAGE = ("max_pixels",)  # sizes of images are read to convert, not their pixels


def add_data(verb: argparse.ArgumentParser) -> None:
    """The kinds of the verb `data`."""
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser("tiny", help="generate the small data set of the demo")
    kind.add_argument("folder", type=given_path, metavar="DIR", help="folder to create")
    kind.add_argument(
        "--train",
        metavar="N",
        type=int,
        default=4000,
        help="training images (default: %(default)s)",
    )
    kind.add_argument(
        "--val", metavar="N", type=int, default=200, help="validation images (default: %(default)s)"
    )
    kind.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    kind.set_defaults(run=run_data_tiny)
    for name, title in (("coco", "COCO 2017"), ("lvis", "LVIS v1 and COCO's images")):
        add_fetch(
            kinds.add_parser(name, help=f"download, verify and unpack {title}", description=DATA),
            name,
        )
    kind = kinds.add_parser("check", help="list all problems of a data set in COCO's layout")
    kind.add_argument("folder", type=given_path, metavar="DIR", help="folder of the data set")
    kind.add_argument(
        "--images",
        action="store_true",
        help="also read every image, and find images that are in two splits; uses all CPU cores",
    )
    add_reading(kind)
    kind.set_defaults(run=run_data_check)
    kind = kinds.add_parser(
        "report",
        help="write an HTML page about a data set: counts, classes, sizes, sample images, problems",
    )
    kind.add_argument("folder", type=given_path, metavar="DIR", help="folder of the data set")
    kind.add_argument(
        "--output",
        type=given_path,
        metavar="FILE",
        help="HTML file (default: NAME.html in the current folder, with the folder's name)",
    )
    kind.add_argument(
        "--images",
        action="store_true",
        help="also read every image, as `vitdet data check` does with --images",
    )
    add_reading(kind)
    kind.set_defaults(run=run_data_report)
    add_convert(
        kinds.add_parser("convert", help="convert a data set of another format to COCO's layout")
    )


def add_fetch(kind: argparse.ArgumentParser, dataset: str) -> None:
    """The arguments of `data coco` and `data lvis`."""
    kind.add_argument("folder", type=given_path, metavar="DIR", help="folder of the data set")
    kind.add_argument(
        "--split",
        default="",
        choices=("train", "val"),
        help="download only what this split needs; LVIS val also needs images of COCO's train "
        "(default: both)",
    )
    kind.add_argument(
        "--mirror",
        default="",
        metavar="URL",
        help="download URL/PATH, where PATH is the path of the published URL; for COCO e.g. "
        "https://s3.amazonaws.com/images.cocodataset.org",
    )
    kind.add_argument(
        "--from",
        type=given_path,
        metavar="DIR",
        dest="local",
        help="use the archives in this folder and download nothing",
    )
    kind.add_argument(
        "--keep-archives",
        action="store_true",
        help="keep the archives in DIR/archives (twice the disk space)",
    )
    kind.set_defaults(run=run_data_fetch, dataset=dataset)


def add_convert(kind: argparse.ArgumentParser) -> None:
    """The arguments of `data convert`."""
    kind.add_argument(
        "source",
        type=given_path,
        metavar="SRC",
        help="folder in the format of YOLO (data.yaml), Pascal VOC, COCO (also of Roboflow, CVAT, "
        "Label Studio "
        "and FiftyOne), LabelMe or CVAT for images; or its data.yaml, JSON or XML file",
    )
    kind.add_argument("target", type=given_path, metavar="DST", help="folder to create")
    kind.add_argument(
        "--format",
        choices=("yolo", "voc", "coco", "labelme", "cvat"),
        help="format of SRC (default: detect it)",
    )
    kind.add_argument(
        "--splits",
        type=_names,
        default=(),
        metavar="A,B",
        help="convert only these splits (default: all)",
    )
    kind.add_argument(
        "--val-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the images of a source without val that become val, e.g. 0.1 (default: "
        "%(default)s)",
    )
    kind.add_argument(
        "--seed", type=int, default=0, help="random seed of --val-share (default: %(default)s)"
    )
    kind.add_argument(
        "--rename",
        type=Path,
        metavar="FILE",
        help="YAML or JSON map from old to new class names; two classes may get the same name",
    )
    kind.add_argument(
        "--classes",
        type=_names,
        default=(),
        metavar="A,B",
        help="keep only these classes (new names), in this order (default: all)",
    )
    kind.add_argument(
        "--copy", action="store_true", help="copy the images instead of linking them (hard links)"
    )
    kind.add_argument(
        "--boxes-as-masks",
        action="store_true",
        help="use the box of an object without a mask as its mask",
    )
    add_reading(kind, LARGEST_IMAGE)
    kind.set_defaults(run=run_data_convert)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return list(dict.fromkeys(names))


def run_data_tiny(given: argparse.Namespace) -> int:
    """vitdet data tiny"""
    from vitdet.demo.tiny import make_tiny

    made = make_tiny(given.folder, given.train, given.val, given.seed)
    print(
        f"{given.folder}: {given.train} + {given.val} images" + ("" if made else ", already there")
    )
    return 0


def run_data_check(given: argparse.Namespace) -> int:
    """vitdet data check"""
    from vitdet.data import download_record
    from vitdet.data.check import check
    from vitdet.data.images import DEFAULT

    reading = reading_with(given.overrides, DEFAULT)
    report = check(given.folder, images=given.images, reading=reading)
    try:
        if download_record.exists(given.folder):
            download_record.verify(given.folder, contents=given.images)
    except (ValueError, FileNotFoundError) as error:
        report.error(f"not as {download_record.NAME} says", str(error))
    print(*report.lines(), sep="\n")
    return 0 if report.ok else 1


def run_data_fetch(given: argparse.Namespace) -> int:
    """vitdet data coco, vitdet data lvis"""
    from vitdet.data import download_record
    from vitdet.datasets.fetch import fetch
    from vitdet.datasets.published import archives

    if given.mirror and given.local:
        raise ValueError("--from and --mirror are mutually exclusive")
    wanted = archives(given.dataset, given.split)
    made = fetch(wanted, given.folder, Bar, given.mirror, given.local, given.keep_archives)
    paths = {path for archive in wanted for path in archive.paths}
    here = download_record.read(given.folder).only((), paths)
    parts = [f"{one.path} {one.count:,} images" for one in here.folders] + [
        one.path for one in here.files
    ]
    print(f"{given.folder}: {', '.join(parts)}{'' if made else ', already there'}")
    return 0


def run_data_convert(given: argparse.Namespace) -> int:
    """vitdet data convert"""
    from vitdet.data.images import DEFAULT
    from vitdet.datasets.classes import read_names
    from vitdet.datasets.convert import convert
    from vitdet.datasets.importers.dataset import SourceError

    try:
        made = convert(
            given.source,
            given.target,
            given.format or "",
            given.copy,
            given.boxes_as_masks,
            splits=given.splits,
            classes=given.classes,
            rename=read_names(given.rename) if given.rename else {},
            val_share=given.val_share,
            seed=given.seed,
            reading=reading_with(given.overrides, DEFAULT, LARGEST_IMAGE),
        )
    except SourceError as error:
        print(f"vitdet: {error}", file=sys.stderr)  # all problems, a line each
        return 1
    splits = [
        f"{split} {images:,} images, {objects:,} objects"
        for split, (images, objects) in made.splits.items()
    ]
    print(f"{given.target}: {'; '.join([f'{len(made.class_names)} classes', *splits])}")
    for remark in made.remarks:
        print(f"  {remark}")
    for note, count in made.notes.items():
        print(f"  {count:,} x {note}")
    return 0


def run_data_report(given: argparse.Namespace) -> int:
    """vitdet data report"""
    from vitdet.data.images import DEFAULT
    from vitdet.datasets.report.page import write_page

    reading = reading_with(given.overrides, DEFAULT)
    output = given.output or Path(f"{given.folder.resolve().name}.html")
    images, objects, report = write_page(given.folder, output, given.images, reading)
    errors, warnings = (
        sum(one.count for one in found) for found in (report.errors, report.warnings)
    )
    print(
        f"{output}: {images:,} images, {objects:,} annotations, {errors:,} errors, {warnings:,} warnings"
    )
    return 0
