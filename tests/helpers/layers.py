"""The layers of the package and the imports allowed between them.

`LAYERS` is the one table of which part may import which. `tests.helpers.house` counts the imports that it
does not allow; `tests/cli/test_architecture.py` fails on each. Nothing here imports the product: the
sources are parsed, so that any checkout can be read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PRODUCT = ("vitdet", "components", "pipeline")

# A room is a module or folder directly in vitdet/, or one of the folders components/, pipeline/.
# The lowest layer comes first. Each room lists what it may import besides itself: a room, one of
# its modules (`data.images`), or ALL for every room of the layers below.
BASE = "files config types distributed torchrun"
ALL = "*"
LAYERS: tuple[dict[str, str], ...] = (
    {
        "files": BASE,
        "config": BASE,
        "types": BASE,
        "distributed": BASE,
        "torchrun": "",
    },
    {"kernels": "", "pages": ""},
    {"models": f"{BASE} kernels", "data": BASE},
    {"checkpoint": f"{BASE} models", "visualize": f"{BASE} data"},
    {
        "predictor": f"{BASE} models data.images data.transforms checkpoint visualize",
        "datasets": f"{BASE} data checkpoint visualize pages",
    },
    # a conversion needs the shapes of the model, a fetched file is a download
    {"weights": f"{BASE} models data checkpoint datasets.download"},
    {"evaluation": f"{BASE} kernels models data checkpoint visualize predictor pages"},
    # the gate compares evaluations; the model card states the licence of the initial weights
    {"tracking": f"{BASE} data checkpoint predictor evaluation weights.catalogue"},
    {
        "training": f"{BASE} kernels models data checkpoint visualize predictor"
        " evaluation weights tracking.tracker"
    },
    {"demo": f"{BASE} data checkpoint models training weights"},
    {"stages": ALL},
    {"cli": ALL, "components": "stages"},
    {"__main__": "cli", "pipeline": "components config.credentials"},
)
# (importing module, imported room) -> the function that the import is inside of
EXCEPTIONS = {("types", "visualize"): "Detections.draw"}
# Modules that are still to be merged into a room; the table treats them as part of it.
MERGING: dict[str, str] = {}

LEVELS = {room: level for level, layer in enumerate(LAYERS) for room in layer}
ALLOWED = {room: allowed.split() for layer in LAYERS for room, allowed in layer.items()}


@dataclass(frozen=True)
class Source:
    """A parsed Python file; name is its path relative to the checkout, in POSIX form."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.name)

    @property
    def module(self) -> str:
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, by full dotted name, on a line of a file.

    target is a module of the product where it is one, else the name as imported, e.g.
    `torch.distributed.all_reduce`. scope is the enclosing class and function, empty at module level.
    """

    file: str
    line: int
    module: str
    target: str
    scope: str = ""
    type_checking: bool = False

    def __str__(self) -> str:
        inside = f" in {self.scope}" if self.scope else ""
        return f"{self.file}:{self.line}: {self.module} imports {self.target}{inside}"


def read_sources(root: Path, *folders: str) -> list[Source]:
    """Read the Python files of these folders of a checkout, sorted by path."""
    paths = {path for folder in folders for path in (root / folder).rglob("*.py")}
    return [
        Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(paths)
    ]


def room_of(module: str) -> str:
    """Return the room of a module: `data` for vitdet.data.coco, `components` for components.train."""
    top, _, rest = module.partition(".")
    room = (rest.split(".")[0] or "__init__") if top == "vitdet" else top
    return MERGING.get(room, room)


def read_imports(sources: Iterable[Source], modules: Iterable[str] = ()) -> list[Import]:
    """Return the absolute and relative imports of the sources, in-function ones included.

    modules: the modules of the product, by default those of the sources.
    """
    sources = list(sources)
    known = set(modules) or {source.module for source in sources}
    return [found for source in sources for found in _imports(source, known)]


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements directly in a node; functions, classes and imports are nowhere else."""
    for name in ("body", "handlers", "cases", "orelse", "finalbody"):
        inside = getattr(node, name, ())
        yield from inside if isinstance(inside, list) else ()


def _imports(source: Source, known: set[str]) -> Iterator[Import]:
    def visit(node: ast.AST, scope: tuple[str, ...], type_checking: bool) -> Iterator[Import]:
        for target in _targets(node, source, known):
            yield Import(
                source.name, node.lineno, source.module, target, ".".join(scope), type_checking
            )
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        guarded = node.body if isinstance(node, ast.If) and _tests_type_checking(node.test) else []
        for child in statements(node):
            yield from visit(child, scope, type_checking or child in guarded)

    yield from visit(source.tree, (), False)


def _tests_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _targets(node: ast.AST, source: Source, known: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:  # relative: from the package that the file is in, or one of its parents
        package = source.name.removesuffix(".py").split("/")[: -node.level]
        base = ".".join([*package, *([base] if base else [])])
    named = [f"{base}.{alias.name}" for alias in node.names]
    internal = base in known or base.split(".")[0] in PRODUCT
    return sorted({name if name in known or not internal else base for name in named})


def is_internal(found: Import) -> bool:
    """Whether the target of an import is part of the product."""
    return found.target.split(".")[0] in PRODUCT


def is_excepted(found: Import) -> bool:
    """Whether an import is one that EXCEPTIONS names."""
    key = (found.module.removeprefix("vitdet."), room_of(found.target))
    return key in EXCEPTIONS and EXCEPTIONS[key] == found.scope


def is_covered(found: Import) -> bool:
    """Whether LAYERS names the rooms at both ends of an import."""
    return room_of(found.module) in LEVELS and room_of(found.target) in LEVELS


def is_allowed(found: Import) -> bool:
    """Whether LAYERS or EXCEPTIONS allows an import within the product whose rooms it names."""
    source, target = room_of(found.module), room_of(found.target)
    below = LEVELS[target] < LEVELS[source]
    name = ".".join([target, *found.target.removeprefix("vitdet.").split(".")[1:]])
    return (
        source == target
        or is_excepted(found)
        or any(
            below if entry == ALL else f"{name}.".startswith(f"{entry}.")
            for entry in ALLOWED[source]
        )
    )


def is_upward(found: Import) -> bool:
    """Whether an import leads to a higher layer than that of the importing module."""
    return LEVELS[room_of(found.target)] > LEVELS[room_of(found.module)]


def product_edges(imports: Iterable[Import]) -> list[Import]:
    """Return the imports that make the import graph: internal, at run time, not excepted."""
    return [
        found
        for found in imports
        if is_internal(found) and not found.type_checking and not is_excepted(found)
    ]


def cycles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node, the largest first."""
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        if source != target:
            graph.setdefault(source, set()).add(target)
            graph.setdefault(target, set())
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:  # Tarjan
        index[node] = low[node] = len(index)
        stack.append(node)
        for neighbor in sorted(graph[node]):
            if neighbor not in index:
                visit(neighbor)
                low[node] = min(low[node], low[neighbor])
            elif neighbor in stack:
                low[node] = min(low[node], index[neighbor])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found, key=lambda component: (-len(component), component))
