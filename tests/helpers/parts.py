"""Parts of the detector with default settings, so that tests state only differences. Drop path is off."""

import math
from dataclasses import asdict

from vitdet.config import (
    BackboneConfig,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    RoIHeadsConfig,
    RPNConfig,
)
from vitdet.models.assign import match, match_keeping_own
from vitdet.models.attention import Attention
from vitdet.models.baselines.swin import Swin
from vitdet.models.baselines.vitaev2 import ViTAEv2
from vitdet.models.box_head import BoxHead
from vitdet.models.mask_head import MaskHead
from vitdet.models.pyramid import SimpleFeaturePyramid
from vitdet.models.roi_heads import RoIHeads
from vitdet.models.rpn import RPN
from vitdet.models.vit import SIZES, Block, ViT
from vitdet.models.vitae import SMALL_SIZES, ViTAESmall

EPS = ModelConfig().norm_eps


def backbone_settings(*names, **others):
    settings = asdict(BackboneConfig())
    return {name: settings[name] for name in names} | {"drop_path": 0.0, **others}


PLAIN = ("window_size", "rel_pos_size", "residual_blocks", "scaled_rel_pos", "final_norm")


def vit(**given):
    settings = backbone_settings(*PLAIN, "patch_size", "pos_embed_grid", branch=None)
    return ViT(**settings | {"mlp_ratio": SIZES["vit_b"].mlp_ratio} | given)


def vitae_small(**given):
    return ViTAESmall(**backbone_settings(*PLAIN) | SMALL_SIZES["vitae_s"]._asdict() | given)


def swin(**given):
    return Swin(**{"window_size": 7, "drop_path": 0.0} | given)


def vitaev2(**given):
    return ViTAEv2(**{"window_size": 7, "drop_path": 0.0} | given)


def attention(dim, heads, size, scaled_rel_pos=False):
    return Attention(dim=dim, heads=heads, size=size, scaled_rel_pos=scaled_rel_pos)


def block(**given):
    settings = {
        "mlp_ratio": SIZES["vit_b"].mlp_ratio,
        "drop_path": 0.0,
        "conv_after": False,
        "scaled_rel_pos": False,
        "branch": None,
    }
    return Block(**settings | given)


def pyramid(in_channels, out_channels, stride, **given):
    settings = asdict(ModelConfig().pyramid)
    chosen = {name: settings[name] for name in ("scales", "halve_channels")} | {"eps": EPS} | given
    return SimpleFeaturePyramid(
        in_channels=in_channels, out_channels=out_channels, stride=stride, **chosen
    )


def rpn(**given):
    limits = {"eps": EPS, "min_log_scale": -math.inf, "match": match_keeping_own}
    return RPN(**asdict(RPNConfig()) | limits | given)


def box_head(**given):
    settings = asdict(RoIHeadsConfig())
    names = ("num_convs", "num_fcs", "fc_dim", "num_classes", "norm")
    return BoxHead(**{name: settings[name] for name in names} | {"eps": EPS} | given)


def mask_head(**given):
    settings = asdict(MaskConfig())
    names = ("num_convs", "norm")
    return MaskHead(**{name: settings[name] for name in names} | {"eps": EPS} | given)


def roi_heads(kind=RoIHeads, **given):
    settings, evaluation = asdict(RoIHeadsConfig()), asdict(EvalConfig())
    names = ("ious", "samples", "positive_fraction", "sampling_ratio")
    limits = ("score_threshold", "nms_iou", "max_detections")
    return kind(
        **{name: settings[name] for name in names}
        | {name: evaluation[name] for name in limits}
        | {"mask_samples": MaskConfig().samples, "min_log_scale": -math.inf, "match": match}
        | given
    )
