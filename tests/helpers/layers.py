"""The layers of the package and the imports allowed between them.

`LAYERS` is the one table of which part may import which; `tests/cli/test_architecture.py` checks it.
Nothing here imports the product: the sources are parsed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

PRODUCT = ("vitdet", "components", "pipeline")

# A part is a module or folder directly in vitdet/, or one of the folders components/ and pipeline/.
# The lowest layer comes first. Each part lists what it may import besides itself: a part, one of
# its modules (`data.images`), or ALL for every part of the layers below.
BASE = "files config types distributed torchrun"
AFTER = "evaluation weights tracking.tracker"
ALL = "*"
LAYERS: tuple[dict[str, str], ...] = (
    {"files": BASE, "config": BASE, "types": BASE, "distributed": BASE, "torchrun": ""},
    {"kernels": "", "pages": ""},
    {"models": f"{BASE} kernels", "data": BASE},
    {"checkpoint": f"{BASE} models", "visualize": f"{BASE} data"},
    {
        "predictor": f"{BASE} models data.images data.transforms checkpoint visualize",
        "datasets": f"{BASE} data checkpoint visualize pages",
    },
    # conversions need the model's shapes, and published files are downloaded
    {"weights": f"{BASE} models data checkpoint datasets.download"},
    {"evaluation": f"{BASE} kernels models data checkpoint visualize predictor pages"},
    # the gate compares evaluations; the model card states the license of the initial weights
    {"tracking": f"{BASE} data checkpoint predictor evaluation weights.catalogue"},
    {"training": f"{BASE} kernels models data checkpoint visualize predictor {AFTER}"},
    {"demo": f"{BASE} data checkpoint models training weights"},
    {"stages": ALL},
    {"cli": ALL, "components": "stages"},
    {"__main__": "cli", "pipeline": "components config.credentials"},
)
# (importing module, imported part) -> the function that contains the import
EXCEPTIONS = {("types", "visualize"): "Detections.draw"}

LEVELS = {part: level for level, layer in enumerate(LAYERS) for part in layer}
ALLOWED = {part: allowed.split() for layer in LAYERS for part, allowed in layer.items()}


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


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, by full dotted name, on a line of a file.

    target is a module if the product has it, else the name as imported, e.g.
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


def part_of(module: str) -> str:
    """Return a module's part: `data` for vitdet.data.coco, `components` for components.train."""
    top, _, rest = module.partition(".")
    return (rest.split(".")[0] or "__init__") if top == "vitdet" else top


def read_imports(sources: list[Source]) -> list[Import]:
    """Return all absolute imports, including those in functions; `sources` is the whole product."""
    known = {source.module for source in sources}
    return [found for source in sources for found in _imports(source, known)]


def _imports(source: Source, known: set[str]) -> Iterator[Import]:
    def visit(node: ast.AST, scope: tuple[str, ...], type_checking: bool) -> Iterator[Import]:
        for target in _targets(node, known):
            inside = ".".join(scope)
            yield Import(source.name, node.lineno, source.module, target, inside, type_checking)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope, type_checking or guarded and child in node.body)

    yield from visit(source.tree, (), False)


def _targets(node: ast.AST, known: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom) or not node.module:
        return []
    named = [f"{node.module}.{alias.name}" for alias in node.names]
    internal = node.module.split(".")[0] in PRODUCT
    return sorted({name if name in known or not internal else node.module for name in named})


def is_excepted(found: Import) -> bool:
    """Return whether EXCEPTIONS lists the import."""
    key = (found.module.removeprefix("vitdet."), part_of(found.target))
    return key in EXCEPTIONS and EXCEPTIONS[key] == found.scope


def is_allowed(found: Import) -> bool:
    """Return whether LAYERS or EXCEPTIONS allows an import within the product."""
    source, target = part_of(found.module), part_of(found.target)
    if source == target or is_excepted(found):
        return True
    below = LEVELS[target] < LEVELS[source]
    name = ".".join([target, *found.target.removeprefix("vitdet.").split(".")[1:]])
    return any(
        below if entry == ALL else f"{name}.".startswith(f"{entry}.") for entry in ALLOWED[source]
    )


def internal(imports: Iterable[Import]) -> list[Import]:
    """Return the imports whose target is part of the product."""
    return [found for found in imports if found.target.split(".")[0] in PRODUCT]


def cycle_in(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Return a cycle of the graph with these edges, [] if there is none."""
    sorter = TopologicalSorter()
    for source, target in edges:
        if source != target:
            sorter.add(source, target)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1]
    return []
