"""The pipeline's steps: thin shells over `vitdet.stages`, one KFP component each.

A component's source travels in the compiled pipeline as text, everything that it calls is in the
image. So a body imports from vitdet or components, calls, and prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The image of all steps, read when a pipeline is compiled; "" is that of the training job
IMAGE = os.environ.get("VITDET_IMAGE", "")
# Set in the pods from their label, in a local run by `python -m pipeline run`
RUN_ID = "KFP_RUN_ID"


def run_id() -> str:
    """The id of the pipeline run of this step. Raises RuntimeError outside of a step."""
    found = os.environ.get(RUN_ID, "")
    if not found:
        raise RuntimeError(
            f"{RUN_ID} is not set: the step does not know the run that it belongs to"
        )
    return found


@contextmanager
def afterwards(call: Callable[[], None]) -> Iterator[None]:
    """Call `call` at the end, also after an error: the body of a step has no `try`."""
    try:
        yield
    finally:
        call()
