"""Evaluation of a detector: its detections on the validation images, as COCO results, against the annotations.

As in Detectron2, masks are compared at the size of the original image: boxes are scaled by one factor per axis, masks
are pasted with threshold 0.5, and boxes are written as xywh without rounding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import vitdet.evaluation.coco as coco
import vitdet.evaluation.lvis as lvis
from vitdet import distributed, kernels
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
from vitdet.evaluation.analysis import Analysis, analyse
from vitdet.evaluation.detections import detections_to_results as detections_to_results
from vitdet.evaluation.detections import results_of
from vitdet.evaluation.matching import Comparison
from vitdet.evaluation.page import Facts, checkpoint_facts, results_facts, write_page
from vitdet.evaluation.pairs import Images, images_of
from vitdet.evaluation.pictures import write_pictures
from vitdet.evaluation.report import REPORT, details, write_report
from vitdet.evaluation.results import Truth, kinds_of, read_results, read_truth, truth_of
from vitdet.types import Batch

log = logging.getLogger(__name__)

METRICS_OF = {"coco": coco, "lvis": lvis}  # data.dataset -> the definition of its AP
# the same for files of results
OF_FILES = {"coco": coco.compare, "lvis": lvis.compare_file}
SECTIONS = ("data", "evaluate")  # of a config, that an evaluation may change
# The settings of `data` that determine which images a detector is evaluated on, and how they are read
PLACE = (
    *("dataset", "root", "train_split", "val_split", "max_images", "workers"),
    *("max_pixels", "bit_depth"),
)
# What an evaluation reports to its caller before each batch (True) and before the comparison (False);
# the answer True before a batch cancels it on all ranks.
Advance = Callable[[bool], bool]


class Cancelled(Exception):
    """An evaluation was cancelled by its caller, on this rank or another."""


def evaluate_detector(
    detector: nn.Module,
    data: DataConfig,
    settings: EvalConfig,
    device: torch.device | str = "cpu",
    advance: Advance = lambda batch: False,
) -> tuple[dict[str, float], list[dict]]:
    """Return box and, with masks, mask AP in percent on the validation split, and the COCO results, sorted by image.

    The detector is on `device`; its mode is restored afterwards. With several processes, each evaluates a part of the
    images and all return the same metrics, only the first the results (those of LVIS take 5 GB). Raises Cancelled on
    all of them if `advance` cancels it on one.
    """
    truth, split = read_validation(data, settings)
    results, image_ids = detect(detector, data, settings, device, split, advance)
    metrics = {}
    advance(False)
    if distributed.rank() == 0:
        kinds = kinds_found_by(detector)
        finished = _compare(truth, results, kinds, data, settings, image_ids)
        metrics = METRICS_OF[data.dataset].summary(finished)
    return distributed.all_gather_objects(metrics)[0], results


def measured_metrics(config: Config) -> list[str]:
    """Return the names of the metrics that `evaluate_detector` returns for a detector of this config: without those for which
    the validation split has no object. Takes as long as a comparison without detections; raises as that does.
    """
    truth, split = read_validation(config.data, config.evaluate)
    kinds = ("bbox", "segm") if config.model.mask.enabled else ("bbox",)
    image_ids = [record.image_id for record in split.records]
    finished = _compare(truth, [], kinds, config.data, config.evaluate, image_ids)
    return list(METRICS_OF[config.data.dataset].summary(finished))


def kinds_found_by(detector: nn.Module) -> tuple[str, ...]:
    """Return the kinds of its detections that are compared: "bbox" and, with a mask head, "segm"."""
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
    """Return the COCO results of `evaluate_detector` without the comparison, and the ids of the evaluated images.

    split: the validation split, if it was read before. Of several processes the first has those of all, others none.
    Raises Cancelled as `evaluate_detector` does.
    """
    was_training = detector.training
    detector.eval()
    try:
        share = _detect_share(
            detector, data, split or read_split(data, data.val_split), settings, device, advance
        )
    finally:
        detector.train(was_training)
    # a collective: a rank that stops must not leave the others waiting in the next one
    if distributed.async_max(int(share is None))():
        raise Cancelled
    found: dict[int, list[dict]] = {}
    for part in distributed.gather_objects(share or {}):
        found.update(part)  # a sampler may assign an image to two ranks
    image_ids = sorted(found)
    return [result for image_id in image_ids for result in found[image_id]], image_ids


def evaluation_config(
    stored: Config, overrides: Sequence[str] = (), config: Config | None = None
) -> tuple[Config, dict[str, str | int]]:
    """Return the config of a checkpoint with the data and evaluate settings of `config`, then with overrides.

    As in training, an override of data.root takes the splits from that folder unless they are
    overridden too; returns these settings as well. Raises ValueError for an override of another section.
    """
    for one in overrides:
        if one.split(".")[0].strip() not in SECTIONS:
            raise ValueError(
                f"override {one!r}: only data.* and evaluate.* can change for a trained checkpoint"
            )
    # classes and mask head are the checkpoint's: other classes are refused when the data is read
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
    """Return box and mask AP in percent of a checkpoint on its validation split, as {"box_ap": 51.6, "mask_ap": 45.9, ...}.

    The data and evaluate settings are the checkpoint's, or those of `config`, changed by overrides. Two folders, if
    given: `pictures` receives what `write_pictures` writes, `plots` what `write_report` does and, in report.html, the page
    of `vitdet.evaluation.page`; `report` is another file for this page. Under torchrun each process takes a share of the
    images and all return the same. device: a GPU if there is one. detailed: also what `vitdet.evaluation.report.details` returns, and seconds_per_image: wall time
    from reading to detections. Raises ValueError when
    the data set has other classes than the checkpoint, or when an override changes another section, before anything is
    written. Changes the process as described in `vitdet.data.loader.configure_process`.
    """
    configure_process()
    from vitdet.checkpoint import restore_detector

    # here: the AP of results needs neither models nor training
    from vitdet.models import build_detector
    from vitdet.models.compile import compile_parts

    detector, stored, class_names = restore_detector(checkpoint)
    config, found = evaluation_config(stored, overrides, config)
    if found and distributed.rank() == 0:
        log.info("%s has %s", config.data.root, settings_text(found))
    if config.evaluate != stored.evaluate:
        rebuilt = build_detector(config.model, config.evaluate)
        rebuilt.load_state_dict(detector.state_dict())
        detector = rebuilt
    truth, split = read_validation(config.data, config.evaluate)
    _check_classes(checkpoint, class_names, split.class_names, config.data)
    if config.model.mask.enabled and not split.outlines and distributed.rank() == 0:
        log.info(
            "%s: no object of %s has an outline: box AP only",
            config.data.root,
            config.data.val_split,
        )
    with distributed.process_group() as own_device:
        device = torch.device(device or own_device)
        if device.type == "cuda" and distributed.rank() == 0:
            log.info(kernels.describe())
        detector = detector.to(device).eval()
        compiled = config.evaluate.compile and device.type == "cuda"
        if compiled:
            compile_parts(detector)
        start = time.perf_counter()
        results, image_ids = detect(detector, config.data, config.evaluate, device, split)
        seconds = time.perf_counter() - start
        metrics = {}
        if distributed.rank() == 0:
            kinds = kinds_found_by(detector)
            finished = _compare(truth, results, kinds, config.data, config.evaluate, image_ids)
            metrics = METRICS_OF[config.data.dataset].summary(finished)
            where = str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)
            facts = partial(checkpoint_facts, Path(checkpoint), config, len(image_ids), where)
            pages = _Pages(plots, report, facts, _images(config.data))
            pages.write(finished, metrics, truth, results)
            if detailed:
                metrics |= details(finished)
                metrics["seconds_per_image"] = seconds / max(len(image_ids), 1)
            if pictures is not None:
                # one image at a time, for which the detector would be compiled again
                stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
                with stance:
                    write_pictures(
                        detector,
                        config.data,
                        pictures,
                        split=split,
                        precision=config.evaluate.precision,
                    )
        return distributed.all_gather_objects(metrics)[0]


def evaluate_alike(
    checkpoint: str | Path,
    plots: str | Path | None = None,
    *,
    config: Config,
    class_names: Sequence[str],
    val_fingerprint: str,
) -> dict[str, float]:
    """Return the metrics of a checkpoint on the validation data and with the settings of another detector's evaluation.

    config: of that evaluation; how images are resized stays the checkpoint's own, as its model. class_names: of that detector.
    val_fingerprint: of the validation split then. plots: as in `evaluate`. Raises ValueError where classes or data differ.
    """
    from vitdet.checkpoint import load_model_file

    stored = load_model_file(checkpoint)
    names = [str(name) for name in stored["class_names"]]
    if names != list(class_names):
        shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise ValueError(
            f"it has different classes ({shown}); register this model under another tracking.model_name"
        )
    if fingerprint(config.data, config.data.val_split) != val_fingerprint:
        raise ValueError(f"{config.data.root} has changed since the candidate was evaluated")
    own = from_dict(stored["config"])
    theirs = {key: getattr(config.data, key) for key in PLACE}
    alike = replace(own, data=replace(own.data, **theirs), evaluate=config.evaluate)
    return evaluate(checkpoint, config=alike, plots=plots)


def evaluate_results(
    results: str | Path,
    annotations: str | Path,
    dataset: str = DataConfig.dataset,
    *,
    plots: str | Path | None = None,
    report: str | Path | None = None,
    detailed: bool = False,
) -> dict[str, float]:
    """Return box and/or mask AP in percent of a file of COCO results, by its content, against an annotation file.

    dataset: 'coco' or 'lvis', whose rules differ. `plots` and `report` as in `evaluate`; the page has pictures if the
    images are found beside the annotations. detailed: also what
    `vitdet.evaluation.report.details` returns. Raises FileNotFoundError for a missing file and ValueError, in one
    line, for what is wrong in them.
    """
    if dataset not in METRICS_OF:
        raise ValueError(f"dataset is {' or '.join(METRICS_OF)}, got {dataset!r}")
    found = read_results(results)
    truth = read_truth(annotations, dataset == "lvis")
    try:
        finished = OF_FILES[dataset](truth, found, kinds_of(found))
    except ValueError as error:
        raise ValueError(f"{results}: {error}") from error
    metrics = METRICS_OF[dataset].summary(finished)
    if not metrics:
        raise ValueError(f"{annotations}: contains no object to find; AP is undefined")
    facts = partial(results_facts, Path(results), truth.path, len(truth.images), found)
    pages = _Pages(plots, report, facts, images_of(truth.path, dataset))
    pages.write(finished, metrics, truth, found)
    return metrics | details(finished) if detailed else metrics


@dataclass(frozen=True)
class _Pages:
    """Where the findings are written: the folder of `write_report`, and the page of `vitdet.evaluation.page`.

    facts: those of the page, from the first analysis.
    """

    plots: str | Path | None
    report: str | Path | None
    facts: Callable[[Analysis], Facts]
    images: Images | None

    def write(
        self,
        finished: Mapping[str, Comparison],
        metrics: Mapping[str, float],
        truth: Truth,
        results: list[dict],
    ) -> None:
        pages = {Path(self.plots) / REPORT} if self.plots else set()
        pages |= {Path(self.report)} if self.report else set()
        if not pages:
            return
        # a data set of boxes only has no masks
        known = {kind: one for kind, one in finished.items() if one.ap() is not None}
        analyses = [analyse(kind, one, metrics, truth) for kind, one in known.items()]
        if self.plots:
            write_report(self.plots, finished, results, analyses)
        for page in pages:
            write_page(page, analyses, self.facts(analyses[0]), truth, results, self.images)


def _images(data: DataConfig) -> Images:
    folder = split_files(data, data.val_split).images
    return Images(folder, data.dataset == "lvis", Reading.of(data))


def _compare(
    truth: Truth,
    results: Sequence[dict],
    kinds: Sequence[str],
    data: DataConfig,
    settings: EvalConfig,
    image_ids: Sequence[int],
) -> dict[str, Comparison]:
    """By the rules of the data set; COCO's largest limit of detections grows with that of the detector."""
    if data.dataset == "lvis":
        return lvis.compare(truth, results, kinds, image_ids)
    usual, most = coco.LIMITS[-1], settings.max_detections
    if most > usual:
        log.info(
            "evaluate.max_detections=%d: AP counts up to %d detections of a class in an image; COCO's own counts %d",
            most,
            most,
            usual,
        )
    return coco.compare(truth, results, kinds, image_ids, max(usual, most))


def read_validation(data: DataConfig, settings: EvalConfig) -> tuple[Truth, CocoSplit]:
    """Return the validation split for the comparison and for the detector; the annotation file is read once.

    Raises ValueError, before anything is detected, if AP is undefined: no object counts.
    """
    path = split_files(data, data.val_split)[0]
    if not path.exists():
        raise missing(path, data)
    tree = read_tree(path)
    split = read_split(data, data.val_split, tree)
    if settings.max_images:
        every, split = split, with_objects(split, settings.max_images)
        if distributed.rank() == 0:
            log.info(
                "evaluate.max_images=%d: AP of %d of the %d images of %s",
                settings.max_images,
                len(split.records),
                len(every.records),
                data.val_split,
            )
    truth, image_ids = truth_of(path, tree), {record.image_id for record in split.records}
    arbiter = METRICS_OF[data.dataset]
    arbiter.check(truth)
    objects = (one for one in truth.objects if one.image_id in image_ids)
    if not any(one.category_id in truth.categories and arbiter.counts(one) for one in objects):
        raise ValueError(
            f"{path}: AP is undefined: none of the objects in the {len(image_ids)} images to evaluate "
            f"counts: {arbiter.UNCOUNTED}"
        )
    return truth, split


def _detect_share(
    detector: nn.Module,
    data: DataConfig,
    split: CocoSplit,
    settings: EvalConfig,
    device: torch.device | str,
    advance: Advance,
) -> dict[int, list[dict]] | None:
    """The results of this rank's images by image id; None when it was cancelled."""

    def batches() -> Iterator[Batch]:
        for batch in val_loader(
            data, settings.batch_size, distributed.rank(), distributed.world_size(), split
        ):
            if advance(True):
                raise Cancelled
            yield batch

    share: dict[int, list[dict]] = {}
    try:
        for found in results_of(
            detector, batches(), split.category_ids, device, settings.precision
        ):
            share |= found
    except Cancelled:
        return None
    return share


def _check_classes(
    checkpoint: str | Path, trained: Sequence[str], present: Sequence[str], data: DataConfig
) -> None:
    if tuple(trained) == tuple(present):
        return
    differs = next(
        (
            f"class {i} is {b!r}, not {a!r}"
            for i, (a, b) in enumerate(zip(trained, present, strict=False))
            if a != b
        ),
        f"{len(present)} classes, not {len(trained)}",
    )
    raise ValueError(
        f"{data.root}: its classes are not those that {checkpoint} was trained on: {differs}; "
        "set data.root to a data set with the checkpoint's classes"
    )
