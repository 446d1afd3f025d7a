"""The fenced blocks of docs/kubeflow.md, and the commands in its text and tables."""

from __future__ import annotations

import re
import textwrap

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "kubeflow.md").read_text()
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"(?ms)^ *```\n(.*?)^ *```$", TEXT)]
PROSE = re.sub(r"(?ms)^ *```\n.*?^ *```$", "", TEXT)
CODE = re.findall(r"`([^`\n]+)`", PROSE)
COMMANDS = [command for command in CODE if re.match(r"\(?(kubectl|python -m) ", command)]


def lines(*words: str) -> list[str]:
    """Return the command lines, with continuations joined, that contain all these words."""
    joined = [
        line for code in [*BLOCKS, *COMMANDS] for line in code.replace("\\\n", " ").split("\n")
    ]
    return [line.strip() for line in joined if all(word in line for word in words)]
