"""Compare the training step and inference of a recipe with Detectron2's, on the same images in the same process.

    python -m tests.bench.detectron2 FOLDER --batch 8,1 --output figures.json

FOLDER contains Detectron2's sources. They need not be compiled, as torchvision has the operators
that ViTDet needs, but fvcore, iopath, omegaconf and others must be installed. A training step is
that of Detectron2's AMPTrainer in fp16, as in the configs of ViTDet; polygons, proposals on the
objects and scaled class logits are those of `vitdet.cli.bench`. If Detectron2 runs out
of memory, a smaller batch is measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from vitdet.cli.bench.inference import SCALES, measure_inference
from vitdet.cli.bench.measurement import call_row, peak_memory, report, summary, timed
from vitdet.cli.bench.synthetic import SHARE, boxes_on_objects
from vitdet.cli.bench.training import images_for, measure_training
from vitdet.config import Config, load_config
from vitdet.types import Batch

WARM = 4  # steps before the measured ones
CONFIGS = {  # ours -> theirs, in projects/ViTDet/configs
    f"{cascade}mask_rcnn_vitdet_{size}_coco": f"COCO/{cascade}mask_rcnn_vitdet_{size}_{epochs}ep.py"
    for cascade in ("", "cascade_")
    for size, epochs in (("b", 100), ("l", 100), ("h", 75))
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, help="folder of Detectron2's sources")
    parser.add_argument("--recipe", default="mask_rcnn_vitdet_b_coco", choices=CONFIGS)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--batch", default="8,1")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", choices=("train", "infer"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    load_sources(given.sources)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    config = load_config(given.recipe, given.overrides)
    sizes = [int(batch) for batch in given.batch.split(",")]
    found = {}
    for kind, ours, theirs in (
        ("train", measure_training, training_row),
        ("infer", measure_inference, inference_row),
    ):
        if given.only not in (None, kind):
            continue
        figures = found[kind] = beside(
            config, given, sizes, device, ours, theirs, CONFIGS[given.recipe]
        )
        print(f"\n{kind}, {given.recipe}: {report(figures)}", flush=True)
        for line in ratios(figures["rows"]):
            print(line, flush=True)
        if given.output:  # after each kind, as the run may be cut off
            given.output.write_text(json.dumps(found, indent=1))


def beside(
    config: Config,
    given: argparse.Namespace,
    sizes: list[int],
    device: torch.device,
    ours: Callable[..., dict],
    theirs: Callable[..., dict],
    path: str,
) -> dict:
    """Return the measurements of both implementations as rows; the column `who` names the implementation."""
    figures: dict = {"product_tflops": {}, "tflop_per_image": 0.0}
    rows: list[dict] = []
    for size in sizes:
        try:
            figures = ours(config, [size], [config.train.precision], given.steps, device)
            rows.append({"who": "vitdet", **figures["rows"][0]})
        except Exception as error:  # keep the other measurements
            traceback.print_exc()
            rows.append({"who": "vitdet", "batch": size, "error": str(error).splitlines()[0]})
        row = fitting(
            size, lambda size: theirs(given.sources, path, config, size, given.steps, device)
        )
        rate = max(figures["product_tflops"].values(), default=0.0)
        if "images_per_second" in row and rate:
            row["mfu"] = row["images_per_second"] * figures["tflop_per_image"] / rate
        rows.append(row)
    return {**summary(device, 0.0, {}, []), **figures, "rows": rows}


def fitting(size: int, measure: Callable[[int], dict]) -> dict:
    """Return the row of the largest batch of size, size / 2, ... that fits into memory."""
    precision = "fp16" if torch.cuda.is_available() else "fp32"
    row: dict[str, Any] = {"who": "detectron2", "precision": precision}
    while size:
        try:
            return {**row, "batch": size, **measure(size)}
        except torch.OutOfMemoryError:
            print(f"detectron2 runs out of memory at batch {size}", flush=True)
            size //= 2
    return {**row, "error": "out of memory"}


def ratios(rows: list[dict]) -> Iterator[str]:
    """Yield a line for each batch size with the ratios vitdet / detectron2 of speed and memory."""
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        speeds = [row.get("images_per_second") for row in (ours, theirs)]
        if all(speeds):
            yield (
                f"batch {ours['batch']}: {speeds[0] / speeds[1]:.2f} times detectron2's images/s "
                f"(at batch {theirs['batch']}), {ours['peak_gib'] / theirs['peak_gib']:.2f} of its memory"
            )


def load_sources(folder: Path) -> None:
    """Make `import detectron2` work without its compiled extension and without setuptools' pkg_resources."""
    folder = folder.resolve()
    if not (folder / "detectron2").is_dir():
        raise SystemExit(f"{folder}: no folder detectron2/ in it; expected a checkout of it")
    sys.path.insert(0, str(folder))
    resources: Any = types.ModuleType("pkg_resources")
    resources.resource_filename = lambda package, file: str(
        folder / "configs" / Path(file).relative_to("configs")
    )
    resources.resource_exists = lambda package, file: True
    sys.modules["pkg_resources"] = resources
    import detectron2

    sys.modules["detectron2._C"] = detectron2._C = types.ModuleType("detectron2._C")


def build(sources: Path, path: str, config: Config, device: torch.device) -> tuple[Any, Any]:
    """Return Detectron2's model with random weights, and its config, both with the recipe's image size and samples."""
    from detectron2.config import LazyConfig, instantiate

    theirs = LazyConfig.load(str(sources / "projects/ViTDet/configs" / path))
    theirs.model.backbone.square_pad = config.data.image_size
    theirs.model.backbone.net.img_size = config.model.backbone.rel_pos_size
    theirs.model.roi_heads.batch_size_per_image = config.model.roi_heads.samples
    rpn = config.model.rpn
    theirs.model.proposal_generator.pre_nms_topk = (rpn.pre_nms_train, rpn.pre_nms_test)
    theirs.model.proposal_generator.post_nms_topk = (rpn.post_nms_train, rpn.post_nms_test)
    torch.manual_seed(0)
    with device:
        return instantiate(theirs.model).to(device), theirs


def training_row(
    sources: Path, path: str, config: Config, size: int, steps: int, device: torch.device
) -> dict:
    """Measure a training step of Detectron2's trainer, in fp16 on a GPU."""
    from detectron2.config import instantiate
    from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer
    from detectron2.utils.events import EventStorage

    model, theirs = build(sources, path, config, device)
    theirs.optimizer.params.model = model.train()
    optimizer = instantiate(theirs.optimizer)
    images = images_for(config, size)
    lay_on_objects(model, images, device)
    kind = AMPTrainer if device.type == "cuda" else SimpleTrainer
    peak = peak_memory(device)
    data, steps_done = their_batch(images), count()
    trainer = kind(model, iter(lambda: data, None), optimizer)
    with EventStorage(0) as storage:

        def step() -> None:
            trainer.iter = storage.iter = next(steps_done)
            trainer.run_step()

        return call_row(step, size, steps, device, WARM, peak)


@torch.no_grad()
def inference_row(
    sources: Path, path: str, config: Config, size: int, steps: int, device: torch.device
) -> dict:
    """Measure Detectron2's detection, and evaluation results with masks as run lengths."""
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    model = build(sources, path, config, device)[0].eval()
    data = their_batch(images_for(config, size))
    let_detect(model, data[:1])
    peak = peak_memory(device)
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):

        def detect() -> None:
            model.inference(data, do_postprocess=False)

        row = call_row(detect, size, steps, device, WARM, peak)

        def results() -> None:
            for result in model(data):
                instances_to_coco_json(result["instances"].to("cpu"), 1)

        seconds = statistics.median(timed(results, device, max(steps // 4, 1))) / 1e3
        row["results_per_second"] = size / seconds
        row["detections"] = len(model.inference(data[:1], do_postprocess=False)[0])
    return row


def their_batch(batch: Batch) -> list[dict]:
    """Convert a batch to the format of Detectron2's mapper: uint8 images, polygons."""
    from detectron2.structures import Boxes, Instances, PolygonMasks

    found = []
    originals = batch.originals.tolist()
    for image, target, original in zip(batch.images, batch.targets, originals, strict=True):
        side, (height, width) = image.shape[-1], original
        made = Instances((side, side))
        made.gt_boxes, made.gt_classes = Boxes(target.boxes.clone()), target.labels.clone()
        outlines = target.masks
        made.gt_masks = PolygonMasks(
            [
                [outlines.edges[start:end, :2].double().numpy().ravel()]
                for start, end in outlines.spans.tolist()
            ]
        )
        found.append({"image": image, "instances": made, "height": height, "width": width})
    return found


def lay_on_objects(model: Any, batch: Batch, device: torch.device) -> None:
    """Place proposals on objects, as `vitdet.cli.bench.synthetic.lay_on_objects` does."""
    from detectron2.structures import Boxes

    generator, side = model.proposal_generator, batch.images.shape[-1]
    predict, laid = generator.predict_proposals, []
    number = int(SHARE * generator.post_nms_topk[True])
    for target in batch.targets:
        laid.append(boxes_on_objects(target.boxes, number, side).to(device))

    def proposals(*given: Any) -> list:
        found = predict(*given)
        for instances, boxes in zip(found, laid, strict=True):
            kept = instances.proposal_boxes.tensor[:-number]
            instances.proposal_boxes = Boxes(torch.cat([kept, boxes.to(kept.dtype)]))
        return found

    generator.predict_proposals = proposals


def let_detect(model: Any, data: list[dict]) -> None:
    """Scale the class logits as `vitdet.cli.bench.inference.let_detect` does."""
    predictors = model.roi_heads.box_predictor
    layers = (
        [predictor.cls_score for predictor in predictors]
        if hasattr(predictors, "__len__")
        else [predictors.cls_score]
    )
    drawn = [layer.weight.clone() for layer in layers]
    for scale in SCALES:
        for layer, weight in zip(layers, drawn, strict=True):
            layer.weight.copy_(scale * weight)
        if len(model.inference(data, do_postprocess=False)[0]) >= 100:
            break


if __name__ == "__main__":
    main()
