"""The model card: its contents, and the warning about the license of the initial weights."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tracking.test_gate import evaluation, hits
from vitdet.config import load_config, to_dict
from vitdet.data.protocol import Protocol
from vitdet.tracking.gate import Evaluation
from vitdet.tracking.model_card import DESCRIPTION, description_of, initial_weights, render


def card(
    found: Evaluation,
    recipe: str = "tiny",
    names: tuple[str, ...] = ("disc", "ring"),
    evaluated: tuple[str, ...] = (),
) -> str:
    config = load_config(recipe)
    stored = {"config": to_dict(config), "class_names": names, "step": 300}
    stored["fingerprints"] = {"train": "aaaa", "val": "bbbb"}
    used = load_config(recipe, evaluated)
    protocol = Protocol.of(used, "bbbb")
    return render("shapes", stored, used, found, protocol, "1234", "f" * 40)


def test_a_card_states_data_training_metrics_and_the_worst_classes() -> None:
    found = evaluation({"disc": hits(50), "ring": hits(20)})
    text = card(found)
    assert text.startswith("# shapes\n") and "\n\n\n" not in text
    interval = f"| box AP | {found.metrics['box_ap']:.1f} | "
    assert interval in text and " to " in text.partition(interval)[2].splitlines()[0]
    assert text.index("| ring | 60 | 33") < text.index("| disc | 60 | 83")
    for part in ("`bbbb`", "`aaaa`", "300 steps", "Apache-2.0", "Mask R-CNN", "60 images"):
        assert part in text, part
    assert "**Warning:**" not in text
    without = card(Evaluation({"box_ap": 12.3}))
    assert "| box AP | 12.3 |\n" in without and "interval" not in without
    assert "No metrics are known." in card(Evaluation({}))


def test_the_limits_are_those_of_the_packaged_detector() -> None:
    evaluated = ("evaluate.max_detections=7", "evaluate.score_threshold=0.3")
    assert "- At most 60 detections per image, with a score above 0.05." in card(
        Evaluation({}), evaluated=evaluated
    )


def test_a_card_warns_of_a_license_that_excludes_commercial_use() -> None:
    text = card(Evaluation({}), "mask_rcnn_vitdet_b_coco")
    assert "**Warning:** the initial weights (mae_vit_b) are licensed under CC BY-NC 4.0" in text
    assert "- Initial weights mae_vit_b: CC BY-NC 4.0." in text


@pytest.mark.parametrize(
    ("init", "licenses", "warned"),
    [
        ("", [], []),
        ("mae_vit_tiny", ["Apache-2.0"], []),
        ("mae_vit_h", ["CC BY-NC 4.0"], ["mae_vit_h"]),
        ("/space/weights/mae_vit_l.safetensors", ["CC BY-NC 4.0"], ["mae_vit_l"]),
        ("vitae_b", ["not published"], ["vitae_b"]),
        ("runs/one/model.pt", ["unknown"], ["model.pt"]),
    ],
)
def test_initial_weights_have_a_license_and_a_warning_if_needed(
    init: str, licenses: list[str], warned: list[str]
) -> None:
    found = initial_weights(init)
    assert [origin.license for origin in found] == licenses
    assert [origin.name for origin in found if origin.warning] == warned


def test_weights_of_a_detector_include_the_license_of_their_pre_training() -> None:
    first, second = initial_weights("mask_rcnn_vitdet_b_coco")
    assert "CC BY-SA 3.0" in first.license and second.name == "mae_vit_b" and second.warning


def test_a_long_description_is_truncated_after_a_line() -> None:
    names = tuple(f"class {place}" for place in range(1203))
    assert "class 19 and 1183 more." in card(Evaluation({}), names=names)
    text = card(Evaluation({}))
    assert text == "# shapes\n\n" + description_of(text)
    long = text + "\n".join(["x" * 99] * 80)
    cut = description_of(long)
    assert DESCRIPTION - 200 < len(cut) <= DESCRIPTION and "`model_card.md`" in cut[-80:]
    assert np.all([line in long.splitlines() for line in cut.splitlines()[:-1]])
