"""Read COCO and LVIS annotation files as records of images and their training objects.

The formats are described in Lin et al. 2014, https://cocodataset.org/#format-data, and Gupta et al.
2019, https://www.lvisdataset.org/dataset. LVIS locates COCO's images by coco_url. Objects that
cannot be used are dropped and counted. An error in a file raises ValueError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vitdet.data.annotation_file import read_entries
from vitdet.data.annotations import AnnotationValidator
from vitdet.data.coco_layouts import existing_name, root_of
from vitdet.data.images import DEFAULT, Reading, exchanged, open_image
from vitdet.data.records import Objects, Records


class ImageError(ValueError):
    """Error for an unusable image file.

    Only the last line of `message` is kept, since DataLoader prepends the worker's traceback.
    """

    def __init__(self, message: str) -> None:
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


@dataclass(frozen=True)
class CocoSplit:
    """Split of a data set.

    Attributes:
        class_names, category_ids: name and category id of each label.
        records: images with their objects, in order of image id.
        image_counts: number of images with each label, as stated by the file (LVIS) or counted.
        dropped: number of objects that are not used, by reason.
        unmasked: number of objects used for box and class only, by reason.
        outlines: number of objects with a usable outline.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: Records
    image_counts: tuple[int, ...]
    dropped: dict[str, int]
    unmasked: dict[str, int] = field(default_factory=dict)
    outlines: int = 0


def read_coco(
    annotations: Path | str, images: Path | str, by_url: bool = False, tree: dict | None = None
) -> CocoSplit:
    """Read an annotation file without opening its images.

    Args:
        by_url: whether the file has LVIS's format, which locates images by coco_url.
        tree: content of the file, if it was already read.

    Raises:
        FileNotFoundError: if the annotation file does not exist.
        ValueError: for invalid JSON, or for the first validation error.
    """
    path = Path(annotations)
    content = _read(path) if tree is None else tree
    with _named(path):
        return _split(content, Path(images), by_url)


def validate_tree(path: Path, tree: object, lvis: bool) -> None:
    """Raise the ValueError of `read_coco` for invalid content; image file names may be missing."""
    with _named(path):
        validator = AnnotationValidator(lvis, files=False)
        table = validator.read_header(tree)["annotations"]
        for _ in validator.annotations(table, flawless=False):
            pass


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path of the annotation file and a remedy to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; `vitdet data check {root_of(path)}` lists all problems"
        ) from error


def image_counts(stated: Sequence[object], records: Records) -> tuple[int, ...]:
    """Return the number of images per category: `stated` if valid, else counted in `records`."""
    known = [count for count in stated if isinstance(count, int) and type(count) is int]
    if len(known) == len(stated) and all(0 <= count < 2**53 for count in known):
        return tuple(known)
    counts = Counter(label for labels in records.labels() for label in set(labels.tolist()))
    return tuple(counts[label] for label in range(len(stated)))


def read_image(
    path: Path, size: tuple[int, int] | None = None, reading: Reading = DEFAULT
) -> Image.Image:
    """Read a file as an upright RGB image; `size` is the expected (height, width), None for any.

    Raises ImageError if the file is missing, truncated, not an image or of a different size.
    """
    try:
        image = open_image(path, reading)
    except (FileNotFoundError, ValueError) as error:
        raise ImageError(
            f"{error}; `vitdet data check ROOT --images` lists all problems"
        ) from error
    if size is not None and (image.height, image.width) != size:
        raise ImageError(
            f"{path}: {image.width} x {image.height} pixels, annotated {size[1]} x {size[0]} "
            f"(width x height){exchanged((image.height, image.width), size)}; "
            "`vitdet data check ROOT --images` lists all problems"
        )
    return image


def read_tree(path: Path) -> Any:
    """Read an annotation file as `read_entries` does, but without memory-mapping the file.

    Raises FileNotFoundError for a missing file and ValueError for invalid JSON.
    """
    return _read(path, mapped=False)


def _read(path: Path, mapped: bool = True) -> Any:
    try:
        return read_entries(path, mapped)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such annotation file; expected ROOT/annotations/instances_SPLIT.json "
            "(lvis_v1_SPLIT.json if data.dataset=lvis); check data.root and the names of the splits"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{path}: invalid JSON ({error}); if it is damaged, write or download it again"
        ) from error


def _split(content: dict, images: Path, by_url: bool) -> CocoSplit:
    validator = AnnotationValidator(by_url)
    annotations = validator.read_header(content)["annotations"]
    image_ids = sorted(validator.sizes)
    row_of = {image_id: row for row, image_id in enumerate(image_ids)}
    objects, dropped, unmasked = Objects(), Counter[str](), Counter[str]()
    for validated in validator.annotations(annotations):
        if validated.dropped:
            dropped[validated.dropped] += 1
            continue
        unmasked[validated.unmasked] += 1
        objects.append(
            row_of[validated.annotation.image_id],
            validated.annotation.category_id,
            validated.annotation.bbox,
            validated.segmentation,
            validated.own_box,
        )
    sizes = sorted(validator.sizes.items())  # an invalid size has already raised an error
    heads = [(image_id, *size) for image_id, size in sizes if size is not None]
    names = [existing_name(images, validator.names[image_id]) for image_id in image_ids]
    category_ids = sorted(validator.categories)  # validation removes an unused root category
    records = Records.of(images, names, heads, objects, category_ids)
    outlines = unmasked.pop("", 0)
    return CocoSplit(
        tuple(validator.categories[category] for category in category_ids),
        tuple(category_ids),
        records,
        image_counts([validator.stated[category] for category in category_ids], records),
        dict(dropped),
        dict(unmasked),
        outlines,
    )
