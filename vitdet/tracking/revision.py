"""The code of a process: its commit, and the image that it runs in."""

from __future__ import annotations

import os
import shutil
import subprocess


def git_revision() -> str | None:
    """Return the commit of the working directory's repository, with `-dirty` where tracked files differ.

    Without a repository: the environment variable VITDET_REVISION, which the image sets; otherwise None.
    """
    commit = changes = ""
    if shutil.which("git") is not None:
        commit, changes = (
            subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()
            for words in (
                ["rev-parse", "--verify", "-q", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    if not commit:
        return os.environ.get("VITDET_REVISION") or None
    return commit + ("-dirty" if changes else "")


def code_tags() -> dict[str, str]:
    """Return MLflow's tags `git_revision` and `image`, each where it is known.

    The image is the environment variable VITDET_IMAGE, as a pod's manifest names it; a container
    cannot find out its own. With a digest it is exact.
    """
    tags = {"git_revision": git_revision(), "image": os.environ.get("VITDET_IMAGE")}
    return {key: value for key, value in tags.items() if value}
