"""The registered model: a detector that MLflow loads and serves without this repository.

A version contains the detector (weights in safetensors; versions before 0.2: a checkpoint of plain
tensors), this package as a wheel, and a code file that imports the class below; nothing is pickled,
so it loads with MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false. requirements.txt lists the wheel
by its path in the model, which MLflow resolves when it creates an environment; manually:
`cd MODEL && pip install -r requirements.txt`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow.artifacts import download_artifacts
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PythonModel, PythonModelContext, save_model
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

from vitdet.checkpoint import save_safetensors
from vitdet.config import from_dict
from vitdet.tracking.requests import repeating
from vitdet.tracking.wheel import requirements

CODE = '''"""The detector as an MLflow model; the code is in the wheel vitdet, which travels with it."""
from mlflow.models import set_model
from vitdet.tracking.packaged_model import DetectorModel

set_model(DetectorModel())
'''
COLUMNS = {
    "name": "string",
    "label": "long",
    "score": "double",
    "x0": "double",
    "y0": "double",
    "x1": "double",
    "y1": "double",
    "height": "long",
    "width": "long",
    "mask": "string",
}


def signature(masks: bool) -> ModelSignature:
    """Return the signature of a detector with or without masks."""
    columns: list = [
        ColSpec(kind, name) for name, kind in COLUMNS.items() if masks or name != "mask"
    ]
    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, -1, 3), "image")]),
        outputs=Schema(columns),
        params=ParamSchema([ParamSpec("threshold", "double", 0.5)]),
    )


class DetectorModel(PythonModel):
    """One RGB image (H, W, 3) uint8 -> a table with a row a detection, best first."""

    def load_context(self, context: PythonModelContext) -> None:
        from vitdet.predictor import Predictor

        self.predictor = Predictor.load(context.artifacts["checkpoint"])

    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict | None = None
    ) -> pd.DataFrame:
        """name, label, score, box x0 y0 x1 y1 in pixels, height and width of the image; mask: COCO's compressed RLE of
        a bitmap of that size, no such column for a detector without masks.
        """
        from vitdet.data.masks import encode, paste

        # by its name in the signature
        image = model_input["image"] if isinstance(model_input, dict) else model_input
        found = self.predictor(image, threshold=(params or {}).get("threshold", 0.5))
        rows = [
            (name, label, score, *box, *image.shape[:2])
            for name, label, score, box in zip(
                found.names,
                found.labels.tolist(),
                found.scores.tolist(),
                found.boxes.tolist(),
                strict=True,
            )
        ]
        table = pd.DataFrame(rows, columns=[name for name in COLUMNS if name != "mask"])
        if found.masks is not None:
            masks = encode(paste(found.masks, found.boxes, image.shape[:2]))
            table["mask"] = [mask["counts"] for mask in masks]
        return table


@contextmanager
def exported(uri: str) -> Iterator[None]:
    """Set MLFLOW_TRACKING_URI for code of MLflow that reads the server from it instead of its client."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def download(uri: str, artifact: str, folder: Path) -> Path:
    """Download an artifact, as `models:/NAME/VERSION/FILE`, from the server `uri`; return its path in `folder`."""
    with exported(uri), repeating(uri):
        return Path(
            download_artifacts(artifact, dst_path=str(folder), tracking_uri=uri, registry_uri=uri)
        )


def download_checkpoint(uri: str, model_name: str, version: str, folder: Path) -> Path:
    """Download the checkpoint of a registered version to `folder`; return its path.

    uri: the tracking server. Raises OSError, LookupError or ValueError if the artifacts cannot be read, and ValueError
    if the version was not created by `register`.
    """
    model = download(uri, f"models:/{model_name}/{version}", folder)
    try:
        flavors = Model.load(str(model)).flavors
        return model / flavors["python_function"]["artifacts"]["checkpoint"]["path"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"version {version} of {model_name} contains no checkpoint") from error


def pack(path: Path, model: Model, content: dict, wheel: Path) -> None:
    """Save a detector as a folder of MLflow; its input example is an image of noise.

    content: of the checkpoint, as `load_model_file` returns it.
    """
    example = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    weights, code = path.parent / "detector.safetensors", path.parent / "detector.py"
    save_safetensors(weights, content)
    code.write_text(CODE)
    # it warns that torch was imported before it
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
