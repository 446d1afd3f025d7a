"""The model card of a model version: Markdown text in the version's description and artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from vitdet.config import Config, from_dict, load_config
from vitdet.data.protocol import Protocol
from vitdet.evaluation.bootstrap import METRICS, Interval, WeightedAP, bootstrap
from vitdet.evaluation.coco import NAMES
from vitdet.evaluation.matches import Matches
from vitdet.tracking.gate import Evaluation
from vitdet.weights.catalogue import CATALOGUE, NOT_PUBLISHED

# maximum length of a description in MLflow's database (store/model_registry/dbmodels)
DESCRIPTION = 5000
SHOWN_CLASSES = 20
WORST = 5


class InitialWeights(NamedTuple):
    """Initial weights of a training run. warning: a problem with the license, or ""."""

    name: str
    what: str
    license: str
    warning: str = ""


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

    stored: the content of the checkpoint. used: the config of the evaluation. run_id, revision: ID
    and git revision of the training run, if known.
    """
    config, matches = from_dict(stored["config"]), evaluation.matches
    classes = [str(class_name) for class_name in stored["class_names"]]
    environment = Environment(
        loader=PackageLoader("vitdet.tracking", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown
    )
    return environment.get_template("model_card.md.jinja").render(
        name=name,
        config=config,
        used=used,
        classes=classes,
        shown=SHOWN_CLASSES,
        initial=initial_weights(config.train.init),
        metrics=_rows(evaluation),
        images=next((len(found.image_ids) for found in matches.values()), 0),
        worst=_worst(matches["bbox"]) if "bbox" in matches else [],
        data_name=Path(used.data.root).name,
        train_name=Path(config.data.root).name,
        train_fingerprint=(stored.get("fingerprints") or {}).get("train", ""),
        protocol=protocol,
        step=stored["step"],
        run_id=run_id,
        revision=revision[:12],
    )


def description_of(card: str) -> str:
    """Return the card without its title, truncated to the maximum length of a description.

    MLflow's list of versions shows the first line of the description.
    """
    return shortened(card.partition("\n")[2].lstrip(), "model_card.md")


def shortened(text: str, artifact: str) -> str:
    """Return the text, truncated after a line to the maximum length of a description."""
    if len(text) <= DESCRIPTION:
        return text
    more = f"\n\n... The whole text is in the artifact `{artifact}`."
    return text[: DESCRIPTION - len(more)].rpartition("\n")[0].rstrip() + more


def initial_weights(init: str) -> list[InitialWeights]:
    """Return the weights of `train.init`, then the weights that these were trained from, if any.

    A file with the name of published weights is assumed to contain these weights.
    """
    if not init:
        return []
    file = Path(init).name
    name = Path(init).stem if Path(init).suffix else init
    if name not in CATALOGUE:
        warning = (
            f"the license of the initial weights ({file}) is unknown; check their source before "
            "you use this model."
        )
        return [InitialWeights(file, "a file", "unknown", warning)]
    entry, warning = CATALOGUE[name], ""
    if "NC" in entry.license.replace("-", " ").split():
        warning = (
            f"the initial weights ({name}) are licensed under {entry.license}, which excludes "
            "commercial use; weights trained from them may be subject to this license."
        )
    elif entry.license == NOT_PUBLISHED:
        warning = (
            f"no license is published for the initial weights ({name}); ask their authors before "
            "you use this model commercially."
        )
    before = load_config(entry.recipe).train.init if entry.recipe else ""
    return [InitialWeights(name, entry.what, entry.license, warning), *initial_weights(before)]


def _rows(evaluation: Evaluation) -> list[tuple[str, float, Interval | None]]:
    """Return rows (metric, value in percent, interval); the interval is None without matches."""
    rows = []
    for kind, prefix in NAMES.items():
        matches = evaluation.matches.get(kind)
        resampled = bootstrap([matches])[0] if matches else None
        for metric in METRICS:
            value = evaluation.metrics.get(f"{prefix}_{metric}")
            if value is not None:
                interval = resampled.interval(metric) if resampled else None
                rows.append((f"{prefix} {metric.replace('ap', 'AP')}", value, interval))
    return rows


def _worst(matches: Matches) -> list[tuple[str, int, float]]:
    """Return (class, number of objects, AP in percent) of up to WORST classes, lowest AP first."""
    aps = WeightedAP(matches)(np.ones(len(matches.image_ids), np.int32))[0, 1:]
    objects = np.bincount(matches.object_category, minlength=len(aps))
    order = [index for index in np.argsort(aps) if objects[index]][:WORST]
    names = matches.class_names
    return [(names[index], int(objects[index]), float(aps[index])) for index in order]
