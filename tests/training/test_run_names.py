"""Names of run and checkpoint folders: digests of the settings that affect the trained weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from vitdet.config import Config, OptimConfig, load_config
from vitdet.config import digest as digest_module
from vitdet.config.digest import difference, digest, legacy_digest
from vitdet.config.sections import list_settings

STORED = Path(__file__).parents[1] / "golden_checkpoints" / "digests.json"
OPERATIONAL = """
    data.workers=7 data.root=/elsewhere data.max_pixels=7 train.log_every=7 train.eval_every=7
    train.save_every=7 train.keep=7 train.accumulate=7 train.activation_checkpointing=blocks
    train.compile=never optim.lr_batch_size=7 evaluate.precision=bf16 evaluate.compile=true
    evaluate.score_threshold=0.7 evaluate.nms_iou=0.7 evaluate.max_detections=7
    evaluate.batch_size=7 evaluate.max_images=7 tracking.uri=http://x tracking.experiment=x
    tracking.model_name=x gate.metric=mask_ap gate.min_gain=7 gate.min_class_ap=7
    gate.max_class_loss=7 gate.confidence=0.7
""".split()


@dataclass(frozen=True)
class LaterOptim(OptimConfig):
    """The section of a later version, with a new setting."""

    nesterov: bool = False


@dataclass(frozen=True)
class LaterConfig(Config):
    """The config of a later version."""

    optim: LaterOptim = field(default_factory=LaterOptim)


def later(config: Config, **changes: object) -> LaterConfig:
    values = {name: getattr(config, name) for name in Config.__dataclass_fields__}
    optim = LaterOptim(**{**vars(config.optim), **changes})
    return LaterConfig(**{**values, "optim": optim})


def test_an_operational_setting_does_not_change_the_name() -> None:
    ours = load_config("tiny")
    keys = [key for key, (_, operational) in list_settings(ours).items() if operational]
    assert sorted(keys) == sorted(override.partition("=")[0] for override in OPERATIONAL)
    for override in OPERATIONAL:
        theirs = load_config("tiny", [override])
        assert digest(ours) == digest(theirs), override
        assert difference(ours, theirs, affecting_weights=True) == [], override
        assert len(difference(ours, theirs, affecting_weights=False)) == 1, override


OTHERS = """
    optim.lr=1e-3 optim.steps=7 train.seed=7 train.init= data.flip=0 data.max_images=7 model.norm_eps=1e-3
    data.bit_depth=12 data.keep_empty=true data.val_split=other model.rpn.post_nms_test=7
""".split()


@pytest.mark.parametrize("override", OTHERS)
def test_any_other_setting_changes_the_name(override: str) -> None:
    ours, theirs = load_config("tiny"), load_config("tiny", [override])
    assert digest(ours) != digest(theirs)
    assert difference(ours, theirs, affecting_weights=True) == difference(ours, theirs)
    assert difference(ours, theirs, affecting_weights=False) == []


def test_a_new_setting_at_its_default_does_not_change_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load_config("tiny")
    assert digest(later(config)) == digest(config)
    assert digest(later(config, nesterov=True)) != digest(config)
    monkeypatch.setattr(digest_module, "LATER", (*digest_module.LATER, "optim.nesterov"))
    assert legacy_digest(later(config)) == digest_of_version_01("tiny")
    assert legacy_digest(later(config, nesterov=True)) is None


def digest_of_version_01(recipe: str) -> str:
    return json.loads(STORED.read_text())["digests"][recipe]


@pytest.mark.parametrize("recipe", json.loads(STORED.read_text())["digests"])
def test_the_digest_of_commit_dad8b8b_can_still_be_computed(recipe: str) -> None:
    config = load_config(recipe)
    assert legacy_digest(config) == digest_of_version_01(recipe)
    other = replace(config, data=replace(config.data, workers=7))
    assert legacy_digest(other) != legacy_digest(config)
