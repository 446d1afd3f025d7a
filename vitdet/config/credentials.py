"""Detection and masking of credentials in addresses."""

from __future__ import annotations

import re

_TEXT = r"(?:[^\s'\"]|['\"](?=\w))"  # a quote within a password, but not a quote that ends the URL
# USER:PASSWORD@ after ://. A password may contain / and @, so match up to the last @, unless the
# colon precedes the port of http://HOST:PORT/PATH, or there is no colon (then the path may contain
# @, as in s3://BUCKET/a@b, and the address of a file has no host).
_USER = (
    rf"(?:(?<!http)(?<!https)|(?!://[^/\s]*:\d+/))(?P<scheme>://)[^/\s'\"\[]*?:{_TEXT}*(?P<at>@)"
)
_USER_ONLY = r"(?<=://)[^/\s'\"]*(?P<at2>@)"
# NAME=VALUE of a query; %3B and %3D: of an ODBC connection string in one
_NAME = (
    r"[\w.-]*(?:password|passwd|passphrase|secret|token|signature|credential"
    r"|(?:api|access|account|shared)[_-]?key)[\w.-]*"
    r"|key|pwd|pass|sig|auth"
)
_QUERY = rf"(?P<name>(?:[?&;]|%3[BF]|%26|odbc_connect=)(?:{_NAME})(?:=|%3D))[^&\s'\"]+"
_CREDENTIALS = re.compile(f"{_USER}|{_USER_ONLY}|{_QUERY}", re.IGNORECASE)


def has_credentials(address: str) -> bool:
    """Return whether an address contains a user, a password, a token or a key.

    A password as in http://USER:12/ab@HOST, which begins like a port, is not recognized.
    """
    return bool(_CREDENTIALS.search(address))


def hide_credentials(text: object) -> str:
    """Return the text with *** in place of its credentials."""
    return _CREDENTIALS.sub(r"\g<scheme>\g<name>***\g<at>\g<at2>", str(text))


def without_credentials(address: str) -> str:
    """Return the address without its credentials."""
    return _CREDENTIALS.sub(r"\g<scheme>", address)
