"""Every setting of an experiment, once: a tree of frozen dataclasses whose defaults are the published
ViTDet-B Mask R-CNN on COCO (Detectron2, mask_rcnn_vitdet_b_100ep).

A recipe (a YAML file in `recipes/`) lists what differs from the defaults, an override `a.b=c` changes one setting
more. The field's type converts the text (`vitdet.typed`), so `1e-4` is a number although YAML reads it as a string.
A resolved config holds every value and is what is stored, logged and passed between the steps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import reduce
from pathlib import Path
from typing import Literal

import yaml

from vitdet import rules
from vitdet.files import written
from vitdet.typed import build, nearest, overridden, settings

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class BackboneConfig:
    """What an image goes through first; depth, width, heads and global blocks belong to the name."""

    name: Literal[
        "vit_tiny", "vit_b", "vit_l", "vit_h", "vitae_b", "vitae_s", "swin_t", "vitaev2_s"
    ] = "vit_b"
    patch_size: int = 16  # pixels; the stride of the one feature map
    window_size: int = 14  # tokens, side of a window of the local attention blocks
    drop_path: float = 0.1  # rate of the last block; grows linearly from 0
    pos_embed_grid: int = (
        14  # tokens a side of the stored position embedding: 224 / 16 in the MAE pre-training
    )
    global_attention: bool = (
        True  # in a few blocks that the name tells; false: all blocks look at windows
    )
    residual_blocks: tuple[
        int, ...
    ] = ()  # blocks that residual convolutions follow: the paper's other propagation
    rel_pos_size: int = (
        1024  # pixels a side for which the global blocks' relative-position tables are made
    )
    scaled_rel_pos: bool = (
        False  # relative positions meet the scaled query (ViTAE-Transformer/ViTDet)
    )
    final_norm: bool = False  # LayerNorm after the last block (ViTAE-Transformer/ViTDet)


@dataclass(frozen=True)
class PyramidConfig:
    """Simple feature pyramid over the last map of the backbone, or an FPN over the maps of a hierarchical one."""

    kind: Literal["simple", "fpn"] = "simple"
    channels: int = 256
    halve_channels: bool = (
        True  # each deconvolution halves the channels; else keeps them (ViTAE-Transformer/ViTDet)
    )
    scales: tuple[float, float, float, float] = (
        4.0,
        2.0,
        1.0,
        0.5,
    )  # of p2..p5 against the backbone's map


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network."""

    anchor_scale: float = 8.0  # anchor side / stride of its level: 32..512 on strides 4..64
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    num_convs: int = 2
    norm: bool = False  # LN after each convolution (ViTAE-Transformer/ViTDet)
    divide_by_sampled: bool = (
        False  # losses / anchors sampled (mmdet), not / (samples * images) (detectron2)
    )
    samples: int = 256  # anchors an image that the loss looks at
    positive_fraction: float = 0.5
    iou_low: float = 0.3  # below: background
    iou_high: float = 0.7  # from here: object
    pre_nms_train: int = 2000  # best anchors a level that enter NMS
    pre_nms_test: int = 1000
    post_nms_train: int = 1000  # proposals an image, over all levels
    post_nms_test: int = 1000
    nms_iou: float = 0.7


@dataclass(frozen=True)
class RoIHeadsConfig:
    """Box stages: one is Mask R-CNN, three are Cascade Mask R-CNN."""

    num_classes: int = 80
    ious: tuple[float, ...] = (0.5,)  # one stage an entry; a box is foreground from this IoU
    loss: Literal["softmax", "federated"] = "softmax"
    samples: int = 512  # boxes an image that the loss looks at
    positive_fraction: float = 0.25
    num_convs: int = 4
    num_fcs: int = 1
    fc_dim: int = 1024
    norm: bool = True  # LN after each convolution
    sampling_ratio: int = 0  # RoIAlign points a bin and axis; 0: adaptive, as published
    federated_classes: int = 50


@dataclass(frozen=True)
class MaskConfig:
    """Mask head."""

    num_convs: int = 4
    norm: bool = True  # LN after each convolution
    samples: int = 128  # at most so many of an image's foreground boxes train the mask head


@dataclass(frozen=True)
class ModelConfig:
    """The detector."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi_heads: RoIHeadsConfig = field(default_factory=RoIHeadsConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    norm_eps: float = 1e-6  # of the LNs of pyramid and heads; 1e-5 in mmdet
    low_quality: Literal["own", "best"] = (
        "own"  # a ground truth's best box learns from its own best (detectron2, RPN
    )
    # only), or from that ground truth, in RPN and RoI heads (mmdet)
    clamp_shrinking: bool = (
        False  # a box also shrinks at most 1000 / 16 times in one step (mmdet), not only grows
    )


@dataclass(frozen=True)
class DataConfig:
    """A folder in COCO's layout: ROOT/SPLIT/*.jpg and ROOT/annotations/instances_SPLIT.json (LVIS: lvis_v1_SPLIT.json,
    whose images lie where their coco_url says).
    """

    dataset: Literal["coco", "lvis"] = "coco"
    root: str = "data/coco"
    train_split: str = "train2017"
    val_split: str = "val2017"
    max_images: int = (
        0  # of each split only the so many images of lowest id that hold an object; 0: all
    )
    image_size: int = 1024  # pixels a side of the square canvas
    scale_range: tuple[float, float] = (
        0.1,
        2.0,
    )  # large-scale jitter; (1, 1): longest side = canvas
    flip: float = 0.5  # probability of a horizontal flip
    diagonal_crop: bool = (
        True  # one random number for both offsets of the crop (detectron2); false: two (mmdet)
    )
    transpose: float = 0.0  # probability of exchanging the axes
    color_jitter: float = 0.0  # brightness, contrast and saturation change by up to this factor - 1
    antialias: bool = True  # when an image is made smaller (PIL, detectron2); false: plain bilinear (OpenCV, mmdet)
    redraw_empty: bool = (
        False  # a crop without any object is replaced by one of another image (mmdet)
    )
    repeat_threshold: float = (
        0.0  # images with classes in a smaller share of the images are repeated; 0: none (LVIS)
    )
    workers: int = 4  # data-loader processes a rank; 0: load in the training process


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with layer-wise decay of the learning rate, linear warm-up."""

    lr: float = 1e-4
    weight_decay: float = 0.1
    # What has no weight decay: the blocks' LayerNorms and the position embedding (ViT-B, L); everything of one axis,
    # relative positions and the position embedding (ViTAE-Transformer/ViTDet); LayerNorms and Swin's tables of
    # positions, but no BatchNorm (mmdet's Swin); nothing (ViT-H).
    undecayed: Literal["norms", "vectors", "layer_norms", "nothing"] = "norms"
    layer_decay: float = 0.7
    steps: int = 184_375  # 100 epochs of COCO at batch 64
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (
        0.8888889,
        0.962963,
    )  # fractions of `steps`; the rate drops to a tenth at each
    warmup_steps: float = 250.0
    warmup_factor: float = 0.001  # of lr at step 0
    clip: float = 0.0  # largest gradient norm; 0: no clipping, as published
    ema: float = 0.0  # decay of the averaged weights that are evaluated and shipped; 0: none


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    init: str = "mae_vit_b"  # a name of the weights catalogue, a file of weights or a checkpoint; '': from scratch
    init_format: Literal[
        "vitdet",
        "detectron2",
        "mmdet",
        "mae",
        "vitae",
        "vitae_cls",
        "swin",
        "swin_cls",
        "swin_mmdet",
        "vitaev2",
        "vitaev2_cls",
    ] = "vitdet"  # of a file in `init`
    batch_size: int = 64  # images a step over all processes
    precision: Literal["fp32", "bf16", "auto"] = (
        "bf16"  # auto: bf16 where the processor multiplies it natively
    )
    seed: int = 0
    log_every: int = 20  # steps
    eval_every: int = 5000
    save_every: int = 1000
    keep: int = 2  # checkpoints


@dataclass(frozen=True)
class EvalConfig:
    """What counts as a detection."""

    score_threshold: float = 0.05
    nms_iou: float = 0.5
    max_detections: int = 100
    batch_size: int = 1


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow; the environment's MLFLOW_TRACKING_URI wins over `uri`."""

    uri: str = ""  # '': a sqlite file beside the output folder
    experiment: str = "vitdet"
    model_name: str = "vitdet"


@dataclass(frozen=True)
class Config:
    """The whole experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        rules.check(self)


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a recipe (by name) or YAML file, with overrides `section.key=value` applied in order.

    Raises ValueError for an unknown recipe, setting or choice (naming the nearest one) and for a value of the wrong
    type; FileNotFoundError for a missing file.
    """
    return overridden(Config, _read(name_or_path), overrides)


def override(
    config: Config,
    overrides: Sequence[str],
    other: Config | None = None,
    sections: Sequence[str] = (),
) -> Config:
    """The config with these sections of another one, if there is one, then with overrides as `load_config` takes them.

    Raises ValueError as there.
    """
    theirs = to_dict(other) if other else {}
    return overridden(
        Config, to_dict(config) | {name: theirs[name] for name in sections if theirs}, overrides
    )


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML: to a temporary file first, so a full disk leaves the old one whole."""
    with written(Path(path)) as temporary:
        temporary.write_text(dump_config(config))


def dump_config(config: Config) -> str:
    """The resolved config as YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def to_dict(config: Config) -> dict:
    """The config as plain dicts, lists, numbers and strings."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(tree: Mapping) -> Config:
    """The inverse of `to_dict`; absent settings take their defaults. Raises ValueError as `load_config` does."""
    return build(Config, dict(tree))


def flatten(config: Config) -> dict[str, bool | int | float | str]:
    """{'optim.lr': 0.0001, ...}: the keys that overrides use; lists as text."""
    values = {key: reduce(getattr, key.split("."), config) for key in settings(Config)}
    return {
        key: json.dumps(value) if isinstance(value, tuple) else value
        for key, value in values.items()
    }


def difference(ours: Config, theirs: Config) -> list[str]:
    """One text a setting that differs, as in `optim.lr: 0.0001, not 0.0002`."""
    left, right = flatten(ours), flatten(theirs)
    return [f"{key}: {left[key]}, not {right[key]}" for key in left if left[key] != right[key]]


def digest(config: Config) -> str:
    """12 hexadecimal digits that name this config."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]


LISTED = " (`vitdet config` lists all recipes)"


def recipes() -> list[str]:
    """The names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _read(name_or_path: str | Path) -> dict:
    text, path = str(name_or_path), Path(name_or_path)
    if not path.suffix and os.sep not in text:
        path = RECIPES / f"{text}.yaml"
        if not path.exists():
            raise ValueError(f"{text}: no such recipe; {nearest(text, recipes())}{LISTED}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such config file; give a file or a recipe's name{LISTED}"
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree if tree is not None else {}, dict):
        raise ValueError(
            f"{path}: expected sections ({', '.join(f.name for f in fields(Config))}), got {tree!r}"
        )
    return tree or {}
