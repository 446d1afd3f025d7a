"""The catalogue lists the published weights, including the initial weights of each recipe."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from vitdet.config import load_config, recipes
from vitdet.weights.catalogue import CATALOGUE, PACKAGED, Entry, cache_folder, fetched, find
from vitdet.weights.formats import FORMATS

PUBLISHED = Path(__file__).parents[3] / "shared" / "reference" / "detectron2" / "PUBLISHED.md"
ENTRIES = list(CATALOGUE.values())


def test_every_value_has_the_type_of_its_field() -> None:
    raw = (PACKAGED / "catalogue.yaml").read_bytes()
    assert msgspec.yaml.decode(raw, type=list[Entry]) == ENTRIES


def test_the_initial_weights_of_every_recipe_are_listed() -> None:
    for recipe in recipes():
        name = load_config(recipe).train.init
        assert name == "" or (name in CATALOGUE and not CATALOGUE[name].recipe), recipe


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_fields_of_an_entry_are_consistent(entry: object) -> None:
    assert bool(entry.recipe) == bool(entry.ap)
    assert entry.file.endswith(".pt" if entry.recipe else ".safetensors")
    assert (entry.format in FORMATS) == (entry.state != "packaged")
    assert entry.other == "" or find(entry.other).state != "none"
    assert (urlsplit(entry.url).scheme == "https") == (entry.state in ("file", "page", "dead"))
    for digits in (entry.sha256, entry.md5):
        assert re.fullmatch("[0-9a-f]*", digits) and len(digits) in (0, 6, 8, 64)
    if entry.recipe not in ("", *recipes()):
        pytest.skip(f"there is no recipe {entry.recipe}")
    assert entry.recipe == "" or load_config(entry.recipe).train.init in CATALOGUE


def test_detectors_of_detectron2_match_its_tables() -> None:
    if not PUBLISHED.exists():
        pytest.skip("needs ../shared")
    published = {}
    for row in PUBLISHED.read_text().splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 10 and "vitdet" in cells[0] and cells[-1].endswith(".pkl"):
            published[cells[-1]] = (float(cells[6]), float(cells[7]), cells[0])
    base = "https://dl.fbaipublicfiles.com/detectron2/ViTDet/"
    detectron2 = [entry for entry in ENTRIES if entry.format == "detectron2"]
    ours = {entry.url.removeprefix(base): entry for entry in detectron2}
    assert set(ours) == set(published) and len(ours) == 12
    for path, (box_ap, mask_ap, config) in published.items():
        entry, name = ours[path], f"{config.rsplit('_', 1)[0]}_{path.split('/')[0].lower()}"
        assert entry.ap == (box_ap, mask_ap) and path.endswith(f"_{entry.md5}.pkl")
        assert entry.name == name == entry.recipe


def test_fetched_files_are_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vitdet"
    assert fetched("mae_vit_tiny").is_file()
    run = "run: vitdet weights fetch"
    for given, says in (
        (("mae_vit_b",), f"mae_vit_b.safetensors: not fetched yet; {run} mae_vit_b$"),
        (("mae_vit_tiny", Path("there")), f"{run} mae_vit_tiny --output there$"),
        (("mae_vitae_b",), "not published it: convert .*--set train.init=vitae_b"),
    ):
        with pytest.raises(FileNotFoundError, match=says):
            fetched(*given)
    for name in ("mae_vit_b.safetensors", "mask_rcnn_vitdet_b_coco.pt"):
        cache_folder().mkdir(parents=True, exist_ok=True)
        (cache_folder() / name).touch()
        assert fetched(name.split(".")[0]) == cache_folder() / name
