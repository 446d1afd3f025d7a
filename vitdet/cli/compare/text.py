"""Markdown text of a comparison: conclusions, AP, classes, seeds, speed, settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from vitdet.cli.compare.inputs import Compared
from vitdet.config import Config, override
from vitdet.config.digest import training_settings
from vitdet.evaluation.bootstrap import METRICS, MIN_IMAGES, Difference, Interval, Resampled
from vitdet.evaluation.coco import NAMES
from vitdet.tracking.address import hide_credentials
from vitdet.tracking.table import markdown_table, mean_deviation

CHANGES = 10  # maximum number of classes shown for each result
AP_HEADS = [metric.replace("ap", "AP") for metric in METRICS]
# column -> MLflow metric of the training run
RESOURCES = {
    "training images/s": "images_per_second",
    "evaluation s/image": "seconds_per_image",
    "memory (GB)": "memory_gb",
    "GPU hours": "gpu_hours",
}


def comparison_text(
    compared: Sequence[Compared], resampled: Mapping[str, Sequence[Resampled]]
) -> str:
    """Return Markdown that compares all inputs with the first. resampled: results by kind."""
    names, matches = _names(compared), next(iter(compared[0].matches.values()))
    resamples = len(next(iter(resampled.values()))[0].resampled)
    protocol = next((item.protocol for item in compared if item.protocol), None)
    data = f", data {protocol.fingerprint}" if protocol and protocol.fingerprint else ""
    heads = ["result", "kind", *AP_HEADS, "AP - first", "p", "significant"]
    sections = [
        "# Comparison\n",
        "".join(f"- {sentence}\n" for sentence in _conclusions(names, resampled)),
        f"Images: {len(matches.image_ids)}, classes: {len(matches.category_ids)}{data}. Brackets "
        f"contain 95% confidence intervals from a paired bootstrap with {resamples} resamples of "
        "the images. A difference is significant at the 5% level if its interval excludes 0; p is "
        f"two-sided. A difference is tested if {MIN_IMAGES} or more images have objects. Training "
        "noise is not included: compare several seeds.\n",
        "## AP\n",
        markdown_table(heads, [*_ap_rows(names, resampled)], padded=True),
    ]
    for kind, results in resampled.items():
        for name, result in zip(names[1:], results[1:], strict=True):
            sections += _classes(name, kind, results[0], result)
    sections += _seeds(names, compared, resampled)
    if any(item.metrics.get(key) is not None for item in compared for key in RESOURCES.values()):
        sections += ["## Speed and memory\n", _resources(names, compared)]
    if sum(bool(item.settings) for item in compared) > 1:
        sections += ["## Settings that differ\n", _settings(names, compared)]
    return "\n".join(sections)


def _names(compared: Sequence[Compared]) -> list[str]:
    """Return the names of the inputs; equal names are numbered."""
    names = [result.name for result in compared]
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _conclusions(
    names: Sequence[str], resampled: Mapping[str, Sequence[Resampled]]
) -> Iterator[str]:
    first = names[0]
    for index, name in enumerate(names[1:], start=1):
        for kind, results in resampled.items():
            found = results[index].difference(results[0])
            if found is None:
                continue
            ap, value = f"{NAMES[kind]} AP", found.value
            limits = f"95% interval {_range(found, '{:+.2f}')}"
            if found.is_significant is None:
                yield (
                    f"{name} and {first} differ by {value:+.2f} {ap}; not tested for "
                    f"significance, which needs at least {MIN_IMAGES} images with objects (found: "
                    f"{found.images})."
                )
            elif found.is_significant:
                yield (
                    f"{name} is {'better' if value > 0 else 'worse'} than {first} by "
                    f"{abs(value):.2f} {ap} ({limits}): the difference is significant."
                )
            else:
                yield (
                    f"{name} and {first} do not differ significantly: {value:+.2f} {ap} ({limits})."
                )


def _ap_rows(
    names: Sequence[str], resampled: Mapping[str, Sequence[Resampled]]
) -> Iterator[list[str]]:
    for kind, results in resampled.items():
        for name, result in zip(names, results, strict=True):
            intervals = [_interval(result.interval(metric)) for metric in METRICS]
            found = None if result is results[0] else result.difference(results[0])
            yield [name, NAMES[kind], *intervals, *_difference(found)]


def _classes(name: str, kind: str, first: Resampled, result: Resampled) -> list[str]:
    """Return the section on the classes whose AP differs most from the first result's AP."""
    found = []
    for index, label in enumerate(result.class_names):
        difference = result.difference(first, "ap", index)
        if difference is not None:
            found.append((label, difference, first.value[0, index + 1], result.value[0, index + 1]))
    found.sort(key=lambda row: -abs(row[1].value))
    flags = [row[1].is_significant for row in found if row[1].is_significant is not None]
    rows = [
        [label, str(difference.images), f"{before:.1f}", f"{after:.1f}", *_difference(difference)]
        for label, difference, before, after in found[:CHANGES]
    ]
    note = (
        f"Classes shown (largest changes): {len(rows)} of {len(found)}. Classes tested (objects in "
        f"{MIN_IMAGES} or more images): {len(flags)}; significant: {sum(flags)}. The tests are not "
        "corrected for multiple comparisons: about 1 in 20 unchanged classes is significant by "
        "chance.\n"
    )
    heads = ["class", "images", "first", "AP", "AP - first", "p", "significant"]
    title = f"## Classes: {name}, {NAMES[kind]} AP\n"
    return [title, note, markdown_table(heads, rows, padded=True)]


def _seeds(
    names: Sequence[str], compared: Sequence[Compared], resampled: Mapping[str, Sequence[Resampled]]
) -> list[str]:
    """Return the section on groups of runs with different seeds and otherwise equal training
    settings, or [] if there are no such groups.
    """
    groups = defaultdict(list)
    for index, item in enumerate(compared):
        if training := _training(item.settings):
            groups[training].append(index)
    rows = []
    for group in groups.values():
        seeds = {compared[index].settings["train.seed"] for index in group}
        if not len(seeds) == len(group) > 1:  # equal seeds: checkpoints of the same run
            continue
        members = ", ".join(names[index] for index in group)
        for kind, results in resampled.items():
            values = [results[index].value[:, 0].tolist() for index in group]
            cells = [mean_deviation(column) for column in zip(*values, strict=True)]
            rows.append([members, str(len(group)), NAMES[kind], *cells])
    title, heads = "## Over seeds: mean ± standard deviation\n", ["results", "number", "kind"]
    return [title, markdown_table([*heads, *AP_HEADS], rows, padded=True)] if rows else []


def _training(settings: Mapping[str, str]) -> tuple:
    """Return the settings that affect the weights, except the seed; () if they are unknown."""
    try:
        config = override(Config(), [f"{key}={value}" for key, value in settings.items()])
    except ValueError:  # the settings are from another version of vitdet
        return ()
    affecting = training_settings(config) if settings else {}
    return tuple((key, value) for key, value in affecting.items() if key != "train.seed")


def _resources(names: Sequence[str], compared: Sequence[Compared]) -> str:
    values = [[result.metrics.get(key) for key in RESOURCES.values()] for result in compared]
    rows = [
        [name, *("-" if value is None else f"{value:.3g}" for value in row)]
        for name, row in zip(names, values, strict=True)
    ]
    return markdown_table(["result", *RESOURCES], rows, padded=True)


def _settings(names: Sequence[str], compared: Sequence[Compared]) -> str:
    pairs = zip(names, compared, strict=True)
    known = {name: item.settings for name, item in pairs if item.settings}
    rows = []
    for key in dict.fromkeys(key for settings in known.values() for key in settings):
        values = [settings.get(key, "-") for settings in known.values()]
        if len(set(values)) > 1:
            rows.append([key, *map(hide_credentials, values)])
    return markdown_table(["setting", *known], rows, padded=True) if rows else "None.\n"


def _interval(found: Interval | None) -> str:
    return "-" if found is None else f"{found.value:.2f} [{_range(found)}]"


def _difference(found: Difference | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    value = f"{found.value:+.2f} [{_range(found, '{:+.2f}')}]"
    if found.is_significant is None:
        return [value, "-", "-"]
    return [value, f"{found.p:.3f}", "yes" if found.is_significant else "no"]


def _range(found: Interval, form: str = "{:.2f}") -> str:
    return f"{form} to {form}".format(found.low, found.high)
