"""The address of the tracking server, and how it is shown."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

# user:password@ of an address; a password may itself contain @
CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]*@")


def tracking_uri(uri: str, folder: Path) -> str:
    """The server in use: the environment's MLFLOW_TRACKING_URI, else `uri`, else FOLDER/mlflow.db."""
    return (
        os.environ.get("MLFLOW_TRACKING_URI")
        or uri
        or f"sqlite:///{Path(folder).resolve() / 'mlflow.db'}"
    )


def hide_credentials(text: object) -> str:
    """Return the text with *** instead of the user and password of each address in it."""
    return CREDENTIALS.sub("***@", str(text))


class HidingFilter(logging.Filter):
    """Hides the credentials of addresses in every message."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide_credentials(record.getMessage()), ()
        return True
