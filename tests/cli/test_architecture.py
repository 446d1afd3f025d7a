"""Code structure: import layers, dependencies, file length, and constructs that no file may contain.

The layers are in `tests/helpers/layers.py`. Each test checks all files and reports all violations at once.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers import layers
from tests.helpers.layers import Import, Source, cycle_in, internal, part_of
from vitdet.config import Config, flatten

MAX_MODULES = 10  # files directly in vitdet/
MAX_LINES = 400  # per file; 500 in tests
PRINTING = ("vitdet/cli/", "pipeline/cli/", "components/")
# Packages that only the listed files may import, besides tests.
ONLY_IN = {
    "mlflow": ["vitdet/tracking/"],
    "kfp": ["components/", "pipeline/"],
    "kubernetes": ["components/launcher/"],
    "dvc": [],
    "pycocotools": [
        *("vitdet/data/masks.py", "vitdet/data/segmentation.py"),
        *("vitdet/evaluation/", "vitdet/cli/bench/"),
    ],
    "faster_coco_eval": ["vitdet/evaluation/"],
    "detectron2": ["vitdet/cli/bench/data.py"],
    "shapely": ["vitdet/cli/bench/data.py"],
    "torch.distributed": ["vitdet/distributed.py", "vitdet/training/parallel.py"],
    "torch.nn.parallel": ["vitdet/training/parallel.py"],
    "argparse": ["vitdet/cli/", "pipeline/cli/"],
    "triton": ["vitdet/kernels/"],
    "timm.models": ["vitdet/models/baselines/swin.py"],  # other files import only timm.layers
}


def tracked(*patterns: str) -> list[str]:
    """Return the files that git tracks or would add: neither ignored nor deleted."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.check_output(words, cwd=ROOT, text=True).splitlines()
    return sorted({name for name in listed if (ROOT / name).is_file()})


@cache
def product() -> list[Source]:
    names = tracked(*(f"{folder}/*.py" for folder in layers.PRODUCT))
    return [Source(name, (ROOT / name).read_text(encoding="utf-8")) for name in names]


@cache
def imports() -> list[Import]:
    return layers.read_imports(product())


def report(violations: Iterable[object], rule: str) -> None:
    found = list(map(str, violations))
    assert not found, "\n  ".join([f"{rule}:", *found])


def nodes(kind: type[ast.AST], *folders: str) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield each node of this kind with its location and its file's name."""
    for source in product():
        if source.name.startswith(folders or ""):
            for node in ast.walk(source.tree):
                if isinstance(node, kind):
                    yield f"{source.name}:{getattr(node, 'lineno', 0)}", node, source.name


def test_imports_follow_the_layers() -> None:
    parts = {part_of(source.module) for source in product()} - {"__init__"}
    report(parts ^ set(layers.LEVELS), "the table of tests/helpers/layers.py and the parts differ")
    upward = [
        f"{part} -> {entry}"
        for part, allowed in layers.ALLOWED.items()
        for entry in set(allowed) - {"*"}
        if layers.LEVELS[entry.split(".")[0]] > layers.LEVELS[part]
    ]
    report(upward, "the table allows imports of a higher layer")
    inside = [item for item in internal(imports()) if "vitdet" not in (item.module, item.target)]
    wrong = [found for found in inside if not layers.is_allowed(found)]
    report(wrong, "the table of tests/helpers/layers.py does not allow these imports")
    assert sum(map(layers.is_excepted, imports())) == len(layers.EXCEPTIONS)


def test_there_are_no_import_cycles() -> None:
    edges = [
        (found.module, found.target)
        for found in internal(imports())
        if not found.type_checking and not layers.is_excepted(found)
    ]
    report(cycle_in(edges), "modules that import each other")
    parts = ((part_of(source), part_of(target)) for source, target in edges)
    report(cycle_in(parts), "parts that import each other")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("from vitdet.data.images import read_image", True),
        ("from vitdet.data import coco", False),
        ("def f():\n    from vitdet.training import train", False),
        ("import vitdet.tracking.mlflow", False),
    ],
)
def test_an_import_against_the_layers_is_found(text: str, allowed: bool) -> None:
    source = Source("vitdet/predictor.py", text)
    known = [Source(f"{name}.py", "") for name in ("vitdet/data/images", "vitdet/data/coco")]
    (found,) = internal(layers.read_imports([source, *known]))
    assert layers.is_allowed(found) is allowed
    assert cycle_in([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")])
    assert not cycle_in([("a", "b"), ("b", "c"), ("a", "c")])


def test_third_party_packages_are_imported_only_where_allowed() -> None:
    places = {place for places in ONLY_IN.values() for place in places}
    report([place for place in places if not (ROOT / place).exists()], "no such place")
    outside = [
        found
        for package, places in ONLY_IN.items()
        for found in imports()
        if f"{found.target}.".startswith(f"{package}.")
        and not found.file.startswith((*places, "!"))
    ]
    report(outside, f"only these places may import these packages: {ONLY_IN}")


def test_the_package_imports_only_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    renamed = {"pillow": "PIL", "pyyaml": "yaml"}

    def modules(requirements: list[str]) -> set[str]:
        names = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements]
        return {renamed.get(name, name.replace("-", "_")) for name in names}

    core = modules(project["dependencies"]) | set(sys.stdlib_module_names) | {"vitdet"}
    more = {
        # mlflow brings pandas
        "vitdet/tracking/": modules(project["optional-dependencies"]["tracking"]) | {"pandas"},
        "vitdet/kernels/": {"triton"},  # a dependency of torch for CUDA
        "vitdet/cli/bench/data.py": {"detectron2", "shapely"},  # benchmarked only if installed
    }
    missing = []
    for found in imports():
        allowed = core.union(*(more[place] for place in more if found.file.startswith(place)))
        if found.file.startswith("vitdet/") and found.target.split(".")[0] not in allowed:
            missing.append(found)
    report(missing, "vitdet imports what its dependencies do not bring")


def test_models_do_not_depend_on_config_mode_or_device() -> None:
    wrong: list[object] = [
        found
        for found in imports()
        if found.file.startswith("vitdet/models/")
        and found.file != "vitdet/models/__init__.py"
        and part_of(found.target) == "config"
    ]
    regularization = "vitdet/models/layers.py"  # drop path, which depends on the mode by definition
    for where, node, name in nodes(ast.Attribute, "vitdet/models/"):
        by_mode = ast.unparse(node) == "self.training" and name != regularization
        if node.attr in ("cuda", "autocast") or by_mode:
            wrong.append(f"{where}: {ast.unparse(node)}")
    report(wrong, "a model must not depend on the config, the training mode or the device")


def test_the_code_follows_its_conventions() -> None:
    wrong = []
    for where, node, name in nodes(ast.Call):
        called = ast.unparse(node.func)
        if called == "print" and not name.startswith(PRINTING):
            wrong.append(f"{where}: only {', '.join(PRINTING)} print")
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called.endswith("load_state_dict") and keywords.get("strict", "True") != "True":
            wrong.append(f"{where}: load_state_dict without strict=True")
    wrong += [
        f"{where}: {node.name} takes **{node.args.kwarg.arg}; public functions name their arguments"
        for where, node, _ in nodes(ast.FunctionDef)
        if node.args.kwarg and not node.name.startswith("_")
    ]
    wrong += [
        f"{where}: a relative import" for where, node, _ in nodes(ast.ImportFrom) if node.level
    ]
    report(wrong, "conventions of this code")


def test_files_are_short() -> None:
    counts = {name: len((ROOT / name).read_text().splitlines()) for name in tracked("*.py")}
    limits = {name: 500 if name.startswith("tests/") else MAX_LINES for name in counts}
    long = [f"{name}: {count}" for name, count in counts.items() if count > limits[name]]
    report(long, "files that are too long")
    modules = [source.name for source in product() if re.fullmatch(r"vitdet/\w+[.]py", source.name)]
    assert len(modules) <= MAX_MODULES, f"{len(modules)} modules directly in vitdet/: {modules}"


def test_settings_are_not_named_outside_the_package() -> None:
    keys = {key for key in flatten(Config()) if "." in key}
    leaves = {key.split(".")[-1] for key in keys}
    # `name` and `init` are also ordinary words
    names = {rf"\b{name}\b" for name in leaves if "_" in name}
    whole = {rf"(?<![\w.]){re.escape(key)}(?![\w.])" for key in keys}
    pattern = re.compile("|".join(whole | names))
    found = [
        f"{name}:{number}: {match[0]}"
        for name in tracked("components/*", "pipeline/*", "manifests/*", "dvc.yaml")
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1)
        if not line.lstrip().startswith("#")
        for match in pattern.finditer(line)
    ]
    report(found, "settings are named outside vitdet/")


def test_dvc_stages_depend_on_existing_files_and_sections() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    outs = {out for stage in stages.values() for out in stage.get("outs", [])}
    outs |= {out for stage in stages.values() for out in stage.get("metrics", [])}
    # DVC runs independent stages in this order, so a wrong setting is reported before any work
    assert next(iter(stages)) == "config"
    wrong = []
    for key, stage in stages.items():
        for name in stage.get("deps", []):
            if name not in outs and not (ROOT / name).exists():
                wrong.append(f"{key}: no file {name}")
        for params in stage.get("params", []):
            assert set(params) <= {"work/config.yaml", "work/training.json"} & outs, key
            unknown = set(params.get("work/config.yaml") or ()) - set(Config.__dataclass_fields__)
            wrong += [f"{key}: no section {section}" for section in sorted(unknown)]
    report(wrong, "dvc.yaml")


def test_the_data_stage_depends_on_all_code_that_draws_the_data() -> None:
    files = {source.module: source.name for source in product()}
    reached, waiting = set(), ["vitdet.demo.tiny"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [edge.target for edge in imports() if edge.module == module]
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["data"]
    assert sorted(files[module] for module in reached & set(files)) == sorted(stage["deps"])


def test_no_file_mentions_a_registry_or_a_folder_of_one_machine() -> None:
    hosts = r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|registry[.]npmjs|deb[.]debian[.]org"
    options = r"^--(?:extra-)?index-url|^--find-links"
    folders = r"(?<![\w.}])/(?:home|root|Users|work|opt)/\w"
    exempt = ("manifests/", ".gitignore", ".dvc", "tests/cli/test_architecture.py")
    wrong = []
    for name in tracked():
        content = (ROOT / name).read_bytes()
        if b"\0" in content:
            continue  # binary file
        patterns = [hosts, options, *([] if name.startswith(exempt) else [folders])]
        for number, line in enumerate(content.decode().splitlines(), 1):
            if any(re.search(pattern, line) for pattern in patterns):
                wrong.append(f"{name}:{number}: {line.strip()[:80]}")
    report(wrong, "these belong to one network or machine")


HEAVY = ("torch", "torchvision", "mlflow", "timm", "numpy", "PIL")


@pytest.mark.parametrize(
    ("run", "heavy"),
    [
        ("from vitdet.cli import main; main(['--help'])", HEAVY),
        ("from vitdet.cli import main; main(['config', 'tiny'])", HEAVY),
        ("from vitdet.cli import main; main(['weights', 'list'])", HEAVY),
        ("from vitdet import stages; stages.plan_trainings(['tiny'], [], '')", HEAVY),
        ("import vitdet.data.check", ("torch",)),
    ],
)
def test_light_commands_import_no_heavy_packages(run: str, heavy: tuple[str, ...]) -> None:
    found = f"set({heavy}) & set(sys.modules)"
    code = f"import sys\ntry:\n    {run}\nfinally:\n    assert not {found}\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
