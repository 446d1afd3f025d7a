"""Evaluation of detectors, checkpoints and results files against an annotation file.

As in Detectron2, boxes and masks are compared at the original image size: boxes are scaled by one
factor per axis and not rounded; masks are pasted with threshold 0.5.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import vitdet.evaluation.coco as coco
import vitdet.evaluation.lvis as lvis
from vitdet import distributed, kernels
from vitdet.checkpoint import load_model_file, restore_detector
from vitdet.config import Config, DataConfig, EvalConfig, from_dict, override
from vitdet.data.coco import CocoSplit, read_tree
from vitdet.data.dataset import read_split, with_objects
from vitdet.data.fingerprint import fingerprint
from vitdet.data.images import Reading
from vitdet.data.layout import (
    CLASSES,
    MASKS,
    missing,
    overridden_settings,
    resolve,
    settings_text,
    split_files,
)
from vitdet.data.loader import configure_process, val_loader
from vitdet.evaluation.detections import detections_to_results as detections_to_results
from vitdet.evaluation.detections import results_of
from vitdet.evaluation.matching import Comparison
from vitdet.evaluation.page import checkpoint_facts, results_facts
from vitdet.evaluation.pictures import Images, images_of, write_pictures
from vitdet.evaluation.report import details, write_reports
from vitdet.evaluation.results import Truth, kinds_of, read_results, read_truth, truth_of
from vitdet.models import build_detector
from vitdet.models.compile import compile_parts
from vitdet.types import Batch

log = logging.getLogger(__name__)

METRICS_OF = {"coco": coco, "lvis": lvis}  # data.dataset -> module that computes AP
# data.dataset -> function that compares results from a results file
OF_FILES = {"coco": coco.compare, "lvis": lvis.compare_file}
SECTIONS = ("data", "evaluate")  # config sections that an evaluation may change
# `data` settings that determine which images are evaluated and how their files are read
IMAGE_SETTINGS = (
    *("dataset", "root", "train_split", "val_split", "max_images", "workers"),
    *("max_pixels", "bit_depth"),
)
# Callback that is called with True before each batch and with False before the comparison. If it
# returns True before a batch, the evaluation is canceled on all ranks.
Advance = Callable[[bool], bool]


class Cancelled(Exception):
    """Raised on all ranks if the caller cancels an evaluation on any rank."""


def evaluate_detector(
    detector: nn.Module,
    data: DataConfig,
    settings: EvalConfig,
    device: torch.device | str = "cpu",
    advance: Advance = lambda batch: False,
) -> tuple[dict[str, float], list[dict]]:
    """Return the validation metrics in percent, and the COCO results in order of image id.

    The detector must be on `device`; its mode is restored. Each process evaluates a part of the
    images. All ranks return the metrics; on ranks other than 0, the list of results is empty.
    Raises Cancelled on all ranks if `advance` cancels the evaluation on any rank.
    """
    truth, split = read_validation(data, settings)
    results, image_ids = detect(detector, data, settings, device, split, advance)
    advance(False)
    metrics: dict[str, float] = {}
    if distributed.rank() == 0:
        _, metrics = _compare(truth, results, kinds_found_by(detector), data, settings, image_ids)
    return distributed.all_gather_objects(metrics)[0], results


def measured_metrics(config: Config) -> list[str]:
    """Return the names of the metrics that `evaluate_detector` would return for this config.

    Undefined metrics are omitted. Raises the errors of `read_validation`.
    """
    truth, split = read_validation(config.data, config.evaluate)
    kinds = ("bbox", "segm") if config.model.mask.enabled else ("bbox",)
    image_ids = [record.image_id for record in split.records]
    return list(_compare(truth, [], kinds, config.data, config.evaluate, image_ids)[1])


def kinds_found_by(detector: nn.Module) -> tuple[str, ...]:
    """Return the kinds of detections to compare: "bbox" and, unless `mask` is None, "segm"."""
    heads = getattr(detector, "roi_heads", None)
    return ("bbox",) if heads is not None and heads.mask is None else ("bbox", "segm")


def detect(
    detector: nn.Module,
    data: DataConfig,
    settings: EvalConfig,
    device: torch.device | str = "cpu",
    split: CocoSplit | None = None,
    advance: Advance = lambda batch: False,
) -> tuple[list[dict], list[int]]:
    """Return the validation split's COCO results in order of image id, and the sorted image ids.

    By default, the split is read from `data`. Rank 0 returns the results of all ranks; other
    ranks return empty lists. Raises Cancelled on all ranks if `advance` cancels on any rank.
    """
    split = split or read_split(data, data.val_split)

    def batches() -> Iterator[Batch]:
        rank, count = distributed.rank(), distributed.world_size()
        for batch in val_loader(data, settings.batch_size, rank, count, split):
            if advance(True):
                raise Cancelled
            yield batch

    was_training = detector.training
    detector.eval()
    share: dict[int, list[dict]] = {}
    cancelled = False
    try:
        ids, precision = split.category_ids, settings.precision
        for results in results_of(detector, batches(), ids, device, precision):
            share |= results
    except Cancelled:
        cancelled = True
    finally:
        detector.train(was_training)
    # all ranks must stop: a rank that continued would wait for the others in the next collective
    if distributed.async_max(int(cancelled))():
        raise Cancelled
    found: dict[int, list[dict]] = {}
    for part in distributed.gather_objects(share):
        found |= part  # a sampler may assign an image to two ranks
    image_ids = sorted(found)
    return [result for image_id in image_ids for result in found[image_id]], image_ids


def evaluation_config(
    stored: Config, overrides: Sequence[str] = (), config: Config | None = None
) -> tuple[Config, dict[str, str | int]]:
    """Return the config for evaluating a checkpoint, and the settings changed to match data.root.

    The data and evaluate settings are those of `config` (default: `stored`) with the overrides
    applied; all other settings are those of `stored`, the checkpoint's config. An override of
    data.root can also change the splits (`vitdet.data.layout.resolve`). Raises ValueError for
    invalid overrides and for overrides of other settings.
    """
    for setting in overrides:
        if setting.split(".")[0].strip() not in SECTIONS:
            raise ValueError(
                f"override {setting!r}: only data.* and evaluate.* settings of a trained "
                "checkpoint can be overridden"
            )
    # the data determines neither the classes nor the mask head of a trained detector; different
    # classes are rejected when the data is read
    explicit = overridden_settings(overrides) | {CLASSES, MASKS}
    return resolve(override(stored, overrides, config, SECTIONS), explicit)


def evaluate(
    checkpoint: str | Path,
    overrides: Sequence[str] = (),
    *,
    config: Config | None = None,
    pictures: str | Path | None = None,
    plots: str | Path | None = None,
    report: str | Path | None = None,
    device: torch.device | str | None = None,
    detailed: bool = False,
) -> dict[str, float]:
    """Return a checkpoint's metrics in percent on its validation split: {"box_ap": 51.6, ...}.

    Under torchrun, each process evaluates a part of the images; all processes return the metrics.
    Changes process settings as described in `vitdet.data.loader.configure_process`.

    Args:
        overrides: data and evaluate settings to change, as "SECTION.KEY=VALUE".
        config: its data and evaluate settings replace the checkpoint's; then overrides apply.
        pictures: folder for `write_pictures`.
        plots: folder for `write_report` and for report.html (`vitdet.evaluation.page`).
        report: additional path for report.html.
        device: by default, a GPU if there is one.
        detailed: also return `vitdet.evaluation.report.details` and seconds_per_image, the wall
            time of reading and detection divided by the number of images.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file or an override is invalid, or the classes of the data set differ from the
            checkpoint's.
    """
    configure_process()
    detector, stored, class_names = restore_detector(checkpoint)
    config, found = evaluation_config(stored, overrides, config)
    data, settings = config.data, config.evaluate
    on_rank0 = distributed.rank() == 0
    if found and on_rank0:
        log.info("%s has %s", data.root, settings_text(found))
    if settings != stored.evaluate:
        rebuilt = build_detector(config.model, settings)
        rebuilt.load_state_dict(detector.state_dict())
        detector = rebuilt
    truth, split = read_validation(data, settings)
    _check_classes(checkpoint, class_names, split.class_names, data)
    if config.model.mask.enabled and not split.outlines and on_rank0:
        log.info("%s: %s has no outlines; only box AP is computed", data.root, data.val_split)
    with distributed.process_group() as own_device:
        device = torch.device(device or own_device)
        if device.type == "cuda" and on_rank0:
            log.info(kernels.describe())
        detector = detector.to(device).eval()
        compiled = settings.compile and device.type == "cuda"
        if compiled:
            compile_parts(detector)
        start = time.perf_counter()
        results, image_ids = detect(detector, data, settings, device, split)
        seconds = time.perf_counter() - start
        metrics: dict[str, float] = {}
        if distributed.rank() == 0:
            kinds = kinds_found_by(detector)
            finished, metrics = _compare(truth, results, kinds, data, settings, image_ids)
            where = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
            facts = partial(checkpoint_facts, Path(checkpoint), config, where)
            folder = split_files(data, data.val_split).images
            images = Images(folder, data.dataset == "lvis", Reading.of(data))
            write_reports(plots, report, finished, metrics, truth, results, facts, images)
            if detailed:
                metrics |= details(finished)
                metrics["seconds_per_image"] = seconds / max(len(image_ids), 1)
            if pictures is not None:
                # eager mode: the detector would be compiled again for single images
                stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
                with stance:
                    precision = settings.precision
                    write_pictures(detector, data, pictures, split=split, precision=precision)
        return distributed.all_gather_objects(metrics)[0]


def evaluate_alike(
    checkpoint: str | Path,
    plots: str | Path | None = None,
    *,
    config: Config,
    class_names: Sequence[str],
    val_fingerprint: str,
) -> dict[str, float]:
    """Return a checkpoint's metrics on the data and with the settings of another evaluation.

    Images are resized as configured in the checkpoint. Raises ValueError if classes or data differ.

    Args:
        plots: see `evaluate`.
        config, class_names: the detector's config and classes in the other evaluation.
        val_fingerprint: fingerprint of the validation split in the other evaluation.
    """
    stored = load_model_file(checkpoint)
    names = [str(name) for name in stored["class_names"]]
    if names != list(class_names):
        shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise ValueError(
            f"the classes of this model ({shown}) differ from the candidate's; register the "
            "candidate under another tracking.model_name"
        )
    if fingerprint(config.data, config.data.val_split) != val_fingerprint:
        raise ValueError(f"{config.data.root} has changed; evaluate the candidate again")
    own = from_dict(stored["config"])
    changes = {key: getattr(config.data, key) for key in IMAGE_SETTINGS}
    same = replace(own, data=replace(own.data, **changes), evaluate=config.evaluate)
    return evaluate(checkpoint, config=same, plots=plots)


def evaluate_results(
    results: str | Path,
    annotations: str | Path,
    dataset: str = DataConfig.dataset,
    *,
    plots: str | Path | None = None,
    report: str | Path | None = None,
    detailed: bool = False,
) -> dict[str, float]:
    """Evaluate a COCO results file against an annotation file; return the metrics in percent.

    Args:
        dataset: evaluation protocol, "coco" or "lvis".
        plots, report, detailed: see `evaluate`; seconds_per_image is not returned. report.html
            has pictures if the images and annotations are in a known folder layout.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: `dataset` or a file is invalid. The message is one line.
    """
    if dataset not in METRICS_OF:
        raise ValueError(f"dataset must be {' or '.join(METRICS_OF)}, got {dataset!r}")
    found = read_results(results)
    truth = read_truth(annotations, dataset == "lvis")
    try:
        finished = OF_FILES[dataset](truth, found, kinds_of(found))
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from error
    metrics = METRICS_OF[dataset].summary(finished)
    if not metrics:
        raise ValueError(f"{annotations}: contains no objects that AP includes; AP is undefined")
    facts = partial(results_facts, Path(results), truth.path, len(found))
    images = images_of(truth.path, dataset)
    write_reports(plots, report, finished, metrics, truth, found, facts, images)
    return metrics | details(finished) if detailed else metrics


def _compare(
    truth: Truth,
    results: Sequence[dict],
    kinds: Sequence[str],
    data: DataConfig,
    settings: EvalConfig,
    image_ids: Sequence[int],
) -> tuple[dict[str, Comparison], dict[str, float]]:
    """Return the comparison of each kind, and COCO's or LVIS's metrics.

    For COCO, the detection limit is the larger of 100 and evaluate.max_detections.
    """
    if data.dataset == "lvis":
        finished = lvis.compare(truth, results, kinds, image_ids)
        return finished, lvis.summary(finished)
    usual, most = coco.LIMITS[-1], settings.max_detections
    if most > usual:
        log.info(
            "evaluate.max_detections=%d: AP is computed with up to %d detections per class and "
            "image; COCO's limit is %d",
            most,
            most,
            usual,
        )
    finished = coco.compare(truth, results, kinds, image_ids, max(usual, most))
    return finished, coco.summary(finished)


def read_validation(data: DataConfig, settings: EvalConfig) -> tuple[Truth, CocoSplit]:
    """Return the validation split as a `Truth` and as a `CocoSplit`.

    Raises FileNotFoundError for missing files, ValueError for invalid files or if AP is undefined.
    """
    path = split_files(data, data.val_split)[0]
    if not path.exists():
        raise missing(path, data)
    tree = read_tree(path)
    split = read_split(data, data.val_split, tree)
    if settings.max_images:
        full, split = split, with_objects(split, settings.max_images)
        if distributed.rank() == 0:
            log.info(
                "evaluate.max_images=%d: AP is computed on %d of %d images in %s",
                settings.max_images,
                len(split.records),
                len(full.records),
                data.val_split,
            )
    truth, image_ids = truth_of(path, tree), {record.image_id for record in split.records}
    rules = METRICS_OF[data.dataset]
    if rules is lvis:
        lvis.check(truth)
    objects = (target for target in truth.objects if target.image_id in image_ids)
    if not any(item.category_id in truth.categories and rules.counts(item) for item in objects):
        raise ValueError(
            f"{path}: AP is undefined, as no object in the images to evaluate (images: "
            f"{len(image_ids)}) is counted: {rules.UNCOUNTED}"
        )
    return truth, split


def _check_classes(
    checkpoint: str | Path, trained: Sequence[str], present: Sequence[str], data: DataConfig
) -> None:
    if tuple(trained) == tuple(present):
        return
    pairs = enumerate(zip(trained, present, strict=False))
    counts = f"number of classes is {len(present)}, not {len(trained)}"
    differs = next((f"class {i} is {b!r}, not {a!r}" for i, (a, b) in pairs if a != b), counts)
    raise ValueError(
        f"{data.root}: the classes of this data set differ from those of {checkpoint}: {differs}; "
        "set data.root to a data set with the checkpoint's classes"
    )
