"""Failure policies of a Job and its JobSet for failed pods.

Kubernetes' Job controller: pkg/controller/job/pod_failure_policy.go (matchPodFailurePolicy) and job_controller.go
(getFailJobMessage, and the order in syncJob: the pod failure policy of any failed pod before the backoff limit). FailJob
is the only simulated action. JobSet 0.12: pkg/controllers/failure_policy.go, constants of pkg/constants/constants.go.
"""

from __future__ import annotations

import re

RESTARTS_IGNORED = "RestartJobSetAndIgnoreMaxRestarts"


def matches(rule: dict, pod: dict) -> str | None:
    """Return how the pod matches the rule, in the words of the Job's condition, else None."""
    where, status = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}", pod["status"]
    if codes := rule.get("onExitCodes"):
        for entry in status.get("containerStatuses") or []:
            code = entry["state"].get("terminated", {}).get("exitCode", 0)
            listed = (code in codes["values"]) == (codes["operator"] == "In")
            if codes.get("containerName", entry["name"]) == entry["name"] and code and listed:
                return f"Container {entry['name']} for pod {where} failed with exit code {code}"
        return None
    for condition in status.get("conditions") or []:
        for pattern in rule["onPodConditions"]:
            if {**condition, **pattern} == condition:
                return f"Pod {where} has condition {condition['type']}"
    return None


def job_failure(spec: dict, pods: list[dict]) -> tuple[str, str] | None:
    """Return reason and message of the Failed condition of a Job with these pods, else None."""
    failed = [pod for pod in pods if pod["status"]["phase"] == "Failed"]
    for pod in failed:
        for index, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", [])):
            assert rule["action"] == "FailJob", "no other action is simulated"
            if found := matches(rule, pod):
                return "PodFailurePolicy", f"{found} matching FailJob rule at index {index}"
    if len(failed) > spec.get("backoffLimit", 6):
        return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    return None


def failure_action(policy: dict, reason: str, message: str) -> str:
    """Return the action of the first matching rule: findFirstFailedPolicyRuleAndJob, ruleIsApplicable."""
    for rule in policy.get("rules", []):
        reasons = rule.get("onJobFailureReasons", [])
        patterns = rule.get("onJobFailureMessagePatterns", [])
        if (not reasons or reason in reasons) and (
            not patterns or any(re.search(pattern, message) for pattern in patterns)
        ):
            return rule["action"]
    return "RestartJobSet"


def jobset_failure(
    policy: dict | None, reason: str, message: str, counted: int, job: str
) -> tuple[str, str] | None:
    """Return reason and message of a JobSet's Failed condition, None if it restarts.

    `counted` is the number of restarts that count towards maxRestarts.
    """
    first = f"(first failed job: {job})"
    if policy is None:
        return "FailedJobs", f"jobset failed due to one or more job failures {first}"
    action = failure_action(policy, reason, message)
    if action == "FailJobSet":
        return "FailJobSetFailurePolicyAction", f"applying FailJobSet failure policy action {first}"
    if action == RESTARTS_IGNORED or counted < policy.get("maxRestarts", 0):
        return None
    return ("ReachedMaxRestarts", f"jobset failed due to reaching max number of restarts {first}")
