"""`vitdet predict`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vitdet.cli.overrides import add_reading, reading_with
from vitdet.cli.paths import given_path
from vitdet.files import write_jpeg, write_json, written


def add_predict(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `predict`."""
    verb.add_argument("checkpoint", type=given_path, help="checkpoint of a detector")
    verb.add_argument("images", type=given_path, nargs="+", metavar="IMAGE", help="image file")
    verb.add_argument(
        "--output",
        metavar="DIR",
        type=given_path,
        required=True,
        help="folder for the drawn images and detections.json",
    )
    verb.add_argument(
        "--threshold",
        metavar="SCORE",
        type=float,
        default=0.5,
        help="minimum score (default: %(default)s)",
    )
    add_reading(verb)
    verb.set_defaults(run=run_predict)


def run_predict(given: argparse.Namespace) -> int:
    """vitdet predict"""
    from vitdet.data.images import find_image
    from vitdet.predictor import Predictor, read_image

    if not 0 <= given.threshold <= 1:
        raise ValueError(f"--threshold must lie between 0 and 1, got {given.threshold}")
    for path in given.images:
        find_image(path)
    targets = place(given.images, given.output)
    predictor = Predictor.load(given.checkpoint)
    predictor.reading = reading_with(given.overrides, predictor.reading)
    for path in given.images:  # all of them, before anything is written
        read_image(path, predictor.reading)
    given.output.mkdir(parents=True, exist_ok=True)
    table = {}
    for path, target in targets.items():
        picture = read_image(path, predictor.reading)
        found = predictor(picture, given.threshold)
        with written(target) as temporary:
            write_jpeg(temporary, found.draw(picture), quality=92)
        table[target.name] = [
            {"name": name, "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for name, score, box in zip(
                found.names, found.scores.tolist(), found.boxes.tolist(), strict=True
            )
        ]
        named = ", ".join(f"{one['name']} {one['score']:.2f}" for one in table[target.name])
        print(f"{target}: {named or 'nothing'}")
    write_json(given.output / "detections.json", table)
    return 0


def place(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where the drawing of each picture goes: folder/NAME.jpg, and NAME_2.jpg for another picture of that name.

    Raises ValueError rather than draw over one of the pictures themselves.
    """
    targets: dict[Path, Path] = {}
    for path in images:
        target, number = folder / f"{path.stem}.jpg", 1
        while target in targets.values():
            number += 1
            target = folder / f"{path.stem}_{number}.jpg"
        targets.setdefault(path, target)
    own = {path.resolve() for path in images} & {target.resolve() for target in targets.values()}
    if own:
        raise ValueError(
            f"{min(own)}: the drawing would take the place of the picture; choose another --output"
        )
    return targets
