"""The model card of a registered version: Markdown for its description and its artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from vitdet.config import Config, from_dict, load_config
from vitdet.data.protocol import Protocol
from vitdet.evaluation.bootstrap import METRICS, Interval, Resampled, WeightedAP, bootstrap
from vitdet.evaluation.coco import NAMES
from vitdet.evaluation.matches import Matches
from vitdet.tracking.gate import Evaluation
from vitdet.weights.catalogue import CATALOGUE, NOT_PUBLISHED

DESCRIPTION = 5000  # characters of a description: MLflow's column (store/model_registry/dbmodels)
MORE = "\n\n... The whole text is in the artifact `model_card.md`."
SHOWN_CLASSES = 20
WORST = 5
TITLES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75"}


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a training began from; warning: what their licence may forbid, "" if nothing."""

    name: str
    what: str
    license: str
    warning: str = ""


@dataclass(frozen=True)
class Row:
    """A metric in percent, with its interval if the per-image matches are known."""

    name: str
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class ClassRow:
    """A class with its number of objects and its AP in percent."""

    name: str
    objects: int
    ap: float


def render(
    name: str,
    stored: Mapping,
    used: Config,
    evaluation: Evaluation,
    protocol: Protocol,
    run_id: str | None,
    revision: str,
) -> str:
    """Return the card as Markdown.

    stored: the content of the checkpoint. used: the config of the evaluation. run_id, revision: of
    the training, if known.
    """
    config = from_dict(stored["config"])
    classes = [str(one) for one in stored["class_names"]]
    more = f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else ""
    resampled = {kind: bootstrap([one])[0] for kind, one in evaluation.matches.items()}
    boxes = evaluation.matches.get("bbox")
    environment = Environment(
        loader=PackageLoader("vitdet.tracking", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown
    )
    return environment.get_template("model_card.md.jinja").render(
        name=name,
        architecture=f"{config.model.architecture}, backbone {config.model.backbone.name}",
        classes=classes,
        shown_classes=", ".join(classes[:SHOWN_CLASSES]) + more,
        config=config,
        initial=initial_weights(config.train.init),
        metrics=_rows(evaluation.metrics, resampled),
        has_intervals=bool(resampled),
        images=next((len(one.image_ids) for one in evaluation.matches.values()), 0),
        worst=_worst(boxes) if boxes else [],
        data_name=Path(used.data.root).name,
        val_split=used.data.val_split,
        trained_on={
            "root_name": Path(config.data.root).name,
            "dataset": config.data.dataset,
            "train_split": config.data.train_split,
        },
        fingerprints={"train": (stored.get("fingerprints") or {}).get("train", "")},
        protocol=protocol,
        step=stored["step"],
        run_id=run_id,
        revision=revision[:12],
        evaluate=used.evaluate,
    )


def description_of(card: str) -> str:
    """Return the card without its title, cut at a line if it is longer than a description may be.

    MLflow's list of versions shows the first line.
    """
    card = card.partition("\n")[2].lstrip()
    if len(card) <= DESCRIPTION:
        return card
    kept = card[: DESCRIPTION - len(MORE)]
    return kept.rpartition("\n")[0].rstrip() + MORE


def initial_weights(init: str) -> list[InitialWeights]:
    """Return the weights of train.init, and those that they were themselves trained from.

    A file with the name of a published one is treated as that one.
    """
    if not init:
        return []
    name = Path(init).stem if Path(init).suffix else init
    if name not in CATALOGUE:
        return [
            InitialWeights(
                Path(init).name,
                "a file",
                "unknown",
                f"the licence of the initial weights ({Path(init).name}) is not known here; "
                "ask their source before you use this model.",
            )
        ]
    entry = CATALOGUE[name]
    warning = ""
    if "NC" in entry.license.replace("-", " ").split():
        warning = (
            f"the initial weights ({name}) are licensed under {entry.license}, which excludes "
            "commercial use; weights trained from them may be subject to it."
        )
    elif entry.license == NOT_PUBLISHED:
        warning = (
            f"the authors of the initial weights ({name}) published no licence for them; ask them "
            "before you use this model commercially."
        )
    before = load_config(entry.recipe).train.init if entry.recipe else ""
    return [
        InitialWeights(name, entry.what, entry.license, warning),
        *initial_weights(before),
    ]


def _rows(metrics: Mapping[str, float | None], resampled: Mapping[str, Resampled]) -> list[Row]:
    kinds = {prefix: kind for kind, prefix in NAMES.items()}
    rows = []
    for prefix, kind in kinds.items():
        for metric in METRICS:
            value = metrics.get(f"{prefix}_{metric}")
            if value is not None:
                one = resampled.get(kind)
                interval = one.interval(metric) if one else None
                rows.append(Row(f"{prefix} {TITLES[metric]}", value, interval))
    return rows


def _worst(matches: Matches) -> list[ClassRow]:
    """The classes of the lowest AP, the lowest first."""
    aps = WeightedAP(matches)(np.ones(len(matches.image_ids), np.int32))[0, 1:]
    objects = np.bincount(matches.object_category, minlength=len(aps))
    order = [place for place in np.argsort(aps) if objects[place]][:WORST]
    return [
        ClassRow(matches.class_names[place], int(objects[place]), float(aps[place]))
        for place in order
    ]
