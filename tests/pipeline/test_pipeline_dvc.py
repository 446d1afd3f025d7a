"""The stages of dvc.yaml under DVC with a stub command line: which changes rerun which stages, and the state after
experiments, invalid settings and killed training runs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STAGES = ["config", "data", "weights", "train", "evaluate", "register"]
RECIPE = "vitdet/recipes/tiny.yaml"
STUB = """#!{python}
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from vitdet.config import load_config, save_config, to_dict
from vitdet.config.digest import training_settings

verb, *rest = sys.argv[1:]
positions = [word for i, word in enumerate(rest) if not word.startswith("--") and (i == 0 or rest[i - 1][:2] != "--")]
options = {{name: Path(value) for name, value in zip(rest, rest[1:]) if name.startswith("--")}}
with open("ran.txt", "a") as log:
    print(verb, file=log)
output = options.get("--output", Path(positions[-1]))
output.parent.mkdir(parents=True, exist_ok=True)
if verb == "config":
    try:
        config = load_config(positions[0])
        save_config(config, output)
        if "--training" in options:  # earlier versions of dvc.yaml do not have it
            options["--training"].write_text(json.dumps(training_settings(config)))
    except ValueError as error:
        sys.exit(str(error))
elif verb == "data":
    output.mkdir()
    (output / "image").write_text("image")
elif verb == "weights":
    output.write_text("weights")
elif verb == "train":
    config = load_config(positions[0])
    output.mkdir()
    progress = options["--checkpoints"] / "step"
    progress.parent.mkdir(exist_ok=True)
    start = int(progress.read_text()) if progress.exists() else 0
    for step in range(start + 1, config.optim.steps + 1):
        time.sleep(float(os.environ.get("SECONDS_A_STEP", "0")))
        progress.with_suffix(".tmp").write_text(str(step))
        progress.with_suffix(".tmp").replace(progress)
    with open("ran.txt", "a") as log:
        print(f"from {{start}} to {{config.optim.steps}}", file=log)
    (output / "model.pt").write_text(json.dumps(to_dict(config)))
elif verb == "evaluate":
    place = Path(positions[0])  # a folder, a file in earlier versions of dvc.yaml
    config = load_config(options["--config"])
    model = json.loads((place / "model.pt" if place.is_dir() else place).read_text())
    ap = 10 + model["optim"]["clip"] + config.evaluate.nms_iou
    output.write_text(json.dumps({{"box_ap": ap, "mask_ap": ap}}))
    output.with_suffix(".measured.json").write_text("{{}}")
    for name in ("--pictures", "--plots"):
        options[name].mkdir()
    (options["--plots"] / "report.html").write_text("<p>report")
    for name, key, columns in (("curve", "recall", ("iou50", "iou75")), ("thresholds", "threshold", ("precision", "recall", "f1"))):
        row = {{f"{{kind}}_{{column}}": ap for kind in ("box", "mask") for column in columns}}
        rows = [{{key: i / 4, **row}} for i in range(5)]
        (options["--plots"] / f"{{name}}.json").write_text(json.dumps(rows))
    (options["--plots"] / "classes.json").write_text(json.dumps([{{"class": "star", "box_ap": ap}}]))
else:
    output.write_text("{{}}")
"""


class Project:
    """A git repository with the real dvc.yaml and a stub of the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str, ok: bool = True, **environment: str) -> str:
        """Run a command and return its output; `ran` returns the executed verbs."""
        (self.folder / "ran.txt").unlink(missing_ok=True)
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment(**environment),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert (done.returncode == 0) == ok, done.stdout
        return done.stdout

    def environment(self, **more: str) -> dict[str, str]:
        """Return an environment without the user's git and DVC settings; the stub is first on PATH."""
        path = os.pathsep.join(
            [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        return {
            **os.environ,
            "PATH": path,
            "HOME": str(self.folder / "home"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@b",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@b",
            **more,
        }

    @property
    def ran(self) -> list[str]:
        """Return the verbs run by the last command, in order."""
        log = self.folder / "ran.txt"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def changed(self) -> str:
        """Return the tracked files that differ from HEAD."""
        return self("git", "status", "--porcelain", "--untracked-files=no")


def write_code(folder: Path, stages: Path) -> None:
    """Write a file for each code dependency of the stages in a dvc.yaml; for a folder, one file in it."""
    for stage in yaml.safe_load(stages.read_text())["stages"].values():
        for name in stage.get("deps", []):
            if not name.startswith("work/"):
                place = folder / name
                code = place if place.suffix else place / "code.py"
                code.parent.mkdir(parents=True, exist_ok=True)
                code.write_text("code\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Return a project after `make demo`."""
    folder = tmp_path_factory.mktemp("project")
    project = Project(folder)
    for name in (".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "dvc.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text(
        (folder / ".gitignore").read_text() + "/ran.txt\n/bin/\n/home/\n"
    )
    write_code(folder, ROOT / "dvc.yaml")
    (folder / RECIPE).write_text("# a comment\noptim: {lr: 1e-3, steps: 20}\n")
    stub = folder / "bin" / "vitdet"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable, root=str(ROOT)))
    stub.chmod(0o755)
    project("git", "init", "--quiet", "--initial-branch", "main")
    project("git", "add", ".")
    project("git", "commit", "--quiet", "--message", "start")
    project("dvc", "repro")
    assert [word for word in project.ran if word in STAGES] == STAGES
    project("dvc", "exp", "save", "--force", "--name", "demo")
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """Return a copy of the finished project that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


def test_a_second_repro_runs_nothing_and_the_demo_changes_no_tracked_file(project: Project) -> None:
    start = time.monotonic()
    project("dvc", "repro")
    print(f"dvc repro again: {time.monotonic() - start:.1f} s")
    assert project.ran == []
    assert project.changed == ""


def test_an_experiment_may_add_settings_and_keeps_the_data(project: Project) -> None:
    project("dvc", "exp", "run", "--name", "clipped", "-S", f"{RECIPE}:++optim.clip=0.5")
    assert project.ran == ["config", "train", "from 0 to 20", "evaluate", "register"]
    table = json.loads(project("dvc", "metrics", "diff", "demo", "clipped", "--json"))
    assert table["work/metrics.json"]["box_ap"]["diff"] == pytest.approx(0.5)
    curve = json.loads(project("dvc", "plots", "diff", "demo", "clipped", "--json"))["data"]
    assert any("demo" in str(plot) and "clipped" in str(plot) for plot in curve.values())
    project("git", "restore", RECIPE)
    project("dvc", "repro")
    assert project.ran == []  # the demo's results are restored from the cache
    assert json.loads((project.folder / "work/metrics.json").read_text())[
        "box_ap"
    ] == pytest.approx(10.5)


def test_an_evaluation_setting_does_not_rerun_training(project: Project) -> None:
    project("dvc", "exp", "run", "-S", f"{RECIPE}:++evaluate.nms_iou=0.7")
    assert project.ran == ["config", "evaluate", "register"]
    assert json.loads((project.folder / "work/metrics.json").read_text())[
        "box_ap"
    ] == pytest.approx(10.7)


def test_a_setting_that_selects_the_best_model_reruns_training(project: Project) -> None:
    project("dvc", "exp", "run", "-S", f"{RECIPE}:++train.keep_best=box_ap")
    assert "train" in project.ran
    project("dvc", "exp", "run", "-S", f"{RECIPE}:++evaluate.nms_iou=0.7")
    assert project.ran == ["config", "train", "from 0 to 20", "evaluate", "register"]
    project("dvc", "exp", "run", "-S", f"{RECIPE}:++train.log_every=7")
    assert "config" in project.ran and "train" not in project.ran


def test_edited_code_reruns_its_stages(project: Project) -> None:
    (project.folder / "vitdet/models/code.py").write_text("edited")
    project("dvc", "repro")
    assert project.ran == ["train", "from 0 to 20", "evaluate", "register"]
    (project.folder / "vitdet/evaluation/code.py").write_text("edited")
    project("dvc", "repro")
    # the model contains the current code
    assert project.ran == ["evaluate", "register"]


@pytest.mark.parametrize(
    ("setting", "says"), [("optim.lrr=1", "lrr"), ("optim.lr=fast", "optim.lr")]
)
def test_a_wrong_setting_fails_the_first_stage(project: Project, setting: str, says: str) -> None:
    said = project("dvc", "exp", "run", "-S", f"{RECIPE}:++{setting}", ok=False)
    assert project.ran == ["config"]
    assert says in said
    assert "Traceback" not in said


def test_a_killed_training_run_resumes(project: Project) -> None:
    (project.folder / RECIPE).write_text("optim: {lr: 2e-3, steps: 20}\n")
    (project.folder / "ran.txt").unlink(missing_ok=True)
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project.folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=project.environment(SECONDS_A_STEP="0.2"),
    )
    progress = project.folder / "work/checkpoints/step"
    while not (progress.exists() and progress.read_text() > "4") and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = int(progress.read_text())
    assert 0 < reached < 20
    project("dvc", "repro")
    assert project.ran == ["train", f"from {reached} to 20", "evaluate", "register"]
    assert not progress.exists()


def test_the_lock_and_cache_of_an_earlier_version_run_the_stages_once(project: Project) -> None:
    """dvc_dad8b8b.yaml has the stages of an earlier commit, whose dependencies have moved since."""
    recipe = (project.folder / RECIPE).read_text()
    for name in ("vitdet", "work", ".dvc/cache"):  # with the current stages' results
        shutil.rmtree(project.folder / name)
    (project.folder / "dvc.lock").unlink()
    shutil.copy(ROOT / "tests/golden/dvc_dad8b8b.yaml", project.folder / "dvc.yaml")
    write_code(project.folder, project.folder / "dvc.yaml")
    (project.folder / RECIPE).write_text(recipe)
    project("dvc", "repro")
    lock = (project.folder / "dvc.lock").read_text()
    assert "vitdet/typed.py" in lock

    shutil.rmtree(project.folder / "vitdet")
    shutil.copy(ROOT / "dvc.yaml", project.folder / "dvc.yaml")
    write_code(project.folder, project.folder / "dvc.yaml")
    (project.folder / RECIPE).write_text(recipe)
    project("dvc", "repro")
    assert [verb for verb in project.ran if verb in STAGES] == STAGES
    project("dvc", "repro")
    assert project.ran == []
