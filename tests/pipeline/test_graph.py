"""Dependencies of the pipeline's steps: the real graph and components under kfp's local runner, with stub stages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

STEPS = """
import json, os
from pathlib import Path

def note(*words):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(words) + "\\n")

def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)

def resolve_configs(recipes, overrides, workspace, folder, sweep, seeds):
    note("configs", recipes, overrides, sweep, seeds)
    write(Path(folder) / "names", json.dumps(recipes))
    return recipes

def recipes(settings):
    return json.loads((Path(settings) / "names").read_text())

def prepare_data(settings, workspace, configs, manifest, fetch):
    from types import SimpleNamespace
    note("data", fetch)
    write(Path(configs) / "config", "resolved")
    write(manifest, "manifest")
    return SimpleNamespace(fingerprint="fingerprint", names=recipes(settings), notes=["a note"])

def fetch_weights(configs, workspace):
    note("weights")
    return ""

def start_parent_run(configs, workspace, run_id):
    note("announce", run_id)
    return "parent"

def train_recipe(settings, name, data, workspace, run_id, checkpoint):
    assert data == "fingerprint"
    note("train", name, run_id)
    if name == "slow":
        import time
        time.sleep(60)
        note("woke", name)
    if name == "broken":
        raise ValueError("a loss is not finite")
    write(checkpoint, name)

def evaluate_recipe(checkpoint, configs, name, data, workspace, run_id, figures, report):
    assert (Path(configs) / "config").read_text() == "resolved"
    note("evaluate", name, Path(checkpoint).read_text())
    write(figures, name)
    write(report, "<p>report")
    from types import SimpleNamespace
    return SimpleNamespace(
        metrics={"box_ap": 40.0}, known="unknown" not in name, page="", text=lambda: "box AP 40"
    )

def evaluate_champion(checkpoint, figures, configs, name, workspace, run_id):
    note("champion", name, Path(checkpoint).read_text(), Path(figures).read_text(), run_id)
    return "evaluated"

def gate(figures, configs, name, workspace, run_id, verdict):
    note("gate", name)
    write(verdict, name)
    return "better" in name, "why"

def register_recipe(checkpoint, figures, configs, name, workspace, run_id):
    note("register", name, Path(checkpoint).read_text())
    return "version 1"

def compare(verdicts, configs, workspace, run_id, table, links):
    note("compare", sorted(Path(verdict).read_text() for verdict in verdicts), run_id)
    write(table, "<table>")
    write(links, "| a table |")
    return "| a table |"

def compare_finished(workspace, run_id, table):
    note("compare-finished", run_id)
    write(table, "<table>")
    return "what finished"

def end_parent_run(recipes, overrides, workspace, run_id, state):
    note("clean-up", recipes, state, run_id)
"""


class Ran:
    """`python -m pipeline run` with stub stages, and their calls in order; interrupt: Ctrl-C during training."""

    def __init__(self, folder: Path, *recipes: str, interrupt: bool = False) -> None:
        package, self.log = folder / "steps" / "vitdet", folder / "calls"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").touch()
        (package / "stages.py").write_text(f"{STEPS}\nplan_trainings = fetch_words = print\n")
        path = f"{package.parent}{os.pathsep}{ROOT}"
        outer = {**os.environ, "PYTHONPATH": path, "CALLS": str(self.log)}
        run = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", *recipes, "--set", "a.b=1"],
            cwd=folder,
            env=outer,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while interrupt and run.poll() is None:
            if self.log.exists() and '["train"' in self.log.read_text():
                os.killpg(run.pid, signal.SIGINT)  # to all processes, like a terminal
                break
            time.sleep(0.1)
        self.done = subprocess.CompletedProcess(run.args, 0, *run.communicate())
        self.done.returncode = run.returncode
        self.calls = [json.loads(line) for line in self.log.read_text().splitlines()]

    def succeeded(self) -> "Ran":
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        return self

    def of(self, step: str) -> list[list]:
        return [rest for name, *rest in self.calls if name == step]

    def order(self) -> list[str]:
        return [name for name, *_ in self.calls]


def test_every_recipe_is_processed_and_compared_in_one_table(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "good", "better", "best").succeeded()
    assert ran.of("configs") == [[["good", "better", "best"], ["a.b=1"], [], 1]]
    (run_id,) = ran.of("announce")[0]
    assert sorted(ran.of("train")) == [["best", run_id], ["better", run_id], ["good", run_id]]
    assert sorted(ran.of("evaluate")) == [["best", "best"], ["better", "better"], ["good", "good"]]
    assert ran.of("register") == [["better", "better"]]  # the only one that passed the gate
    assert ran.of("compare") == [[["best", "better", "good"], run_id]]
    assert ran.of("clean-up") == [[["good", "better", "best"], "SUCCEEDED", run_id]]
    order = ran.order()
    assert order[0] == "configs"
    # these steps precede the first training step
    assert sorted(order[1:4]) == ["announce", "data", "weights"]
    assert order[-3:] == ["compare", "compare-finished", "clean-up"]
    assert "| a table |" in ran.done.stdout


def test_the_champion_is_evaluated_only_if_its_ap_is_unknown(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "unknown", "known", "better-unknown").succeeded()
    (run_id,) = ran.of("announce")[0]
    names = ["better-unknown", "unknown"]
    assert sorted(ran.of("champion")) == [[name, name, name, run_id] for name in names]
    order = ran.calls
    for name in names:  # before the gate
        champion = next(i for i, call in enumerate(order) if call[:2] == ["champion", name])
        assert order.index(["evaluate", name, name]) < champion < order.index(["gate", name])
    assert sorted(ran.of("gate")) == [["better-unknown"], ["known"], ["unknown"]]
    assert ran.of("register") == [["better-unknown", "better-unknown"]]


def test_a_failed_recipe_does_not_affect_the_others(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "broken", "better")
    assert ran.done.returncode == 1
    assert "ValueError: a loss is not finite" in ran.done.stdout
    assert ran.done.stderr.startswith("pipeline: step train failed")
    (run_id,) = ran.of("announce")[0]
    assert [name for name, _ in ran.of("train")] == ["broken", "better"]  # one after the other
    assert ran.of("register") == [["better", "better"]]
    assert ran.of("compare") == []
    assert ran.order()[-2:] == ["compare-finished", "clean-up"]
    assert "what finished" in ran.done.stdout
    assert ran.of("clean-up")[0][1:] == ["FAILED", run_id]


def test_settings_seeds_and_data_are_passed_to_the_first_steps(tmp_path: Path) -> None:
    words = ["--sweep", "a.c=1,2", "--seeds", "3", "--fetch", "coco", "--parallel", "2"]
    ran = Ran(tmp_path, "good", *words).succeeded()
    assert ran.of("configs") == [[["good"], ["a.b=1"], ["a.c=1,2"], 3]]
    assert ran.of("data") == [["coco"]]


def test_ctrl_c_ends_the_steps_and_the_parent_run(tmp_path: Path, ctrl_c: None) -> None:
    ran = Ran(tmp_path, "slow", interrupt=True)
    assert ran.done.returncode == 130, ran.done.stderr
    assert ran.of("train") and not ran.of("woke")  # interrupted in its sleep
    assert ran.of("clean-up")[0][:2] == [["slow"], "CANCELED"] and ran.order()[-1] == "clean-up"
    assert ran.of("evaluate") == []
