"""The commit of the code that trains."""

from __future__ import annotations

import shutil
import subprocess


def git_revision() -> str | None:
    """The commit of the working directory's repository, with `-dirty` where tracked files differ; None without one."""
    if shutil.which("git") is None:
        return None
    commit, changes = (
        subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()
        for words in (
            ["rev-parse", "--verify", "-q", "HEAD"],
            ["status", "--porcelain", "--untracked-files=no"],
        )
    )
    return commit + ("-dirty" if changes else "") if commit else None
