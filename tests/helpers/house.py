"""Code metrics of a checkout: size by folder, import graph and repeated defaults.

    python -m tests.helpers.house                          this checkout
    python -m tests.helpers.house --root ../old --verbose  another one, with every import and default listed

The sources are parsed and never imported, so a checkout of any age can be measured. Lines are
counted in the files as they are; format an old checkout first (ruff format --line-length 100).
"""

from __future__ import annotations

import argparse
import ast
import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from tests.helpers.layers import (
    EXCEPTIONS,
    LAYERS,
    LEVELS,
    PRODUCT,
    Import,
    Source,
    cycles,
    is_allowed,
    is_covered,
    is_excepted,
    is_internal,
    is_upward,
    product_edges,
    read_imports,
    read_sources,
    room_of,
    statements,
)

# The detector (D): what finds objects and what trains and evaluates it. A name that ends with a
# slash is a folder. The second line exists in the flat layout only (commit dad8b8b).
DETECTOR = (
    *("__init__.py", "config.py", "types.py", "files.py", "distributed.py", "checkpoint.py"),
    *("predictor.py", "visualize.py", "models/", "data/", "training/", "evaluation/"),
    *("typed.py", "rules.py", "written.py"),
)
# Files that the flat layout had in these folders and that are not part of the detector.
NOT_DETECTOR = (
    *("data/charts.py", "data/convert.py", "data/extract.py", "data/fetch.py", "data/foreign.py"),
    *("data/outlines.py", "data/page.py", "data/portrait.py", "data/published.py"),
    *("data/report.py", "data/scenes.py", "data/shapes.py", "data/tiny.py", "data/together.py"),
    *("data/voc.py", "data/yolo.py", "training/convert.py", "training/mae.py"),
    *("evaluation/bench.py", "evaluation/bench_data.py"),
)


@dataclass(frozen=True)
class Function:
    """A function or method, by its qualified name; lines from `def` to its end."""

    file: str
    name: str
    lines: int


@dataclass(frozen=True)
class Default:
    """A default value of a parameter or dataclass field outside config.py."""

    file: str
    line: int
    owner: str
    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.owner}({self.name}={self.value})"


@dataclass(frozen=True)
class Setting:
    """A field of the configuration: its annotation and its default, as source text."""

    annotation: str
    default: str

    def accepts(self, value: str) -> bool:
        """Whether a value is of this setting's type, and one of its choices where it has some."""
        if self.annotation.startswith("Literal"):
            return value in self.annotation
        ours, theirs = _kind(self.default), _kind(value)
        return theirs in (ours, "expression")


def _kind(text: str) -> str:
    try:
        value = ast.literal_eval(text)
    except ValueError:
        return "expression"
    return "number" if type(value) in (int, float) else type(value).__name__


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml: its dependencies in vitdet/ and the files that these are."""

    name: str
    dependencies: list[str]
    files: list[Path]
    missing: list[str]


def is_detector(name: str) -> bool:
    """Whether a file, by its path in the checkout, is part of the detector."""
    inside = name.removeprefix("vitdet/")
    return name != inside and inside.startswith(DETECTOR) and inside not in NOT_DETECTOR


@cache
def functions_of(source: Source) -> list[Function]:
    """Return all functions of a file: methods and nested functions too."""

    def visit(node: ast.AST, scope: tuple[str, ...]) -> Iterator[Function]:
        for child in statements(node):
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = (*scope, child.name)
                if not isinstance(child, ast.ClassDef):
                    length = (child.end_lineno or child.lineno) - child.lineno + 1
                    yield Function(source.name, ".".join(inner), length)
            yield from visit(child, inner)

    return list(visit(source.tree, ()))


def settings_of(config: Source) -> dict[str, Setting]:
    """Return {'optim.lr': Setting('float', '1e-4'), ...}: every setting under class Config."""
    classes = {node.name: node for node in config.tree.body if isinstance(node, ast.ClassDef)}

    def visit(name: str, prefix: str) -> Iterator[tuple[str, Setting]]:
        for node in classes[name].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                kind = ast.unparse(node.annotation)
                if kind in classes:
                    yield from visit(kind, f"{prefix}{node.target.id}.")
                elif node.value is not None:
                    yield f"{prefix}{node.target.id}", Setting(kind, ast.unparse(node.value))

    return dict(visit("Config", "")) if "Config" in classes else {}


def defaults_of(source: Source) -> list[Default]:
    """Return the defaults of a file's parameters and dataclass fields; None is no value."""
    found = []

    def add(node: ast.expr | None, owner: str, name: str) -> None:
        # `DataConfig.antialias` refers to the one default, it does not repeat it
        refers = isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("Config")
        if node is not None and not refers and ast.unparse(node) != "None":
            found.append(Default(source.name, node.lineno, owner, name, ast.unparse(node)))

    def visit(node: ast.AST, scope: tuple[str, ...]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        owner = ".".join(scope)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            values = [None] * (len(positional) - len(node.args.defaults)) + node.args.defaults
            names, values = positional + node.args.kwonlyargs, values + node.args.kw_defaults
            for argument, value in zip(names, values, strict=True):
                add(value, owner, argument.arg)
        if isinstance(node, ast.ClassDef) and any(
            "dataclass" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    add(field.value, owner, field.target.id)
        for child in statements(node):
            visit(child, scope)

    visit(source.tree, ())
    return found


def doubled_defaults(sources: list[Source]) -> tuple[dict[str, Setting], dict[str, list[Default]]]:
    """Return the settings, and for each that has a default elsewhere: where its name has one.

    Settings are matched by the last part of their name and the type of the value: `num_convs=4`
    counts for rpn.num_convs, roi_heads.num_convs and mask.num_convs.
    """
    config = next((source for source in sources if source.name == "vitdet/config.py"), None)
    settings = settings_of(config) if config else {}
    others = [found for source in sources if source is not config for found in defaults_of(source)]
    found = {
        key: [
            default
            for default in others
            if default.name == key.split(".")[-1] and setting.accepts(default.value)
        ]
        for key, setting in settings.items()
    }
    return settings, {key: places for key, places in found.items() if places}


def stages_of(root: Path) -> list[Stage]:
    """Read which files of vitdet/ each stage of dvc.yaml depends on."""
    path = root / "dvc.yaml"
    stages = yaml.safe_load(path.read_text())["stages"] if path.is_file() else {}
    result = []
    for name, stage in stages.items():
        dependencies = [
            item for item in stage.get("deps", []) if item.split("/")[0].strip() == "vitdet"
        ]
        files = sorted(
            {file for item in dependencies for file in _files(root / item, _is_tracked_kind)}
        )
        missing = [item for item in dependencies if not (root / item).exists()]
        result.append(Stage(name, dependencies, files, missing))
    return result


def _is_tracked_kind(path: Path) -> bool:
    return "__pycache__" not in path.parts and path.suffix != ".pyc"


def _files(path: Path, choose: Callable[[Path], bool]) -> list[Path]:
    found = path.rglob("*") if path.is_dir() else [path]
    return sorted(item for item in found if item.is_file() and choose(item))


def _text_lines(path: Path) -> int:
    content = path.read_bytes()
    return 0 if b"\0" in content else len(content.decode("utf-8", "replace").splitlines())


def rooms_table(root: Path, sources: list[Source], tests: list[Source]) -> Iterator[str]:
    """Lines and files of every room, then the totals."""

    def row(label: str, chosen: list[Source], mark: str = "", more: str = "") -> str:
        functions = sum(len(functions_of(source)) for source in chosen)
        lines = sum(source.lines for source in chosen)
        return f"{mark:2}{label:24}{lines:>8,}{len(chosen):>7,}{functions:>11,}{more}"

    yield f"{'':2}{'room':24}{'lines':>8}{'files':>7}{'functions':>11}   (Python; D: detector)"
    package = [source for source in sources if source.name.startswith("vitdet/")]
    rooms: dict[str, list[Source]] = {}
    for source in package:
        parts = source.name.split("/")
        rooms.setdefault(f"{parts[1]}/" if len(parts) > 2 else parts[1], []).append(source)
    for name, chosen in sorted(rooms.items(), key=lambda item: (item[0][-1] == "/", item[0])):
        marked = [source for source in chosen if is_detector(source.name)]
        mark = "D" if marked else ""
        partly = f"   {len(marked)} of {len(chosen)} files are D" * (0 < len(marked) < len(chosen))
        yield row(name, chosen, mark, partly)
    yield ""
    yield row("detector (D)", [source for source in package if is_detector(source.name)])
    yield row("weights/", rooms.get("weights/", []))
    yield row("vitdet/", package)
    for folder in ("components", "pipeline"):
        yield row(f"{folder}/", [s for s in sources if s.name.startswith(f"{folder}/")])
    yield row("product (these three)", sources)
    manifests = _files(root / "manifests", _is_tracked_kind)
    lines = sum(map(_text_lines, manifests))
    yield f"{'':2}{'manifests/':24}{lines:>8,}{len(manifests):>7,}{'':11}   (all text files)"
    cases = sum(
        function.name.split(".")[-1].startswith("test_")
        for source in tests
        for function in functions_of(source)
    )
    yield row("tests/", tests, more=f"   {cases:,} of them test_*")


def top_level(root: Path) -> str:
    """What is directly in vitdet/: modules, folders and other files."""
    entries = list((root / "vitdet").glob("*"))
    folders = [path for path in entries if path.is_dir() and _files(path, _is_tracked_kind)]
    modules = [path for path in entries if path.is_file() and path.suffix == ".py"]
    others = sorted(path.name for path in entries if path.is_file() and path.suffix != ".py")
    return f"{len(modules)} modules, {len(folders)} folders, other files: {', '.join(others) or 'none'}"


def sizes(sources: list[Source]) -> Iterator[str]:
    """Median and longest file and function."""
    files = sorted(sources, key=lambda source: source.lines)
    functions = sorted(
        (function for source in sources for function in functions_of(source)),
        key=lambda function: function.lines,
    )
    if files:
        median = statistics.median(source.lines for source in files)
        yield f"file      median {median:g}, longest {files[-1].lines} ({files[-1].name})"
    if functions:
        median = statistics.median(function.lines for function in functions)
        last = functions[-1]
        yield f"function  median {median:g}, longest {last.lines} ({last.name} in {last.file})"


def import_report(imports: list[Import], verbose: bool) -> Iterator[str]:
    """Cycles, and the imports that the table of layers does not allow."""
    edges = product_edges(imports)
    for level, found in (
        ("modules", cycles((edge.module, edge.target) for edge in edges)),
        ("rooms", cycles((room_of(edge.module), room_of(edge.target)) for edge in edges)),
    ):
        yield f"cycles between {level}: {len(found)}"
        yield from (f"    {' <-> '.join(component)}" for component in found)
    wrong = [edge for edge in edges if is_covered(edge) and not is_allowed(edge)]
    upward = [edge for edge in wrong if is_upward(edge)]
    yield f"imports that the layers do not allow: {len(wrong)}, of them upward: {len(upward)}"
    yield from (f"    {'upward' if edge in upward else 'other ':6}  {edge}" for edge in wrong)
    unknown = sorted({room for edge in edges for room in _ends(edge)} - set(LEVELS))
    if unknown:
        count = sum(not is_covered(edge) for edge in edges)
        yield f"imports from or to rooms that are not in the layers, not checked: {count}"
        yield f"    {', '.join(unknown)}"
    excepted = [found for found in imports if is_excepted(found)]
    yield f"named exceptions: {len(excepted)} of {len(EXCEPTIONS)}"
    yield from (f"    {found}" for found in excepted)
    typing = [found for found in imports if is_internal(found) and found.type_checking]
    yield f"imports under TYPE_CHECKING, not counted above: {len(typing)}"
    yield from (f"    {found}" for found in typing if verbose)


def _ends(edge: Import) -> tuple[str, str]:
    return room_of(edge.module), room_of(edge.target)


def defaults_report(sources: list[Source], verbose: bool) -> Iterator[str]:
    """How many settings have a default outside config.py, in the detector and in the rest."""
    settings, doubled = doubled_defaults(sources)
    for label, inside in (("the detector", True), ("the rest of the product", False)):
        chosen = {
            key: [default for default in found if is_detector(default.file) == inside]
            for key, found in doubled.items()
        }
        chosen = {key: found for key, found in chosen.items() if found}
        places = {default for found in chosen.values() for default in found}
        most = max((len(found) for found in chosen.values()), default=0)
        yield (
            f"{len(chosen)} of {len(settings)} settings have another default in {label}: "
            f"{len(places)} places, up to {most} of one setting"
        )
        if verbose:
            for key, found in chosen.items():
                yield f"    {key} = {settings[key].default}"
                yield from (f"        {default}" for default in found)


def stages_report(root: Path) -> Iterator[str]:
    """The files of vitdet/ that the stages of dvc.yaml name."""
    for stage in stages_of(root):
        lines = sum(map(_text_lines, stage.files))
        yield f"{stage.name:10}{len(stage.files):>5} files{lines:>8,} lines"
        yield from (f"    {name}" for name in stage.dependencies)
        yield from (f"    {name}: does not exist" for name in stage.missing)


def report(root: Path, verbose: bool = False) -> str:
    """Return the metrics of a checkout as text."""
    sources, tests = read_sources(root, *PRODUCT), read_sources(root, "tests")
    package = [source for source in sources if source.name.startswith("vitdet/")]
    sections: dict[str, list[str]] = {
        "Size": list(rooms_table(root, sources, tests)),
        "Top level of vitdet/": [top_level(root)],
        "Files and functions of vitdet/": list(sizes(package)),
        f"Files and functions of {', '.join(f'{name}/' for name in PRODUCT)}": list(sizes(sources)),
        f"Imports ({len(LAYERS)} layers)": list(import_report(read_imports(sources), verbose)),
        "Doubled defaults": list(defaults_report(sources, verbose)),
        "Files of vitdet/ by stage of dvc.yaml": list(stages_report(root)),
    }
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections.items())


def main(argv: list[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.house", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], metavar="DIR")
    parser.add_argument("--verbose", action="store_true", help="list every repeated default")
    args = parser.parse_args(argv)
    if not (args.root / "vitdet").is_dir():
        print(f"{args.root}: no folder vitdet/ in it; --root takes a checkout", file=sys.stderr)
        return 2
    try:
        print(report(args.root, args.verbose))
    except SyntaxError as error:
        print(f"{args.root}: {error}: expected valid Python; fix the file", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    gc.disable()  # the trees live until the end; collecting takes two thirds of the time
    sys.exit(main())
