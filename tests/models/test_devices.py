"""A model on a GPU creates no tensor on the CPU; checked without a GPU."""

import contextlib

import pytest
import torch

from tests.conftest import minimal
from tests.helpers.far import FarTensor, far_device, send
from tests.helpers.small import images, small_detector, target
from tests.models.test_detector import KINDS
from vitdet.config import load_config
from vitdet.data.loader import train_loader
from vitdet.demo.mae import MaskedAutoencoder
from vitdet.evaluation.evaluator import evaluate_detector
from vitdet.evaluation.pictures import write_pictures
from vitdet.models import build_backbone, build_detector
from vitdet.training.meter import Meter
from vitdet.training.optim import WeightAverage

OBJECTS = {
    "objects": [([[10, 10, 60, 70], [40, 50, 120, 120]], [0, 3]), ([[64, 8, 100, 40]], [2])],
    "nothing": [([], []), ([], [])],
}


def test_operands_on_two_devices_are_refused():
    with far_device() as device:
        far = torch.ones(3, device=device)
        assert isinstance(far + 1, FarTensor) and isinstance(far * torch.tensor(2.0), FarTensor)
        with pytest.raises(RuntimeError, match="on the CPU"):
            far + torch.ones(3)
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.ones(3)[far.long()]
        assert far.to("cpu").tolist() == far.tolist() == [1, 1, 1]


@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_stays_on_its_device(kind, objects):
    detector = send(small_detector(**KINDS[kind]))
    with far_device() as device:
        targets = [target(*given).to(device) for given in OBJECTS[objects]]
        sizes = torch.tensor([[128, 128], [100, 61]], device=device)
        losses = detector(images(2).to(device), targets, sizes)
        assert all(isinstance(loss, FarTensor) for loss in losses.values())
        sum(losses.values()).backward()
        with torch.no_grad():
            found = detector.eval()(images(2).to(device))
        for image in found:
            assert isinstance(image.masks, FarTensor) and isinstance(image.boxes, FarTensor)


def test_training_and_evaluation_stay_on_the_device_of_the_detector(tiny, tmp_path, monkeypatch):
    # autocast accepts only real devices
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    config = load_config("tiny", minimal(tiny))
    detector = send(build_detector(config.model, config.evaluate))
    with far_device() as device:
        average, meter = WeightAverage(detector, 0.9), Meter(2)
        for batch in train_loader(config.data, 2, 0, 0, 2):
            batch = batch.to(device)
            losses = detector(batch.images, batch.targets, batch.sizes)
            sum(losses.values()).backward()
            meter.add(losses, torch.ones((), device=device))
            average.update(0)
        stored = {name: weights.to("cpu") for name, weights in average.state_dict().items()}
        average.load_state_dict(stored)
        average.swap()
        gone_on = Meter(2)
        gone_on.restore(meter.state())
        gone_on.add(losses, torch.ones((), device=device))
        assert gone_on.state()["count"] == 3
        metrics, _ = evaluate_detector(detector, config.data, config.evaluate, device)
        assert metrics["box_ap"] >= 0
        assert len(write_pictures(detector, config.data, tmp_path, count=1, threshold=0.0)) == 1
        autoencoder = send(MaskedAutoencoder(build_backbone(config.model)))
        assert isinstance(autoencoder(torch.zeros(1, 3, 128, 128).to(device)), FarTensor)
