"""Random annotation files: either `data check` finds no error and all readers work, or it finds errors and
all readers raise a one-line error. There is no other exception, crash or hang.

To run longer, with new inputs each time: pytest --hypothesis-profile=long tests/data/test_fuzz_annotations.py
"""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.helpers.annotations import document, draw_images, files
from tests.helpers.readers import judged
from vitdet.config import DataConfig


@pytest.fixture(scope="module", params=["coco", "lvis"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A folder whose annotation file is replaced by each input."""
    folder = tmp_path_factory.mktemp("fuzz")
    draw_images(folder / "val")
    (folder / "annotations").mkdir()
    splits = {"train_split": "val", "val_split": "val"}
    return DataConfig(root=str(folder), dataset=request.param, image_size=64, **splits)


@given(content=files(document()), other=files(document(lvis=True)))
def test_all_readers_agree_with_the_check(data: DataConfig, content: bytes, other: bytes) -> None:
    judged(data, other if data.dataset == "lvis" else content)
