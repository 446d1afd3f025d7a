"""The pipeline's steps: thin shells over `vitdet.workspace`, one KFP component each.

A component's source travels in the compiled pipeline as text, everything that it calls is in the image. So a body
imports from vitdet or components, calls, and prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

IMAGE = os.environ.get(
    "VITDET_IMAGE", ""
)  # of all steps, read when a pipeline is compiled; '': that of the job
RUN_ID = (
    "KFP_RUN_ID"  # set in the pods from their label, in a local run by `python -m pipeline run`
)


def run_id() -> str:
    """The id of the pipeline run that this step belongs to. Raises RuntimeError outside of a step."""
    found = os.environ.get(RUN_ID, "")
    if not found:
        raise RuntimeError(
            f"{RUN_ID} is not set: the step does not know the run that it belongs to"
        )
    return found


@contextmanager
def afterwards(call: Callable[[], None]) -> Iterator[None]:
    """Calls it in the end, whatever fails before: a step's body has no `try`."""
    try:
        yield
    finally:
        call()
