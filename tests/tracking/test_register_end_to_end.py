"""From training to the registry: equal detections in an environment without this repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest

from tests.conftest import minimal, options
from vitdet.predictor import Predictor
from vitdet.tracking import mlflow as tracking
from vitdet.tracking.evaluations import model_id_of
from vitdet.tracking.packaged_model import download, download_checkpoint

pytestmark = pytest.mark.slow
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
ASK = """
import json, sys
import numpy as np
import mlflow
import vitdet.predictor
model = mlflow.pyfunc.load_model(sys.argv[1])
found = model.predict(np.load(sys.argv[2]), params={"threshold": 0.0})
print(json.dumps({"file": vitdet.predictor.__file__, "rows": found.to_dict("records")}))
"""


def fresh_environment(model: Path, folder: Path) -> Path:
    """Create an environment with the current packages and a model's wheel; return its Python."""
    lines = (model / "requirements.txt").read_text().splitlines()
    (wheel,) = [line for line in lines if line.endswith(".whl")]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    install = [*pip, "install", "-q", "--no-index", "--no-deps", wheel]
    # the wheel's path in requirements.txt is relative to the model
    subprocess.run(install, cwd=model, check=True, env=plain_environment())
    # use this environment's packages (torch is large), not its .pth files (editable installs)
    (site,) = (folder / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others))
    return python


def plain_environment() -> dict[str, str]:
    ours = ("PYTHON", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


def test_a_registered_model_returns_equal_detections_in_a_fresh_environment(
    tiny: Path, vitdet: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    output, metrics, plots = (tmp_path / name for name in ("runs/one", "metrics.json", "plots"))
    checkpoint = output / "model.pt"
    assert vitdet("train", "tiny", *options(minimal(tiny)), "--output", output)[0] == 0
    assert vitdet("evaluate", checkpoint, "--output", metrics, "--plots", plots)[0] == 0
    words = ["--alias", "champion", "--metrics", metrics, "--plots", plots]
    code, out, err = vitdet("register", checkpoint, *words)
    assert code == 0 and "version 1 (champion)" in out, err

    server = tracking.tracking_uri("", output.parent)
    client = mlflow.MlflowClient(server, server)
    version = client.get_model_version_by_alias("vitdet", "champion")
    assert version.description.startswith("Mask R-CNN, backbone vit_tiny, 6 classes: ")
    model = download(server, "models:/vitdet/1", tmp_path / "model")
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert {"model_card.md", "config.yaml", "artifacts/detector.safetensors"} <= files
    assert (model / "report.html").read_bytes() == (plots / "report.html").read_bytes()
    measured = json.loads(metrics.read_text())
    logged = {item.key: item for item in client.get_logged_model(model_id_of(version)).metrics}
    assert logged.keys() == {key for key in measured if "/" not in key}
    assert logged["box_ap"].value == pytest.approx(measured["box_ap"])
    assert logged["box_ap"].dataset_digest == version.tags["val_fingerprint"]
    points = client.get_metric_history(version.run_id, "box_ap")
    # registration does not log the last evaluation again
    assert len(points) == len({point.step for point in points})

    python = fresh_environment(model, tmp_path / "venv")
    np.save(tmp_path / "image.npy", IMAGE)
    variables = plain_environment() | {"MLFLOW_TRACKING_URI": server}
    variables["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    question = [str(python), "-c", ASK, "models:/vitdet@champion", str(tmp_path / "image.npy")]
    printed = subprocess.check_output(question, cwd=tmp_path, text=True, env=variables)
    answer = json.loads(printed.splitlines()[-1])
    assert Path(answer["file"]).is_relative_to(tmp_path / "venv")
    stored = download_checkpoint(server, "vitdet", "1", tmp_path / "checkpoint")
    for path in (checkpoint, stored):
        expected = Predictor.load(path)(IMAGE, threshold=0.0)
        assert len(answer["rows"]) == len(expected) > 0
        for place, row in enumerate(answer["rows"]):
            assert row["name"] == expected.names[place]
            assert row["score"] == pytest.approx(float(expected.scores[place]), abs=1e-5)
            box = [row[key] for key in ("x0", "y0", "x1", "y1")]
            assert box == pytest.approx(expected.boxes[place].tolist(), abs=1e-3)
            assert (row["height"], row["width"]) == (60, 90) and row["mask"]
