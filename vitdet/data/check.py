"""`vitdet data check`, which reports all problems of a data set in COCO's or LVIS's format.

Errors stop training or evaluation, or make the metrics meaningless. An entry with a warning is
dropped or accepted. `AnnotationValidator` validates the annotation files, as in training; this
module also checks the image files and whether the splits overlap.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from vitdet.data.annotation_file import read_entries
from vitdet.data.annotations import AnnotationValidator, explain_dropped
from vitdet.data.coco_layouts import SplitFiles, coco_files, existing_name, find_splits
from vitdet.data.images import DEFAULT, Examined, Reading, check_file, examine, exchanged
from vitdet.data.segmentation import show

DEPTHS = (8, 10, 12, 14)  # common bit depths of values in 16-bit files
EXAMPLES = 3  # maximum number of locations that are listed for each kind of problem


@dataclass
class Finding:
    """A kind of problem, its number of occurrences and the locations of the first occurrences."""

    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Result of a check; `splits`: numbers of images, annotations and categories of each split."""

    folder: Path
    splits: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def error(self, kind: str, example: str) -> None:
        """Count an error of this kind; keep the first examples."""
        _count(self.errors, kind, example)

    def warning(self, kind: str, example: str) -> None:
        """Count a warning of this kind; keep the first examples."""
        _count(self.warnings, kind, example)

    @property
    def ok(self) -> bool:
        """Whether the data set has no errors."""
        return not self.errors

    def lines(self) -> list[str]:
        """Return the lines of the report: splits, errors and warnings, with counts and examples."""
        text = [str(self.folder)]
        for split, counts in self.splits.items():
            text.append("  {} (images: {}, annotations: {}, categories: {})".format(split, *counts))
        for title, findings in (("errors", self.errors), ("warnings", self.warnings)):
            text.append(f"{title}: {sum(finding.count for finding in findings) or 'none'}")
            for finding in findings:
                text.append(f"  {finding.count} x {finding.kind}")
                text += [f"      {example}" for example in finding.examples]
                if finding.count > len(finding.examples):
                    text.append("      ...")
        return [_printable(line) for line in text]


def _count(findings: list[Finding], kind: str, example: str) -> None:
    finding = next((finding for finding in findings if finding.kind == kind), None)
    if finding is None:
        findings.append(finding := Finding(kind))
    finding.count += 1
    if len(finding.examples) < EXAMPLES:
        finding.examples.append(example)


def _prefix(images: Path, folder: Path) -> str:
    relative = images.relative_to(folder)
    return "" if relative == Path() else f"{relative}/"


def _backslash_hint(name: str) -> str:
    return "; the backslashes suggest a path written on Windows" if "\\" in name else ""


def _printable(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().splitlines())


def check(
    folder: Path | str,
    splits: Sequence[str] | None = None,
    images: bool = True,
    reading: Reading = DEFAULT,
) -> Report:
    """Check the annotation files and images of a data set.

    Args:
        splits: names of the splits; by default, all splits found by `find_splits`.
        images: whether to decode every image file, which takes most of the time; otherwise,
            only the files' existence is checked.
    """
    report = Report(Path(folder))
    found = [
        (name, files, dataset == "lvis")
        for dataset in ("coco", "lvis")
        for name, files in find_splits(report.folder, dataset).items()
    ]
    if splits is not None:
        by_name = {name: [entry for entry in found if entry[0] == name] for name in splits}
        found = [
            entry
            for name, entries in by_name.items()
            for entry in entries or [(name, coco_files(report.folder, name), False)]
        ]
    elif not found:
        names = sorted(path.name for path in report.folder.glob("*") if path.name[0] != ".")
        hint = f"; found {', '.join(names[:5])}{', ...' if names[5:] else ''}" if names else ""
        report.error(
            "no annotation file", f"expected {report.folder}/annotations/instances_SPLIT.json{hint}"
        )
    checked = [_Split(report, *entry, reading) for entry in found]
    for split in checked:
        split.check()
    for split in checked:
        if images:
            split.read_images()
        else:
            split.find_images()
    for first, second in combinations(checked, 2):
        if first.lvis == second.lvis:  # LVIS's splits overlap COCO's by design
            _compare(report, first, second)
    return report


class _Outcome(NamedTuple):
    """Result of reading an image file; without an error, `kind` and `text` are empty."""

    kind: str
    text: str
    digest: str = ""
    found: Examined | None = None


class _Split:
    """Checks one split; `digests` maps image ids to the checksums of the files that were read."""

    def __init__(
        self, report: Report, name: str, files: SplitFiles, lvis: bool, reading: Reading
    ) -> None:
        self.report, self.lvis, self.reading = report, lvis, reading
        self.name = f"lvis_v1_{name}" if lvis else name  # as shown in the report
        self.path, self.images = files
        path = files.annotations.relative_to(report.folder)
        self.file = path.name if path.parent.name == "annotations" else str(path)
        self.validator = AnnotationValidator(self.lvis, self._error, self._warning)
        self.digests: dict[int, str] = {}

    def check(self) -> None:
        """Check the annotation file and count its entries."""
        try:
            content = read_entries(self.path)
        except FileNotFoundError:
            self.report.error("no annotation file", f"expected {self.path}")
        except OSError as error:
            self.report.error("annotation file that cannot be read", f"{self.file}: {error}")
        except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
            self.report.error("invalid JSON", f"{self.file}: {error}")
        else:
            kinds = len(self.report.errors)
            tables = self.validator.read_header(content)
            if isinstance(content, dict):
                found = self.validator.annotations(tables["annotations"], flawless=False)
                dropped = Counter(validated.dropped for validated in found)
                counts = len(tables["images"]), len(tables["annotations"])
                self.report.splits[self.name] = *counts, len(self.validator.categories)
                # unless an error reported above already explains why there are no objects
                if not self.validator.instances and kinds == len(self.report.errors):
                    # a test split may have no annotations
                    add = self._warning if "test" in self.name.casefold() else self._error
                    add("no objects", "annotations", explain_dropped(dropped))

    def find_images(self) -> None:
        for image_id, name in self.validator.names.items():
            if not os.path.isfile(f"{self.images}/{existing_name(self.images, name)}"):
                self._image_error("missing image file", image_id, _backslash_hint(name))

    def read_images(self) -> None:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            outcomes = pool.map(self._read_image, self.validator.names)
            maxima = dict[bool, dict[int, int]]()  # True for color: {image id: largest value}
            for image_id, outcome in zip(self.validator.names, outcomes, strict=True):
                if outcome.kind:
                    self._image_error(outcome.kind, image_id, outcome.text)
                if outcome.digest:
                    self.digests[image_id] = outcome.digest
                if outcome.found and outcome.found.highest is not None:
                    maxima.setdefault(outcome.found.colors, {})[image_id] = outcome.found.highest
        for colors, highest in maxima.items():
            self._check_bit_depth(colors, highest)

    def _check_bit_depth(self, colors: bool, highest: dict[int, int]) -> None:
        """Warn about 16-bit images whose values use fewer bits and would appear too dark."""
        bits = max(highest.values()).bit_length()
        depth = next((depth for depth in DEPTHS if bits <= depth), 16)
        if self.reading.bit_depth or depth == 16:
            return
        remedy = "save it with 8 bits per channel" if colors else f"set data.bit_depth={depth}"
        kind = f"16-bit image whose values use only {depth} bits and appear too dark ({remedy})"
        for image_id, value in highest.items():
            text = f"{show(self.validator.names[image_id])}: largest value {value} of 65535"
            self._warning(kind, f"image {image_id}", text)

    def _image_error(self, kind: str, image_id: int, what: str = "") -> None:
        folder = "" if self.lvis else _prefix(self.images, self.report.folder)
        text = f"{folder}{show(self.validator.names[image_id])}{what}"
        self._error(kind, f"image {image_id}", text)

    def _error(self, kind: str, where: str, what: str) -> None:
        self.report.error(kind, f"{self.file}: {where}{what and ': '}{what}")

    def _warning(self, kind: str, where: str, what: str) -> None:
        self.report.warning(kind, f"{self.file}: {where}{what and ': '}{what}")

    def _read_image(self, image_id: int) -> _Outcome:
        name = self.validator.names[image_id]
        path = self.images / existing_name(self.images, name)
        try:
            check_file(path)
            content = path.read_bytes()
        except FileNotFoundError:
            return _Outcome("missing image file", _backslash_hint(name))
        except (OSError, ValueError) as error:  # ValueError: e.g. an empty file or a folder
            return _Outcome("image file that cannot be read", f": {error}")
        digest = hashlib.sha256(content).hexdigest()
        try:
            found = examine(content, self.reading)
        except ValueError as error:
            return _Outcome("truncated or invalid image file", f": {error}", digest)
        size = self.validator.sizes.get(image_id)
        if size not in (None, found.size):
            height, width = found.size
            text = f": {width} x {height}, annotated {size[1]} x {size[0]} (width x height)"
            text += exchanged(found.size, size)
            return _Outcome("image size that differs from the annotations", text, digest)
        return _Outcome("", "", digest, found)


def _compare(report: Report, first: _Split, second: _Split) -> None:
    """Report categories that differ between two splits, and images that are in both splits."""
    ours, theirs = first.validator, second.validator
    pair = f"{first.file} and {second.file}"
    if ours.categories != theirs.categories and {first.name, second.name} <= report.splits.keys():
        differing = sorted(set(ours.categories.items()) ^ set(theirs.categories.items()))
        report.error("categories that differ between splits", f"{pair}: {show(differing)}")
    image_of = {digest: image_id for image_id, digest in first.digests.items()}
    for image_id, digest in second.digests.items():
        if digest in image_of:
            name = show(theirs.names[image_id])
            images = f"image {image_of[digest]} and image {image_id}, {name}"
            report.error("same image file in two splits", f"{pair}: {images}")
    by_name = {name: image_id for image_id, name in theirs.names.items()}
    both = sorted(ours.sizes.keys() & theirs.sizes.keys())
    same_id = [("image id in two splits", str(key), key, key) for key in both]
    same_name = [
        ("file name in two splits", show(name), key, by_name[name])
        for key, name in ours.names.items()
        if name in by_name
    ]
    for kind, value, key, other in same_id + same_name:
        digests = first.digests.get(key), second.digests.get(other)
        if None in digests:  # an image was not read; the images may be the same
            report.error(kind, f"{pair}: {value} (--images compares their content)")
        elif digests[0] != digests[1]:  # training accepts different images with the same id or name
            report.warning(kind, f"{pair}: {value}")
