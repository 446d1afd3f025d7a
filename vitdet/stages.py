"""What joins detection and its tracking: the stages train, evaluate and register, for the command line and the
pipeline's components alike.

Imports stand inside the functions: who asks for a stage's help or its config waits for neither torch nor MLflow.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitdet.config import Config, TrackingConfig, digest, flatten, legacy_digest

if TYPE_CHECKING:
    from vitdet.tracking.tracker import Progress


def tracking_folder(output: Path) -> Path:
    """Where the default MLflow store of a run lies: beside the run's folder, so that runs can be compared."""
    return output.resolve().parent


def has_mlflow() -> bool:
    """Whether the extra `tracking` is installed."""
    return importlib.util.find_spec("mlflow") is not None


def start_tracker(
    config: Config,
    recipe: str,
    output: Path,
    group: str,
    identity: str,
    run_id: str | None,
    step: int,
) -> Progress:
    """Progress for the eye, MLflow behind it where that is installed."""
    from vitdet.tracking.tracker import Progress, Tracker

    for digits in filter(None, (digest(config), legacy_digest(config))):  # of a pipeline
        recipe = recipe.removesuffix(f"-{digits[:8]}")

    tracker = Tracker()
    if has_mlflow():
        from vitdet.tracking.mlflow import start_run

        data = config.data
        tracker = start_run(
            uri=config.tracking.uri,
            folder=tracking_folder(output),
            experiment=config.tracking.experiment,
            name=f"{output.name if recipe == 'config' else recipe} {digest(config)[:6]}",
            params=flatten(config),
            tags={"recipe": recipe},
            group=group,
            dataset={
                "name": Path(data.root).name,
                "digest": identity,
                "source": str(Path(data.root).resolve()),
            },
            run_id=run_id,
            resume_step=step,
        )
    else:
        logging.getLogger(__name__).warning("mlflow is not installed: this training is not tracked")
    return Progress(tracker, config.optim.steps, step)


def train_tracked(
    config: Config,
    recipe: str,
    output: Path,
    *,
    checkpoints: Path | None = None,
    weights: Path | None = None,
    group: str = "",
) -> Path:
    """output/model.pt of a training that MLflow follows; raises what `vitdet.train` raises.

    weights: the folder in which train.init lies. group: the pipeline run that this training belongs to, if any.
    """
    from vitdet.training import train
    from vitdet.weights import resolve

    def start_tracking(identity: str, run_id: str | None, step: int) -> Progress:
        return start_tracker(config, recipe, output, group, identity, run_id, step)

    return train(
        config,
        output,
        checkpoints=checkpoints,
        weights=resolve(config.train.init, weights),
        start_tracking=start_tracking,
    )


def log_evaluation(
    checkpoint: Path,
    metrics: dict[str, float],
    uri: str | None,
    folder: Path,
    pictures: Sequence[Path] = (),
) -> str | None:
    """Adds an evaluation to the run that trained the checkpoint, and gives its id; uri None: that of its config.

    Nothing happens, and None is given, where the run's store is not in sight: the checkpoint was carried away.
    """
    from vitdet.checkpoint import load_model_file

    stored = load_model_file(checkpoint)
    if not stored["run_id"] or not has_mlflow():
        return None
    from vitdet.tracking.mlflow import log_metrics, tracking_uri

    uri = stored["config"]["tracking"]["uri"] if uri is None else uri
    kind, _, path = tracking_uri(uri, folder).partition(":///")
    if kind == "sqlite" and not Path(path).exists():
        return None
    return log_metrics(
        stored["run_id"], uri, folder, metrics, stored["step"], dict.fromkeys(pictures, "pictures")
    )


def register_checkpoint(
    checkpoint: Path,
    settings: TrackingConfig | None,
    metrics: dict[str, float] | None,
    folder: Path,
    alias: str,
) -> tuple[str, str]:
    """(name, version) of a checkpoint in the model registry; settings and metrics None: those that it holds.

    Raises ValueError without MLflow, and what `vitdet.tracking.registry.register` raises.
    """
    if not has_mlflow():
        raise ValueError("mlflow is not installed; install vitdet with its extra 'tracking'")
    import tempfile

    import numpy as np

    from vitdet.checkpoint import load_model_file
    from vitdet.config import from_dict
    from vitdet.tracking.registry import register
    from vitdet.tracking.wheel import build_wheel

    stored = load_model_file(checkpoint)
    settings = settings or from_dict(stored["config"]).tracking
    metrics = stored["metrics"] if metrics is None else metrics
    side = stored["config"]["data"]["image_size"]
    example = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as work:
        return register(
            checkpoint,
            run_id=stored["run_id"],
            uri=settings.uri,
            folder=folder,
            model_name=settings.model_name,
            alias=alias,
            metrics={
                key: metrics[key] for key in ("box_ap", "mask_ap") if metrics.get(key) is not None
            },
            example=example,
            wheel=build_wheel(Path(work)),
            tags={"dataset_digest": stored["dataset_digest"]},
        )
