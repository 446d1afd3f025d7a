"""Read and write configs: recipes, YAML files, overrides and dictionaries."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from vitdet.config.credentials import has_credentials
from vitdet.config.ranges import ExperimentName, ModelName, check, check_address
from vitdet.config.schema import Config, TrackingConfig
from vitdet.config.sections import convert_section, list_settings, merge, section_error
from vitdet.config.suggestions import nearest
from vitdet.files import atomic_write, parse_yaml

RECIPES = Path(__file__).parents[1] / "recipes"
SEE_RECIPES = " (`vitdet config` lists all recipes)"


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a recipe or YAML file, with overrides `section.key=value` applied.

    Raises:
        ValueError: for an unknown recipe or setting (the message suggests known names), for a value
            of the wrong type or out of range, and if `check_tracking` raises ValueError.
        FileNotFoundError: if the file does not exist.
    """
    config = _apply_overrides(_read(name_or_path), overrides)
    check_tracking(config.tracking)
    return config


def load_stored(path: str | Path) -> Config:
    """Return a config that a training run or a registration saved.

    Accepts `tracking` settings that `load_config` rejects, since old configs may contain them."""
    return from_dict(_read(path))


def check_tracking(tracking: TrackingConfig) -> None:
    """Raise ValueError for an invalid address or name, and for an address with credentials."""
    check_names(tracking)
    if has_credentials(tracking.uri):
        raise ValueError(
            "tracking.uri must not contain credentials, as it is stored in configs and "
            "checkpoints; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or the whole "
            "address as MLFLOW_TRACKING_URI"
        )


def check_names(tracking: TrackingConfig) -> None:
    """Raise ValueError for an invalid MLflow address, experiment name or model name.

    TrackingConfig accepts invalid values, since old checkpoints may contain them.
    """
    check_address("tracking.uri", tracking.uri)
    check("tracking.experiment", ExperimentName, tracking.experiment)
    check("tracking.model_name", ModelName, tracking.model_name)


def override(
    config: Config, overrides: Sequence[str], other: Config | None = None, sections: Sequence = ()
) -> Config:
    """Return `config` with the overrides applied. sections: names of sections to take from `other`.

    Raises ValueError for unknown settings and invalid values."""
    theirs = to_dict(other) if other else {}
    tree = to_dict(config) | {name: theirs[name] for name in sections if theirs}
    return _apply_overrides(tree, overrides)


def save_config(config: Config, path: str | Path) -> None:
    """Write the config to a YAML file atomically, with all settings."""
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(dump_config(config))


def dump_config(config: Config) -> str:
    """Return the config as YAML text, with all settings."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def to_dict(config: Config) -> dict:
    """Return the config as plain dicts, lists, numbers and strings."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(tree: Mapping) -> Config:
    """Build a config from the output of `to_dict`; missing settings get their default values.

    Raises ValueError for unknown settings and invalid values."""
    if unknown := list(_unknown(Config, tree)):
        raise ValueError("; ".join(unknown))
    return convert_section(Config, tree)


def flatten(config: Config) -> dict[str, bool | int | float | str]:
    """Return all settings by key, e.g. {'optim.lr': 0.0001}; lists are returned as JSON text."""
    values = {key: value for key, (value, _) in list_settings(config).items()}
    return {k: json.dumps(v) if isinstance(v, tuple) else v for k, v in values.items()}


def recipes() -> list[str]:
    """Return the names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _read(name_or_path: str | Path) -> dict:
    text, path = str(name_or_path), Path(name_or_path)
    if not path.suffix and os.sep not in text:
        path = RECIPES / f"{text}.yaml"
        if not path.exists():
            raise ValueError(f"{text}: no such recipe; {nearest(text, recipes())}{SEE_RECIPES}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such config file; expected a file or the name of a recipe{SEE_RECIPES}"
        )
    try:
        tree = parse_yaml(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections ({', '.join(Config.hints)}), got {tree!r}")
    return tree or {}


def _apply_overrides(tree: dict, overrides: Sequence[str]) -> Config:
    settings = flatten(Config())
    for assignment in overrides:
        key, separator, text = map(str.strip, assignment.partition("="))
        if not separator or not key:
            message = f"override {assignment!r}: expected section.key=value, e.g. optim.lr=2e-4"
            raise ValueError(message)
        if outer := next((name for name in settings if key.startswith(f"{name}.")), None):
            raise ValueError(f"{key}: {outer} is a setting, not a section")
        changes: Any = _parse(key, text)
        for name in reversed(key.split(".")):
            changes = {name: changes}
        merge(tree, Config, changes)
    return from_dict(tree)


def _parse(key: str, text: str) -> object:
    """Parse an override's value as YAML. Unquoted values of text settings are not parsed."""
    default, _ = list_settings(Config()).get(key, (None, False))
    if isinstance(default, str) and text[:1] not in ("'", '"'):
        return text
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{key}: {text!r} cannot be parsed as a value") from error


def _unknown(kind: Any, tree: object) -> Iterator[str]:
    """Yield a message for each unknown setting. Raises ValueError if a section is not a mapping."""
    if not isinstance(tree, Mapping | None):
        raise section_error(kind, tree)
    for name, value in (tree or {}).items():
        if name not in kind.hints:
            elsewhere = [key for key in flatten(Config()) if key.endswith(f".{name}")]
            close = f"did you mean '{elsewhere[0]}'?" if elsewhere else ""
            near = close or nearest(str(name), list(kind.hints))
            yield f"{kind.prefix}{name}: no such setting; {near}"
        elif is_dataclass(kind.hints[name]):
            yield from _unknown(kind.hints[name], value)
