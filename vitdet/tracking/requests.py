"""Retries of MLflow requests after transient errors.

MLflow's HTTP client does it (urllib3): after a lost connection, 408, 429 and 5xx, with a back-off, or after the time
that the server names in Retry-After. Here it is switched on for single calls, and each wait is logged.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from vitdet.tracking.address import hide_credentials

# with 0, 2, 4, ... seconds between them: about a minute, as long as a server takes to restart
TRIES = 7
BACK_OFF = 1
RETRIES, FACTOR = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"
# Environment variable with the settings, as NAME=VALUE, that are not the user's but of `set_defaults`: child processes
# inherit both.
DEFAULTS = "VITDET_MLFLOW_DEFAULTS"
# Set by the user
USER_SETTINGS = {
    name: os.environ[name]
    for name in (RETRIES, FACTOR)
    if name in os.environ
    and f"{name}={os.environ[name]}" not in os.environ.get(DEFAULTS, "").split()
}
# If the answer is lost, the request may have been carried out: see `create`.
ONCE = ("create_experiment", "create_run", "create_registered_model", "create_model_version")
MISSING = {"RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND"}
INVALID = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
DENIED = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}  # 401 and 403
# MLflow, and what it uses for HTTP, databases and artifact stores; not all of their errors become MLflow's
LIBRARIES = {
    *("mlflow", "requests", "urllib3", "sqlalchemy", "psycopg2"),
    *("botocore", "boto3", "s3transfer", "google", "azure"),
}
# of SQLAlchemy: no address of a database, no database; not its OperationalError, which may pass
NO_DATABASE = {"ArgumentError", "NoSuchModuleError", "DatabaseError"}
# MLflow's settings and the loggers are the process's: blocks of two threads must not restore each other's values.
LOCK = threading.RLock()
T = TypeVar("T")
log = logging.getLogger(__name__)


class RefusedError(ValueError):
    """What MLflow will not accept later either."""


class UnknownRunError(LookupError):
    """The server does not have the run, and there is nothing to make it of."""


def set_defaults(settings: dict[str, str]) -> None:
    """Set MLflow's environment variables that are not set, and mark them as not set by the user."""
    missing = {name: value for name, value in settings.items() if name not in os.environ}
    marks = [f"{name}={value}" for name, value in missing.items()]
    known = os.environ.get(DEFAULTS, "").split()
    os.environ.update(missing)
    os.environ[DEFAULTS] = " ".join(dict.fromkeys([*known, *marks]))


class RepeatingClient:
    """An MlflowClient whose requests are repeated, and whose errors are of Python and one line each.

    LookupError: it does not exist on the server. FileExistsError: it exists already. RefusedError: the server rejects the
    request permanently or denies access. ConnectionError: all others, e.g. no answer.
    """

    def __init__(self, client: Any, uri: str) -> None:
        self._client, self._uri = client, uri

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def _call(*args: Any, **kwargs: Any) -> Any:
            with repeating(self._uri, tries=1 if name in ONCE else None):
                return method(*args, **kwargs)

        return _call


@contextmanager
def repeating(uri: str, tries: int | None = None) -> Iterator[None]:
    """Make each of MLflow's requests in this block up to so many times; raises as `RepeatingClient` does.

    Threads run such blocks one after another.
    """
    with LOCK, _retry_settings(uri, TRIES if tries is None else tries):
        yield


@contextmanager
def _retry_settings(uri: str, tries: int) -> Iterator[None]:
    logger, waits = logging.getLogger("urllib3.util.retry"), _Waits(uri)
    connections = logging.getLogger("urllib3.connectionpool")  # logs some of the same waits
    settings = {RETRIES: str(tries - 1), FACTOR: str(BACK_OFF)} | (
        USER_SETTINGS if tries > 1 else {}
    )
    before = {name: os.environ.get(name) for name in settings}
    levels = logger.level, logger.propagate, connections.level
    os.environ.update(settings)
    logger.addHandler(waits)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    connections.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in LIBRARIES:
            raise
        raise _translated(error, uri) from None  # its context names the address with the password
    finally:
        logger.removeHandler(waits)
        logger.setLevel(levels[0])
        logger.propagate = levels[1]
        connections.setLevel(levels[2])
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Waits(logging.Handler):
    """Logs that a request is repeated, once per repetition, from the message that urllib3 has for developers."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = hide_credentials(uri)

    def emit(self, record: logging.LogRecord) -> None:
        retry: Any = record.args[-1] if isinstance(record.args, tuple) and record.args else None
        history = getattr(retry, "history", ())
        if not history:
            return
        last = history[-1]
        reason = f"the answer is {last.status}" if last.status else first_line(last.error)
        log.warning("%s: %s; %d more tries", self._uri, reason, retry.total + 1)


def create(find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """Return what `find` finds, or else what `make` makes; after a lost answer, look again before making another."""
    for last in (False, False, True):
        if (found := find()) is not None:
            return found
        try:
            return make()
        except (ConnectionError, FileExistsError) as error:
            if last:
                raise
            log.warning("%s; looking whether it was carried out", first_line(error))
    raise AssertionError


def _translated(error: Exception, uri: str) -> Exception:
    code = getattr(error, "error_code", "")
    kind: type[Exception] = ConnectionError
    if code == "RESOURCE_ALREADY_EXISTS":
        kind = FileExistsError
    elif _is_denied(error, uri):
        return _denied(error, uri)
    elif code in MISSING | INVALID:
        kind = LookupError if code in MISSING else RefusedError
    return kind(f"{hide_credentials(uri)}: {first_line(error)}")


def _is_denied(error: Exception, uri: str) -> bool:
    """Whether an error is of a 401 or 403."""
    from mlflow.exceptions import MlflowException, RestException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    status = getattr(getattr(error, "response", None), "status_code", None)  # of requests
    if getattr(error, "error_code", "") in DENIED or status in (401, 403):
        return True
    if not isinstance(error, RestException) or "error_code" in error.json:
        return False
    try:  # JSON of a proxy: MLflow's error lacks the status, so the request is repeated
        answer = http_request(
            get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search?max_results=1", "GET"
        )
    except MlflowException:
        return False
    return answer.status_code in (401, 403)


def _denied(error: Exception, uri: str) -> RefusedError:
    return RefusedError(
        f"{hide_credentials(uri)} denies access ({first_line(error)}); set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of an account that may do this"
    )


@contextmanager
def permitted(uri: str) -> Iterator[None]:
    """Raise a RefusedError where MLflow answers 401 or 403 in this block."""
    try:
        yield
    except Exception as error:
        if not _is_denied(error, uri):
            raise
        raise _denied(error, uri) from None  # its context may name the address with the password


@contextmanager
def using(uri: str) -> Iterator[None]:
    """Raise a RefusedError if it shows in this block that the store at `uri` can never be used."""
    try:
        with permitted(uri):
            yield
    except Exception as error:
        # not BAD_REQUEST, which a proxy in front of a server may answer for a while
        is_invalid = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
        lacks_driver = isinstance(error, ImportError)
        if not (is_invalid or lacks_driver or type(error).__name__ in NO_DATABASE):
            raise
        raise RefusedError(
            f"{hide_credentials(uri)}: {first_line(error)}; set tracking.uri or MLFLOW_TRACKING_URI to "
            "http://HOST:PORT or sqlite:///FILE"
        ) from None  # its context may name the address with the password


def first_line(error: object) -> str:
    """Return the first line of an error, without credentials."""
    return hide_credentials((str(error).strip().splitlines() or [repr(error)])[0][:300])
