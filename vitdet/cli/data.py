"""`vitdet data`: make, fetch, check, report or convert a data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vitdet.cli.overrides import add_reading, reading_with
from vitdet.cli.paths import given_path
from vitdet.cli.progress_bar import Bar

DATA = (
    "Brings the published archives, verifies and unpacks them into the layout that every COCO tool expects, and "
    "writes DIR/manifest.json. Whatever interrupts it, the same command goes on from there; what is there is not "
    "downloaded again, and nothing is overwritten. The proxies of http_proxy and https_proxy are used."
)

LARGEST_IMAGE = ("max_pixels",)  # sizes of images are read to convert, not their pixels


def add_data(verb: argparse.ArgumentParser) -> None:
    """The kinds of the verb `data`."""
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser("tiny", help="draw the small data set of the demo")
    kind.add_argument("folder", type=given_path)
    kind.add_argument("--train", type=int, default=4000, help="training images (4000)")
    kind.add_argument("--val", type=int, default=200, help="validation images (200)")
    kind.add_argument("--seed", type=int, default=0)
    kind.set_defaults(run=run_data_tiny)
    for name, title in (("coco", "COCO 2017"), ("lvis", "LVIS v1 and COCO's images")):
        add_fetch(
            kinds.add_parser(
                name, help=f"bring {title}: download, verify, unpack", description=DATA
            ),
            name,
        )
    kind = kinds.add_parser("check", help="list every problem of a folder in COCO's layout")
    kind.add_argument("folder", type=given_path)
    kind.add_argument(
        "--images",
        action="store_true",
        help="read every image file too, and look for the same picture "
        "in two splits, on all processors",
    )
    add_reading(kind)
    kind.set_defaults(run=run_data_check)
    kind = kinds.add_parser(
        "report",
        help="show a folder in COCO's layout on one HTML page: counts, classes, sizes, "
        "pictures, problems",
    )
    kind.add_argument("folder", type=given_path)
    kind.add_argument(
        "--output", type=given_path, metavar="FILE", help="(NAME OF THE FOLDER.html, here)"
    )
    kind.add_argument(
        "--images", action="store_true", help="read every image file too, as data check does"
    )
    add_reading(kind)
    kind.set_defaults(run=run_data_report)
    add_convert(
        kinds.add_parser("convert", help="rewrite a data set of another format in COCO's layout")
    )


def add_fetch(kind: argparse.ArgumentParser, dataset: str) -> None:
    """The arguments of `data coco` and `data lvis`."""
    kind.add_argument("folder", type=given_path, metavar="DIR")
    kind.add_argument(
        "--split",
        default="",
        choices=("train", "val"),
        help="only what this split needs; val of LVIS lies in the images of COCO's train, too",
    )
    kind.add_argument(
        "--mirror",
        default="",
        metavar="URL",
        help="take URL/PATH instead, where PATH is the path of the published address without its host; "
        "https://s3.amazonaws.com/images.cocodataset.org is one of COCO's",
    )
    kind.add_argument(
        "--from",
        type=given_path,
        metavar="FOLDER",
        dest="local",
        help="take the archives that lie in this folder; nothing is downloaded",
    )
    kind.add_argument(
        "--keep-archives",
        action="store_true",
        help="leave the archives in DIR/archives: twice the disk",
    )
    kind.set_defaults(run=run_data_fetch, dataset=dataset)


def add_convert(kind: argparse.ArgumentParser) -> None:
    """The arguments of `data convert`."""
    kind.add_argument(
        "source",
        type=given_path,
        metavar="SRC",
        help="a folder of YOLO (data.yaml), Pascal VOC, COCO (as Roboflow, CVAT, Label Studio and FiftyOne "
        "write it), LabelMe or CVAT for images; or its data.yaml, JSON or XML file",
    )
    kind.add_argument("target", type=given_path, metavar="DST", help="a new folder")
    kind.add_argument(
        "--format",
        choices=("yolo", "voc", "coco", "labelme", "cvat"),
        help="what SRC is, where it looks like several",
    )
    kind.add_argument(
        "--splits",
        type=_names,
        default=(),
        metavar="A,B",
        help="only these splits",
    )
    kind.add_argument(
        "--val-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of a source with one split, put this share of the images into val, such as 0.1",
    )
    kind.add_argument("--seed", type=int, default=0, help="of --val-share: which images (0)")
    kind.add_argument(
        "--rename",
        type=Path,
        metavar="FILE",
        help="a YAML or JSON map of class names, old: new; two names may become one class",
    )
    kind.add_argument(
        "--classes",
        type=_names,
        default=(),
        metavar="A,B",
        help="only these classes, in this order, under their new names",
    )
    kind.add_argument(
        "--copy", action="store_true", help="copy the images instead of linking them (hard links)"
    )
    kind.add_argument(
        "--boxes-as-masks",
        action="store_true",
        help="make a mask of the box of each object that has a box only",
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
        raise ValueError(
            "--from takes the archives of a folder and --mirror those of a server: give one of them"
        )
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
