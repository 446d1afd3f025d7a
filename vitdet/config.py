"""Every setting of an experiment: a tree of frozen dataclasses.

The defaults are Detectron2's ViTDet-B Mask R-CNN on COCO (mask_rcnn_vitdet_b_100ep); comments name
the source of other values. A recipe (a YAML file in `recipes/`) lists what differs from them, an
override `section.key=value` changes one more setting. Steps pass the resolved config on.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from vitdet.credentials import has_credentials
from vitdet.files import written
from vitdet.ranges import (
    Amount,
    Confidence,
    Count,
    Depth,
    ExperimentName,
    Fraction,
    Fractions,
    ModelName,
    NonNegative,
    Percent,
    Positive,
    Positives,
    Seed,
    Size,
    Workers,
    between,
    check,
    check_address,
)
from vitdet.sections import (
    Section,
    convert_section,
    list_settings,
    merge,
    operational,
    section_error,
)
from vitdet.suggestions import nearest
from vitdet.yaml_text import parse_yaml

RECIPES = Path(__file__).parent / "recipes"
SEE_RECIPES = " (`vitdet config` lists all recipes)"
# of one kind (box, mask), by data.dataset: the AP by which train.keep_best can choose
AP = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
AP_OF = {"coco": AP, "lvis": (*AP, "ap_rare", "ap_common", "ap_frequent")}
# with one of them, the evaluations of a training determine its result
SELECTING = ("train.keep_best", "train.patience")


@dataclass(frozen=True)
class BackboneConfig(Section, prefix="model.backbone."):
    """Backbone; `name` determines depth, width, heads and the blocks with global attention."""

    name: Literal[
        "vit_tiny", "vit_b", "vit_l", "vit_h", "vitae_b", "vitae_s", "swin_t", "vitaev2_s"
    ] = "vit_b"
    patch_size: Size = 16  # pixels; the stride of the feature map
    window_size: Annotated[int, between(0, 65_536)] = 14  # side of an attention window in tokens
    drop_path: Fraction = 0.1  # rate of the last block; increases linearly from 0
    pos_embed_grid: Size = 14  # side of the stored position embedding in tokens: 224 / 16 in MAE
    global_attention: bool = True  # in a few blocks; false: window attention in all blocks
    # blocks followed by residual convolutions (ViTDet paper)
    residual_blocks: tuple[Annotated[int, between(0, 1023)], ...] = ()
    rel_pos_size: Size = 1024  # image side in pixels for the global blocks' relative positions
    scaled_rel_pos: bool = False  # apply relative positions to the scaled query (ViTAE)
    final_norm: bool = False  # LayerNorm after the last block (ViTAE)


@dataclass(frozen=True)
class PyramidConfig(Section, prefix="model.pyramid."):
    """Simple feature pyramid on a plain backbone's map, or an FPN on a hierarchical backbone."""

    kind: Literal["simple", "fpn"] = "simple"
    channels: Size = 256
    halve_channels: bool = True  # in each deconvolution; ViTAE keeps the channels
    scales: tuple[Positive, Positive, Positive, Positive] = (4.0, 2.0, 1.0, 0.5)  # of p2..p5


@dataclass(frozen=True)
class RPNConfig(Section, prefix="model.rpn."):
    """Region proposal network."""

    anchor_scale: Positive = 8.0  # anchor side / stride of its level: 32..512 on strides 4..64
    aspect_ratios: Positives = (0.5, 1.0, 2.0)  # height / width
    num_convs: Depth = 2
    norm: bool = False  # LayerNorm after each convolution (ViTAE)
    divide_by_sampled: bool = False  # losses / sampled anchors (mmdet), not / (samples * images)
    samples: Amount = 256  # anchors per image in the loss
    positive_fraction: Fraction = 0.5
    iou_low: float = 0.3  # background below this IoU
    iou_high: float = 0.7  # foreground from this IoU
    pre_nms_train: Amount = 2000  # best anchors per level before NMS
    pre_nms_test: Amount = 1000
    post_nms_train: Amount = 1000  # proposals per image after NMS, over all levels
    post_nms_test: Amount = 1000
    nms_iou: Fraction = 0.7


@dataclass(frozen=True)
class RoIHeadsConfig(Section, prefix="model.roi_heads."):
    """Box stages: one for Mask R-CNN, three for Cascade Mask R-CNN."""

    num_classes: Amount = 80
    ious: Fractions = (0.5,)  # one per stage: a box is foreground from this IoU
    loss: Literal["softmax", "federated"] = "softmax"
    samples: Amount = 512  # boxes per image in the loss
    positive_fraction: Fraction = 0.25
    num_convs: Depth = 4
    num_fcs: Annotated[int, between(1, 1024)] = 1
    fc_dim: Size = 1024
    norm: bool = True  # LayerNorm after each convolution
    sampling_ratio: Annotated[int, between(0, 1024)] = 0  # per RoIAlign bin and axis; 0: adaptive
    federated_classes: Amount = 50  # classes per step in the federated loss


@dataclass(frozen=True)
class MaskConfig(Section, prefix="model.mask."):
    """Mask head."""

    enabled: bool = True  # false: a detector of boxes and classes, Faster or Cascade R-CNN
    num_convs: Depth = 4
    norm: bool = True  # LayerNorm after each convolution
    samples: Amount = 128  # most foreground boxes per image in the mask loss


@dataclass(frozen=True)
class ModelConfig(Section, prefix="model."):
    """The detector."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi_heads: RoIHeadsConfig = field(default_factory=RoIHeadsConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    norm_eps: Positive = 1e-6  # of the LayerNorms in pyramid and heads; 1e-5 in mmdet
    # GT of a low-quality match: the box's own best GT (Detectron2, RPN only), or the GT that the
    # box is best for, in RPN and RoI heads (mmdet)
    low_quality: Literal["own", "best"] = "own"
    clamp_shrinking: bool = False  # limit the shrinking of a box to 16 / 1000 too (mmdet)

    @property
    def architecture(self) -> str:
        """The name of the detector, e.g. Cascade Mask R-CNN."""
        cascade = "Cascade " if len(self.roi_heads.ious) > 1 else ""
        return f"{cascade}{'Mask' if self.mask.enabled else 'Faster'} R-CNN"


@dataclass(frozen=True)
class DataConfig(Section, prefix="data."):
    """A folder in COCO's layout, ROOT/SPLIT/*.jpg and ROOT/annotations/instances_SPLIT.json, or in
    LVIS's, ROOT/annotations/lvis_v1_SPLIT.json and the images where their coco_url says.
    """

    dataset: Literal["coco", "lvis"] = "coco"
    root: str = field(default="data/coco", metadata=operational("the data's identity is compared"))
    train_split: str = "train2017"
    val_split: str = "val2017"
    # per split, those of lowest id that hold an object; 0: all
    max_images: Annotated[int, between(0, 2**31 - 1)] = 0
    image_size: Size = 1024  # side of the square canvas in pixels
    scale_range: tuple[Positive, Positive] = (0.1, 2.0)  # jitter; (1, 1): longest side = canvas
    flip: Fraction = 0.5  # probability of a horizontal flip
    diagonal_crop: bool = True  # one random number for both crop offsets; two in mmdet
    transpose: Fraction = 0.0  # probability of exchanging the axes
    color_jitter: Fraction = 0.0  # largest relative change of brightness, contrast, saturation
    antialias: bool = True  # when downscaling, as PIL; mmdet uses OpenCV's plain bilinear filter
    keep_empty: bool = False  # train images without objects too, as background
    redraw_empty: bool = False  # replace a crop without objects by one of another image (mmdet)
    repeat_threshold: Fraction = 0.0  # repeat images with classes in a smaller share of the images
    # of an image file; one with more is refused before it is decoded (Pillow's own bound is the last)
    max_pixels: Annotated[int, between(1, 178_956_970)] = field(
        default=100_000_000, metadata=operational("an error instead of a larger image")
    )
    # of grey values in files of more than 8 bits, as cameras store 12 in 16; 0: what the file says
    bit_depth: Literal[0, 8, 10, 12, 14, 16] = 0
    # loader processes per rank; 0: load in the training process
    workers: Workers = field(default=4, metadata=operational("samples depend on seed and position"))


@dataclass(frozen=True)
class OptimConfig(Section, prefix="optim."):
    """AdamW with layer-wise learning-rate decay and linear warm-up."""

    lr: Positive = 1e-4
    scale_lr: bool = False  # lr * train.batch_size / lr_batch_size
    lr_batch_size: Amount = field(  # images per step that lr is meant for
        default=64, metadata=operational("a line of the log", "optim.scale_lr")
    )
    weight_decay: NonNegative = 0.1
    # Without weight decay: the blocks' LayerNorms and the position embedding (ViT-B, ViT-L); 1-D
    # parameters, relative positions and the position embedding (ViTAE); LayerNorms and position
    # tables, but no BatchNorm (mmdet's Swin); nothing (ViT-H)
    undecayed: Literal["norms", "vectors", "layer_norms", "nothing"] = "norms"
    layer_decay: Positive = 0.7
    steps: Count = 184_375  # 100 epochs of COCO with batch size 64
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = (0.8888889, 0.962963)  # of `steps`: drops to a tenth; []: none
    warmup_steps: NonNegative = 250.0
    warmup_factor: Fraction = 0.001  # of lr at step 0
    clip: NonNegative = 0.0  # largest gradient norm; 0: no clipping
    ema: Fraction = 0.0  # decay of the averaged weights that are evaluated and saved; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(low < high for low, high in pairwise((0.0, *self.milestones, 1.0)))
        what = "rise between 0 and 1 (fractions of the steps)"
        _rule(rising, f"optim.milestones must {what}, got {list(self.milestones)}")


@dataclass(frozen=True)
class TrainConfig(Section, prefix="train."):
    """The training loop."""

    init: str = "mae_vit_b"  # name in the weights catalogue, file or checkpoint; '': random weights
    init_format: Literal[
        "vitdet", "detectron2", "mmdet", "mae", "vitae", "vitae_cls", "swin", "swin_cls",
        "swin_mmdet", "vitaev2", "vitaev2_cls",
    ] = "vitdet"  # fmt: skip  # of the file `init`
    batch_size: Amount = 64  # images per step over all processes
    # micro-batches per step and process, one after the other; as that many more processes
    accumulate: Amount = field(default=1, metadata=operational("as the number of processes"))
    # blocks: the backbone's compute again in the backward pass; auto: where a GPU's memory needs it
    activation_checkpointing: Literal["none", "blocks", "auto"] = field(
        default="auto", metadata=operational("the same gradients")
    )
    # on a GPU: torch.compile and CUDA graphs; auto: compiles from 1000 steps on
    compile: Literal["auto", "never", "always"] = field(
        default="auto", metadata=operational("the same step up to rounding")
    )
    # auto: bf16 if native, else fp16 on a GPU and fp32 on a CPU
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "bf16"
    seed: Seed = 0
    log_every: Count = field(default=20, metadata=operational("logs"))  # steps
    eval_every: Count = field(  # steps
        default=5000, metadata=operational("evaluates only", *SELECTING)
    )
    save_every: Count = field(default=1000, metadata=operational("resuming is exact"))  # steps
    keep: Count = field(default=2, metadata=operational("disk space only"))  # training states
    # the metric, as box_ap, whose highest value determines the detector in best.pt; '': no best.pt
    keep_best: str = ""
    # evaluations without improvement of keep_best's metric (box_ap) that end the training; 0: never
    patience: Annotated[int, between(0, 1_000_000)] = 0


@dataclass(frozen=True)
class EvalConfig(Section, prefix="evaluate."):
    """Selection of the detections, and how they are computed."""

    score_threshold: Fraction = 0.05
    nms_iou: Fraction = 0.5
    max_detections: Amount = 100
    batch_size: Amount = 1
    # of the detector; auto: bf16 or fp16 where the processor has instructions for it
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    # on a GPU, with torch.compile: takes a minute, pays from some thousand images on
    compile: bool = False
    # of the validation split, those of lowest id that hold an object; 0: all
    max_images: Annotated[int, between(0, 2**31 - 1)] = 0


@dataclass(frozen=True)
class TrackingConfig(Section, prefix="tracking."):
    """MLflow; the environment variable MLFLOW_TRACKING_URI takes precedence over `uri`."""

    uri: str = ""  # '': an SQLite file beside the output folder
    experiment: str = "vitdet"
    model_name: str = "vitdet"


@dataclass(frozen=True)
class GateConfig(Section, prefix="gate."):
    """When a registered detector replaces the champion, in percentage points of AP on the same validation data."""

    metric: Literal["box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"] = (
        "box_ap"
    )
    min_gain: NonNegative = 0.0  # the metric must exceed the champion's by more than this
    min_class_ap: Percent = 0.0  # of each class, in the same metric; 0: any
    max_class_loss: Percent = 100.0  # of any class against the champion; 100: any
    # the paired bootstrap interval of the gain at this level must be above min_gain; 0: the gain is enough
    confidence: Confidence = 0.0


@dataclass(frozen=True)
class Config(Section):
    """The whole experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvalConfig = field(
        default_factory=EvalConfig, metadata=operational("evaluates only", *SELECTING)
    )
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=operational("logs"))
    gate: GateConfig = field(default_factory=GateConfig, metadata=operational("registers only"))

    def __post_init__(self) -> None:
        backbone, pyramid, data = self.model.backbone, self.model.pyramid, self.data
        stride = round(2 * backbone.patch_size / pyramid.scales[-1])  # of p6
        side, what = data.image_size, f"be a positive multiple of {stride} (the coarsest stride)"
        _rule(side % stride == 0, f"data.image_size must {what}, got {side}")
        size, patch = backbone.rel_pos_size, backbone.patch_size
        message = f"model.backbone.rel_pos_size must be at least patch_size ({patch}), got {size}"
        _rule(size >= patch, message)
        low, high = data.scale_range
        _rule(low <= high, f"data.scale_range must be low <= high, got {[low, high]}")
        hierarchical = backbone.name in ("swin_t", "vitaev2_s")
        kind, name, window = (
            "fpn" if hierarchical else "simple",
            backbone.name,
            backbone.window_size,
        )
        message = f"model.backbone.name={name} goes with model.pyramid.kind={kind}"
        _rule(pyramid.kind == kind, message)
        message = f"model.backbone.window_size must be 7 with {name}, got {window}"
        _rule(window == 7 or not hierarchical, message)
        kinds = ("box", "mask") if self.model.mask.enabled else ("box",)
        known = [f"{kind}_{name}" for kind in kinds for name in AP_OF[data.dataset]]
        message = (
            f"train.keep_best: {self.train.keep_best!r} is not an AP metric that is measured with data.dataset="
            f"{data.dataset} and model.mask.enabled={str(self.model.mask.enabled).lower()}; "
        )
        best = self.train.keep_best
        _rule(best in ("", *known), message + nearest(best, known))


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a recipe or YAML file, with overrides `section.key=value` in order.

    Raises ValueError for unknown recipes, settings and choices (suggesting the nearest one) and for
    values of the wrong type or out of range; FileNotFoundError for a missing file.
    """
    config = _overridden(_read(name_or_path), overrides)
    check_tracking(config.tracking)
    return config


def load_stored(path: str | Path) -> Config:
    """The config that a training or registration saved; earlier versions stored addresses and names
    that `load_config` refuses.
    """
    return from_dict(_read(path))


def check_tracking(tracking: TrackingConfig) -> None:
    """Raise ValueError as `check_names`, and for an address with a password, as configs are stored."""
    check_names(tracking)
    _rule(
        not has_credentials(tracking.uri),
        "tracking.uri must not contain a user or password, as it is stored in configs and checkpoints; "
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole address as MLFLOW_TRACKING_URI",
    )


def check_names(tracking: TrackingConfig) -> None:
    """Raise ValueError for an address or names that MLflow refuses; not part of the section, as old
    checkpoints may contain such.
    """
    check_address("tracking.uri", tracking.uri)
    check("tracking.experiment", ExperimentName, tracking.experiment)
    check("tracking.model_name", ModelName, tracking.model_name)


def override(
    config: Config, overrides: Sequence[str], other: Config | None = None, sections: Sequence = ()
) -> Config:
    """`config` with `sections` of `other`, then with overrides; raises as `load_config` does."""
    theirs = to_dict(other) if other else {}
    tree = to_dict(config) | {name: theirs[name] for name in sections if theirs}
    return _overridden(tree, overrides)


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML, all or nothing."""
    with written(Path(path)) as temporary:
        temporary.write_text(dump_config(config))


def dump_config(config: Config) -> str:
    """The resolved config as YAML text that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def to_dict(config: Config) -> dict:
    """The config as plain dicts, lists, numbers and strings."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(tree: Mapping) -> Config:
    """The inverse of `to_dict`; absent settings take their defaults. Raises as `load_config`."""
    if unknown := list(_unknown(Config, tree)):
        raise ValueError("; ".join(unknown))
    return convert_section(Config, tree)


def flatten(config: Config) -> dict[str, bool | int | float | str]:
    """{'optim.lr': 0.0001, ...}: the keys that overrides use; lists as JSON text."""
    values = {key: value for key, (value, _) in list_settings(config).items()}
    return {k: json.dumps(v) if isinstance(v, tuple) else v for k, v in values.items()}


def recipes() -> list[str]:
    """The names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _read(name_or_path: str | Path) -> dict:
    text, path = str(name_or_path), Path(name_or_path)
    if not path.suffix and os.sep not in text:
        path = RECIPES / f"{text}.yaml"
        if not path.exists():
            raise ValueError(f"{text}: no such recipe; {nearest(text, recipes())}{SEE_RECIPES}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such config file; give a file or a recipe's name{SEE_RECIPES}"
        )
    try:
        tree = parse_yaml(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections ({', '.join(Config.hints)}), got {tree!r}")
    return tree or {}


def _overridden(tree: dict, overrides: Sequence[str]) -> Config:
    settings = flatten(Config())
    for one in overrides:
        key, separator, text = map(str.strip, one.partition("="))
        if not separator or not key:
            raise ValueError(f"override {one!r}: expected section.key=value, as in optim.lr=2e-4")
        if outer := next((name for name in settings if key.startswith(f"{name}.")), None):
            raise ValueError(f"{key}: {outer} is a setting, not a section")
        changes: Any = _parse(key, text)
        for name in reversed(key.split(".")):
            changes = {name: changes}
        merge(tree, Config, changes)
    return from_dict(tree)


def _parse(key: str, text: str) -> object:
    """The value of an override: YAML, but text is taken literally, as 2017 or `a #1`."""
    default, _ = list_settings(Config()).get(key, (None, False))
    if isinstance(default, str) and text[:1] not in ("'", '"'):
        return text
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{key}: {text!r} is not readable as a value") from error


def _unknown(kind: Any, tree: object) -> Iterator[str]:
    """A text for each unknown name. Raises ValueError for a section that is no mapping."""
    if not isinstance(tree, Mapping | None):
        raise section_error(kind, tree)
    for name, value in (tree or {}).items():
        if name not in kind.hints:
            elsewhere = [key for key in flatten(Config()) if key.endswith(f".{name}")]
            close = f"did you mean '{elsewhere[0]}'?" if elsewhere else ""
            near = close or nearest(str(name), list(kind.hints))
            yield f"{kind.prefix}{name}: no such setting; {near}"
        elif is_dataclass(kind.hints[name]):
            yield from _unknown(kind.hints[name], value)


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
