"""GPU memory: the out-of-memory message, the estimate, and activation checkpointing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import minimal, options
from tests.helpers.runs import assert_equal
from tests.helpers.triton_device import needs_gpu
from vitdet import stages
from vitdet.config import BackboneConfig, Config, load_config
from vitdet.models import build_backbone, build_detector
from vitdet.models.detector import Detector
from vitdet.models.layers import Blocks
from vitdet.tracking import runs
from vitdet.training.graph import can_be_graphed
from vitdet.training.memory import checkpoint_activations, step_bytes

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free. "
# torch's message, on one line
TORCH = SAID + (
    "Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory 70.00 GiB is "
    "allocated by PyTorch, and 5.10 GiB is reserved by PyTorch but unallocated. See documentation ..."
)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def failed(vitdet: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """failed(*words) returns the last line of a command whose detector exceeds the GPU memory."""

    def fill(*_: object) -> None:
        raise torch.OutOfMemoryError(TORCH)

    def run(*words: object) -> str:
        code, _, said = vitdet(*words)
        assert code == 1
        return said.splitlines()[-1].removeprefix("vitdet: ")

    monkeypatch.setattr(Detector, "forward", fill)
    monkeypatch.setattr(runs, "has_mlflow", lambda: False)
    return run


def test_the_message_names_the_settings_that_need_less_memory(
    failed: Callable[..., str], tiny: Path, trained: Path, picture: Path, tmp_path: Path
) -> None:
    cpu = "a GPU with more memory or the CPU: CUDA_VISIBLE_DEVICES= vitdet"
    line = failed("train", "tiny", *options(minimal(tiny)), "--output", tmp_path / "run")
    assert line == (
        f"{SAID}Raise train.accumulate (the same batch in smaller micro-batches), set train.activation_checkpointing=blocks, or "
        "lower train.batch_size, data.image_size or, for evaluations, evaluate.batch_size; or use a GPU with more memory"
    )
    assert not (tmp_path / "run" / "model.pt").exists()
    line = failed("evaluate", trained / "model.pt")
    assert line == f"{SAID}Lower evaluate.batch_size, or use {cpu} evaluate ..."
    line = failed("predict", trained / "model.pt", picture, "--output", tmp_path / "drawn")
    assert line == f"{SAID}Use {cpu} predict ..."
    assert list((tmp_path / "drawn").iterdir()) == []


def test_an_unknown_message_of_torch_is_kept(
    failed: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2 GiB.\nSee docs.")

    monkeypatch.setattr(stages, "train", fill)
    line = failed("train", "tiny", "--output", tmp_path / "run")
    assert line.startswith("HIP out of memory. Tried to allocate 2 GiB. Raise train.accumulate")


def checkpointing(detector: nn.Module) -> set[bool]:
    return {module.checkpointing for module in detector.modules() if isinstance(module, Blocks)}


def test_auto_enables_checkpointing_above_90_percent_of_gpu_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config("tiny")
    detector = build_detector(config.model)
    needed = step_bytes(detector, config, 8, "bf16", False)

    def decide(setting: str, device: torch.device, memory: float) -> bool:
        given = replace(config, train=replace(config.train, activation_checkpointing=setting))
        gpu = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        checkpoint_activations(detector, given, 8, "bf16", device)
        (decided,) = checkpointing(detector)
        assert can_be_graphed(detector) != decided  # a CUDA graph cannot repeat random draws
        return decided

    with caplog.at_level(logging.INFO, "vitdet"):
        assert not decide("auto", GPU, needed / 0.89)
        assert not decide("auto", CPU, 1) and not decide("none", GPU, 1)
        assert decide("blocks", CPU, 1e15) and decide("blocks", GPU, 1e15)
        assert not caplog.messages
        assert decide("auto", GPU, needed / 0.91)
    assert len(caplog.messages) == 1 and "micro-batches of size 8 would need about" in caplog.text


# recipe, images, with the kernels (H200, CUDA graph) or without (H100), GiB in bf16 without checkpointing
MEASURED = [
    ("mask_rcnn_vitdet_b_coco", 1, False, 5.0),
    ("mask_rcnn_vitdet_b_coco", 8, False, 25.8),
    ("mask_rcnn_vitdet_l_coco", 4, False, 29.2),
    ("mask_rcnn_vitdet_h_coco", 4, False, 46.5),
    ("mask_rcnn_vitdet_b_coco", 1, True, 4.2),
    ("mask_rcnn_vitdet_b_coco", 8, True, 21.05),
    ("mask_rcnn_vitdet_l_coco", 4, True, 22.83),
]


@pytest.mark.parametrize(("recipe", "images", "fused", "measured"), MEASURED)
def test_the_memory_estimate_is_close_to_measurements(
    recipe: str, images: int, fused: bool, measured: float
) -> None:
    config = load_config(recipe)
    with torch.device("meta"):
        detector = build_detector(config.model)
    fp16, bf16, fp32 = (
        step_bytes(detector, config, images, precision, fused) / 2**30
        for precision in ("fp16", "bf16", "fp32")
    )
    assert bf16 == pytest.approx(measured, rel=0.05 if fused else 0.15) and fp32 > fp16


VIT = {"window_size": 3, "rel_pos_size": 64}
BACKBONES = [
    BackboneConfig(name="vit_tiny", pos_embed_grid=4, drop_path=0.5, **VIT),
    BackboneConfig(name="vitae_s", drop_path=0.5, **VIT),
    BackboneConfig(name="swin_t", window_size=7, drop_path=0.5),
    pytest.param(
        BackboneConfig(name="vitaev2_s", window_size=7, drop_path=0.5), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda case: case.name)
def test_checkpointed_blocks_bitwise_equal_plain_blocks(backbone: BackboneConfig) -> None:
    """The same paths are dropped, and BatchNorm statistics are updated only once."""
    torch.manual_seed(0)
    plain = build_backbone(replace(Config().model, backbone=backbone)).train()
    again = copy.deepcopy(plain)
    images, results = torch.randn(2, 3, 64, 64), []
    for model in (plain, again):
        stages, calls = [module for module in model.modules() if isinstance(module, Blocks)], []
        for stage in stages:
            stage.checkpointing = model is again
            stage[-1].register_forward_pre_hook(lambda block, _, calls=calls: calls.append(block))
        torch.manual_seed(1)
        found = model(images)
        maps = [found] if isinstance(found, Tensor) else found
        torch.stack([features.square().mean() for features in maps]).sum().backward()
        assert len(calls) == len(stages) * (2 if model is again else 1)
        results.append([*maps, torch.rand(3)])  # later random draws are equal as well
    assert all(map(torch.equal, *results))
    for parameter_name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, again.get_parameter(parameter_name).grad), parameter_name
    assert_equal(plain.state_dict(), again.state_dict())


@needs_gpu
@pytest.mark.cuda
def test_torch_still_raises_the_message_that_is_shortened(
    vitdet: Command, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "has_mlflow", lambda: False)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() + 2**20
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(held / total)
    try:
        code, _, said = vitdet("train", "tiny", *options(minimal(tiny)), "--output", tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    line = said.splitlines()[-1]
    assert code == 1 and line.startswith("vitdet: CUDA out of memory. Tried to allocate ")
    assert " is free. Raise train.accumulate" in line


@needs_gpu
@pytest.mark.cuda
def test_checkpointed_blocks_need_less_gpu_memory() -> None:
    settings = BackboneConfig(drop_path=0.5, rel_pos_size=512)
    torch.manual_seed(0)
    backbone = build_backbone(replace(Config().model, backbone=settings)).cuda().train()
    images, peaks, gradients = torch.randn(2, 3, 512, 512, device="cuda"), [], []
    for checkpointing in (False, False, True):  # the first pass selects kernels
        backbone.blocks.checkpointing = checkpointing
        backbone.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16):
            backbone(images).float().square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    print(f"peak of ViT-B, 2 images of 512 pixels: {peaks[1]} bytes, checkpointed: {peaks[2]}")
    assert peaks[2] < 0.7 * peaks[1]
    # not bitwise equal, as kernels add in any order
    assert (gradients[2] - gradients[1]).norm() < 1e-2 * gradients[1].norm()
