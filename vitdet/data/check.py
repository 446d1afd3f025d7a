"""All problems of a folder in COCO's or LVIS's layout at once.

An error is what training or evaluation would stop at, or what would make their figures worthless; without errors both
run. A warning is what they leave out or tolerate. `AnnotationValidator` decides which is which in an annotation file,
for all readers; this module adds the image files and what two splits must not share.
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

from vitdet.data.annotation_file import read_entries
from vitdet.data.annotations import AnnotationValidator, existing_name, without_objects
from vitdet.data.images import examine, exchanged, look
from vitdet.data.segmentation import show

PREFIXES = ("instances_", "lvis_v1_")  # of annotation files: COCO's and LVIS's
EXAMPLES = 3  # places that are named of each kind of problem


@dataclass
class Finding:
    """One kind of problem: how often it came, and where the first few times."""

    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found in a folder; `splits` counts the images, annotations and categories of each."""

    folder: Path
    splits: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def error(self, kind: str, example: str) -> None:
        """Counts an error of this kind."""
        _count(self.errors, kind, example)

    def warning(self, kind: str, example: str) -> None:
        """Counts a warning of this kind."""
        _count(self.warnings, kind, example)

    @property
    def ok(self) -> bool:
        """Whether training and evaluation can use the folder."""
        return not self.errors

    def lines(self) -> list[str]:
        """The report as text: the splits, then errors, then warnings, each kind with its count and examples."""
        text = [str(self.folder)]
        for split, counts in self.splits.items():
            text.append("  {}: {} images, {} annotations, {} categories".format(split, *counts))
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


def _backslashes(name: str) -> str:
    return "; backslashes: written on Windows?" if "\\" in name else ""


def _printable(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().splitlines())


def check(folder: Path | str, splits: Sequence[str] | None = None, images: bool = True) -> Report:
    """Looks at folder/annotations/instances_SPLIT.json and folder/SPLIT/ of the given splits, or of all there are.

    LVIS is found as lvis_v1_SPLIT.json, its images below `folder` where their coco_url says. images: also decode every
    image file, on all processors, which takes most of the time; else only whether it is there.
    """
    report = Report(Path(folder))
    found = [
        (prefix, path.stem.removeprefix(prefix))
        for prefix in PREFIXES
        for path in sorted(report.folder.glob(f"annotations/{prefix}*.json"))
    ]
    if splits is not None:
        there = {name: [pair for pair in found if pair[1] == name] for name in splits}
        found = [pair for name, pairs in there.items() for pair in pairs or [(PREFIXES[0], name)]]
    elif not found:
        report.error(
            "no annotation file", f"expected {report.folder}/annotations/instances_SPLIT.json"
        )
    checked = [_Split(report, prefix, name) for prefix, name in found]
    for split in checked:
        split.check()
    digests = [split.read_images() if images else split.find_images() for split in checked]
    for (first, its_digests), (second, other_digests) in combinations(
        zip(checked, digests, strict=True), 2
    ):
        if first.lvis == second.lvis:  # one picture may well be in COCO and in LVIS
            _compare(report, first, second, its_digests, other_digests)
    return report


class _Split:
    """One annotation file while it is looked at."""

    def __init__(self, report: Report, prefix: str, name: str) -> None:
        self.report = report
        self.lvis = prefix == "lvis_v1_"
        self.name = f"lvis_v1_{name}" if self.lvis else name  # in the report
        self.images = report.folder if self.lvis else report.folder / name
        self.file = f"{prefix}{name}.json"
        self.validator = AnnotationValidator(self.lvis, self._error, self._warning)

    def check(self) -> None:
        """Everything but the image files."""
        path = self.report.folder / "annotations" / self.file
        try:
            content = read_entries(path)
        except FileNotFoundError:
            self.report.error("no annotation file", f"expected {path}")
        except OSError as error:
            self.report.error("annotation file that cannot be read", f"{self.file}: {error}")
        except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError, which says where
            self.report.error("broken JSON", f"{self.file}: {error}")
        else:
            kinds = len(self.report.errors)
            tables = self.validator.read_header(content)
            if isinstance(content, dict):
                images, annotations, categories = map(len, tables.values())
                self.report.splits[self.name] = images, annotations, categories
                found = self.validator.annotations(tables["annotations"])
                dropped = Counter(one.dropped for one in found)
                # else these say why
                if not self.validator.instances and kinds == len(self.report.errors):
                    # its answers may be secret
                    say = self._warning if "test" in self.name else self._error
                    causes = without_objects(dropped)
                    say("no object to learn from or to find", "annotations", causes)

    def find_images(self) -> dict[int, str]:
        """No digests; the files that are not there become errors."""
        for image_id, name in self.validator.names.items():
            if not os.path.isfile(f"{self.images}/{existing_name(self.images, name)}"):
                self._image_error("missing image file", image_id, _backslashes(name))
        return {}

    def read_images(self) -> dict[int, str]:
        """The digest of each image's file; the files that cannot be used become errors."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            outcomes = pool.map(self._read_image, self.validator.names)
            digests = {}
            for image_id, (kind, what, digest) in zip(self.validator.names, outcomes, strict=True):
                if kind:
                    self._image_error(kind, image_id, what)
                if digest:
                    digests[image_id] = digest
        return digests

    def _image_error(self, kind: str, image_id: int, what: str = "") -> None:
        folder = "" if self.lvis else f"{self.name}/"
        self._error(
            kind, f"image {image_id}", f"{folder}{show(self.validator.names[image_id])}{what}"
        )

    def _error(self, kind: str, where: str, what: str) -> None:
        self.report.error(kind, f"{self.file}: {where}{what and ': '}{what}")

    def _warning(self, kind: str, where: str, what: str) -> None:
        self.report.warning(kind, f"{self.file}: {where}{what and ': '}{what}")

    def _read_image(self, image_id: int) -> tuple[str, str, str]:
        """Kind of error ('': none), its text, digest of the file's bytes ('': not read)."""
        name = self.validator.names[image_id]
        path = self.images / existing_name(self.images, name)
        try:
            look(path)
            content = path.read_bytes()
        except FileNotFoundError:
            return "missing image file", _backslashes(name), ""
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            return "image file that cannot be read", f": {error}", ""
        digest = hashlib.sha256(content).hexdigest()
        try:
            found = examine(content)
        except ValueError as error:
            return "image file that is truncated or no image", f": {error}", digest
        size = self.validator.sizes.get(image_id)
        if size not in (None, found):
            return (
                "image of another size than annotated",
                f": {found[1]} x {found[0]}, annotated {size[1]} x "
                f"{size[0]} (width x height){exchanged(found, size)}",
                digest,
            )
        return "", "", digest


def _compare(
    report: Report,
    first: _Split,
    second: _Split,
    first_digests: dict[int, str],
    second_digests: dict[int, str],
) -> None:
    """What two splits must not share; pictures are compared where both were read, else ids and file names."""
    one, two = first.validator, second.validator
    pair = f"{first.file} and {second.file}"
    if (
        one.categories != two.categories
        and first.name in report.splits
        and second.name in report.splits
    ):
        differing = sorted(set(one.categories.items()) ^ set(two.categories.items()))
        report.error("categories that differ between splits", f"{pair}: {show(differing)}")
    image_of = {digest: image_id for image_id, digest in first_digests.items()}
    for image_id, digest in second_digests.items():
        if digest in image_of:
            report.error(
                "picture in two splits",
                f"{pair}: image {image_of[digest]} and image {image_id}, {show(two.names[image_id])}",
            )
    by_name = {name: image_id for image_id, name in two.names.items()}
    same_id = [
        ("image id in two splits", str(key), key, key)
        for key in one.sizes.keys() & two.sizes.keys()
    ]
    same_name = [
        ("file name in two splits", show(name), key, by_name[name])
        for key, name in one.names.items()
        if name in by_name
    ]
    for kind, value, key, other in sorted(same_id, key=lambda entry: entry[2]) + same_name:
        digests = first_digests.get(key), second_digests.get(other)
        if None in digests:  # not read: it may be the same picture
            report.error(kind, f"{pair}: {value}")
        elif digests[0] != digests[1]:  # two pictures under one number, which training tolerates
            report.warning(kind, f"{pair}: {value}")
