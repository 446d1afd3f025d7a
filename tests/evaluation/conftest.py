"""Fixtures of the evaluation's tests."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "shared" / "data" / "coco-eval"


@pytest.fixture
def examples() -> Path:
    """Return annotations and results of the packages pycocotools and lvis, with their metrics."""
    if not EXAMPLES.is_dir():
        pytest.skip("needs ../shared")
    return EXAMPLES
