"""Which values of the settings make sense: ranges of single numbers, and what several settings must have in common."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdet.config import Config

# Settings by name, test of one value, the words for it.
RANGES = (
    (
        "optim.steps train.batch_size train.log_every train.eval_every train.save_every train.keep data.image_size "
        "model.roi_heads.num_classes model.roi_heads.samples model.roi_heads.fc_dim model.roi_heads.federated_classes "
        "model.rpn.samples model.rpn.pre_nms_train model.rpn.pre_nms_test model.rpn.post_nms_train "
        "model.rpn.post_nms_test model.roi_heads.num_fcs model.mask.samples model.pyramid.channels "
        "model.backbone.patch_size model.backbone.pos_embed_grid evaluate.batch_size evaluate.max_detections",
        lambda value: value >= 1,
        "be at least 1",
    ),
    (
        "optim.lr optim.layer_decay model.norm_eps data.scale_range model.pyramid.scales "
        "model.rpn.anchor_scale model.rpn.aspect_ratios",
        lambda value: value > 0,
        "be above 0",
    ),
    (
        "optim.weight_decay optim.warmup_steps optim.clip data.workers data.max_images train.seed "
        "model.backbone.window_size model.rpn.num_convs model.roi_heads.num_convs model.mask.num_convs "
        "model.roi_heads.sampling_ratio",
        lambda value: value >= 0,
        "not be negative",
    ),
    (
        "data.flip data.transpose data.color_jitter data.repeat_threshold "
        "model.backbone.drop_path optim.ema optim.warmup_factor "
        "model.rpn.positive_fraction model.roi_heads.positive_fraction model.roi_heads.ious model.rpn.nms_iou "
        "evaluate.score_threshold evaluate.nms_iou",
        lambda value: 0 <= value <= 1,
        "lie between 0 and 1",
    ),
)


def check(config: Config) -> None:
    """Raises ValueError, naming the setting, what was expected and what came, for a value that makes no sense."""
    for keys, holds, what in RANGES:
        for key in keys.split():
            value = reduce(getattr, key.split("."), config)
            several = isinstance(value, tuple)
            _rule(
                value and all(map(holds, value)) if several else holds(value),
                f"{key} must {what}, got {list(value) if several else value}",
            )
    backbone, data, optim = config.model.backbone, config.data, config.optim
    stride = round(
        2 * backbone.patch_size / config.model.pyramid.scales[-1]
    )  # p6: a whole number of its cells
    _rule(
        data.image_size % stride == 0,
        f"data.image_size must be a positive multiple of {stride} (the coarsest stride), got {data.image_size}",
    )
    _rule(
        all(
            0 < a < b for a, b in zip(optim.milestones, optim.milestones[1:] + (1.0,), strict=True)
        ),
        f"optim.milestones must rise between 0 and 1 (fractions of the steps), got {list(optim.milestones)}",
    )
    _rule(
        backbone.rel_pos_size >= backbone.patch_size,
        "model.backbone.rel_pos_size must be at least patch_size "
        f"({backbone.patch_size}), got {backbone.rel_pos_size}",
    )
    low, high = data.scale_range
    _rule(low <= high, f"data.scale_range must be low <= high, got {[low, high]}")
    hierarchical = backbone.name in ("swin_t", "vitaev2_s")
    _rule(
        hierarchical == (config.model.pyramid.kind == "fpn"),
        f"model.backbone.name={backbone.name} goes with model.pyramid.kind={'fpn' if hierarchical else 'simple'}",
    )
    _rule(
        not hierarchical or backbone.window_size == 7,
        f"model.backbone.window_size must be 7 with {backbone.name}, got {backbone.window_size}",
    )


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
