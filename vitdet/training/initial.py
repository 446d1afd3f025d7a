"""Initialization of a training run's detector."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from vitdet import distributed
from vitdet.config import Config
from vitdet.data.coco import CocoSplit
from vitdet.models import Detector, build_detector
from vitdet.models.losses import FederatedClassification
from vitdet.weights.load import load_pretrained

log = logging.getLogger(__name__)


def fresh_detector(
    config: Config, split: CocoSplit, source: str | Path | None, device: torch.device
) -> Detector:
    """Build the detector with the weights in `source`; None: random weights from train.seed.

    The class weights of the federated loss are computed from the training images.
    """
    torch.manual_seed(config.train.seed)
    # class weights: image_count ** 0.5, as in Detectron2
    odds = torch.tensor(split.image_counts, dtype=torch.float32).sqrt()
    detector = build_detector(config.model, config.evaluate, odds.clone()).to(device)
    if source is not None:
        loaded = load_pretrained(detector, source, config.train.init_format, split.class_names)
        for note in loaded.notes if distributed.rank() == 0 else ():
            log.info("%s: %s", source, note)
    classification = detector.roi_heads.classification
    if isinstance(classification, FederatedClassification):
        # the class weights in the file may have been computed from different images
        classification.class_weights.copy_(odds)
    return detector
