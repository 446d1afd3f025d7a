"""Compilation of a detector's parts: each as a whole, once, with the names and the results of the parts as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.small import images, small_detector, target
from vitdet.models import compile as compilation
from vitdet.models.layers import DropPath


def drop(detector: nn.Module, rate: float) -> None:
    """Give all blocks but the first a drop path."""
    for block in list(detector.backbone.blocks)[1:]:
        block.drop_path = DropPath(rate)


def test_every_part_compiles_as_a_whole_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that differ in the rate of their drop path alone share their code; a second step compiles nothing."""
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
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda part, **options: compile_part(part, **options, backend=record, fullgraph=True),
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
            # windows without drop path, windows and the grid with it; pyramid, RPN, box head, mask head
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
