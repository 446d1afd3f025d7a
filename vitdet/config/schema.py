"""All settings of an experiment: a tree of frozen dataclasses.

The defaults follow Detectron2's ViTDet-B Mask R-CNN on COCO (mask_rcnn_vitdet_b_100ep). A recipe (a
YAML file in `recipes/`) lists the settings that differ from the defaults; an override
`section.key=value` changes a single setting.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

from vitdet.config.ranges import (
    Amount,
    Confidence,
    Count,
    Depth,
    Fraction,
    Fractions,
    NonNegative,
    Percent,
    Positive,
    Positives,
    Seed,
    Size,
    Workers,
    between,
)
from vitdet.config.sections import Section, operational
from vitdet.config.suggestions import nearest

# AP metrics by data.dataset; train.keep_best accepts their names with the prefix box_ or mask_
AP = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
AP_OF = {"coco": AP, "lvis": (*AP, "ap_rare", "ap_common", "ap_frequent")}
# if train.keep_best or train.patience is set, evaluations affect the trained detector
SELECTING = ("train.keep_best", "train.patience")


@dataclass(frozen=True)
class BackboneConfig(Section, prefix="model.backbone."):
    """Backbone. `name` determines the depth, width, number of heads and global-attention blocks."""

    name: Literal[
        "vit_tiny", "vit_b", "vit_l", "vit_h", "vitae_b", "vitae_s", "swin_t", "vitaev2_s"
    ] = "vit_b"
    patch_size: Size = 16  # in pixels; also the stride of the feature map
    window_size: Annotated[int, between(0, 65_536)] = 14  # side in tokens; 0: global attention
    drop_path: Fraction = 0.1  # stochastic depth rate of the last block; increases linearly from 0
    pos_embed_grid: Size = 14  # side of the position embedding in tokens: 224 / 16 in MAE
    global_attention: bool = True  # false: window attention in all blocks
    # indices of the blocks that are followed by residual convolutions (ViTDet paper)
    residual_blocks: tuple[Annotated[int, between(0, 1023)], ...] = ()
    rel_pos_size: Size = 1024  # image side (pixels) of the global blocks' relative-position tables
    scaled_rel_pos: bool = False  # apply relative positions to the scaled query (ViTAE)
    final_norm: bool = False  # LayerNorm after the last block (ViTAE)


@dataclass(frozen=True)
class PyramidConfig(Section, prefix="model.pyramid."):
    """Simple feature pyramid (plain backbones) or FPN (hierarchical backbones)."""

    kind: Literal["simple", "fpn"] = "simple"
    channels: Size = 256
    halve_channels: bool = True  # each deconvolution halves the channels
    scales: tuple[Positive, Positive, Positive, Positive] = (4.0, 2.0, 1.0, 0.5)  # levels p2 to p5


@dataclass(frozen=True)
class RPNConfig(Section, prefix="model.rpn."):
    """Region proposal network."""

    anchor_scale: Positive = 8.0  # anchor side / stride: 32 to 512 pixels at strides 4 to 64
    aspect_ratios: Positives = (0.5, 1.0, 2.0)  # height / width
    num_convs: Depth = 2
    norm: bool = False  # LayerNorm after each convolution (ViTAE)
    divide_by_sampled: bool = False  # divide losses by the number of sampled anchors (mmdet)
    samples: Amount = 256  # maximum number of anchors per image in the loss
    positive_fraction: Fraction = 0.5
    iou_low: float = 0.3  # anchors with a lower IoU are background
    iou_high: float = 0.7  # anchors with at least this IoU are foreground
    pre_nms_train: Amount = 2000  # highest-scoring anchors per level before NMS
    pre_nms_test: Amount = 1000
    post_nms_train: Amount = 1000  # proposals per image after NMS, all levels together
    post_nms_test: Amount = 1000
    nms_iou: Fraction = 0.7


@dataclass(frozen=True)
class RoIHeadsConfig(Section, prefix="model.roi_heads."):
    """Box heads: one stage in Mask R-CNN, three stages in Cascade Mask R-CNN."""

    num_classes: Amount = 80
    ious: Fractions = (0.5,)  # minimum IoU of foreground boxes in each stage
    loss: Literal["softmax", "federated"] = "softmax"
    samples: Amount = 512  # maximum number of boxes per image in the loss
    positive_fraction: Fraction = 0.25
    num_convs: Depth = 4
    num_fcs: Annotated[int, between(1, 1024)] = 1
    fc_dim: Size = 1024
    norm: bool = True  # LayerNorm after each convolution
    sampling_ratio: Annotated[int, between(0, 1024)] = 0  # RoIAlign's sampling_ratio; 0: adaptive
    federated_classes: Amount = 50  # number of classes per batch in the federated loss


@dataclass(frozen=True)
class MaskConfig(Section, prefix="model.mask."):
    """Mask head."""

    enabled: bool = True  # false: boxes and classes only (Faster or Cascade R-CNN)
    num_convs: Depth = 4
    norm: bool = True  # LayerNorm after each convolution
    samples: Amount = 128  # maximum number of foreground boxes per image in the loss


@dataclass(frozen=True)
class ModelConfig(Section, prefix="model."):
    """Detector."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pyramid: PyramidConfig = field(default_factory=PyramidConfig)
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi_heads: RoIHeadsConfig = field(default_factory=RoIHeadsConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    norm_eps: Positive = 1e-6  # epsilon of the LayerNorms in pyramid and heads; 1e-5 in mmdet
    # rule for the box that has the highest IoU with an object. own: foreground in the RPN, even if
    # the IoU is low (Detectron2); best: matched to this object in RPN and box heads (mmdet)
    low_quality: Literal["own", "best"] = "own"
    clamp_shrinking: bool = False  # clamp dw and dh from below at log(16 / 1000) (mmdet)

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as Cascade Mask R-CNN."""
        cascade = "Cascade " if len(self.roi_heads.ious) > 1 else ""
        return f"{cascade}{'Mask' if self.mask.enabled else 'Faster'} R-CNN"


@dataclass(frozen=True)
class DataConfig(Section, prefix="data."):
    """Data set and augmentation.

    COCO's layout is ROOT/SPLIT/*.jpg and ROOT/annotations/instances_SPLIT.json. LVIS's layout is
    ROOT/annotations/lvis_v1_SPLIT.json; coco_url contains the path of an image in ROOT."""

    dataset: Literal["coco", "lvis"] = "coco"
    root: str = field(default="data/coco", metadata=operational("fingerprints identify the data"))
    train_split: str = "train2017"
    val_split: str = "val2017"
    # maximum number of images per split, with objects unless keep_empty, lowest ids first; 0: all
    max_images: Annotated[int, between(0, 2**31 - 1)] = 0
    image_size: Size = 1024  # side of the square canvas in pixels
    scale_range: tuple[Positive, Positive] = (0.1, 2.0)  # random scale; 1: longer side = image_size
    flip: Fraction = 0.5  # probability of a horizontal flip
    diagonal_crop: bool = True  # draw one number for both crop offsets; mmdet draws two
    transpose: Fraction = 0.0  # probability of transposing the image
    color_jitter: Fraction = 0.0  # maximum relative change of brightness, contrast, saturation
    antialias: bool = True  # downscale images with antialiasing, unlike mmdet
    keep_empty: bool = False  # use training images without objects as background
    redraw_empty: bool = False  # if a crop contains no objects, crop another image (mmdet)
    repeat_threshold: Fraction = 0.0  # oversample classes in less than this fraction of images
    # images with more pixels are rejected before decoding; Pillow rejects more than 178,956,970
    max_pixels: Annotated[int, between(1, 178_956_970)] = field(
        default=100_000_000, metadata=operational("larger images raise an error")
    )
    # bit depth of gray images with more than 8 bits, e.g. 12 in 16-bit files; 0: from the file
    bit_depth: Literal[0, 8, 10, 12, 14, 16] = 0
    # loader processes per rank; 0: load in the training process
    workers: Workers = field(default=4, metadata=operational("the samples are the same"))


@dataclass(frozen=True)
class OptimConfig(Section, prefix="optim."):
    """AdamW with layer-wise learning-rate decay and linear warm-up."""

    lr: Positive = 1e-4
    scale_lr: bool = False  # multiply lr by train.batch_size / lr_batch_size
    lr_batch_size: Amount = field(  # images per step for which lr was chosen
        default=64, metadata=operational("logs", "optim.scale_lr")
    )
    weight_decay: NonNegative = 0.1
    # parameters without weight decay. layer_norms: LayerNorms of the backbone, position embedding,
    # bias tables (Swin); norms: the same and BatchNorms (ViT-B, ViT-L); vectors: 1-D parameters,
    # position embedding, relative positions (ViTAE); nothing: no parameters (ViT-H)
    undecayed: Literal["norms", "vectors", "layer_norms", "nothing"] = "norms"
    layer_decay: Positive = 0.7
    steps: Count = 184_375  # 100 epochs of COCO with batch size 64
    schedule: Literal["step", "cosine"] = "step"
    # schedule=step: fractions of `steps` after which the rate is divided by 10; []: none
    milestones: tuple[float, ...] = (0.8888889, 0.962963)
    warmup_steps: NonNegative = 250.0
    warmup_factor: Fraction = 0.001  # learning rate at step 0, as a fraction of lr
    clip: NonNegative = 0.0  # maximum gradient norm; 0: no clipping
    ema: Fraction = 0.0  # decay of averaged weights, which are evaluated and saved; 0: no average

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            all(low < high for low, high in pairwise((0.0, *self.milestones, 1.0))),
            "optim.milestones must increase between 0 and 1 (fractions of optim.steps), "
            f"got {list(self.milestones)}",
        )


@dataclass(frozen=True)
class TrainConfig(Section, prefix="train."):
    """Training loop."""

    init: str = "mae_vit_b"  # initial weights: catalog name, weights file or checkpoint; '': random
    init_format: Literal[
        "vitdet", "detectron2", "mmdet", "mae", "vitae", "vitae_cls", "swin", "swin_cls",
        "swin_mmdet", "vitaev2", "vitaev2_cls",
    ] = "vitdet"  # fmt: skip  # format of the file train.init
    batch_size: Amount = 64  # total number of images per step, over all processes
    # micro-batches per step and process (gradient accumulation)
    accumulate: Amount = field(default=1, metadata=operational("equivalent to more processes"))
    # blocks: recompute the backbone's blocks in the backward pass; auto: only if memory is short
    activation_checkpointing: Literal["none", "blocks", "auto"] = field(
        default="auto", metadata=operational("the gradients are the same")
    )
    # use CUDA graphs and torch.compile on a GPU (auto: torch.compile only if optim.steps >= 1000)
    compile: Literal["auto", "never", "always"] = field(
        default="auto", metadata=operational("the step is the same up to rounding")
    )
    # auto: bf16 if the device supports it natively; otherwise fp16 on a GPU, fp32 on a CPU
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "bf16"
    seed: Seed = 0
    log_every: Count = field(default=20, metadata=operational("logs"))  # steps
    eval_every: Count = field(  # steps
        default=5000, metadata=operational("evaluates only", *SELECTING)
    )
    save_every: Count = field(default=1000, metadata=operational("resuming is exact"))  # steps
    keep: Count = field(default=2, metadata=operational("disk space only"))  # training states
    # save the detector with the highest value of this metric, e.g. box_ap, as best.pt; '': no file
    keep_best: str = ""
    # stop after this many evaluations without a new best value of keep_best, or of box_ap if
    # keep_best is ''; 0: never stop
    patience: Annotated[int, between(0, 1_000_000)] = 0


@dataclass(frozen=True)
class EvalConfig(Section, prefix="evaluate."):
    """Evaluation: selection of detections, batch size and precision."""

    score_threshold: Fraction = 0.05
    nms_iou: Fraction = 0.5
    max_detections: Amount = 100
    batch_size: Amount = 1
    # auto: bf16 if the device supports it natively, otherwise fp16 on a GPU and fp32 on a CPU
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    # torch.compile on a GPU: takes about a minute and pays off after a few thousand images
    compile: bool = False
    # validate on at most this many images, only those with objects, lowest ids first; 0: all images
    max_images: Annotated[int, between(0, 2**31 - 1)] = 0


@dataclass(frozen=True)
class TrackingConfig(Section, prefix="tracking."):
    """MLflow settings. The environment variable MLFLOW_TRACKING_URI takes precedence over `uri`."""

    uri: str = ""  # MLflow tracking URI; '': mlflow.db next to the output folder
    experiment: str = "vitdet"
    model_name: str = "vitdet"


@dataclass(frozen=True)
class GateConfig(Section, prefix="gate."):
    """Conditions under which a registered detector replaces the champion; AP is in percent."""

    metric: Literal["box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"] = (
        "box_ap"
    )
    min_gain: NonNegative = 0.0  # minimum gain over the champion (exclusive)
    min_class_ap: Percent = 0.0  # minimum value of the metric for each class; 0: no limit
    max_class_loss: Percent = 100.0  # maximum drop of the metric in a class; 100: no limit
    # confidence level of the gain's bootstrap interval, which must be above min_gain; 0: no check
    confidence: Confidence = 0.0


@dataclass(frozen=True)
class Config(Section):
    """All settings of an experiment."""

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
        _require(
            data.image_size % stride == 0,
            f"data.image_size must be a positive multiple of {stride} (the coarsest stride), "
            f"got {data.image_size}",
        )
        _require(
            backbone.rel_pos_size >= backbone.patch_size,
            f"model.backbone.rel_pos_size must be at least patch_size ({backbone.patch_size}), "
            f"got {backbone.rel_pos_size}",
        )
        low, high = data.scale_range
        _require(low <= high, f"data.scale_range must have low <= high, got {[low, high]}")
        hierarchical = backbone.name in ("swin_t", "vitaev2_s")
        kind = "fpn" if hierarchical else "simple"
        _require(
            pyramid.kind == kind,
            f"model.backbone.name={backbone.name} requires model.pyramid.kind={kind}, "
            f"got {pyramid.kind}",
        )
        _require(
            backbone.window_size == 7 or not hierarchical,
            f"model.backbone.window_size must be 7 with {backbone.name}, "
            f"got {backbone.window_size}",
        )
        kinds = ("box", "mask") if self.model.mask.enabled else ("box",)
        known = [f"{kind}_{name}" for kind in kinds for name in AP_OF[data.dataset]]
        best = self.train.keep_best
        _require(
            best in ("", *known),
            f"train.keep_best: {best!r} is not an AP metric that is measured with data.dataset="
            f"{data.dataset} and model.mask.enabled={str(self.model.mask.enabled).lower()}; "
            f"{nearest(best, known)}",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
