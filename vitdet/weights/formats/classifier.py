"""What checkpoints of pre-trained backbones and their classifiers have in common."""

from __future__ import annotations

# Layers behind the backbone of fine-tuned classifiers, also those of timm and DINO
HEADS = ("head.{*}", "head_dist.{*}", "fc_norm.{*}", "fc.{*}", "classifier.{*}", "dino_head.{*}")
PARTS = ("teacher.", "encoder.", "backbone.")
WRAPPERS = ("state_dict_ema", "state_dict", "model")  # of timm's trainer
