"""The command line: its words and their help. What each does stands in `verbs`, `data_verbs`, `weights_verbs`."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from vitdet import data_verbs, verbs, weights_verbs

DATA = (
    "Brings the published archives, verifies and unpacks them into the layout that every COCO tool expects, and "
    "writes DIR/manifest.json. Whatever interrupts it, the same command goes on from there; what is there is not "
    "brought again, and nothing is written over. The proxies of http_proxy and https_proxy are used."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; a user's mistake is one line on stderr and exit code 1 (2 for the command line itself)."""
    given = parser().parse_args(arguments)
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # of an odd image what matters is said in one line
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code = given.run(given)
    except (ValueError, OSError, LookupError) as error:
        if isinstance(error, KeyError | IndexError):
            raise  # a mistake of ours, not of the user's
        print("vitdet:", *str(error).splitlines(), file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """All verbs and their arguments."""
    root = argparse.ArgumentParser(prog="vitdet", description="Plain Vision Transformer detectors.")
    add = root.add_subparsers(required=True, metavar="VERB").add_parser
    add_config(
        add("config", help="print the resolved config of a recipe or file, or the recipes' names")
    )
    add_data(add("data", help="make, fetch or check a data set"))
    add_weights(add("weights", help="list, fetch and convert published weights"))
    add_train(add("train", help="train a detector; goes on where an interrupted training stopped"))
    add_evaluate(
        add(
            "evaluate",
            help="box and mask AP of a checkpoint on its validation images, or of a file of "
            "results",
        )
    )
    add_predict(add("predict", help="draw what a checkpoint finds in pictures"))
    add_bench(add("bench", help="measure how fast something is"))
    add_register(add("register", help="add a checkpoint to the MLflow model registry"))
    return root


def add_config(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `config`."""
    verb.add_argument(
        "recipe",
        nargs="?",
        help="a recipe's name or a YAML file; without one, the names are listed",
    )
    add_set(verb)
    verb.add_argument("--output", type=Path, help="write it to this file instead")
    verb.set_defaults(run=verbs.run_config)


def add_data(verb: argparse.ArgumentParser) -> None:
    """The kinds of the verb `data`."""
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser("tiny", help="draw the small data set of the demo")
    kind.add_argument("folder", type=Path)
    kind.add_argument("--train", type=int, default=4000, help="training images (4000)")
    kind.add_argument("--val", type=int, default=200, help="validation images (200)")
    kind.add_argument("--seed", type=int, default=0)
    kind.set_defaults(run=verbs.run_data_tiny)
    for name, title in (("coco", "COCO 2017"), ("lvis", "LVIS v1 and COCO's images")):
        add_fetch(
            kinds.add_parser(
                name, help=f"bring {title}: download, verify, unpack", description=DATA
            ),
            name,
        )
    kind = kinds.add_parser("check", help="list every problem of a folder in COCO's layout")
    kind.add_argument("folder", type=Path)
    kind.add_argument(
        "--images",
        action="store_true",
        help="read every image file too, and look for the same picture "
        "in two splits, on all processors",
    )
    kind.set_defaults(run=verbs.run_data_check)
    kind = kinds.add_parser(
        "report",
        help="show a folder in COCO's layout on one HTML page: counts, classes, sizes, "
        "pictures, problems",
    )
    kind.add_argument("folder", type=Path)
    kind.add_argument("--output", type=Path, metavar="FILE", help="(NAME OF THE FOLDER.html, here)")
    kind.add_argument(
        "--images", action="store_true", help="read every image file too, as data check does"
    )
    kind.set_defaults(run=data_verbs.run_data_report)
    add_convert(
        kinds.add_parser("convert", help="rewrite a folder of YOLO or Pascal VOC in COCO's layout")
    )


def add_fetch(kind: argparse.ArgumentParser, dataset: str) -> None:
    """The arguments of `data coco` and `data lvis`."""
    kind.add_argument("folder", type=Path, metavar="DIR")
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
        type=Path,
        metavar="FOLDER",
        dest="local",
        help="take the archives that lie in this folder; nothing is downloaded",
    )
    kind.add_argument(
        "--keep-archives",
        action="store_true",
        help="leave the archives in DIR/archives: twice the disk",
    )
    kind.set_defaults(run=data_verbs.run_data_fetch, dataset=dataset)


def add_convert(kind: argparse.ArgumentParser) -> None:
    """The arguments of `data convert`."""
    kind.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="the folder of data.yaml (YOLO), or of Annotations/, "
        "JPEGImages/ and ImageSets/ (Pascal VOC)",
    )
    kind.add_argument("target", type=Path, metavar="DST", help="a new folder")
    kind.add_argument(
        "--format", choices=("yolo", "voc"), help="what SRC is, where it looks like both"
    )
    kind.add_argument(
        "--copy", action="store_true", help="copy the images instead of linking them (hard links)"
    )
    kind.set_defaults(run=data_verbs.run_data_convert)


def add_weights(verb: argparse.ArgumentParser) -> None:
    """The kinds of the verb `weights`."""
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser(
        "list", help="the published files by name: what, where from, size, checksum, license"
    )
    kind.add_argument("--json", action="store_true", help="for programs")
    kind.set_defaults(run=weights_verbs.run_list)

    kind = kinds.add_parser(
        "fetch",
        help="download a file of the list, verify and convert it",
        description=(
            "Downloads a file of the list, verifies it and converts it: a pre-training to FOLDER/NAME.safetensors, for "
            "train.init, a detector to FOLDER/NAME.pt, for evaluate, predict and train.init. A download that broke off "
            "goes on where it was. The proxies of http_proxy and https_proxy are used."
        ),
    )
    kind.add_argument(
        "name", help="a name of the list, or a config file, whose train.init is meant"
    )
    kind.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="the folder (~/.cache/vitdet, where train.init finds it)",
    )
    kind.add_argument(
        "--mirror",
        default="",
        metavar="URL",
        help="take URL/PATH instead, where PATH is the path of the published address without its host",
    )
    kind.add_argument(
        "--from",
        type=Path,
        metavar="FILE",
        dest="local",
        help="take this copy of the published file",
    )
    kind.set_defaults(run=weights_verbs.run_fetch)

    kind = kinds.add_parser(
        "convert", help="rewrite a foreign checkpoint under our names, or ours under theirs"
    )
    kind.add_argument("source", type=Path, metavar="SRC")
    kind.add_argument(
        "target",
        type=Path,
        metavar="DST",
        help=".safetensors: weights; .pt: a detector of --recipe; with --reverse .pkl or .pth",
    )
    kind.add_argument(
        "--format",
        required=True,
        help="whose names the foreign file has: detectron2, mmdet, mae, ...",
    )
    kind.add_argument(
        "--recipe", help="the model that the weights are for: a recipe's name or a YAML file"
    )
    kind.add_argument("--reverse", action="store_true", help="from our names to theirs")
    kind.set_defaults(run=weights_verbs.run_convert)

    kind = kinds.add_parser(
        "pretrain", help="make mae_vit_tiny: a masked autoencoder on generated pictures, no labels"
    )
    kind.add_argument("output", type=Path, help="the .safetensors file to write")
    kind.add_argument("--steps", type=int, default=6000, help="steps of 64 pictures (6000)")
    kind.set_defaults(run=weights_verbs.run_pretrain)


def add_train(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `train`."""
    verb.add_argument("recipe", help="a recipe's name or a YAML file")
    add_set(verb)
    verb.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for model.pt, config.yaml and checkpoints",
    )
    verb.add_argument(
        "--checkpoints",
        type=Path,
        help="keep training states here, by config and data, not in --output",
    )
    verb.add_argument(
        "--weights", type=Path, help="folder that `vitdet weights fetch` filled, for train.init"
    )
    verb.add_argument(
        "--group", default="", metavar="RUN", help="the pipeline run that MLflow shows it under"
    )
    verb.set_defaults(run=verbs.run_train)


def add_evaluate(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `evaluate`."""
    verb.add_argument("checkpoint", type=Path, nargs="?")
    add_set(verb)
    verb.add_argument(
        "--config", type=Path, help="take the data and evaluate settings from this file"
    )
    verb.add_argument("--output", type=Path, help="write the figures to this JSON file")
    verb.add_argument(
        "--pictures", type=Path, help="folder for pictures of detections beside ground truth"
    )
    verb.add_argument(
        "--plots", type=Path, help="folder for precision over recall and AP of each class, as JSON"
    )
    verb.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="score this list of COCO results (image_id, category_id, score, bbox and/or segmentation)",
    )
    verb.add_argument("--annotations", type=Path, metavar="FILE", help="against these annotations")
    verb.add_argument(
        "--dataset", choices=("coco", "lvis"), help="by the rules of COCO (the default) or LVIS"
    )
    verb.set_defaults(run=verbs.run_evaluate)


def add_predict(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `predict`."""
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    verb.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for the drawn pictures and detections.json",
    )
    verb.add_argument("--threshold", type=float, default=0.5, help="least score (0.5)")
    verb.set_defaults(run=verbs.run_predict)


def add_bench(verb: argparse.ArgumentParser) -> None:
    """The kinds of the verb `bench`."""
    kinds = verb.add_subparsers(required=True, metavar="KIND")
    kind = kinds.add_parser(
        "evaluate", help="AP of made-up results, beside plain pycocotools (5000 images: 3 minutes)"
    )
    kind.add_argument("--images", type=int, default=5000, help="5000")
    kind.add_argument("--detections", type=int, default=100, help="of an image (100)")
    kind.add_argument(
        "--rounds", type=int, default=1, help="measure so often and take the least (1)"
    )
    kind.add_argument("--output", type=Path, help="write the figures to this JSON file")
    kind.set_defaults(run=verbs.run_bench_evaluate)
    kind = kinds.add_parser(
        "data",
        help="time of reading and augmenting a training image, beside Detectron2's mapper "
        "where that is installed",
    )
    kind.add_argument("folder", type=Path, help="photos in COCO's layout")
    kind.add_argument("--split", action="append", help="may be repeated (train2017 and val2017)")
    kind.add_argument("--rounds", type=int, default=5, help="turns over all images (5)")
    kind.add_argument("--output", type=Path, help="write the figures to this JSON file")
    kind.set_defaults(run=verbs.run_bench_data)


def add_register(verb: argparse.ArgumentParser) -> None:
    """The arguments of the verb `register`."""
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument(
        "--alias", default="candidate", help="name that then points to this version (candidate)"
    )
    verb.add_argument("--config", type=Path, help="take the tracking settings from this file")
    verb.add_argument(
        "--metrics", type=Path, help="JSON file of `vitdet evaluate`, for the version's tags"
    )
    verb.add_argument("--output", type=Path, help="write name and version to this JSON file")
    verb.set_defaults(run=verbs.run_register)


def add_set(verb: argparse.ArgumentParser) -> None:
    """The one way to change a setting."""
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change a setting, as in optim.lr=2e-4; may be repeated",
    )
