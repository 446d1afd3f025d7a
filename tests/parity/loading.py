"""Load pre-trained files with our loader; compare with the tensors that the reference's loader reads from them.

A case contains several files: {tag: {backbone: constructor arguments, loaded, left_at_init, unused_source}}, with the
file's tensors under `<tag>/src/` and the backbone's under `<tag>/dst/`. The tensors' names tell a file's layout:
`layers.` is in ViTAE's classifier; PCM, q_bias or a prefix is in its autoencoder; all other files are MAE's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.parity.backbone import system_of
from tests.parity.case import as_tensors, load
from tests.parity.report import Report
from vitdet.weights.formats.table import Format, rename, to_ours
from vitdet.weights.load import load_pretrained

RESIZED = 1e-5  # absolute, for interpolated tensors; all others are bitwise equal


def layout_of(names: list[str]) -> str:
    """Return the layout of a file with these names."""
    if any(name.startswith("layers.") for name in names):
        return "vitae_cls"
    signs = ("PCM.", "q_bias", "module.", "encoder.")
    return "vitae" if any(sign in name for name in names for sign in signs) else "mae"


def compute(folder: Path) -> dict[str, tuple[dict[str, Tensor], list[str]]]:
    """Return {tag: (tensors after loading, names that were not loaded)}; read only the files' tensors."""
    config = json.loads((folder / "config.json").read_text())
    sources = load(folder / "io.npz", lambda name: "/src/" in name)
    found = {}
    for tag, entry in config.items():
        start = f"{tag}/src/"
        weights = as_tensors(inside(sources, start))
        torch.manual_seed(0)
        model = system_of(entry["backbone"]).build(entry["backbone"])
        layout = layout_of(list(weights))
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "file.pth"
            torch.save({"model" if layout == "mae" else "state_dict": weights}, path)
            fresh = load_pretrained(model, path, layout).fresh
        found[tag] = model.state_dict(), fresh
    return found


def compare(
    folder: Path, found: dict[str, tuple[dict[str, Tensor], list[str]]], report: Report
) -> None:
    """Compare every tensor that the reference loaded, and the names that it did not load."""
    config = json.loads((folder / "config.json").read_text())
    stored = load(folder / "io.npz")
    for tag, (ours, fresh) in found.items():
        entry, start = config[tag], f"{tag}/dst/"
        layout = system_of(entry["backbone"]).layout(entry["backbone"])
        inputs = {f"loading.{name}" for name in stored if name.startswith(f"{tag}/src/")}
        report.skip(f"loading.{tag}/src/*", f"{len(inputs)} inputs: they show in what is loaded")
        report.seen |= inputs
        arrays = inside(stored, start)
        theirs = to_ours(as_tensors(arrays, "backbone."), layout)
        report.seen |= {f"loading.{start}{name}" for name in arrays}  # under our names
        for name, expected in theirs.items():
            tolerance = RESIZED if "pos_embed" in name else 0.0
            report.close(f"loading.{tag}.{name}", ours[name], expected, tolerance)
        more = more_than_the_reference(entry, layout)
        if more:
            count = f"{len(more)} tensors of the file that the reference has no place for"
            report.skip(f"loading.{tag}.lost", count)
        loaded = [name for name in ours if name not in fresh]
        report.names(f"loading.{tag}.loaded", set(loaded) - more, theirs)
        left = {rename(f"backbone.{name}", layout) or name for name in entry["left_at_init"]}
        report.names(f"loading.{tag}.left_at_init", fresh, (left & ours.keys()) - more)
        report.names(f"loading.{tag}.list of loaded", entry["loaded"], arrays)
        report.skip(f"loading.{tag}.unused_source", "names of the reference's own bookkeeping")
    report.all_seen([f"loading.{name}" for name in stored])


def more_than_the_reference(entry: dict, layout: Format) -> set[str]:
    """Return, by our names, the file's tensors that the reference does not load: the qkv biases of a ViTAE's global
    blocks, and everything if the reference recognizes none of the file's names.
    """
    left = entry["left_at_init"]
    biases = [name.rpartition(".")[0] for name in left if name.endswith(("q_bias", "v_bias"))]
    more = {f"backbone.{attention}.qkv.bias" for attention in biases}
    if not entry["loaded"]:
        kept = [name for name in left if not name.startswith(("norm.", "fpn"))]
        kept = [name for name in kept if not name.endswith(("rel_pos_h", "rel_pos_w"))]
        more |= {rename(f"backbone.{name}", layout) or name for name in kept}
    return more


def inside(arrays: Mapping[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names start with this prefix, without it."""
    return {n.removeprefix(start): array for n, array in arrays.items() if n.startswith(start)}
