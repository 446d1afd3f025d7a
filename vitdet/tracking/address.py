"""The tracking server's address, and its display without credentials."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from vitdet.config.credentials import hide_credentials as hide_credentials
from vitdet.config.credentials import without_credentials
from vitdet.config.ranges import check_address

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
STEP = "VITDET_"  # prefix of the Secret's variables in a pipeline step, see pipeline/graph.py


def tracking_uri(uri: str, folder: Path) -> str:
    """Return the URI of the MLflow store: MLFLOW_TRACKING_URI or, if it is not set, `uri`.

    The default is sqlite:///FOLDER/mlflow.db. Raises ValueError for an invalid address.
    """
    _use_step_secret()
    name = "MLFLOW_TRACKING_URI"
    found = os.environ.get(name, "")
    if not found:
        name, found = "tracking.uri", uri
    check_uri(name, found)
    return found or f"sqlite:///{Path(folder).resolve() / 'mlflow.db'}"


def run_page(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the URL of a run in MLflow's UI; "" if the store has no UI.

    The environment variable MLFLOW_UI_URL, if set, is the address for browsers instead of `uri`.
    """
    base = os.environ.get("MLFLOW_UI_URL", "") or uri
    if not re.match(r"https?://", base, re.IGNORECASE):
        return ""
    base = without_credentials(base).rstrip("/")
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}"


def _use_step_secret() -> None:
    """Set MLflow's variables from the pipeline step's Secret unless MLFLOW_TRACKING_URI is set.

    The pipeline passes the Secret as VITDET_MLFLOW_*, since the MLflow plugin of Kubeflow
    Pipelines 2.17 sets MLFLOW_*.
    """
    if os.environ.get("MLFLOW_TRACKING_URI") or not os.environ.get(f"{STEP}MLFLOW_TRACKING_URI"):
        return
    for name in VARIABLES:  # never combine the Secret's address with other credentials
        os.environ.pop(name, None)
        if value := os.environ.get(f"{STEP}{name}"):
            os.environ[name] = value


def check_uri(name: str, uri: str) -> None:
    """Raise ValueError for an invalid tracking URI; `name` is the name of its setting."""
    check_address(name, uri)
    if not re.match(r"https?://", uri, re.IGNORECASE):
        return
    try:
        parts = urlsplit(uri)  # the addresses of the UI's pages have a fragment
        valid = parts.hostname and parts.port != 0 and not parts.fragment
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{name}: expected http://HOST:PORT, got {hide_credentials(uri)}")


class HidingFilter(logging.Filter):
    """Logging filter that hides the credentials of addresses in messages and tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide_credentials(record.getMessage()), ()
        if record.exc_info:  # formatters print exc_text, if set, instead of exc_info
            text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_text = hide_credentials(text)
        return True
