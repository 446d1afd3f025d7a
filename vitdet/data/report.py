"""A list of problems: each kind once, with its count and the first few places."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

EXAMPLES = 3


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


def _printable(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().splitlines())
