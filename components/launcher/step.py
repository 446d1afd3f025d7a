"""The step that this process runs: its pod, and whether its pipeline run continues."""

from __future__ import annotations

import os

from components.launcher.client import JobClient
from components.launcher.workflow import end_of_run, is_disrupted, retry_index, workflow_owner

# "0" in the first pod of a step; set by Kubeflow Pipelines since 2.16.1 (argocompiler/common.go)
RETRY_INDEX = "KFP_RETRY_INDEX"
POD = "KFP_POD_NAME"  # set by Kubeflow Pipelines (argocompiler/common.go)


class Step:
    """The step that this process runs.

    owner: an ownerReference to the run's Workflow; None outside a pipeline.
    first_attempt: whether this is the step's first attempt since the run was started or retried.
    """

    def __init__(self, client: JobClient) -> None:
        self.client, self.name = client, os.environ.get(POD, "")
        pod = client.pod(self.name) if self.name else None
        self.owner = workflow_owner(pod) if pod else None
        index = os.environ.get(RETRY_INDEX) or (str(retry_index(pod)) if pod else "")
        self.first_attempt = index == "0"

    def end_reason(self) -> str:
        """Return why the job must end together with this step; "" if the run continues.

        If the run cannot be read, it is assumed to continue if this step's pod is disrupted, and to
        be ending otherwise. Takes at most 5 s, less than the 30 s between SIGTERM and SIGKILL. When
        Argo itself ends the step, SIGKILL may follow within a second; the job is then deleted by
        the exit handler, by `python -m pipeline terminate`, or together with the Workflow.
        """
        if self.owner is None:
            return "it does not belong to a pipeline run"
        try:
            found = self.client.workflow(self.owner["name"], once=True)
        except RuntimeError as error:
            return "" if self.is_disrupted() else f"its run cannot be read ({error})"
        return end_of_run(found, self.owner["uid"])

    def run_ended(self) -> bool:
        """Return whether the run has ended or is ending; raises RuntimeError if this is unknown."""
        owner = self.owner
        return owner is None or bool(end_of_run(self.client.workflow(owner["name"]), owner["uid"]))

    def is_disrupted(self) -> bool:
        """Return whether this pod is gone, or is being deleted or evicted; False if unknown."""
        try:
            pod = self.client.pod(self.name, once=True)
        except RuntimeError:
            return False
        return pod is None or is_disrupted(pod)
