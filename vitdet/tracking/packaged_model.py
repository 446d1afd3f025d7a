"""The registered model: a detector that MLflow loads and serves without this repository.

A version contains the detector's weights (safetensors), this package as a wheel, and a code file
that imports `DetectorModel`. As nothing is pickled, a version can be loaded with
MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false. requirements.txt contains a relative path to the wheel;
to install the requirements, run `pip install -r requirements.txt` in the model's folder.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow.artifacts import download_artifacts
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PythonModel, PythonModelContext, save_model
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

from vitdet.checkpoint import save_safetensors
from vitdet.config import from_dict
from vitdet.tracking.client import repeating
from vitdet.tracking.wheel import requirements

CODE = '''"""The detector as an MLflow model; its code is in the wheel vitdet."""
from mlflow.models import set_model
from vitdet.tracking.packaged_model import DetectorModel

set_model(DetectorModel())
'''
COLUMNS = {
    **{"name": "string", "label": "long", "score": "double"},
    **dict.fromkeys(("x0", "y0", "x1", "y1"), "double"),
    **{"height": "long", "width": "long", "mask": "string"},
}
TIMEOUT_SECONDS = 900.0  # for `try_model`; imports from a network file system can take minutes
PROGRAM = """
import sys
wheel, path = sys.argv[1:]
sys.path.insert(0, wheel)
import mlflow.pyfunc
loaded = mlflow.pyfunc.load_model(path)
found = loaded.predict(loaded.input_example, params={"threshold": 0.0})
modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "vitdet"]
outside = [module.__file__ for module in modules if not module.__file__.startswith(wheel)]
if outside or not modules:
    raise ImportError(f"the package is not imported from the wheel of the model: {outside}")
expected = [column.name for column in loaded.metadata.get_output_schema()]
if list(found.columns) != expected:
    raise ValueError(f"expected a result with columns {expected}, got {list(found.columns)}")
"""


def signature(masks: bool) -> ModelSignature:
    """Return the MLflow signature of a detector. masks: whether the detector predicts masks."""
    columns: list = [
        ColSpec(kind, name) for name, kind in COLUMNS.items() if masks or name != "mask"
    ]
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, -1, 3), "image")]),
        outputs=Schema(columns),
        params=ParamSchema([ParamSpec("threshold", "double", 0.5)]),
    )


class DetectorModel(PythonModel):
    """An MLflow model that maps an RGB image (H, W, 3), uint8, to a table of detections."""

    def load_context(self, context: PythonModelContext) -> None:
        from vitdet.predictor import Predictor

        self.predictor = Predictor.load(context.artifacts["checkpoint"])

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict | None = None
    ) -> pd.DataFrame:
        """Return a table with one row per detection, highest score first.

        Its columns are name, label, score, x0, y0, x1, y1 (the box in pixels), height and width (of
        the image) and, if the detector predicts masks, mask (COCO's compressed RLE of an
        image-sized bitmap).
        """
        from vitdet.data.masks import encode, paste

        # "image": the input's name in the signature
        image = model_input["image"] if isinstance(model_input, dict) else model_input
        found = self.predictor(image, threshold=(params or {}).get("threshold", 0.5))
        table = pd.DataFrame(found.boxes.tolist(), columns=["x0", "y0", "x1", "y1"])
        table.insert(0, "name", found.names)
        table.insert(1, "label", found.labels.tolist())
        table.insert(2, "score", found.scores.tolist())
        table["height"], table["width"] = image.shape[:2]
        if found.masks is not None:
            masks = encode(paste(found.masks, found.boxes, image.shape[:2]))
            table["mask"] = [mask["counts"] for mask in masks]
        return table


def download(uri: str, artifact: str, folder: Path) -> Path:
    """Download an artifact, given as `models:/NAME/VERSION[/FILE]`; return its path in `folder`."""
    with repeating(uri):
        return Path(
            download_artifacts(artifact, dst_path=str(folder), tracking_uri=uri, registry_uri=uri)
        )


def download_checkpoint(uri: str, model_name: str, version: str, folder: Path) -> Path:
    """Download the checkpoint of a registered version to `folder`; return its path.

    Raises OSError, LookupError or ValueError if the artifacts cannot be read, and ValueError if the
    version was not created by `vitdet register`.
    """
    model = download(uri, f"models:/{model_name}/{version}", folder)
    try:
        flavors = Model.load(str(model)).flavors
        return model / flavors["python_function"]["artifacts"]["checkpoint"]["path"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"version {version} of {model_name} contains no checkpoint") from error


def pack(path: Path, model: Model, content: dict, wheel: Path) -> None:
    """Save a detector to a folder as an MLflow model, with a noise image as its input example.

    content: the checkpoint as returned by `load_model_file`.
    """
    example = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    weights, code = path.parent / "detector.safetensors", path.parent / "detector.py"
    save_safetensors(weights, content)
    code.write_text(CODE)
    # suppresses MLflow's progress messages, such as the validation of the input example
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    save_model(
        str(path),
        python_model=str(code),
        artifacts={"checkpoint": str(weights)},
        signature=signature(from_dict(content["config"]).model.mask.enabled),
        code_paths=[str(wheel)],
        mlflow_model=model,
        input_example=example,
        pip_requirements=[*requirements(("mlflow", "pandas")), f"code/{wheel.name}"],
    )
    weights.unlink()


def try_model(model: Path, wheel: Path) -> None:
    """Load a packaged model in a new process and run it on its input example.

    The process imports this package from the wheel, imports other packages from this environment,
    and rejects pickles. Raises ValueError if the model cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="vitdet-trial-") as work:
        site = Path(work).resolve() / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", PROGRAM, str(site), str(model)],
                cwd=work,
                env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"the packaged model did not respond within {TIMEOUT_SECONDS:.0f} s in a new "
                "process; it is not registered"
            ) from error
    if done.returncode:
        reason = next(iter(reversed(done.stderr.strip().splitlines())), f"exit {done.returncode}")
        raise ValueError(
            f"the packaged model cannot be run in a new process ({reason[:300]}); it is not "
            "registered"
        )
