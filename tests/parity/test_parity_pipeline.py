"""The golden test-time pipeline of ViTAE-Transformer/ViTDet passes; a change of any stored value is detected."""

from pathlib import Path

import pytest

import tests.parity.__main__ as parity
from tests.parity import pipeline
from tests.parity.conftest import read, shared_case_holds, write
from vitdet.data import transforms

GOLDEN = Path(__file__).parents[1] / "golden" / "vitae_pipeline"
SHARED = Path(__file__).parents[3] / "shared" / "reference" / "vitae" / "golden" / "test_pipeline"


@pytest.fixture
def case(tmp_path):
    """Return case(arrays, config): the exit code for a folder with this content."""

    def check(arrays, config):
        write(tmp_path / "io.npz", arrays)
        write(tmp_path / "config.json", config)
        return parity.main([str(tmp_path)])

    return check


@pytest.fixture
def arrays():
    return read(GOLDEN / "io.npz")


@pytest.fixture
def config():
    return read(GOLDEN / "config.json")


def test_the_case_passes_with_equal_gray_levels(capsys):
    assert parity.main([str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    errors = [float(line.split()[3]) for line in lines if "/out: error" in line]
    assert len(errors) == 3 and max(errors) < 1e-5  # exactly OpenCV's gray levels


def test_the_shared_case_passes():
    shared_case_holds(SHARED)


def test_an_antialiased_resize_fails(monkeypatch):
    def antialiased(image, size, **_):
        return transforms.resize_and_pad(image, size, antialias=True)

    monkeypatch.setattr(pipeline, "resize_and_pad", antialiased)
    assert parity.main([str(GOLDEN)]) == 1


@pytest.mark.parametrize("tag", ["landscape", "portrait", "square_big"])
def test_a_change_of_any_array_fails(case, arrays, config, tag):
    out = arrays[f"{tag}/out"].copy()
    arrays[f"{tag}/out"] = out + 0.02 * (out == out.max())
    assert case(arrays, config) == 1
    arrays[f"{tag}/out"] = out[:, :-1]
    assert case(arrays, config) == 1
    del arrays[f"{tag}/out"]
    assert case(arrays, config) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"img_shape": [80, 128, 3]},
        {"ori_shape": [61, 97, 3]},
        {"surprise": 1},
        {"scale_factor": [1.3195876, 1.32, 1.3195876, 1.32]},
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_results_fails(case, arrays, config, change):
    config["landscape"].update(change)
    assert case(arrays, config) == 1


def test_results_are_computed_from_the_image_and_canvas_size_only(arrays, config, tmp_path):
    write(tmp_path / "io.npz", {"portrait/bgr": arrays["portrait/bgr"]})
    write(tmp_path / "config.json", {"portrait": {"pad_shape": [96, 96, 3]}})
    found = pipeline.compute(tmp_path)
    assert found["portrait/out"].shape == (3, 96, 96)
    assert found["portrait/img_shape"].tolist() == [96, 61, 3]
