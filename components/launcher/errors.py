"""Describe a rejected Kubernetes API request in one line: the request, the reason, the remedy.

Status 403 has several causes. An RBAC error contains the account, the verb and the resource
of the missing rule (apiserver, pkg/endpoints/handlers/responsewriters/errors.go); retries do not
help. A request that exceeds a ResourceQuota (apiserver, plugin/resourcequota/controller.go) or is
denied by an admission webhook (pkg/admission/plugin/webhook/errors/statuserror.go) may be admitted
later. Webhooks may also return any other status of at least 400.
"""

from __future__ import annotations

import json
import re

from kubernetes.client.exceptions import ApiException

from components.launcher.templates import KINDS, Kind

MISSING_RULE = re.compile(
    r'User "(?P<account>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)"'
    r' in API group "(?P<group>[^"]*)"'
)
QUOTA = re.compile(r"exceeded quota: |status unknown for quota: ")
WEBHOOK = re.compile(r'admission webhook "[^"]+" denied the request')
# Field errors (apimachinery, pkg/util/validation/field/errors.go), which webhooks include in their
# messages; retries do not help
INVALID_FIELD = re.compile(
    r": (Invalid|Required|Unsupported|Duplicate) value|: (Forbidden|Too long|Too many): "
)


def server_message(error: ApiException) -> str:
    """Return the response's message on one line; "" if there is none, e.g. for an unknown path."""
    try:
        return " ".join(json.loads(error.body)["message"].split())
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def describe_outage(error: Exception) -> str:
    """Return a message about a failed connection that contains the type of the error."""
    return f"does not respond ({type(getattr(error, 'reason', None) or error).__name__})"


def may_be_admitted_later(error: ApiException) -> bool:
    """Return whether a quota or admission webhook rejected the request but may admit it later."""
    message = server_message(error)
    if not 400 <= (error.status or 0) < 500 or INVALID_FIELD.search(message):
        return False
    return bool(QUOTA.search(message) or WEBHOOK.search(message))


def describe_error(kind: Kind, namespace: str, verb: str, error: ApiException) -> str:
    """Return one line with the rejected request, the reason and, if known, the remedy."""
    message = server_message(error)
    what = f"cannot {verb} in namespace {namespace}"
    rule = MISSING_RULE.search(message)
    if rule and rule["account"] == "system:anonymous":
        return (
            f"{what}: the request had no credentials; log in to the cluster (HTTP {error.status})"
        )
    if rule:
        resource = f"{rule['resource']}.{rule['group']}".rstrip(".")
        return (
            f"{what}: account {rule['account']} has no Role that allows {rule['verb']} on "
            f"{resource}; apply manifests/shared (Role vitdet-pipeline), or use an account with "
            "this Role"
        )
    reason = message or error.reason
    if error.status == 401:
        return f"{what}: {reason}: the API server does not accept the credentials (HTTP 401)"
    if error.status == 404 and not message:
        version = f"{kind.group}/{kind.version}"
        word, other = next(item for item in KINDS.items() if item[1] is not kind)
        return (
            f"{what}: the cluster has no resource {kind.name} ({version}); install {kind.operator}"
            f", or submit a {other.name} (--job-kind {word}) if the cluster has this kind"
        )
    return f"{what}: {reason} (HTTP {error.status})"
