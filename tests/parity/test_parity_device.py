"""Golden cases on a GPU; without a GPU, fake tensors show that they are computed on the device."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import tests.parity.__main__ as parity
import vitdet.kernels
from tests.helpers.triton_device import needs_gpu
from tests.parity import detector, unit
from tests.parity.case import Case
from tests.parity.device import CPU, moved, without_tf32
from vitdet.models import mask_head, roi_pool

GOLDEN = Path(__file__).parents[1] / "golden"
CUDA = torch.device("cuda")
CASES = "unit maskrcnn_coco maskrcnn_coco_resblock cascade_lvis vitae_mask_rcnn_192".split()


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU with kernels. Operations on tensors of two devices raise RuntimeError, as on a real one."""
    for module in (vitdet.kernels, mask_head, roi_pool, vitdet.kernels.nms):
        monkeypatch.setattr(
            module, "enabled", lambda *tensors: all(tensor.is_cuda for tensor in tensors)
        )
    # modules get new parameters, as existing ones cannot become fake tensors in place
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield FakeTensorMode(allow_non_fake_inputs=True)
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_units_are_computed_on_the_device(gpu):
    with gpu:
        found = unit.compute(GOLDEN / "unit", CUDA)
        counts = {name for name in found if name.endswith("_count")}
        assert {found[name].device.type for name in found.keys() - counts} == {"cuda"}
        assert {tensor.device for tensor in moved(found, CPU).values()} == {CPU}


def test_a_case_is_computed_on_the_device(gpu):
    case = Case.read(GOLDEN / "cascade_lvis")
    with gpu:
        there = moved(case, CUDA)
        maps = detector.run_backbone(there)
        rpn = there.detector.rpn
        features = [maps[f"p{level}"] for level in range(2, 7)]
        proposals = rpn.propose(rpn(features), there.sizes, rpn.top_test)
        found = [*maps.values(), *proposals]
        for targets in (there.bitmaps, there.polygons):
            found += there.detector.train()(there.images, targets, there.sizes).values()
        assert {tensor.device.type for tensor in found} == {"cuda"}


@pytest.mark.parametrize("left", ["images", "sizes", "polygons", "detector"])
def test_a_tensor_left_on_the_cpu_is_detected(gpu, left):
    case = Case.read(GOLDEN / "maskrcnn_coco")
    with gpu:
        there = moved(replace(case, **{left: None}), CUDA)
        there = replace(there, **{left: getattr(case, left)})
        with pytest.raises(RuntimeError, match="device"):
            there.detector.train()(there.images, there.polygons, there.sizes)


@pytest.mark.parametrize("given", [[], ["--device", "cpu"]])
def test_the_device_is_passed_to_compute(monkeypatch, given):
    devices = []
    kind = parity.kind_of(GOLDEN / "unit")

    def compute(folder, device):
        devices.append(device)
        return kind.compute(folder, device)

    monkeypatch.setattr(parity, "KINDS", [kind._replace(compute=compute)])
    assert parity.main([*given, str(GOLDEN / "unit")]) == 0
    assert devices == [CPU]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "--device must be cpu or cuda, got 'tpu'"),
        ("cuda:x", "--device must be cpu or cuda, got 'cuda:x'"),
        ("cuda", "--device cuda: PyTorch finds no GPU here; leave it out to use the CPU"),
    ],
)
def test_an_unknown_or_missing_device_is_an_error(monkeypatch, capsys, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parity.main(["--device", device, str(GOLDEN / "unit")]) == 2
    assert capsys.readouterr() == ("", f"{message}\n")


def test_tf32_is_off_within_a_comparison():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with without_tf32():
        assert not matmul.allow_tf32 and not cudnn.allow_tf32
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_the_case_passes_on_a_gpu(capsys, name):
    assert parity.main(["--device", "cuda", str(GOLDEN / name)]) == 0
    said = capsys.readouterr().out
    assert f"{name}: all hold" in said and "TF32 off; tolerances as on the CPU" in said


@needs_gpu
@pytest.mark.cuda
def test_a_cpu_case_is_skipped_on_a_gpu(capsys):
    assert parity.main(["--device", "cuda", str(GOLDEN / "test_resize")]) == 0
    assert "skip  the case: all of it is the CPU's work" in capsys.readouterr().out
