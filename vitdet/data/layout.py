"""Files of a data set, and settings that are read from its folder.

A recipe specifies a data set by its folder, splits and number of classes. If a user sets only
data.root, the splits, the number of classes and the use of masks are read from the folder.
The first step of the pipeline reads recipes before the data exists; a later step calls `resolve`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitdet.config import RECIPES, Config, DataConfig, flatten, load_config, recipes
from vitdet.data.coco_layouts import SplitFiles, coco_files, find_splits, lvis_files
from vitdet.files import parse_yaml

# setting -> common names of the split, in order of preference; CVAT's begin with a capital letter
SPLITS = {
    "data.train_split": ("train", "train2017", "train2014", "training"),
    "data.val_split": ("val", "val2017", "val2014", "valid", "validation"),
}
CLASSES = "model.roi_heads.num_classes"
MASKS = "model.mask.enabled"
# `vitdet config` starts its output with this prefix and the settings read from data.root
FROM_DATA = "# from data.root: "


def split_files(data: DataConfig, split: str) -> SplitFiles:
    """Return the annotation file and the image folder of a split.

    For a split that does not exist, returns the paths that COCO's or LVIS's layout specifies.
    """
    root = Path(data.root)
    found = find_splits(root, data.dataset)
    default = lvis_files if data.dataset == "lvis" else coco_files
    return found.get(split) or default(root, split)


def splits(data: DataConfig) -> list[str]:
    """Return the names of the splits that have an annotation file under data.root."""
    return list(find_splits(Path(data.root), data.dataset))


def missing(path: Path, data: DataConfig) -> FileNotFoundError:
    """Return the error for a missing annotation file or image folder of a split."""
    other = replace(data, dataset="coco" if data.dataset == "lvis" else "lvis")
    found = splits(data)
    if path.suffix != ".json":
        hint = f"expected the images of {split_files(data, path.name)[0]}"
    elif len(found) == 1 and data.dataset == "coco":
        hint = (
            f"the only split is {found[0]}; `vitdet data convert {split_files(data, found[0])[0]} "
            "DST --val-share 0.1` creates a training and a validation split from it"
        )
    elif found:
        hint = (
            f"the splits are {', '.join(found)}; set data.train_split and data.val_split to two of "
            "them"
        )
    elif splits(other):
        hint = f"the annotations have a different format; set data.dataset={other.dataset}"
    else:
        hint = (
            f"expected annotations/{path.name.replace(path.stem.rpartition('_')[2], 'SPLIT')} "
            "under data.root for each split"
        )
        other_files = sorted(
            str(file.relative_to(data.root)) for file in Path(data.root).glob("*/*.json")
        )
        hint += f", found {', '.join(other_files[:3])}" if other_files else ""
    return FileNotFoundError(f"{path}: no such file or folder; {hint}")


def resolve_config(
    recipe: str | Path, overrides: Sequence[str] = ()
) -> tuple[Config, dict[str, str | int]]:
    """Load a config and adapt it to data.root (see `resolve`); also return the changed settings.

    Raises the errors of `load_config`. Missing or unreadable data is ignored, since it is reported
    when the data is loaded.
    """
    return resolve(load_config(recipe, overrides), explicit_settings(recipe, overrides))


def explicit_settings(recipe: str | Path, overrides: Sequence[str] = ()) -> set[str]:
    """Return the names of the settings that the user chose, for `resolve`.

    * All settings in `overrides`.
    * If `recipe` is the path of a user's config file: all settings in the file, except the settings
      that `vitdet config` listed in the first line.
    * If `recipe` is the path of a recipe in this package, as in dvc.yaml: data.root, since
      `dvc exp run -S` edits the file.
    """
    explicit = overridden_settings(overrides)
    if str(recipe) in recipes():
        return explicit
    if Path(recipe).resolve().parent == RECIPES.resolve():
        return explicit | {"data.root"}
    text = Path(recipe).read_text()
    first = text.partition("\n")[0]
    follows = first.removeprefix(FROM_DATA).split(", ") if first.startswith(FROM_DATA) else ()
    return explicit | (set(_keys(parse_yaml(text))) - set(follows))


def overridden_settings(overrides: Sequence[str]) -> set[str]:
    """Return the names of the settings in overrides, including the keys of overridden sections."""
    found: set[str] = set()
    for override in overrides:
        key, _, text = override.partition("=")
        found |= {key.strip(), *_keys(_section(text), f"{key.strip()}.")}
    return found


def following(explicit: Collection[str]) -> list[str]:
    """Return the names of the settings that `resolve` may read from the folder data.root."""
    return [
        key for key in (*SPLITS, CLASSES, MASKS) if key not in explicit and "data.root" in explicit
    ]


def resolve(config: Config, explicit: Collection[str]) -> tuple[Config, dict[str, str | int]]:
    """Adapt splits, number of classes and masks to data.root; also return the changed settings.

    Changes nothing if data.root is not in `explicit`. Never changes the settings in `explicit`.
    Disables masks if no object in the training split has an outline.
    """
    if "data.root" not in explicit:
        return config, {}
    available, before = splits(config.data), flatten(config)
    found: dict[str, str | int] = {}
    for key, names in SPLITS.items():
        common = [name for known in names for name in available if name.casefold() == known]
        if key not in explicit and before[key] not in available and common:
            found[key] = common[0]
    data = replace(
        config.data,
        train_split=str(found.get("data.train_split", config.data.train_split)),
        val_split=str(found.get("data.val_split", config.data.val_split)),
    )
    config = replace(config, data=data)
    model, tables = config.model, _tables(split_files(data, data.train_split)[0])
    count = _count_classes(tables)
    if CLASSES not in explicit and count and count != before[CLASSES]:
        model = replace(model, roi_heads=replace(model.roi_heads, num_classes=count))
        found[CLASSES] = count
    if MASKS not in explicit and model.mask.enabled and _has_boxes_only(tables):
        model = replace(model, mask=replace(model.mask, enabled=False))
        found[MASKS] = False
    return replace(config, model=model), found


def settings_text(found: Mapping[str, str | int]) -> str:
    """Return the settings as text, e.g. `data.val_split=val, model.mask.enabled=false`."""
    return ", ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in found.items()
    )


def _section(text: str) -> object:
    try:
        return parse_yaml(text)
    except ValueError:
        return None  # `load_config` reports invalid YAML


def _keys(tree: object, start: str = "") -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield f"{start}{key}"
        yield from _keys(value, f"{start}{key}.")


def _tables(annotations: Path) -> dict[str, Any]:
    """Return the tables of an annotation file; {} if the file cannot be read."""
    # imported here, so that `vitdet config` starts fast
    from vitdet.data.annotation_file import Entries, read_entries

    try:
        content = read_entries(annotations)
    except (OSError, ValueError):
        return {}
    tables = content.items() if isinstance(content, dict) else ()
    return {key: table for key, table in tables if isinstance(table, list | Entries)}


def _count_classes(tables: Mapping[str, Any]) -> int:
    from vitdet.data.annotation_file import annotations_of
    from vitdet.data.header import root_category
    from vitdet.data.segmentation import whole_number

    categories = tables.get("categories", ())
    root = root_category(categories)
    used = root is None or any(
        whole_number(getattr(item, "category_id", None)) == root
        for item in annotations_of(tables.get("annotations", ()))
    )
    return len(categories) - (not used)


def _has_boxes_only(tables: Mapping[str, Any]) -> bool:
    """Return whether a split has objects, but no object has an outline."""
    from vitdet.data.annotation_file import annotations_of
    from vitdet.data.segmentation import read_outline

    segmentations = (
        item.get("segmentation") if isinstance(item, dict) else getattr(item, "segmentation", None)
        for item in annotations_of(tables.get("annotations", ()))
    )
    empty = True
    for segmentation in segmentations:
        outline, empty = read_outline(segmentation, None), False
        if outline.shape or outline.problem:
            return False
    return not empty
