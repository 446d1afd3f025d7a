"""The code metrics (`python -m tests.helpers.house`), on scratch packages with known properties."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers.house import (
    defaults_of,
    doubled_defaults,
    functions_of,
    is_detector,
    report,
    settings_of,
    stages_of,
)
from tests.helpers.layers import (
    ALLOWED,
    LAYERS,
    LEVELS,
    Source,
    cycles,
    is_allowed,
    is_upward,
    product_edges,
    read_imports,
    read_sources,
    room_of,
)

CONFIG = """\
@dataclass(frozen=True)
class HeadConfig:
    nms_iou: float = 0.7
    kind: Literal["simple", "fpn"] = "simple"


@dataclass(frozen=True)
class Config:
    head: HeadConfig = field(default_factory=HeadConfig)
    steps: int = 10
"""
FILES = {
    "vitdet/__init__.py": "",
    "vitdet/py.typed": "",
    "vitdet/config/__init__.py": "",
    "vitdet/config/schema.py": CONFIG,
    "vitdet/types.py": """\
class Detections:
    def draw(self):
        from vitdet.visualize import draw

        return draw(self)

    def save(self):
        from vitdet.visualize import draw
""",
    "vitdet/visualize.py": "from vitdet.types import Detections\n",
    "vitdet/models/__init__.py": "from .head import Head\n",
    "vitdet/models/head.py": """\
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitdet.training import Trainer


class Head:
    def __init__(self, *, nms_iou=0.5, kind="simple", steps=None):
        pass


def other(kind="runs", nms_iou="high", steps=Config.steps):
    def inner():
        return 1

    return inner
""",
    "vitdet/data/__init__.py": "",
    "vitdet/data/coco.py": "from vitdet.data import masks\n",
    "vitdet/data/masks.py": "def decode():\n    from vitdet.data.coco import read\n",
    "vitdet/training/__init__.py": "from vitdet.models.head import Head\n",
    "vitdet/checkpoint.py": "def load():\n    import vitdet.training\n",
    "vitdet/legacy.py": "from vitdet.stages import train\n",
    "vitdet/stages.py": "from vitdet import checkpoint\n",
    "components/train.py": "def train():\n    from vitdet.stages import train\n",
    "pipeline/run.py": "import components.train\nfrom vitdet import config\n",
    "manifests/job.yaml": "kind: Job\n---\nkind: Job\n",
    "tests/test_x.py": "def helper():\n    pass\n\n\ndef test_x():\n    pass\n",
    "dvc.yaml": """\
stages:
  train:
    cmd: vitdet train
    deps: [vitdet/models, vitdet/config/schema.py, vitdet/gone.py, work/data]
""",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def edges(checkout: Path) -> list:
    return product_edges(read_imports(read_sources(checkout, "vitdet", "components", "pipeline")))


def test_module_cycles_count_imports_inside_functions(edges: list) -> None:
    found = cycles((edge.module, edge.target) for edge in edges)
    assert found == [
        ["vitdet.data.coco", "vitdet.data.masks"],
        ["vitdet.types", "vitdet.visualize"],  # by Detections.save; Detections.draw is excepted
    ]


def test_room_cycles_leave_out_imports_for_type_checking(edges: list) -> None:
    found = cycles((room_of(edge.module), room_of(edge.target)) for edge in edges)
    assert found == [["types", "visualize"]]  # models -> training is under TYPE_CHECKING only


def test_nodes_of_one_cycle_are_one_component() -> None:
    assert cycles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "d"), ("e", "a")]) == [
        ["a", "b", "c"]
    ]


def test_imports_against_the_layers_are_found(edges: list) -> None:
    covered = [edge for edge in edges if room_of(edge.module) != "legacy"]
    wrong = {f"{e.module} -> {e.target}": is_upward(e) for e in covered if not is_allowed(e)}
    assert wrong == {
        "vitdet.checkpoint -> vitdet.training": True,
        "vitdet.types -> vitdet.visualize": True,  # Detections.save
        "pipeline.run -> vitdet.config": False,
    }


def test_only_the_named_module_of_a_room_is_allowed() -> None:
    text = "from vitdet.data.images import a\nfrom vitdet.data import b, coco\n"
    source = Source("vitdet/predictor.py", text)
    modules = ["vitdet.data", "vitdet.data.images", "vitdet.data.coco"]
    found = {edge.target: is_allowed(edge) for edge in read_imports([source], modules)}
    assert found == {"vitdet.data.images": True, "vitdet.data": False, "vitdet.data.coco": False}


def test_third_party_imports_keep_their_full_name() -> None:
    text = "from torch import distributed as dist\nimport mlflow.pyfunc\nfrom . import vit\n"
    found = read_imports([Source("vitdet/models/swin.py", text)], ["vitdet.models.vit"])
    assert [edge.target for edge in found] == [
        "torch.distributed",
        "mlflow.pyfunc",
        "vitdet.models.vit",
    ]


def test_no_layer_allows_an_import_of_a_higher_layer() -> None:
    assert sum(map(len, LAYERS)) == len(LEVELS)  # no room is listed twice
    for room, allowed in ALLOWED.items():
        for entry in set(allowed) - {"*"}:
            assert LEVELS[entry.split(".")[0]] <= LEVELS[room], (room, entry)


def test_a_doubled_default_is_matched_by_name_and_type(checkout: Path) -> None:
    settings, doubled = doubled_defaults(read_sources(checkout, "vitdet"))
    assert {key: setting.default for key, setting in settings.items()} == {
        "head.nms_iou": "0.7",
        "head.kind": "'simple'",
        "steps": "10",
    }
    assert {key: list(map(str, found)) for key, found in doubled.items()} == {
        "head.nms_iou": ["vitdet/models/head.py:8: Head.__init__(nms_iou=0.5)"],
        "head.kind": ["vitdet/models/head.py:8: Head.__init__(kind='simple')"],
    }


def test_defaults_are_of_parameters_and_dataclass_fields() -> None:
    text = """\
@dataclass
class A:
    x: int = 1
    y: int

class B:
    z: int = 2

def f(a, b=3, /, c=4, *, d, e=5, g=None): ...
"""
    found = [
        (default.owner, default.name, default.value) for default in defaults_of(Source("", text))
    ]
    assert found == [("A", "x", "1"), ("f", "b", "3"), ("f", "c", "4"), ("f", "e", "5")]


def test_functions_are_measured_from_def_to_end(checkout: Path) -> None:
    (head,) = [s for s in read_sources(checkout, "vitdet") if s.name.endswith("head.py")]
    assert [(function.name, function.lines) for function in functions_of(head)] == [
        ("Head.__init__", 2),
        ("other", 5),
        ("other.inner", 2),
    ]


def test_the_detector_is_the_same_in_both_layouts() -> None:
    assert is_detector("vitdet/data/coco.py") and is_detector("vitdet/typed.py")
    assert is_detector("vitdet/checkpoint.py") and is_detector("vitdet/models/baselines/swin.py")
    assert not is_detector("vitdet/data/voc.py") and not is_detector("vitdet/datasets/fetch.py")
    assert not is_detector("components/data.py") and not is_detector("vitdet/weights/load.py")


def test_the_files_of_a_dvc_stage(checkout: Path) -> None:
    (stage,) = stages_of(checkout)
    assert stage.dependencies == ["vitdet/models", "vitdet/config/schema.py", "vitdet/gone.py"]
    assert [path.relative_to(checkout).as_posix() for path in stage.files] == [
        "vitdet/config/schema.py",
        "vitdet/models/__init__.py",
        "vitdet/models/head.py",
    ]
    assert stage.missing == ["vitdet/gone.py"]


def test_the_report_of_a_scratch_checkout(checkout: Path) -> None:
    text = " ".join(report(checkout).split())
    for expected in (
        "D data/ 3 3 1",  # lines, files, functions
        "detector (D) 42 12 7 weights/ 0 0 0 vitdet/ 44 14 7",
        "components/ 2 1 1 pipeline/ 2 1 0",
        "manifests/ 3 1 (all text files) tests/ 6 1 2 1 of them test_*",
        "6 modules, 4 folders, other files: py.typed",
        "file median 1, longest 16 (vitdet/models/head.py)",
        "function median 2, longest 5 (other in vitdet/models/head.py)",
        "cycles between modules: 2",
        "imports that the layers do not allow: 3, of them upward: 2",
        "not checked: 1 legacy",
        "named exceptions: 1 of 1",
        "imports under TYPE_CHECKING, not counted above: 1",
        "2 of 3 settings have another default in the detector: 2 places, up to 1 of one setting",
        "vitdet/gone.py: does not exist",
    ):
        assert expected in text, text


def test_the_command_prints_the_report_without_importing_the_product() -> None:
    code = (
        "import sys, tests.helpers.house\n"
        "status = tests.helpers.house.main(['--verbose'])\n"
        "sys.exit(status or 'vitdet' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Doubled defaults" in done.stdout and "product (these three)" in done.stdout


def test_a_folder_that_is_no_checkout_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.helpers.house", "--root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path}: no folder vitdet/ in it; --root takes a checkout\n"


def test_settings_are_read_from_this_config() -> None:
    from vitdet.config import Config, flatten

    (config,) = [s for s in read_sources(ROOT, "vitdet") if s.name == "vitdet/config/schema.py"]
    assert list(settings_of(config)) == list(flatten(Config()))
