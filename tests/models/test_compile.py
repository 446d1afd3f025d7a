"""`torch.compile` of a detector's parts: whole graphs, compiled once, unchanged results."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.helpers.small import images, small_detector, target
from tests.helpers.triton_device import needs_gpu
from vitdet.evaluation.detections import _found, results_of
from vitdet.models import compile as compilation
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.models.layers import DropPath
from vitdet.types import Batch


def drop(detector: nn.Module, rate: float) -> None:
    """Set the drop path rate of all blocks except the first."""
    for block in list(detector.backbone.blocks)[1:]:
        block.drop_path = DropPath(rate)


def test_every_part_compiles_as_a_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with different drop path rates share their code; a second step compiles nothing."""
    graphs = []

    def record(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    detector = small_detector().train()
    drop(detector, 0.25)
    detector.backbone.blocks[-1].drop_path = DropPath(0.5)
    plain = copy.deepcopy(detector)
    names = list(detector.state_dict())
    compile_part = nn.Module.compile
    options = {"backend": record, "fullgraph": True}
    monkeypatch.setattr(
        nn.Module, "compile", lambda part, **own: compile_part(part, **own, **options)
    )
    torch._dynamo.reset()
    compilation.compile_parts(detector)
    losses = []
    try:
        for model in (detector, plain, detector):
            torch.manual_seed(3)
            found = model(images(2), [target([[10, 20, 60, 70]], [1])] * 2)
            sum(found.values()).backward()
            losses.append({name: loss.item() for name, loss in found.items()})
            # 3 kinds of blocks (by window and drop path), pyramid, RPN, box head, mask head
            assert len(graphs) == 7
    finally:
        torch._dynamo.reset()
    assert losses[0] == losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert list(detector.state_dict()) == names
    for name, parameter in detector.named_parameters():
        assert torch.allclose(parameter.grad, 2 * plain.get_parameter(name).grad, atol=1e-4), name


def test_drop_path_drops_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    path = DropPath(0.25).train()
    found = path(torch.ones(4000, 2, 3))
    assert found.flatten(1).amax(dim=1).tolist() == found.flatten(1).amin(dim=1).tolist()
    values = sorted(set(found.flatten().tolist()))
    assert values == pytest.approx([0, 4 / 3]) and found.mean().item() == pytest.approx(1, abs=0.03)
    x = torch.ones(3, 2)
    assert path.eval()(x) is x and DropPath(0.0).train()(x) is x
    assert path.train()(x.bfloat16()).dtype == torch.bfloat16
    assert not path.state_dict()


@torch.no_grad()
def test_the_last_batch_of_an_evaluation_is_padded() -> None:
    detector, seen = small_detector().eval(), []
    detector.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    sizes = torch.tensor([[128, 100]] * 2)
    batch = Batch(images(2).to(torch.uint8), [], sizes, (1, 2), sizes)
    detect, cpu = GraphedDetector(detector, nullcontext), torch.device("cpu")
    whole, filled = (_found(detect, batch, cpu, slots) for slots in (0, 5))
    assert seen == [2, 5] and len(filled) == len(whole) == 2
    for detections, other in zip(whole, filled, strict=True):
        assert torch.equal(detections.labels, other.labels) and len(detections)
        torch.testing.assert_close(detections.boxes, other.boxes)
        torch.testing.assert_close(detections.masks, other.masks)


@needs_gpu
@pytest.mark.cuda
def test_an_evaluation_compiles_once_on_a_gpu() -> None:
    """A smaller last batch causes no second compilation."""
    detector = small_detector().cuda().eval()
    batches = [
        Batch(images(count).to(torch.uint8), [], sizes, tuple(range(count)), sizes)
        for count in (2, 2, 1)
        for sizes in [torch.tensor([[128, 128]] * count)]
    ]
    torch._dynamo.reset()
    compilation.compile_parts(detector)
    counts = []
    for _ in results_of(detector, batches, range(10), "cuda"):
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] == counts[2] > 0
