"""A detector's golden case: weights in, every intermediate result compared.

`Case` reads only config, weights, inputs and ground truth; `run` computes with them; only then `check` opens the stored
results. The published samplers draw at random; the cases replace that by `evenly` (their README says so).
Letters: B images, s stages, K classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor, nn

from tests.parity.report import Report
from vitdet.data.masks import edges
from vitdet.evaluation import detections_to_results
from vitdet.models.box_head import BoxHead
from vitdet.models.detector import Detector
from vitdet.models.losses import FederatedClassification, SoftmaxClassification, federated_classes
from vitdet.models.mask_head import MaskHead, mask_targets
from vitdet.models.pyramid import SimpleFeaturePyramid
from vitdet.models.roi_heads import RoIHeads
from vitdet.models.rpn import RPN
from vitdet.models.vit import ViT, resize_positions
from vitdet.predictor import to_image
from vitdet.types import Bitmaps, Detections, Polygons, Target
from vitdet.weights.convert import DETECTRON2, rename, to_ours

FEATURES, BOXES, SCORES, LOSSES, GRADIENTS = 1e-4, 1e-3, 1e-5, 1e-5, 1e-3


def evenly(candidates: Tensor, num: int) -> Tensor:
    """`num` candidates at the positions floor(i M / num): the cases' stand-in for a random draw."""
    return candidates[torch.arange(num) * len(candidates) // max(num, 1)]


def build(config: dict, image_counts: list[float] | None) -> Detector:
    """The detector that a case's config.json describes."""
    stages = 3 if config["cascade"] else 1
    classes, channels, depth = config["num_classes"], config["out_channels"], config["depth"]
    backbone = ViT(
        dim=config["embed_dim"], depth=depth, heads=config["num_heads"], patch_size=config["patch_size"],
        global_blocks=[i for i in range(depth) if i not in config["window_block_indexes"]],
        window_size=config["window_size"], pos_embed_grid=config["pretrain_img_size"] // config["patch_size"],
        rel_pos_size=config["img_size"], residual_blocks=config["residual_block_indexes"],
    )
    pyramid = SimpleFeaturePyramid(backbone.out_channels, channels, backbone.stride)
    if config["lvis"]:
        odds = torch.tensor(image_counts, dtype=torch.float32) ** 0.5
        classification: nn.Module = FederatedClassification(odds, config["fed_loss_num_classes"], draw=False)
    else:
        classification = SoftmaxClassification(classes)
    scale = config["anchor_sizes"][0][0] / pyramid.strides[0]
    heads = [
        BoxHead(channels=channels, num_convs=4, fc_dim=config["fc_dim"], num_classes=classes, class_agnostic=stages > 1)
        for _ in range(stages)
    ]
    return Detector(
        backbone=backbone,
        pyramid=pyramid,
        rpn=RPN(
            channels=channels, strides=pyramid.strides, anchor_scale=scale, samples=config["rpn_batch"],
            pre_nms_train=config["pre_nms_topk"][0], pre_nms_test=config["pre_nms_topk"][1],
            post_nms_train=config["post_nms_topk"][0], post_nms_test=config["post_nms_topk"][1], choose=evenly,
        ),
        roi_heads=RoIHeads(
            stages=heads, mask=MaskHead(channels=channels, num_convs=4, num_classes=classes),
            classification=classification, strides=pyramid.strides[:4], ious=(0.5, 0.6, 0.7)[:stages],
            samples=config["roi_batch"], score_threshold=config["score_thresh"], max_detections=config["test_topk"],
            choose=evenly,
        ),
    )


@dataclass
class Case:
    """What a case puts in: the detector with its weights, images, and ground truth as bitmaps and as polygons."""

    config: dict
    detector: Detector
    images: Tensor
    sizes: Tensor
    bitmaps: list[Target]
    polygons: list[Target]
    truth: list[dict]
    inputs: dict[str, np.ndarray]

    @staticmethod
    def read(folder: Path) -> Case:
        """Reads config.json, state_dict.npz, inputs.npz and ground_truth.json, and nothing else."""
        config = json.loads((folder / "config.json").read_text())
        truth = json.loads((folder / "ground_truth.json").read_text())
        inputs, weights = load(folder / "inputs.npz"), load(folder / "state_dict.npz")
        detector = build(config, config.get("image_counts"))
        detector.load_state_dict(to_ours({k: torch.from_numpy(v) for k, v in weights.items()}, DETECTRON2))
        side, count = config["square_pad"], len(truth)
        images, sizes = torch.zeros(count, 3, side, side, dtype=torch.uint8), []
        bitmaps, polygons = [], []
        for i in range(count):
            pixels = torch.from_numpy(inputs[f"image{i}"]).permute(2, 0, 1)
            height, width = pixels.shape[1:]
            images[i, :, :height, :width] = pixels
            sizes.append((height, width))
            boxes, labels = torch.from_numpy(inputs[f"gt_boxes{i}"]), torch.from_numpy(inputs[f"gt_classes{i}"])
            bitmaps.append(Target(boxes, labels, Bitmaps(torch.from_numpy(inputs[f"gt_masks{i}"]))))
            outlines = edges(truth[i]["polygons"], height, width)
            polygons.append(Target(boxes, labels, Polygons(outlines)))
        return Case(config, detector, images, torch.tensor(sizes), bitmaps, polygons, truth, inputs)


def load(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@torch.no_grad()
def run_backbone(case: Case) -> dict[str, Tensor]:
    """Everything up to the pyramid, by the names of backbone.npz (whole maps; `check` cuts them)."""
    vit = case.detector.backbone
    tokens = vit.patch_embed(case.detector.normalize(case.images, case.sizes))
    found = {"patch_embed": tokens, "pos_embed_resized": resize_positions(vit.pos_embed, tuple(tokens.shape[1:3]))}
    x = tokens + found["pos_embed_resized"]
    for i, block in enumerate(vit.blocks):
        x = block(x)
        found[f"block{i}"] = x
    found["last_feat"] = x.permute(0, 3, 1, 2)
    for i, level in enumerate(case.detector.pyramid(found["last_feat"])):
        found[f"p{i + 2}"] = level
    return found


def check(folder: Path, report: Report) -> None:
    """Runs a case, then compares every stored quantity."""
    case = Case.read(folder)
    detector = case.detector.eval()
    maps = run_backbone(case)
    features = [maps[f"p{level}"] for level in range(2, 7)]
    with torch.no_grad():
        heads = [detector.rpn.head(feature) for feature in features]
        found = detector.rpn(features)
        proposals = {
            "eval": detector.rpn.propose(found, case.sizes, detector.rpn.top_test),
            "train": detector.rpn.propose(found, case.sizes, detector.rpn.top_train),
        }
        detections = detector(case.images, None, case.sizes)
        stages = run_stages(detector, features, [p.boxes for p in proposals["eval"]], case.sizes)
    training = run_training(case, found.anchors, [p.boxes for p in proposals["train"]], features)
    losses, gradients = run_losses(case)

    floors = json.loads((folder / "noise_floor.json").read_text())
    report.skip("noise_floor.json", "the reference's own rounding: it sets the tolerances")
    check_inputs(case, report)
    check_backbone(load(folder / "backbone.npz"), maps, floors, report)
    check_rpn(load(folder / "rpn.npz"), heads, proposals, report)
    check_detections(load(folder / "detections.npz"), detections, stages, case, floors, report)
    check_results(json.loads((folder / "results.json").read_text()), detections, case, floors, report)
    check_training(load(folder / "train.npz"), training, case.config["num_classes"], report)
    check_losses(json.loads((folder / "losses.json").read_text()), losses, gradients, floors, report)


def run_stages(detector: Detector, features: list[Tensor], boxes: list[Tensor], sizes: Tensor) -> list:
    """Logits and deltas of every stage on the test-mode proposals of all images."""
    from vitdet.models.boxes import clip, decode

    found = []
    for stage in range(len(detector.roi_heads.stages)):
        logits, deltas = detector.roi_heads.run_stage(stage, features, boxes)
        found.append((logits, deltas.flatten(1)))
        decoded = decode(torch.cat(boxes), deltas[:, 0], detector.roi_heads.weights[stage])
        boxes = [clip(b, size) for b, size in zip(decoded.split([len(b) for b in boxes]), sizes, strict=True)]
    return found


def run_training(case: Case, anchors: list[Tensor], proposals: list[Tensor], features: list[Tensor]) -> dict:
    """Which anchors and boxes are sampled, what each learns, by the names of train.npz."""
    from vitdet.models.boxes import decode

    detector, heads, found = case.detector, case.detector.roi_heads, {}
    assigned = []
    for i, target in enumerate(case.bitmaps):
        _, positive, negative = detector.rpn.sample(torch.cat(anchors), target)
        found[f"rpn_pos_idx{i}"], found[f"rpn_neg_idx{i}"] = positive, negative
        sampled = heads.sample(proposals[i], target)
        pool = torch.cat([proposals[i], target.boxes])
        index = torch.stack([(pool == box).all(dim=1).nonzero()[0, 0] for box in sampled.boxes])
        foreground = sampled.matched >= 0
        found[f"roi_pos_idx{i}"], found[f"roi_neg_idx{i}"] = index[foreground], index[~foreground]
        assigned.append(sampled)
        boxes, matched = sampled.boxes[foreground], sampled.matched[foreground]
        found[f"mask_targets_bitmask{i}"] = mask_targets(target.masks[matched], boxes)
        found[f"mask_targets_polygon{i}"] = mask_targets(case.polygons[i].masks[matched], boxes)
    for stage in range(len(heads.stages)):
        name = "roi" if stage == 0 else f"stage{stage}"
        labels = [heads.labels(a, target) for a, target in zip(assigned, case.bitmaps, strict=True)]
        for i, (one, target) in enumerate(zip(assigned, case.bitmaps, strict=True)):
            found[f"{name}_boxes{i}"], found[f"{name}_gt_classes{i}"] = one.boxes, labels[i]
            found[f"{name}_gt_boxes{i}"] = torch.cat([target.boxes, target.boxes.new_zeros(1, 4)])[one.matched]
        if isinstance(heads.classification, FederatedClassification):
            found[f"fed_classes_call{stage}"] = federated_classes(
                torch.cat(labels), heads.classification.class_weights, heads.classification.num, draw=False
            )
        if stage + 1 < len(heads.stages):
            with torch.no_grad():
                _, deltas = heads.run_stage(stage, features, [a.boxes for a in assigned])
            refined = decode(torch.cat([a.boxes for a in assigned]), deltas[:, 0], heads.weights[stage])
            refined = refined.split([len(a.boxes) for a in assigned])
            assigned = heads.reassign(stage + 1, refined, case.bitmaps, case.sizes)
    return found


def run_losses(case: Case) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """The losses of the three kinds that a case stores, and the gradients (under their names) of the first."""
    empty = case.bitmaps[1][:0]
    kinds = {
        "losses_polygon": case.polygons, "losses_image1_without_gt": [case.bitmaps[0], empty, *case.bitmaps[2:]],
        "losses_bitmask": case.bitmaps,
    }
    detector = case.detector.train()
    losses = {}
    for name, targets in kinds.items():
        detector.zero_grad(set_to_none=True)
        found = detector(case.images, targets, case.sizes)
        losses[name] = {key: float(value) for key, value in found.items()}
    sum(found.values()).backward()
    return losses, {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


def check_inputs(case: Case, report: Report) -> None:
    """The two descriptions of the ground truth that a case holds say the same."""
    for i, truth in enumerate(case.truth):
        height, width = case.sizes[i].tolist()
        report.equal(f"ground_truth.{i}.classes", case.inputs[f"gt_classes{i}"], np.asarray(truth["classes"]))
        report.close(f"ground_truth.{i}.boxes", case.inputs[f"gt_boxes{i}"], np.asarray(truth["boxes"]), BOXES)
        drawn = [rle.decode(rle.merge(rle.frPyObjects(p, height, width))) for p in truth["polygons"]]
        report.equal(f"ground_truth.{i}.polygons", case.inputs[f"gt_masks{i}"], np.stack(drawn))
        report.equal(f"ground_truth.{i}.size", case.sizes[i], np.array([truth["height"], truth["width"]]))
        shape = np.array(case.config["images"][i])
        report.equal(f"config.images.{i}", case.sizes[i], shape)
    count = sum(p.numel() for p in case.detector.parameters())
    token = case.config["embed_dim"]  # the class token's row of the position embedding, which we do not keep
    report.equal("config.n_params", np.array(count + token), np.array(case.config["n_params"]))


def check_backbone(stored: dict[str, np.ndarray], maps: dict[str, Tensor], floors: dict, report: Report) -> None:
    """backbone.npz."""
    ours = {"pos_embed_resized": maps["pos_embed_resized"], "last_feat": maps["last_feat"],
            "patch_embed_image0_channels_0_5": maps["patch_embed"][0, :, :, [0, 5]]}
    for name in stored:
        if name.startswith("block"):
            whole = maps[name.split("_")[0]][0]
            ours[name] = whole[::4, ::4] if name.endswith("_every4") else whole
    for level in range(2, 7):
        feature = maps[f"p{level}"]
        ours |= {f"p{level}": feature, f"p{level}_mean": feature.mean(dim=(2, 3)),
                 f"p{level}_std": feature.flatten(2).std(dim=2)}
    ours["p2_channels_0_7"] = maps["p2"][:, [0, 7]]
    for name, theirs in stored.items():
        if name in ours:
            floor = 10 * floors.get(name.split("_")[0], 0.0)
            report.close(f"backbone.{name}", ours[name], theirs, max(floor, FEATURES))
    report.all_seen([f"backbone.{name}" for name in stored])


def check_rpn(stored: dict[str, np.ndarray], heads: list, proposals: dict[str, list], report: Report) -> None:
    """rpn.npz."""
    ours, tolerance = {}, {}
    for level, (logits, deltas) in enumerate(heads, start=2):
        ours |= {f"objectness_p{level}": logits, f"deltas_p{level}": deltas,
                 f"deltas_p{level}_every4": deltas[:, :, ::4, ::4]}
    for mode, images in proposals.items():
        for i, image in enumerate(images):
            ours |= {f"{mode}_proposals{i}": image.boxes, f"{mode}_proposal_logits{i}": image.logits}
            tolerance[f"{mode}_proposals{i}"] = BOXES
    for name, theirs in stored.items():
        if name in ours:
            report.close(f"rpn.{name}", ours[name], theirs, tolerance.get(name, FEATURES))
    report.all_seen([f"rpn.{name}" for name in stored])


def check_detections(
    stored: dict[str, np.ndarray], detections: list[Detections], stages: list, case: Case, floors: dict,
    report: Report,
) -> None:
    """detections.npz: on the canvas, and after rescaling to the output size."""
    ours, tolerance = {}, {}
    boxes, scores = max(10 * floors.get("boxes", 0), BOXES), max(10 * floors.get("scores", 0), SCORES)
    masks = max(10 * floors.get("mask_probs", 0), SCORES)
    for stage, (logits, deltas) in enumerate(stages):
        ours |= {f"cls_logits_stage{stage}": logits, f"box_deltas_stage{stage}": deltas}
    for i, found in enumerate(detections):
        ours |= {f"boxes{i}": found.boxes, f"scores{i}": found.scores, f"classes{i}": found.labels,
                 f"mask_probs_first20_{i}": found.masks[:20], f"mask_probs_mean{i}": found.masks.mean(dim=(1, 2))}
        truth = case.truth[i]
        output = to_image(found, tuple(case.sizes[i].tolist()), (truth["out_height"], truth["out_width"]))
        ours |= {f"post_boxes{i}": output.boxes, f"post_scores{i}": output.scores, f"post_classes{i}": output.labels}
        tolerance |= {f"boxes{i}": boxes, f"post_boxes{i}": boxes, f"scores{i}": scores, f"post_scores{i}": scores,
                      f"classes{i}": 0.0, f"post_classes{i}": 0.0, f"mask_probs_first20_{i}": masks,
                      f"mask_probs_mean{i}": masks}
    for name, theirs in stored.items():
        if name in ours:
            report.close(f"detections.{name}", ours[name], theirs, tolerance.get(name, FEATURES))
    report.all_seen([f"detections.{name}" for name in stored])


def check_results(
    stored: list[dict], detections: list[Detections], case: Case, floors: dict, report: Report
) -> None:
    """results.json: the first 40 detections of an image as COCO results at output size."""
    ours = []
    for i, found in enumerate(detections):
        truth = case.truth[i]
        size, original = tuple(case.sizes[i].tolist()), (truth["out_height"], truth["out_width"])
        ours += detections_to_results(found, size, original, i, range(case.config["num_classes"]))[:40]
    if len(ours) != len(stored):
        report.out("results", f"{len(ours)} results, expected {len(stored)}")
        return
    pairs = list(zip(ours, stored, strict=True))
    report.equal("results.image", np.array([a["image_id"] for a, _ in pairs]), np.array([b["image"] for _, b in pairs]))
    report.equal("results.category", np.array([a["category_id"] for a, _ in pairs]),
                 np.array([b["category"] for _, b in pairs]))
    report.close("results.score", np.array([a["score"] for a, _ in pairs]), np.array([b["score"] for _, b in pairs]),
                 max(10 * floors.get("scores", 0), SCORES))
    report.close("results.bbox_xywh", np.array([a["bbox"] for a, _ in pairs]),
                 np.array([b["bbox_xywh"] for _, b in pairs]), max(10 * floors.get("boxes", 0), BOXES))
    overlaps, areas = [], []
    for a, b in pairs:
        mine, theirs = rle.decode(a["segmentation"]).astype(bool), rle.decode(b["segmentation"]).astype(bool)
        differing, union = (mine != theirs).sum(), (mine | theirs).sum()
        # A pixel within rounding of 1/2 may flip: three of them, as in the reference's own noise, are no difference.
        overlaps.append(1 - max(differing - 3, 0) / max(union, 1))
        areas.append(mine.sum())
    report.at_least("results.segmentation (IoU but for 3 pixels)", min(overlaps, default=1.0), 0.999)
    report.close("results.area", np.array(areas), np.array([b["area"] for _, b in pairs]), 3, 1e-3)


def check_training(
    stored: dict[str, np.ndarray], ours: dict[str, Tensor], num_classes: int, report: Report
) -> None:
    """train.npz: who is sampled, what it learns, and the mask targets of both forms."""
    for name, theirs in stored.items():
        full = f"train.{name}"
        if name.endswith("_packed"):
            base = name.removesuffix("_packed")
            shape = tuple(stored[f"{base}_shape"].tolist())
            report.equal(f"train.{base}_shape", np.array(ours[base].shape), np.array(shape))
            count = int(np.prod(shape))
            if len(theirs) * 8 < count:
                report.out(full, f"{len(theirs)} bytes do not hold {count} cells")
                continue
            wanted = np.unpackbits(theirs)[:count].reshape(shape).astype(bool)
            mine = ours[base].numpy()
            if "polygon" in base:
                union = (mine | wanted).sum(axis=(1, 2))
                report.at_least(full, float(((mine & wanted).sum(axis=(1, 2)) / np.maximum(union, 1)).mean()), 0.98)
            else:
                report.close(full, float((mine != wanted).mean()), 0.0, 2e-4)
        elif "_gt_boxes" in name and name in ours:
            foreground = ours[name.replace("gt_boxes", "gt_classes")] < num_classes
            report.close(full, ours[name][foreground], theirs[foreground.numpy()], BOXES)
            report.skip(f"{full} of background boxes", "no meaning: they learn no box")
        elif name in ours:
            report.close(full, ours[name].sort().values if name.startswith("fed_") else ours[name],
                         np.sort(theirs) if name.startswith("fed_") else theirs, BOXES if "boxes" in name else 0.0)
    report.all_seen([f"train.{name}" for name in stored])


def check_losses(
    stored: dict, losses: dict[str, dict[str, float]], gradients: dict[str, Tensor], floors: dict, report: Report
) -> None:
    """losses.json: the losses with each kind of target, gradient norms and sums."""
    floor = 10 * max(floors.get("losses_rel", {"": 0.0}).values())
    for kind, theirs in stored.items():
        base = kind.removesuffix("_float64")
        if base in losses:
            report.equal(f"losses.{kind} names", np.array(sorted(losses[base])) == np.array(sorted(theirs)),
                         np.ones(len(theirs), bool))
            for name, value in theirs.items():
                by_polygon = base == "losses_polygon" and name == "loss_mask"
                relative = 1e-2 if by_polygon else max(floor, LOSSES)
                report.close(f"losses.{kind}.{name}", losses[base].get(name, np.nan), value, 0.0, relative)
            report.seen.add(f"losses.{kind}")
        elif base in ("grad_norms", "grad_sums"):
            relative = max(10 * floors.get("grad_norm_rel_max", 0.0), GRADIENTS)
            for name, value in theirs.items():
                gradient = their_gradient(gradients, name)
                if gradient is None:
                    report.out(f"losses.{kind}.{name}", "this parameter has no gradient here")
                elif base == "grad_norms":
                    report.close(f"losses.{kind}.{name}", gradient.norm(), value, 1e-5, relative)
                else:  # a sum of cancelling terms is as exact as its terms are large
                    report.close(f"losses.{kind}.{name}", gradient.double().sum(), value,
                                 1e-5 + GRADIENTS * float(gradient.abs().sum()))
            report.seen.add(f"losses.{kind}")
        elif kind == "params_without_grad":
            without = [name for name in stored["grad_norms"] if their_gradient(gradients, name) is None]
            report.line(f"losses.{kind}", f"{without}, expected {theirs}", without == theirs)
            report.seen.add(f"losses.{kind}")
    report.all_seen([f"losses.{kind}" for kind in stored])


def their_gradient(gradients: dict[str, Tensor], name: str) -> Tensor | None:
    """The gradient of the parameter that they call `name`."""
    ours = rename(name, DETECTRON2)
    return gradients.get(ours) if ours is not None else None
