"""The address of the tracking server, and how it is shown."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from vitdet.config.credentials import hide_credentials as hide_credentials
from vitdet.config.ranges import check_address


def tracking_uri(uri: str, folder: Path) -> str:
    """The server in use: the environment's MLFLOW_TRACKING_URI, else `uri`, else FOLDER/mlflow.db.

    Raises ValueError for what can be no address.
    """
    name = "MLFLOW_TRACKING_URI"
    found = os.environ.get(name, "")
    if not found:
        name, found = "tracking.uri", uri
    _check_address(name, found)
    return found or f"sqlite:///{Path(folder).resolve() / 'mlflow.db'}"


def _check_address(name: str, uri: str) -> None:
    check_address(name, uri)
    if not re.match(r"https?://", uri, re.IGNORECASE):
        return
    try:
        valid = urlsplit(uri).hostname and urlsplit(uri).port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{name}: expected http://HOST:PORT, got {hide_credentials(uri)}")


class HidingFilter(logging.Filter):
    """Hides the credentials of addresses in every message."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide_credentials(record.getMessage()), ()
        return True
