"""What `vitdet data coco`, `lvis`, `convert` and `report` do. See `vitdet.verbs`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vitdet.bar import Bar


def run_data_fetch(given: argparse.Namespace) -> int:
    """vitdet data coco, vitdet data lvis"""
    from vitdet.data import inventory
    from vitdet.data.fetch import fetch
    from vitdet.data.published import archives

    if given.mirror and given.local:
        raise ValueError(
            "--from takes the archives of a folder and --mirror those of a server: give one of them"
        )
    wanted = archives(given.dataset, given.split)
    made = fetch(wanted, given.folder, Bar, given.mirror, given.local, given.keep_archives)
    paths = {path for archive in wanted for path in archive.paths}
    here = inventory.read(given.folder).only((), paths)
    parts = [f"{one.path} {one.count:,} images" for one in here.folders] + [
        one.path for one in here.files
    ]
    print(f"{given.folder}: {', '.join(parts)}{'' if made else ', already there'}")
    return 0


def run_data_convert(given: argparse.Namespace) -> int:
    """vitdet data convert"""
    from vitdet.data.convert import convert

    made = convert(given.source, given.target, given.format or "", given.copy)
    splits = [
        f"{split} {images:,} images, {objects:,} objects"
        for split, (images, objects) in made.splits.items()
    ]
    print(f"{given.target}: {'; '.join([f'{len(made.class_names)} classes', *splits])}")
    for note, count in made.notes.items():
        print(f"  {count:,} x {note}")
    return 0


def run_data_report(given: argparse.Namespace) -> int:
    """vitdet data report"""
    from vitdet.data.page import write_page

    output = given.output or Path(f"{given.folder.resolve().name}.html")
    images, objects, report = write_page(given.folder, output, given.images)
    errors, warnings = (
        sum(one.count for one in found) for found in (report.errors, report.warnings)
    )
    print(
        f"{output}: {images:,} images, {objects:,} annotations, {errors:,} errors, {warnings:,} warnings"
    )
    return 0
