"""`vitdet predict`: detect objects in images and draw them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vitdet.cli.arguments import CHECKPOINT, given_path
from vitdet.cli.overrides import add_reading, reading_with
from vitdet.files import atomic_write, write_jpeg, write_json


def add_predict(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `vitdet predict`."""
    verb.add_argument("checkpoint", type=given_path, help=CHECKPOINT)
    verb.add_argument("images", type=given_path, nargs="+", metavar="IMAGE", help="image file")
    help = "folder for the images with drawn detections, and for detections.json"
    verb.add_argument("--output", metavar="DIR", type=given_path, required=True, help=help)
    help = "minimum score of a detection (default: %(default)s)"
    verb.add_argument("--threshold", metavar="SCORE", type=float, default=0.5, help=help)
    add_reading(verb)
    verb.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> int:
    """Run `vitdet predict`."""
    from vitdet.data.images import find_image
    from vitdet.predictor import Predictor, read_image
    from vitdet.stages.workspace import result

    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be between 0 and 1, got {args.threshold}")
    for path in args.images:
        find_image(path)
    targets = _targets(args.images, args.output)
    predictor = Predictor.load(result(args.checkpoint))
    predictor.reading = reading_with(args.overrides, predictor.reading)
    for path in args.images:  # report unreadable images before writing any output
        read_image(path, predictor.reading)
    args.output.mkdir(parents=True, exist_ok=True)
    table = {}
    for path, target in targets.items():
        image = read_image(path, predictor.reading)
        found = predictor(image, args.threshold)
        with atomic_write(target) as temporary:
            write_jpeg(temporary, found.draw(image), quality=92)
        rows = zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True)
        table[target.name] = [
            {"name": name, "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for name, score, box in rows
        ]
        named = ", ".join(f"{row['name']} {row['score']:.2f}" for row in table[target.name])
        print(f"{target}: {named or 'no detections'}")
    write_json(args.output / "detections.json", table)
    return 0


def _targets(images: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Return the path of each image's drawing: folder/NAME.jpg, or NAME_2.jpg for a repeated NAME.

    Raises ValueError if a drawing would overwrite one of the images.
    """
    targets: dict[Path, Path] = {}
    for path in images:
        target, number = folder / f"{path.stem}.jpg", 1
        while target in targets.values():
            number += 1
            target = folder / f"{path.stem}_{number}.jpg"
        targets.setdefault(path, target)
    both = {path.resolve() for path in images} & {target.resolve() for target in targets.values()}
    if both:
        raise ValueError(f"{min(both)}: the drawing would overwrite the image; change --output")
    return targets
