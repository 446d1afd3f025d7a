"""The dependencies of the stages in dvc.yaml are exactly the files that determine a stage's result."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# stage -> the modules that implement it
ENTRIES = {
    "config": ["vitdet/data/layout.py"],
    "data": ["vitdet/demo/tiny.py"],
    "train": ["vitdet/training/trainer.py", "vitdet/weights/load.py"],
    "evaluate": ["vitdet/evaluation/evaluator.py"],
}
# Imported modules that do not determine the result: settings, which are parameters of the stage, and code that writes
# files, reports or progress, or describes downloads.
IRRELEVANT = {
    "config": {"vitdet/files.py"},
    "data": {"vitdet/files.py"},
    "train": {
        "vitdet/config",
        "vitdet/data/protocol.py",
        "vitdet/evaluation/analysis.py",
        "vitdet/evaluation/errors.py",
        "vitdet/evaluation/page.py",
        "vitdet/evaluation/pictures.py",
        "vitdet/evaluation/report.py",
        "vitdet/files.py",
        "vitdet/predictor.py",
        "vitdet/tracking/tracker.py",
        "vitdet/visualize.py",
        "vitdet/weights/__init__.py",
        "vitdet/weights/catalogue.py",
        "vitdet/pages",
    },
    "evaluate": {
        "vitdet/config",
        "vitdet/data/fingerprint.py",
        "vitdet/data/samplers.py",
        "vitdet/files.py",
    },
}


def code_of(stage: str) -> list[str]:
    """Return the code that a stage depends on, without other stages' outputs."""
    return [name for name in STAGES[stage]["deps"] if not name.startswith("work/")]


def under(path: str, names: set[str] | list[str]) -> bool:
    """Return whether a path is one of these names or is inside one of them."""
    return any(path == name or path.startswith(f"{name}/") for name in names)


def imported(path: Path) -> Iterator[Path]:
    """Return the modules of vitdet that a module imports at run time, even within functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("vitdet.")]
            yield from (ROOT / f"{name.replace('.', '/')}.py" for name in names)
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vitdet"):
            continue
        for alias in node.names:
            candidates = [f"{node.module}.{alias.name}", node.module]
            paths = [ROOT / name.replace(".", "/") for name in candidates]
            files = [
                file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")
            ]
            yield next(file for file in files if file.is_file())


def reached(entries: list[str]) -> set[str]:
    """Return the files of the modules and of everything that they import."""
    seen: set[Path] = set()
    waiting = [ROOT / entry for entry in entries]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += imported(path)
    return {path.relative_to(ROOT).as_posix() for path in seen}


@pytest.mark.parametrize("stage", ENTRIES)
def test_a_stage_depends_on_every_module_that_determines_its_result(stage: str) -> None:
    code, irrelevant = code_of(stage), IRRELEVANT[stage]
    used = reached(ENTRIES[stage])
    missing = {path for path in used if not under(path, code) and not under(path, irrelevant)}
    assert not missing, f"{stage}: neither a dependency nor known to be irrelevant: {missing}"
    python = {name for name in code if name.endswith(".py") and not under(name, irrelevant)}
    assert not python - used, (
        f"{stage}: depends on modules that it does not import: {python - used}"
    )
    stale = {name for name in irrelevant if not any(under(path, {name}) for path in used)}
    assert not stale, f"{stage}: listed as irrelevant, but not imported: {stale}"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repo]:
    """Return a repository with the package and dvc.yaml, every stage committed with a fake result."""
    folder = tmp_path_factory.mktemp("stages")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "vitdet", folder / "vitdet", ignore=ignored)
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "work").mkdir()
    (folder / "work" / "config.yaml").write_text((ROOT / "vitdet/recipes/tiny.yaml").read_text())
    sections = dict.fromkeys(
        ["model", "data", "optim", "train", "evaluate", "gate", "tracking"], {"x": 1}
    )
    (folder / "work" / "config.yaml").write_text(yaml.safe_dump(sections))
    for stage in STAGES.values():
        for name in [*stage.get("outs", []), *stage.get("metrics", [])]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():
                (folder / name).write_text("{}")
    with pytest.MonkeyPatch.context() as patch, Repo.init(str(folder), no_scm=True) as repo:
        patch.chdir(folder)  # DVC resolves the stages' paths relative to this folder
        repo.commit(force=True)
        assert repo.status() == {}
        yield repo


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("vitdet/recipes/tiny.yaml", {"config"}),
        ("vitdet/recipes/mask_rcnn_vitdet_b_coco.yaml", set()),
        ("vitdet/config/schema.py", {"config"}),
        ("vitdet/checkpoint.py", {"train", "evaluate"}),
        ("vitdet/types.py", {"train", "evaluate"}),
        ("vitdet/predictor.py", {"evaluate"}),
        ("vitdet/visualize.py", {"evaluate"}),
        ("vitdet/stages/training.py", set()),
        ("vitdet/models/vit.py", {"train", "evaluate"}),
        ("vitdet/data/masks.py", {"train", "evaluate"}),
        ("vitdet/data/samplers.py", {"train"}),
        ("vitdet/data/outlines.py", {"data"}),
        ("vitdet/data/check.py", set()),
        ("vitdet/training/optim.py", {"train"}),
        ("vitdet/evaluation/coco.py", {"train", "evaluate"}),
        ("vitdet/evaluation/page.html", {"evaluate"}),
        ("vitdet/pages/base.html", {"evaluate"}),
        ("vitdet/weights/load.py", {"weights", "train"}),
        ("vitdet/weights/catalogue.yaml", {"weights"}),
        ("vitdet/datasets/report/page.py", set()),
        ("vitdet/datasets/importers/yolo.py", set()),
        ("vitdet/datasets/fetch.py", set()),
        ("vitdet/tracking/mlflow.py", set()),
        ("vitdet/cli/train.py", set()),
        ("vitdet/demo/scenes.py", {"data"}),
        ("vitdet/demo/mae.py", set()),
    ],
)
def test_an_edited_file_outdates_its_stages(repository: Repo, file: str, stages: set[str]) -> None:
    path = Path(repository.root_dir, file)
    before = path.read_bytes()
    path.write_bytes(before + b"\n# edited\n")
    try:
        assert repository.status().keys() == stages | {"register"}  # the model contains the package
    finally:
        path.write_bytes(before)
    assert repository.status() == {}
