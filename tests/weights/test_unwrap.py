"""Weights wrapped by trainers: keys, prefixes and heads are removed by name; other files are identified."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.runs import refused
from vitdet.weights.formats import FORMATS
from vitdet.weights.load import read_source
from vitdet.weights.pickles import read_file
from vitdet.weights.unwrap import unwrap

NAMES = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed")


def plain() -> dict[str, Tensor]:
    return {name: torch.full((1, 3, 2), float(n)) for n, name in enumerate(NAMES)}


def prefixed(prefix: str, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in (weights or plain()).items()}


def read(text: str) -> str:
    return f"weights: read from {text}"


def removed(text: str) -> str:
    return f"names: removed the prefix {text}"


COUNTER, OTHERS = torch.tensor(5), "other tensors ignored: 3"
INNER = {name.replace(".", "._orig_mod.", 1): tensor for name, tensor in plain().items()}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (plain(), []),
        ({"model": plain(), "epoch": 3}, []),
        ({"state_dict": plain()}, [read("'state_dict'")]),
        ({"ema": {"module": plain()}}, [read("'module' in 'ema'")]),
        ({"student": plain(), "teacher": plain()}, [read("'teacher'")]),
        (prefixed("module.backbone."), [removed("module."), removed("backbone.")]),
        ({"model": plain(), "model_ema": prefixed("x.")}, [read("'model'; ignored: 'model_ema'")]),
        ({**prefixed("module."), "n_averaged": COUNTER}, [removed("module.")]),
        (prefixed("module.module.") | {"module.n_averaged": COUNTER}, [removed("module.module.")]),
        ({"model": plain(), "params": {"lr": 1}, "ema": {"decay": {"value": 0.9}}}, []),
        (
            {"teacher": {"model": {"state_dict": plain()}}, "model": {"lr": 1}},
            [read("'state_dict' in 'model' in 'teacher'")],
        ),
        (prefixed("_orig_mod.module."), [removed("_orig_mod.module.")]),
        (prefixed("model._orig_mod."), [removed("model._orig_mod.")]),
        (INNER, [removed("_orig_mod.")]),
        (prefixed("encoder.") | prefixed("decoder."), [removed(f"encoder.; {OTHERS}")]),
        (prefixed("student.") | prefixed("teacher."), [removed(f"teacher.; {OTHERS}")]),
    ],
)
def test_removed_wrappers_are_reported(content: dict, told: list[str]) -> None:
    found, notes = unwrap(content, FORMATS["mae"], Path("w.pth"))
    assert notes == told
    assert found.keys() == set(NAMES)
    assert all(torch.equal(found[name], tensor) for name, tensor in plain().items())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (plain() | prefixed("module."), r"contains names that differ only by the prefix module\."),
        (plain() | {"params": {"lr": 1}}, r"entries .* complete tensors \(1\): params \(dict\)"),
    ],
)
def test_ambiguous_and_incomplete_weights_are_rejected(content: dict, says: str) -> None:
    with pytest.raises(ValueError, match=f"^w.pth: {says}$"):
        unwrap(content, FORMATS["mae"], Path("w.pth"))


@pytest.mark.parametrize("layout", FORMATS)
def test_every_layout_is_read_through_the_same_wrappers(layout: str, tmp_path: Path) -> None:
    """The error names an unknown tensor without its prefix: wrappers are removed first."""
    path = tmp_path / "w.pth"
    torch.save({"ema": prefixed("module._orig_mod.", {"zzz.w": torch.ones(2)})}, path)
    if layout == "vitdet":  # accepts any name
        assert read_source(path, layout).weights.keys() == {"zzz.w"}
        return
    with pytest.raises(ValueError, match=r"tensors unknown to this format \(1\): zzz\.w$"):
        read_source(path, layout)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("mae", "norm.weight"),
        ("vitae", "norm.weight"),
        ("vitae_cls", "layers.0.RC.PRM.proj.weight"),
        ("swin_cls", "patch_embed.norm.weight"),
        ("vitaev2_cls", "layers.0.RC.PCM.0.weight"),
    ],
)
def test_the_layers_of_a_classifier_are_ignored_by_name(
    layout: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    heads = {name: torch.ones(2) for name in ("head.weight", "head.fc.bias", "fc_norm.weight")}
    ignored = "ignored classifier head: head.weight, head.fc.bias, fc_norm.weight"
    torch.save({"model": {name: torch.ones(2), **heads}}, path)
    found = read_source(path, layout)
    assert len(found.weights) == 1 and found.notes[-1] == ignored
    torch.save(heads, path)
    with pytest.raises(ValueError, match="contains no tensors that a detector uses"):
        read_source(path, layout)
    heads["head.fc.bias"][0] = torch.nan  # unused
    for prefix in ("backbone.", "teacher.", "module.encoder."):
        outer = "module." if prefix.startswith("module.") else ""
        weights = {prefix + name: torch.ones(2), "student.x": torch.ones(2)}
        torch.save(weights | prefixed(outer, heads), path)
        found = read_source(path, layout)
        assert len(found.weights) == 1 and found.notes[-1] == ignored
        assert found.notes[-2].endswith("other tensors ignored: 1")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_rejected(tmp_path: Path, value: float) -> None:
    path, weights = tmp_path / "w.safetensors", plain() | {"pos_embed": torch.zeros(1, 2, 2)}
    weights[NAMES[1]][0, 1, 1] = value
    save_file(weights, path)
    says = rf"tensors with NaN or infinite values \(1\): backbone.{NAMES[1]}"
    with refused(f"^{path}: {says}; use an earlier checkpoint$"):
        read_source(path, "mae")


@pytest.mark.parametrize(
    ("layout", "kept", "dropped"),
    [
        ("mae", "norm.weight", "decoder_embed.weight"),
        ("mae", "norm.weight", "head.weight"),
        ("swin_cls", "patch_embed.norm.weight", "layers.0.blocks.1.attn_mask"),
    ],
)
def test_values_of_ignored_tensors_are_not_checked(
    tmp_path: Path, layout: str, kept: str, dropped: str
) -> None:
    path = tmp_path / "w.safetensors"
    save_file({kept: torch.ones(2), dropped: torch.full((2,), float("-inf"))}, path)
    assert list(read_source(path, layout).weights) == [f"backbone.{kept}"]


def zipped(name: str, content: bytes) -> bytes:
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as file:
        file.writestr(name, content)
    return archive.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the file is empty"),
        (bytes(4096), "begins with zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\xef\xbb\xbf\n<!DOCTYPE HTML><title>Sign in</title>", "an HTML page"),
        (b"<HTML><head>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "an XML document"),
        (b'{"error": "not found"}', "a JSON document"),
        (b'{\n  "weight_map": {}\n}\n', "a JSON document"),
        (b'{\r\n  "weight_map": {}\r\n}\r\n', "a JSON document"),
        (gzip.compress(b"weights", mtime=0), "a gzip archive; unpack it first"),
    ],
)
def test_a_file_of_another_kind_is_reported_by_its_type(
    tmp_path: Path, content: bytes, what: str
) -> None:
    for suffix in (".pth", ".pt", ".bin", ".pkl", ".safetensors", ".npz"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(content)
        with refused(f"^{path}: .*{what}"):
            read_file(path)


def test_an_archive_of_other_files_is_reported(tmp_path: Path) -> None:
    archive = tmp_path / "w.pth"
    archive.write_bytes(zipped("run/w.safetensors", b""))
    with refused(r"a zip archive with run/w\.safetensors"):
        read_file(archive)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_torchscript_program_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), path)
    with refused(f"^{path}: this is a TorchScript program; expected a state dict$"):
        read_file(path)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (6, b"\xff"),  # version needed to extract
        (0, b"XX"),  # signature of the entry
        (46, b"\xff\xff"),  # name, in UTF-8
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_a_damaged_zip_directory_is_rejected_in_one_line(
    tmp_path: Path, offset: int, value: bytes, suffix: str
) -> None:
    path = tmp_path / f"w{suffix}"
    content = bytearray(zipped("é/data.pkl", b"\x80\x02}."))
    start = content.index(b"PK\1\2") + offset
    content[start : start + len(value)] = value
    path.write_bytes(content)
    with refused(f"^{path}: not a complete "):
        read_file(path)
