"""Detection and masking of credentials in addresses."""

from __future__ import annotations

import re

_TEXT = r"(?:[^\s'\"]|['\"](?=\w))"  # allows a quote in a password, but not one that ends the URL
# USER:PASSWORD@ after ://, up to the last @, since a password may contain / and @. The lookarounds
# exclude the port of http://HOST:PORT/PATH. Without a colon, only the part before the first / can
# be a user, since a path may contain @, as in s3://BUCKET/a@b and file:///a@b.
_USER = (
    rf"(?:(?<!http)(?<!https)|(?!://[^/\s]*:\d+/))(?P<scheme>://)[^/\s'\"\[]*?:{_TEXT}*(?P<at>@)"
)
_USER_ONLY = r"(?<=://)[^/\s'\"]*(?P<at2>@)"
# NAME=VALUE in a query; %3B and %3D are the escaped ; and = of an ODBC connection string
_NAME = (
    r"[\w.-]*(?:password|passwd|passphrase|secret|token|signature|credential"
    r"|(?:api|access|account|shared)[_-]?key)[\w.-]*"
    r"|key|pwd|pass|sig|auth"
)
_QUERY = rf"(?P<name>(?:[?&;]|%3[BF]|%26|odbc_connect=)(?:{_NAME})(?:=|%3D))[^&\s'\"]+"
_CREDENTIALS = re.compile(f"{_USER}|{_USER_ONLY}|{_QUERY}", re.IGNORECASE)


def has_credentials(address: str) -> bool:
    """Return whether an address contains a user, a password, a token or a key.

    Returns False for http://USER:12/ab@HOST, where 12 may be a port and ab@HOST a path.
    """
    return bool(_CREDENTIALS.search(address))


def hide_credentials(text: object) -> str:
    """Return the text with each credential replaced by ***."""
    return _CREDENTIALS.sub(r"\g<scheme>\g<name>***\g<at>\g<at2>", str(text))


def without_credentials(address: str) -> str:
    """Return the address without its credentials."""
    return _CREDENTIALS.sub(r"\g<scheme>", address)
