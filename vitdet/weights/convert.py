"""Conversion of checkpoint files from third-party formats to vitdet, and back.

If a recipe is specified, the weights must fit its detector.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from vitdet.checkpoint import FORMAT, read_detector_file, save, write_tensors
from vitdet.config import Config, flatten, load_config, to_dict
from vitdet.files import atomic_write
from vitdet.models import Detector, build_detector
from vitdet.models.vit import ViT
from vitdet.weights import PACKAGED
from vitdet.weights.formats import FORMATS
from vitdet.weights.formats.mmdet import mmdet_format
from vitdet.weights.formats.table import Format, to_theirs
from vitdet.weights.load import LOGITS, Source, Weights, fitted, has_mask_head, read_source
from vitdet.weights.resize import rescale_relative_positions

# Settings that differ between Detectron2 and mmdet and cannot be inferred from the weights
_KEYS = ("model.norm_eps", "model.clamp_shrinking", "model.pyramid.halve_channels")
FIXED = {
    "detectron2": dict(zip(_KEYS, (1e-6, False, True), strict=True)),
    "mmdet": dict(zip(_KEYS, (1e-5, True, False), strict=True)),
}
AUTHOR = "vitdet"  # Detectron2 matches names heuristically if a .pkl has no __author__ entry


def convert_file(
    source: str | Path,
    destination: str | Path,
    layout: str,
    recipe: str | Path | None = None,
    reverse: bool = False,
) -> list[str]:
    """Convert a weights file.

    Args:
        source: a file in the format `layout` or, with `reverse`, a vitdet detector.
        destination: a .safetensors file for tensors with vitdet's names, or a .pt file for a
            complete detector, which requires `recipe`. With `reverse`: a .pkl or .pth file for
            detectron2, a .pth file for mmdet.
        layout: format of the source or, with `reverse`, of the destination; a key of FORMATS.
        recipe: name or YAML file of a recipe; the weights are resized to the shapes of its model.
        reverse: convert from vitdet to `layout`.

    Returns:
        One line for each change or difference from the recipe.

    Raises:
        ValueError, OSError: a file or an option is unusable; the message is one line.
    """
    source, destination = Path(source), Path(destination)
    if layout not in FORMATS:
        known = ", ".join(FORMATS)
        raise ValueError(f"unknown weights format {layout!r}; expected one of {known}")
    if source.resolve() == destination.resolve():
        raise ValueError(f"{destination}: is also the source file; choose another destination")
    if reverse:
        return _write_theirs(source, destination, layout)
    _expect_suffix(destination, (".safetensors", ".pt"), "--format is the format of SRC")
    tensors = destination.suffix == ".safetensors"
    if not tensors and recipe is None:
        raise ValueError(
            f"{destination}: a .pt file contains a config; set --recipe NAME, or choose a name "
            "that ends in .safetensors"
        )
    found = read_source(source, layout)
    if recipe is None:
        _write_tensors(destination, found.weights, found.layout, found.scaled, found.class_names)
        return list(found.notes)
    config, notes = load_config(recipe), []
    if found.whole and config.model.mask.enabled and not has_mask_head(found):
        mask = replace(config.model.mask, enabled=False)
        config = replace(config, model=replace(config.model, mask=mask))
        notes.append("the file has no mask head: model.mask.enabled=false")
    weights, lines = fitted(found, shapes_of(config), source)
    notes += [*lines, *_other_settings(config, found.layout)]
    if found.whole or not tensors:
        _check_whole(found, weights, config, source)
    names, lines = class_names(config, found.class_names) if found.whole else ((), [])
    if tensors:
        scaled = config.model.backbone.scaled_rel_pos
        _write_tensors(destination, weights, found.layout, scaled, () if lines else names)
        return notes
    content = {
        "format": FORMAT,
        "config": to_dict(config),
        "model": {name: tensor.contiguous() for name, tensor in weights.items()},
        "class_names": list(names),
        "run_id": None,
        "step": 0,
        "fingerprints": {},
        "metrics": {},
    }
    save(destination, content)
    return [*notes, *lines]


def shapes_of(config: Config) -> Detector:
    """Build the detector of a config on the meta device."""
    with torch.device("meta"):
        return build_detector(config.model, config.evaluate)


def class_names(config: Config, stored: tuple[str, ...] = ()) -> tuple[tuple[str, ...], list[str]]:
    """Return the class names of a model, and a list with a warning if the names are unknown.

    stored: the names in the file; empty: use the categories of COCO or LVIS v1 (`data.dataset`),
    ordered by id.
    """
    count, dataset = config.model.roi_heads.num_classes, config.data.dataset
    names = stored or tuple((PACKAGED / "labels" / f"{dataset}.txt").read_text().splitlines())
    if len(names) == count:
        return names, []
    unknown = f"class names: unknown for num_classes={count} ({dataset})"
    line = f"{unknown}; named class 0, class 1, ..."
    return tuple(f"class {i}" for i in range(count)), [line]


def _check_whole(found: Source, weights: Weights, config: Config, source: Path) -> None:
    """Raise ValueError if the file does not contain a complete detector that fits the config."""
    if not found.whole:
        raise ValueError(
            f"{source}: contains only a backbone; convert it to .safetensors for train.init"
        )
    if LOGITS not in weights:
        theirs, ours = len(found.weights[LOGITS]) - 1, config.model.roi_heads.num_classes
        raise ValueError(
            f"{source}: number of classes: {theirs} in the file, {ours} in the recipe; to train on "
            "the recipe's classes, set train.init to this file and train.init_format to its format"
        )


def _write_tensors(
    path: Path, weights: Weights, layout: str, scaled: bool | None, names: tuple[str, ...]
) -> None:
    stored = {"format": "pt", "layout": layout}
    stored |= {} if scaled is None else {"scaled_rel_pos": str(scaled).lower()}
    stored |= {"class_names": json.dumps(names)} if names else {}
    save_tensors(path, weights, stored)


def save_tensors(path: Path, tensors: Weights, metadata: dict[str, str]) -> None:
    """Write a .safetensors file atomically. Raises OSError with a one-line message."""
    with _written(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def _write_theirs(source: Path, destination: Path, layout: str) -> list[str]:
    if layout not in ("detectron2", "mmdet"):
        raise ValueError(f"--reverse supports --format detectron2 and mmdet, got {layout}")
    suffixes = (".pkl", ".pth") if layout == "detectron2" else (".pth",)
    _expect_suffix(destination, suffixes, f"for {layout}")
    weights, config, names = read_detector_file(source)
    table = _mmdet_format(config) if layout == "mmdet" else FORMATS[layout]
    if table.scaled is not None:
        scaled = config.model.backbone.scaled_rel_pos
        weights = rescale_relative_positions(weights, scaled, table.scaled)
    try:
        if others := _other_settings(config, layout):
            raise ValueError("; ".join(others))
        theirs = to_theirs(weights, table)
    except ValueError as error:
        raise ValueError(f"{source}: cannot be converted to {layout}: {error}") from error
    if destination.suffix == ".pth":
        meta = {"meta": {"CLASSES": names, "author": AUTHOR}} if layout == "mmdet" else {}
        save(destination, {**meta, table.wrappers[0]: theirs})
        return []
    with _written(destination) as temporary, open(temporary, "wb") as file:
        floats = {name: x.float() for name, x in theirs.items() if x.is_floating_point()}
        arrays = {name: x.numpy() for name, x in (theirs | floats).items()}  # no bfloat16
        content = pickle.dumps({"model": arrays, "__author__": AUTHOR}, protocol=3)
        # NumPy before 1.26.1 does not know the new name of its module
        file.write(content.replace(b"numpy._core", b"numpy.core", 1))
    return []


def _other_settings(config: Config, layout: str) -> list[str]:
    """Return one line per setting that differs from what the format requires."""
    ours, theirs = flatten(config), FIXED.get(layout, {})
    return [
        f"{key} is {ours[key]}, but {layout} uses {value}"
        for key, value in theirs.items()
        if ours[key] != value
    ]


def _mmdet_format(config: Config) -> Format:
    """Return mmdet's format; ViTAE-B has separate q_bias and v_bias in the global blocks."""
    backbone = shapes_of(config).backbone
    if config.model.backbone.name != "vitae_b" or not isinstance(backbone, ViT):
        return mmdet_format()
    return mmdet_format(split=[i for i, block in enumerate(backbone.blocks) if block.window == 0])


def _expect_suffix(path: Path, suffixes: tuple[str, ...], why: str) -> None:
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)} ({why})")


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Write like `atomic_write`, but with the file's name in error messages."""
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be written ({error})") from error
