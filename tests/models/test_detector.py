"""The detector: decreasing losses, independence of the images of a batch, and flips."""

import copy

import pytest
import torch

from tests.helpers.small import CLASSES, SIDE, images, small_config, small_detector, target
from vitdet.models import build_detector
from vitdet.models.attention import Attention

KINDS = {
    "plain": {},
    "cascade": {"ious": (0.5, 0.6, 0.7)},
    "federated": {"loss": "federated"},
    "adaptive points": {"sampling_ratio": 0},
    "ViTAE-Transformer/ViTDet": {"fork": True},
}
OBJECTS = [target([[10, 10, 60, 70], [40, 50, 120, 120]], [0, 3]), target([[64, 8, 100, 40]], [2])]


@pytest.fixture(params=KINDS, ids=str)
def detector(request):
    return small_detector(**KINDS[request.param])


def names(detector):
    stages = len(detector.roi_heads.stages)
    suffixes = [""] if stages == 1 else [f"_stage{i}" for i in range(stages)]
    parts = {f"{name}{suffix}" for name in ("loss_cls", "loss_box_reg") for suffix in suffixes}
    return parts | {"loss_mask", "loss_rpn_cls", "loss_rpn_loc"}


@pytest.mark.parametrize("targets", [OBJECTS, [OBJECTS[0], target([], [])], OBJECTS[1:]])
def test_losses_are_finite_and_reach_every_parameter(detector, targets):
    losses = detector(images(len(targets)), targets)
    assert losses.keys() == names(detector)
    assert all(loss.isfinite() and loss.dim() == 0 and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_losses_without_objects_reach_every_parameter(detector):
    losses = detector(images(2), [target([], []), target([], [])])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == 0 and losses["loss_rpn_loc"] == 0
    assert losses["loss_rpn_cls"] > 0
    sum(losses.values()).backward()
    assert [name for name, p in detector.named_parameters() if p.grad is None] == []


def test_a_training_step_lowers_the_loss():
    detector = small_detector()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    totals = []
    for _ in range(6):
        torch.manual_seed(0)  # sample the same anchors and boxes
        total = sum(detector(images(2), OBJECTS).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.98 * totals[0]


def same(found, wanted):
    assert len(found) == len(wanted) > 0
    assert torch.equal(found.labels, wanted.labels)
    assert torch.allclose(found.boxes, wanted.boxes, atol=1e-3)
    assert torch.allclose(found.scores, wanted.scores, atol=1e-5)
    assert torch.allclose(found.masks, wanted.masks, atol=1e-4)


@torch.no_grad()
def test_detections_do_not_depend_on_other_images(detector):
    detector.eval()
    batch = images(3)
    together = detector(batch)
    for i in range(3):
        (alone,) = detector(batch[i : i + 1])
        same(together[i], alone)
    whole = torch.tensor([[SIDE, SIDE]] * 3)  # the default sizes
    for found, wanted in zip(detector(batch.flip(0), None, whole), together[::-1], strict=True):
        same(found, wanted)


@torch.no_grad()
def test_detections_have_valid_boxes_scores_and_order(detector):
    detector.eval()
    sizes = torch.tensor([[128, 128], [100, 61]])
    results = detector(images(2), None, sizes)
    for found, (height, width) in zip(results, sizes.tolist(), strict=True):
        assert 0 < len(found) <= 20
        assert found.masks.shape == (len(found), 28, 28)
        assert ((found.masks >= 0) & (found.masks <= 1)).all()
        assert (found.scores.diff() <= 0).all()
        assert ((found.scores > 0.05) & (found.scores <= 1)).all()
        assert (found.labels >= 0).all() and (found.labels < CLASSES).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2] <= width).all() and (found.boxes[:, 3] <= height).all()


@torch.no_grad()
def test_padding_does_not_affect_detections(detector):
    detector.eval()
    sizes = torch.tensor([[100, 60], [128, 97]])
    clean, dirty = images(2), images(2)
    for image, (height, width) in zip(dirty, sizes.tolist(), strict=True):
        image[:, height:] = 255
        image[:, :, width:] = 7
    results = (detector(batch, None, sizes) for batch in (dirty, clean))
    for found, wanted in zip(*results, strict=True):
        same(found, wanted)


@torch.no_grad()
def test_padding_is_exactly_the_mean_color():
    canvas = small_detector().normalize(images(2), torch.tensor([[100, 60], [128, 128]]))
    assert (canvas[0, :, 100:] == 0).all() and (canvas[0, :, :, 60:] == 0).all()
    pixel = images(2)[1, :, 5, 9].float()
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])
    wanted = (pixel - mean) / std
    assert torch.allclose(canvas[1, :, 5, 9], wanted)


def mirrored(detector):
    """Return a copy with backbone and pyramid weights flipped along the width."""
    turned = copy.deepcopy(detector)
    turned.backbone.pos_embed.data = detector.backbone.pos_embed.flip(2)
    for module in (*turned.backbone.modules(), *turned.pyramid.modules()):
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.weight.data = module.weight.flip(3)
        if isinstance(module, Attention):
            module.rel_pos_w.data = module.rel_pos_w.flip(0)
    return turned


@torch.no_grad()
def test_mirrored_weights_map_a_mirrored_image_to_mirrored_features():
    detector = small_detector().eval()
    side = 96  # 6 x 6 tokens: whole windows, so that padding is not on one side
    canvas = images(2)[..., :side, :side].float()
    maps = detector.pyramid(detector.backbone(canvas / 64))
    found = mirrored(detector).pyramid(mirrored(detector).backbone(canvas.flip(3) / 64))
    for ours, wanted in zip(found[:4], maps[:4], strict=True):
        assert torch.allclose(ours.flip(3), wanted, atol=1e-3)
    plain = detector.pyramid(detector.backbone(canvas.flip(3) / 64))
    # without mirrored weights, the maps differ
    assert not torch.allclose(plain[0].flip(3), maps[0], atol=1e-1)


def test_class_weights_of_the_federated_loss_are_uniform_by_default_and_stored():
    heads = small_detector(loss="federated").roi_heads
    assert heads.classification.class_weights.tolist() == [1.0] * CLASSES
    odds = torch.tensor([3.0, 0.0, 1.0, 2.0])
    named = build_detector(small_config(loss="federated"), class_weights=odds)
    assert torch.equal(named.state_dict()["roi_heads.classification.class_weights"], odds)
