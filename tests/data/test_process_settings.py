"""Loaders do not change process-wide settings; `configure_process` sets them once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment, minimal

LOADERS = """
import json, multiprocessing.forkserver, resource, sys
from vitdet import train
from vitdet.config import load_config
from vitdet.data.loader import configure_process, train_loader, val_loader

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))

def state():
    server = multiprocessing.forkserver._forkserver
    return [resource.getrlimit(resource.RLIMIT_NOFILE)[0], list(server._preload_modules),
            multiprocessing.get_start_method(allow_none=True)]

found = {"before": state()}
overrides = json.loads(sys.argv[1])
for workers in (0, 2):
    data = load_config("tiny", [*overrides, f"data.workers={workers}"]).data
    train_loader(data, 2, 0, 0, 1)
    val_loader(data, 1)
found["loaders"] = state()
train(load_config("tiny", overrides), "run")
found["configured"] = state()
configure_process()
found["again"] = state()
print(json.dumps({"hard": hard, **found}))
"""


@pytest.mark.slow
def test_training_configures_the_process_and_loaders_do_not(tiny: Path, tmp_path: Path) -> None:
    overrides = json.dumps(minimal(tiny, optim__steps=1))
    done = subprocess.run(
        [sys.executable, "-c", LOADERS, overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaders"] == found["before"]
    limit, preloaded, method = found["configured"]
    assert limit == (65_536 if found["hard"] == -1 else min(65_536, found["hard"]))
    assert preloaded == ["__main__", "vitdet.data.loader"] and method == found["before"][2]
    assert found["again"] == found["configured"]
