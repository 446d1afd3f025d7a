"""The option `--set SECTION.KEY=VALUE`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdet.config import Config
    from vitdet.data.images import Reading

log = logging.getLogger(__name__)
READING = ("max_pixels", "bit_depth")  # settings of `data` for reading image files


def add_set(verb: argparse.ArgumentParser, help: str = "") -> None:
    """Add `--set`. The default help text is for commands that accept all settings."""
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help=help or "override a setting, e.g. optim.lr=2e-4; may be repeated",
    )


def add_reading(verb: argparse.ArgumentParser, names: Sequence[str] = READING) -> None:
    """Add `--set` for the `data` settings in `names` to a command that reads image files."""
    settings = " or ".join(f"data.{name}=N" for name in names)
    add_set(verb, f"override a setting for reading images, {settings}; may be repeated")


def reading_with(
    overrides: Sequence[str], reading: Reading, names: Sequence[str] = READING
) -> Reading:
    """Return `reading` with overrides. Raises ValueError for a setting not in `names`."""
    from vitdet.config import Config, DataConfig, override
    from vitdet.data.images import Reading
    from vitdet.data.layout import overridden_settings

    allowed = [f"data.{name}" for name in names]
    if others := sorted(overridden_settings(overrides) - {"data", *allowed}):
        raise ValueError(f"{others[0]} has no effect; --set accepts {' and '.join(allowed)}")
    return Reading.of(override(Config(data=DataConfig(**vars(reading))), overrides).data)


def log_resolved(config: Config, found: Mapping[str, str | int]) -> None:
    """Log the settings that were determined from the data, if any."""
    from vitdet.data.layout import settings_text

    if found:
        log.info("%s has %s", config.data.root, settings_text(found))
