"""What a number among the settings may be: (settings by name, test of one value, the words for it)."""

from __future__ import annotations

RANGES = (
    ("optim.steps train.batch_size train.log_every train.eval_every train.save_every train.keep data.image_size "
     "model.roi_heads.num_classes model.roi_heads.samples model.roi_heads.fc_dim model.roi_heads.federated_classes "
     "model.rpn.samples model.rpn.pre_nms_train model.rpn.pre_nms_test model.rpn.post_nms_train "
     "model.rpn.post_nms_test model.mask.samples model.pyramid.channels model.backbone.patch_size "
     "model.backbone.pos_embed_grid evaluate.batch_size evaluate.max_detections",
     lambda value: value >= 1, "be at least 1"),
    ("optim.lr optim.layer_decay data.scale_range model.pyramid.scales model.rpn.anchor_scale model.rpn.aspect_ratios",
     lambda value: value > 0, "be above 0"),
    ("optim.weight_decay optim.warmup_steps optim.clip data.workers data.max_images train.seed "
     "model.backbone.window_size model.rpn.num_convs model.roi_heads.num_convs model.mask.num_convs "
     "model.roi_heads.sampling_ratio", lambda value: value >= 0, "not be negative"),
    ("data.flip data.transpose data.color_jitter model.backbone.drop_path optim.ema optim.warmup_factor "
     "model.rpn.positive_fraction model.roi_heads.positive_fraction model.roi_heads.ious model.rpn.nms_iou "
     "evaluate.score_threshold evaluate.nms_iou", lambda value: 0 <= value <= 1, "lie between 0 and 1"),
)
