"""Logs of all ranks of a job on a real API server; its pods are torchrun processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.launcher.templates import job_name
from tests.helpers.cluster import PIPELINE_RUN, job_containers, on_cluster, scene, template

pytestmark = on_cluster
SCRIPT = """
import os, sys, time
rank = int(os.environ["RANK"])
print(f"hello of {rank}", flush=True)
if rank == 1:
    time.sleep(2)
    raise ValueError("bad image 7.jpg")
time.sleep(60)
"""


def test_the_rank_that_fails_first_is_named_and_all_logs_are_kept(tmp_path: Path) -> None:
    job = yaml.safe_load(template())
    job["spec"]["runPolicy"]["backoffLimit"] = 0
    for container in job_containers(job):
        container["command"] = [*container["command"][:-2], "/data/script.py"]
    kept: dict[str, str] = {}
    with scene(tmp_path) as made:
        (made.volume / "script.py").write_text(SCRIPT)
        with pytest.raises(RuntimeError) as raised:
            made.launch(yaml.safe_dump(job), [], "logs", keep_logs=kept.update)
        name = job_name(PIPELINE_RUN, "logs")
    first = f"\nfirst to fail: rank 1 (pod {name}-worker-0): ValueError: bad image 7.jpg\n"
    assert first in str(raised.value)
    assert "hello of 0" in made.lines and "hello of 1" not in made.lines  # only rank 0 is shown
    at = made.lines.index("launcher: last lines of rank 1:")
    assert made.lines[at + 1] == "  hello of 1"
    assert "ValueError: bad image 7.jpg" in kept["rank-00001.log"]
    assert kept["rank-00000.log"].startswith("hello of 0")
