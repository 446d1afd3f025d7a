"""The command of `train_job` as run in a pod, with the task settings that kfp passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import ROOT

COMPONENTS = """
from pathlib import Path
real = Path({real!r})
__path__.append(str(real))
exec((real / "__init__.py").read_text())
"""
LAUNCHER = """
import json, os

def launch(**asked):
    asked["finished"] = asked["finished"]()  # whether the training is complete
    asked["keep_logs"] = asked["keep_logs"]("files")
    asked["check_processes"] = asked["check_processes"](2)
    with open(os.environ["CALLS"], "w") as file:
        json.dump(asked, file)
"""
STEPS = """
from contextlib import nullcontext
from pathlib import Path

def recorded(workspace, name, run_id, step):
    return nullcontext()

def train_argv(settings, name, data, workspace, run_id):
    return ["train", name, run_id]

def keep_logs(settings, name, workspace, run_id, files):
    return f"{workspace}/{name}/{files}"

def check_processes(settings, name, processes):
    return f"{name} on {processes}"

def is_trained(workspace, name, run_id):
    return False

def copy_checkpoint(workspace, name, run_id, checkpoint):
    Path(checkpoint).write_text("model")
"""
VALUES = {
    "name": "tiny",
    "data": "d",
    "initial": "i",
    "workspace": "/data",
    "nodes": 2,
    "pool": "p",
    "image": "i:1",
    "job_kind": "trainjob",
    "job": "backoffLimit: 4",
    # in the form that kfp/dsl/executor.py expects from the server
    "task_config": {
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "k"}],
        "volumeMounts": [{"name": "v"}],
        "volumes": [{"name": "v"}],
        "env": [{"name": "E"}],
        "resources": {"limits": {"cpu": "1"}},
    },
}


def artifact(folder: Path, name: str, kind: str) -> dict:
    schema = {"schemaTitle": f"system.{kind}", "schemaVersion": "0.0.1"}
    return {
        "artifacts": [{"name": name, "uri": str(folder / name), "metadata": {}, "type": schema}]
    }


def test_a_pod_can_run_the_compiled_command(tmp_path: Path) -> None:
    files = {
        "components/__init__": COMPONENTS.format(real=str(ROOT / "components")),
        "vitdet/stages": STEPS,
        "components/launcher/__init__": "",
        "components/launcher/launch": LAUNCHER,
        "vitdet/__init__": "",
    }
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    specification = next(
        yaml.safe_load_all((ROOT / "tests" / "golden_pipeline" / "pipeline.yaml").read_text())
    )
    container = specification["deploymentSpec"]["executors"]["exec-train-job"]["container"]
    kinds = {"settings": "Artifact"}
    inputs = {name: artifact(tmp_path, name, kind) for name, kind in kinds.items()}
    given = json.dumps(
        {
            "inputs": {"parameterValues": VALUES, "artifacts": inputs},
            "outputs": {
                "artifacts": {"checkpoint": artifact(tmp_path, "checkpoint", "Model")},
                "outputFile": str(tmp_path / "out.json"),
            },
        }
    )
    words = [given if word == "{{$}}" else word for word in container["args"]]
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outer = {
        **os.environ,
        "PATH": search,
        "PYTHONPATH": str(tmp_path),
        "CALLS": str(tmp_path / "asked.json"),
        "KFP_RUN_ID": "run",
    }
    done = subprocess.run(
        [*container["command"], *words], cwd=tmp_path, env=outer, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = json.loads((tmp_path / "asked.json").read_text())
    config = asked.pop("task_config")
    same = ("nodes", "pool", "image", "name")
    assert asked == {
        **{key: VALUES[key] for key in same},
        "template": "backoffLimit: 4",
        "kind": "trainjob",
        "run_id": "run",
        "args": ["train", "tiny", "run"],
        "workspace": "/data",
        "finished": False,
        "check_processes": "tiny on 2",
        "keep_logs": "/data/tiny/files",
    }
    given = VALUES["task_config"]
    renamed = {"node_selector": "nodeSelector", "volume_mounts": "volumeMounts"}
    passed = {
        key: given[renamed.get(key, key)] for key in config.keys() - {"affinity", "resources"}
    }
    assert len(passed) == 5 and config == {**passed, "affinity": None, "resources": None}
    assert (tmp_path / "checkpoint").read_text() == "model"
