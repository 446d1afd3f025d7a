"""An MLflow client that can retry requests and raises exceptions with one-line messages.

MLflow's HTTP client (urllib3) retries requests after a lost connection and after some HTTP errors,
e.g. 429 and 503, with a back-off or after the time in Retry-After. MLflow reads the number of
retries from the environment for each request. During training, requests are not retried, as
`vitdet.tracking.shipper` sends the records again later. Commands enable retries with `repeating`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

from vitdet.tracking.address import hide_credentials

# Attempts per request; the pauses of 0, 2, 4, 8, 16 and 32 s are enough for a server restart.
TRIES = 7
BACK_OFF = "1"
RETRIES, FACTOR = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"
NO_RETRIES = "00"  # not "0", so that a child process does not mistake it for a user's setting
DEFAULTS = {
    RETRIES: NO_RETRIES,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
USER_SETTINGS = {
    name: os.environ[name]
    for name in (RETRIES, FACTOR)
    if os.environ.get(name, NO_RETRIES) != NO_RETRIES
}
# Requests that are not retried, as a request without a response may have succeeded; see `create`.
ONCE = ("create_experiment", "create_run", "create_registered_model", "create_model_version")
DENIED = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}  # HTTP 401 and 403
# MLflow and its libraries for HTTP, databases and artifact stores. MLflow does not convert all
# exceptions of these libraries.
LIBRARIES = {
    *("mlflow", "requests", "urllib3", "sqlalchemy", "psycopg2"),
    *("botocore", "boto3", "s3transfer", "google", "azure"),
}
# SQLAlchemy's exceptions for an invalid URI or file; an OperationalError may be temporary.
NO_DATABASE = {"ArgumentError", "NoSuchModuleError", "DatabaseError"}
# All threads share the environment and the loggers; `repeating` changes these under this lock.
LOCK = threading.RLock()
T = TypeVar("T")
log = logging.getLogger(__name__)


class RefusedError(ValueError):
    """A request or store that MLflow will never accept."""


class InvalidRequestError(RefusedError):
    """MLflow rejects this request as invalid, but may accept other requests."""


class UnknownRunError(LookupError):
    """The run is neither on the server nor in a journal from which it could be created."""


KINDS: dict[str, type[Exception]] = {
    "RESOURCE_ALREADY_EXISTS": FileExistsError,
    "RESOURCE_DOES_NOT_EXIST": LookupError,
    "ENDPOINT_NOT_FOUND": LookupError,
    "INVALID_PARAMETER_VALUE": InvalidRequestError,
    "BAD_REQUEST": InvalidRequestError,
}


class Client:
    """Wraps MlflowClient for the server `uri`, optionally with retries (see `repeating`).

    Its methods raise LookupError if an object does not exist on the server, FileExistsError if it
    already exists, RefusedError if the server rejects the request permanently or denies access, and
    ConnectionError for all other errors of LIBRARIES, e.g. if the server does not respond.
    """

    def __init__(self, client: Any, uri: str, retries: bool = True) -> None:
        self._client, self.uri, self._retries = client, uri, retries

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def _call(*args: Any, **kwargs: Any) -> Any:
            if not self._retries:
                with translated(self.uri):
                    return method(*args, **kwargs)
            with repeating(self.uri, tries=1 if name in ONCE else None):
                return method(*args, **kwargs)

        return _call

    def repeating(self) -> Client:
        """Return a client for the same server, with retries."""
        return Client(self._client, self.uri)


def open_client(uri: str) -> Client:
    """Return a client without retries. Raises RefusedError if the store can never be used."""
    for name, value in DEFAULTS.items():  # not cached: MLflow reads the variables for every request
        os.environ.setdefault(name, value)
    return _cached_client(uri)


@cache
def _cached_client(uri: str) -> Client:
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)  # logs migrations of a new SQLite file
    # logs the traceback of each database error, in addition to raising it
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    try:
        return Client(MlflowClient(uri, uri), uri, retries=False)
    except Exception as error:
        is_invalid = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
        lacks_driver = isinstance(error, ImportError)
        if not (is_invalid or lacks_driver or type(error).__name__ in NO_DATABASE):
            raise
        raise RefusedError(
            f"{hide_credentials(uri)}: {first_line(error)}; set tracking.uri or "
            "MLFLOW_TRACKING_URI to http://HOST:PORT or sqlite:///FILE"
        ) from None  # the exception's context may contain the address with the password


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Convert exceptions of MLflow and its libraries to the exceptions of `Client`."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in LIBRARIES:
            raise
        shown, line = hide_credentials(uri), first_line(error)
        if _is_denied(error, uri):
            line = (
                f"{shown} denies access ({line}); set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, for an account with permission"
            )
            # the exception's context contains the address with the password
            raise RefusedError(line) from None
        kind = KINDS.get(getattr(error, "error_code", ""), ConnectionError)
        raise kind(f"{shown}: {line}") from None


@contextmanager
def repeating(uri: str, tries: int | None = None) -> Iterator[None]:
    """Allow up to `tries` attempts (default: TRIES) for each MLflow request in this context.

    MLflow functions without a client argument use the server `uri`. Only one thread at a time can
    be in this context. If `tries` > 1, USER_SETTINGS take precedence. Raises `Client`'s errors.
    """
    tries = TRIES if tries is None else tries
    settings = {"MLFLOW_TRACKING_URI": uri, RETRIES: str(tries - 1), FACTOR: BACK_OFF}
    settings |= USER_SETTINGS if tries > 1 else {}
    retry, pool = (
        logging.getLogger(f"urllib3.{name}") for name in ("util.retry", "connectionpool")
    )
    log_wait = partial(_log_wait, hide_credentials(uri))
    with LOCK:
        before = {name: os.environ.get(name) for name in settings}
        levels = retry.level, pool.level
        os.environ.update(settings)
        retry.addFilter(log_wait)
        retry.setLevel(logging.DEBUG)
        pool.setLevel(logging.ERROR)  # avoids logging some of the retries twice
        try:
            with translated(uri):
                yield
        finally:
            retry.removeFilter(log_wait)
            retry.setLevel(levels[0])
            pool.setLevel(levels[1])
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _log_wait(shown: str, record: logging.LogRecord) -> bool:
    """Log a retry, in place of urllib3's debug message."""
    retry: Any = record.args[-1] if isinstance(record.args, tuple) and record.args else None
    if history := getattr(retry, "history", ()):
        last = history[-1]
        reason = f"HTTP status {last.status}" if last.status else first_line(last.error)
        log.warning("%s: %s; attempts left: %d", shown, reason, retry.total + 1)
    return False


def create(find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """Return the result of `find` or, if it is None, the result of `make`.

    If `make` raises ConnectionError or FileExistsError, both are called again, up to twice.
    """
    for last in (False, False, True):
        if (found := find()) is not None:
            return found
        try:
            return make()
        except (ConnectionError, FileExistsError) as error:
            if last:
                raise
            log.warning("%s; querying the server before retrying", first_line(error))
    raise AssertionError


def _is_denied(error: Exception, uri: str) -> bool:
    """Return whether an error was caused by HTTP status 401 or 403."""
    from mlflow.exceptions import MlflowException, RestException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    status = getattr(getattr(error, "response", None), "status_code", None)  # errors of `requests`
    if getattr(error, "error_code", "") in DENIED or status in (401, 403):
        return True
    if not isinstance(error, RestException) or "error_code" in error.json:
        return False
    try:  # a proxy's response: the exception lacks the HTTP status, so send a request to get it
        path = "/api/2.0/mlflow/experiments/search?max_results=1"
        return http_request(get_default_host_creds(uri), path, "GET").status_code in (401, 403)
    except MlflowException:
        return False


def first_line(error: object) -> str:
    """Return an error's first line without credentials; of a long line, the start and the end.

    The end contains the cause: `(Caused by ...: Connection refused'))`.
    """
    text = re.sub(r"^\(raised as a result of .*\)\n", "", str(error).strip())  # from SQLAlchemy
    line = hide_credentials((text.splitlines() or [repr(error)])[0])
    return line if len(line) <= 300 else f"{line[:100]} ... {line[-195:]}"
