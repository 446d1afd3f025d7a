"""The house rules: who imports whom, how long a file may be, and what stands nowhere."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

from vitdet.config import Config, flatten

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vitdet"
SHELL = ("components", "pipeline", "manifests")

# What each part of the package may import of the others, beside itself. Entrances may all.
ENTRANCES = (
    "__init__",
    "__main__",
    "cli",
    "verbs",
    "data_verbs",
    "weights_verbs",
    "stages",
    "workspace",
)
RECORDS = {"config", "types"}
MAY_IMPORT = {
    "typed": set(),
    "written": set(),
    "rules": {"config"},  # for the type
    "config": {"typed", "rules", "written"},
    "types": {"predictor.draw"},  # inside Detections.draw
    "bar": {"progress"},
    "distributed": set(),
    "download": {"written"},
    "progress": set(),
    "journal": {"written"},
    "wheel": {"written"},
    "tracking": {"journal", "progress"},
    "champion": {"tracking"},
    "comparison": {"champion", "tracking"},
    "serving": {"tracking", "wheel", "predictor", "data"},
    "models": RECORDS,
    "data": RECORDS | {"download", "written"},
    "weights": {"typed", "download"},
    "predictor": RECORDS | {"models", "data", "training.checkpoint"},
    "evaluation": RECORDS
    | {"models", "data", "predictor", "distributed", "written", "training.checkpoint"},
    "training": RECORDS
    | {
        "models",
        "data",
        "weights",
        "evaluation",
        "predictor",
        "distributed",
        "progress",
        "written",
    },
}
PRINTING = (
    "vitdet/cli.py",
    "vitdet/verbs.py",
    "vitdet/data_verbs.py",
    "vitdet/weights_verbs.py",
    "pipeline/cli/",
)
# Packages that only some files may import.
ONLY_IN = {
    "mlflow": (
        "vitdet/tracking.py",
        "vitdet/serving.py",
        "vitdet/champion.py",
        "vitdet/comparison.py",
        "tests/",
    ),
    "kfp": ("components/", "pipeline/", "tests/"),
    "kubernetes": ("components/launcher/", "tests/"),
    "dvc": ("tests/",),
    "pycocotools": ("vitdet/data/masks.py", "vitdet/evaluation/", "tests/"),
    "faster_coco_eval": ("vitdet/evaluation/", "tests/"),
    "detectron2": ("vitdet/evaluation/bench_data.py", "tests/"),
    "shapely": ("vitdet/evaluation/bench_data.py", "tests/"),
    "torch.distributed": ("vitdet/distributed.py", "vitdet/training/parallel.py", "tests/"),
    "torch.nn.parallel": ("vitdet/training/parallel.py", "tests/"),
    "argparse": (*PRINTING, "scripts/", "tests/"),
}


def tracked(*patterns: str) -> list[Path]:
    """The files that git holds and those it would: neither ignored nor deleted."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [ROOT / name for name in sorted(set(listed)) if (ROOT / name).is_file()]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, by full name; `from a import b` is both a and a.b."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


SOURCES = tracked("vitdet/*.py", "components/*.py", "pipeline/*.py")


@pytest.mark.parametrize("path", [path for path in SOURCES if PACKAGE in path.parents], ids=name_of)
def test_a_module_imports_only_what_its_place_allows(path: Path) -> None:
    inside = path.relative_to(PACKAGE).with_suffix("")
    part = inside.parts[0]
    if part in ENTRANCES:
        return
    allowed = MAY_IMPORT[part]
    for module in imports(path):
        if module.startswith("vitdet."):
            target = module.removeprefix("vitdet.")
            known = any(
                target == name or f"{target}.".startswith(f"{name}.") for name in {part, *allowed}
            )
            leads_there = any(
                name.startswith(f"{target}.") for name in allowed
            )  # `from a import b` names a as well
            assert known or leads_there, (
                f"{name_of(path)} imports {module}; allowed: {sorted(allowed)}"
            )


def test_only_the_assembly_of_the_model_sees_a_config() -> None:
    for path in tracked("vitdet/models/*.py"):
        if path.name != "__init__.py":
            assert not any(module.startswith("vitdet.config") for module in imports(path)), name_of(
                path
            )


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_foreign_package_has_one_place(package: str) -> None:
    for path in tracked("*.py"):
        if not name_of(path).startswith(ONLY_IN[package]):
            found = {module for module in imports(path) if f"{module}.".startswith(f"{package}.")}
            assert not found, (
                f"{name_of(path)} imports {package}; only {', '.join(ONLY_IN[package])} may"
            )


@pytest.mark.parametrize("path", [path for path in SOURCES if PACKAGE in path.parents], ids=name_of)
def test_detection_needs_the_core_dependencies_only(path: Path) -> None:
    if name_of(path) in ONLY_IN["mlflow"]:
        return  # these come with the extra `tracking`
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    packages = {re.match(r"[\w-]+", requirement)[0] for requirement in declared}
    modules = {
        {"pillow": "PIL", "pyyaml": "yaml"}.get(package, package.replace("-", "_"))
        for package in packages
    }
    used = {module.split(".")[0] for module in imports(path)} - sys.stdlib_module_names - {"vitdet"}
    used -= (
        {"detectron2", "shapely"} if path.name == "bench_data.py" else set()
    )  # timed where they are installed
    assert used <= modules, f"{name_of(path)} imports {', '.join(used - modules)}"


def test_of_timm_only_the_layers_are_used() -> None:
    for path in SOURCES:
        for module in imports(path):
            layers = [
                "timm.layers",
                *(["timm.models.swin_transformer"] if path.name == "swin.py" else []),
            ]
            assert not module.startswith("timm") or module.startswith(tuple(layers)), (
                f"{name_of(path)}: {module}"
            )


@pytest.mark.parametrize("path", tracked("*.py"), ids=name_of)
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_what_the_house_does_not_do(path: Path) -> None:
    inside = name_of(path)
    for node in ast.walk(tree(path)):
        where = f"{inside}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and inside.startswith("vitdet/models/"):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            assert not (own and node.attr == "training"), (
                f"{where}: a model does not ask for its mode"
            )
            assert node.attr not in ("cuda", "autocast"), (
                f"{where}: a model does not choose devices or precision"
            )
        if (
            isinstance(node, ast.keyword)
            and node.arg == "strict"
            and isinstance(node.value, ast.Constant)
        ):
            loads = "load_state_dict" in ast.unparse(parents(path)[node])
            assert node.value.value or not loads, f"{where}: weights are loaded exactly"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ):
            prints = inside.startswith(PRINTING) or inside.startswith(
                "components/"
            )  # a step prints into its log
            assert prints, f"{where}: only a command line prints"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: an exception is caught by name"
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.args.kwarg is None, (
                f"{where}: {node.name} takes **{getattr(node.args.kwarg, 'arg', '')}"
            )


@cache
def parents(path: Path) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree(path)) for child in ast.iter_child_nodes(node)}


def test_a_setting_is_named_in_the_config_and_the_recipes_only() -> None:
    keys = {key for key in flatten(Config()) if "." in key}
    leaves = {key.split(".")[-1] for key in keys}
    names = {name for name in leaves if "_" in name}  # `name` or `init` is a word of its own
    for path in [*tracked(*(f"{folder}/*" for folder in SHELL)), ROOT / "dvc.yaml"]:
        lines = [
            line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
        ]
        text = "\n".join(lines)
        found = [key for key in keys if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", text)]
        found += [name for name in names if re.search(rf"\b{name}\b", text)]
        assert not found, f"{name_of(path)} names the settings {', '.join(found)}"


def test_the_stages_depend_on_files_that_exist_and_on_sections_that_exist() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    made = {
        out
        for stage in stages.values()
        for out in [*stage.get("outs", []), *stage.get("metrics", [])]
    }
    sections = set(Config.__dataclass_fields__)
    assert (
        next(iter(stages)) == "config"
    )  # DVC runs independent stages in this order: a wrong setting costs nothing
    for stage in stages.values():
        for name in stage.get("deps", []):
            assert name in made or (ROOT / name).exists(), name
        for params in stage.get("params", []):
            assert set(params) == {"work/config.yaml"}
            assert set(params["work/config.yaml"]) <= sections


def test_the_data_stage_depends_on_all_that_draws_the_data() -> None:
    reached, waiting = set(), ["vitdet.data.tiny"]
    while waiting:
        path = ROOT / (waiting.pop().replace(".", "/") + ".py")
        if path.is_file() and path not in reached:
            reached.add(path)
            waiting += [module for module in imports(path) if module.startswith("vitdet.")]
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["data"]
    assert sorted(map(name_of, reached)) == stage["deps"]


def test_no_file_names_a_registry_or_a_folder_of_one_machine() -> None:
    hosts = r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|registry[.]npmjs|deb[.]debian[.]org"
    folders = r"(?<![\w.}])/(?:home|root|Users|work|opt)/\w"
    options = r"^--(?:extra-)?index-url|^--find-links"
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content:
            continue  # arrays, pictures, weights
        for number, line in enumerate(content.decode().splitlines(), 1):
            where = f"{name_of(path)}:{number}: {line.strip()[:80]}"
            assert not re.search(hosts, line), where
            assert not re.search(options, line), where
            if path != Path(__file__) and not name_of(path).startswith(
                ("manifests/", ".gitignore", ".dvc")
            ):
                assert not re.search(folders, line), where


@pytest.mark.parametrize(
    "words", [["--help"], ["config", "tiny"], ["weights", "list"]], ids=" ".join
)
def test_the_command_line_answers_without_loading_torch(words: list[str]) -> None:
    code = (
        "import sys, vitdet.cli\n"
        "sys.argv[0] = 'vitdet'\n"
        "try:\n    status = vitdet.cli.main()\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "heavy = {'torch', 'torchvision', 'mlflow', 'timm', 'numpy', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
