"""Pods that a real API server rejects, here because of a missing PriorityClass."""

from __future__ import annotations

import pytest
import yaml

from components.launcher.templates import job_name
from tests.helpers.cluster import PIPELINE_RUN, QUICK, Scene, on_cluster, template

pytestmark = on_cluster
MISSING = "no PriorityClass with name not-there was found"


@pytest.mark.parametrize("kinds", [("Master", "Worker"), ("Worker",)])
def test_a_rejected_pod_is_reported_as_the_cause(live: Scene, kinds: tuple[str, ...]) -> None:
    job, recipe = yaml.safe_load(template(script=True)), f"refused-{len(kinds)}"
    for kind in kinds:
        replica = job["spec"]["pytorchReplicaSpecs"][kind]
        replica["template"]["spec"]["priorityClassName"] = "not-there"
    with pytest.raises(RuntimeError) as raised:
        live.launch(yaml.safe_dump(job), ["echo on; sleep 60"], recipe, timeouts=QUICK)
    name = job_name(PIPELINE_RUN, recipe)
    error = str(raised.value)
    assert (
        f"{name} has not been able to start for 3 s\ncause: job {name}: FailedCreatePod: " in error
    )
    assert MISSING in error and "is not running" not in error
    assert any("waiting: " in line and name in line and MISSING in line for line in live.lines)
    assert ("on" in live.lines) == (kinds == ("Worker",))
