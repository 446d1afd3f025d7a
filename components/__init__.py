"""The pipeline's steps: thin wrappers around `vitdet.stages`, one KFP component each.

KFP embeds the source of a component in the compiled pipeline; the code that the component calls is
in the image. The body of a component is therefore short and imports the functions that it calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The image of all steps, read when a pipeline is compiled; "": the image of the training job
IMAGE = os.environ.get("VITDET_IMAGE", "")
# Environment variable with the pipeline run's ID, set by `pipeline.graph` and `pipeline.local`
RUN_ID = "KFP_RUN_ID"


def run_id() -> str:
    """Return the ID of the pipeline run. Raises RuntimeError outside a step."""
    found = os.environ.get(RUN_ID, "")
    if not found:
        raise RuntimeError(f"{RUN_ID} is not set: the ID of the pipeline run is unknown")
    return found


@contextmanager
def afterwards(call: Callable[[], None]) -> Iterator[None]:
    """Call `call` on exit, even after an error."""
    try:
        yield
    finally:
        call()
