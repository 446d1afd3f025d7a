"""`--set SECTION.KEY=VALUE`, which every verb with a config takes."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdet.config import Config

log = logging.getLogger(__name__)


def add_set(verb: argparse.ArgumentParser) -> None:
    """The one way to change a setting."""
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="change a setting, as in optim.lr=2e-4; may be repeated",
    )


def log_resolved(config: Config, found: Mapping[str, str | int]) -> None:
    """Log the settings that were read from the data, if there are any."""
    from vitdet.data.layout import settings_text

    if found:
        log.info("%s has %s", config.data.root, settings_text(found))
