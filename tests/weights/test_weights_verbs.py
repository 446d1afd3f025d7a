"""`vitdet weights`: list, download, conversion, and one-line errors."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.web import Web, file, serve
from vitdet.cli.progress_bar import Bar
from vitdet.weights import CATALOGUE, resolve

Run = Callable[..., tuple[int, str, str]]
ADDRESS = "/there/detectron2/ImageNetPretrained/MAE/mae_pretrain_vit_huge_p14to16.pth"


class Exploit:
    def __reduce__(self) -> tuple:
        return os.system, ("touch exploited",)


def stored(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Return a mirror whose ViT-H file has only position and patch embeddings."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with serve() as web:
        weights = {
            "pos_embed": torch.arange(10.0).reshape(1, 5, 2),
            "patch_embed.proj.weight": torch.ones(2, 3, 16, 16),
            "patch_embed.proj.bias": torch.ones(2),
        }
        web.content = stored({"model": weights})
        yield web


@pytest.fixture
def fetch(vitdet: Run, web: Web) -> Run:
    """Return a function that runs `vitdet weights fetch NAME` with the mirror."""

    def run(name: str, *words: object) -> tuple[int, str, str]:
        return vitdet("weights", "fetch", name, "--mirror", f"{web.url}/there", *words)

    return run


def test_the_list_has_every_file_with_all_known_facts(vitdet: Run) -> None:
    code, output, errors = vitdet("weights", "list")
    assert (code, errors) == (0, "")
    blocks = {block.split()[0]: block for block in re.split(r"\n\n(?=  \w)", output)}
    assert set(CATALOGUE) <= set(blocks)
    for name, entry in CATALOGUE.items():
        known = entry.what, entry.url, f"license {entry.license}"
        assert all(part in blocks[name] for part in known)
    for name, part in (
        ("mae_vit_b", "343,249,461 bytes | sha256 aec5f0b6"),
        ("mae_vit_b", "md5 8cad7c..."),
        ("mask_rcnn_vitdet_b_coco", "size not published | sha256 not published | md5 61ccd1..."),
        ("mask_rcnn_vitdet_b_coco", "box/mask AP 51.6/45.9"),
        ("mask_rcnn_vitae_s_coco", "(dead link)"),
        ("mae_vitae_b", "from not published"),
    ):
        assert part in blocks[name]


def test_without_a_home_directory_an_output_is_required(
    vitdet: Run, fetch: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    said = "vitdet: no home folder for the cache of weights; set HOME, or fetch with --output\n"
    assert fetch("mae_vit_h") == (1, "", said)
    assert fetch("mae_vit_h", "--output", "w")[:2] == (0, "w/mae_vit_h.safetensors\n")
    assert vitdet("weights", "list")[0] == 0


def test_the_list_in_json_has_every_file(vitdet: Run) -> None:
    entries = {entry["name"]: entry for entry in json.loads(vitdet("weights", "list", "--json")[1])}
    assert set(entries) == set(CATALOGUE)
    assert entries["mae_vit_b"]["size"] == 343_249_461 and entries["mae_vit_l"]["size"] is None
    assert entries["mae_vit_h"]["sha256"] is None and entries["mae_vitae_b"]["license"] is None
    assert entries["mae_vit_tiny"]["fetched"] is True


def test_fetched_weights_are_found_by_train_init(
    vitdet: Run, fetch: Run, web: Web, tmp_path: Path
) -> None:
    web.plan = [file(cut=500)]
    path = tmp_path / "home" / ".cache" / "vitdet" / "mae_vit_h.safetensors"
    code, output, errors = fetch("mae_vit_h")
    assert (code, output) == (0, f"{path}\n")
    assert web.asked == [(ADDRESS, None), (ADDRESS, "bytes=500-")]
    assert [line for line in errors.splitlines() if "100%" in line]
    assert resolve("mae_vit_h") == path
    assert load_file(path)["backbone.pos_embed"].tolist() == [[[[2, 3], [4, 5]], [[6, 7], [8, 9]]]]
    assert fetch("mae_vit_h") == (0, f"{path}\n", "") and len(web.asked) == 2
    copied = vitdet("weights", "fetch", "mae_vit_h", "--output", "w")
    assert copied == (0, "w/mae_vit_h.safetensors\n", "")
    assert resolve("mae_vit_h", Path("w")) == Path("w/mae_vit_h.safetensors")


def test_the_init_of_a_config_is_fetched_into_a_folder(
    vitdet: Run, fetch: Run, tmp_path: Path
) -> None:
    vitdet("config", "tiny", "--set", "train.init=mae_vit_h", "--output", "config.yaml")
    code, output, _ = fetch("config.yaml", "--output", "w")
    assert (code, output) == (0, "w/mae_vit_h.safetensors\n")
    assert not (tmp_path / "home").exists() and os.listdir("w") == ["mae_vit_h.safetensors"]
    assert fetch("mae_vit_tiny", "--output", "w")[1] == "w/mae_vit_tiny.safetensors\n"


def test_a_copy_is_converted(vitdet: Run, web: Web, tmp_path: Path) -> None:
    (tmp_path / "copy.pth").write_bytes(web.content)
    code, output, _ = vitdet("weights", "fetch", "mae_vit_h", "--from", "copy.pth", "--output", "w")
    assert (code, output) == (0, "w/mae_vit_h.safetensors\n") and not web.asked


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (stored({"model": Exploit()}), "os"),
        (pickle.dumps(Exploit()), ""),
        (b"PK\3\4 cut off", ""),
        (stored({"model": {"head.x": torch.ones(1)}}), "no tensors that .*; found head.x"),
    ],
    ids=["exploit", "bare pickle", "cut off", "another model"],
)
def test_bytes_of_other_weights_are_rejected_in_one_line(
    fetch: Run, web: Web, tmp_path: Path, content: bytes, says: str
) -> None:
    web.content = content
    code, output, errors = fetch("mae_vit_h", "--output", "w")
    last = errors.splitlines()[-1]
    assert (code, output) == (1, "")
    assert last.startswith(f"vitdet: mae_vit_h, from {web.url}{ADDRESS}: ")
    assert re.search(says, last) and last.endswith("; the download was removed")
    assert not list((tmp_path / "w").iterdir()) and not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("mae_vit_hh",), "no weights named 'mae_vit_hh'; did you mean 'mae_vit_h'?"),
        (("mae_vit_h", "--mirror", "nowhere"), "--mirror nowhere: expected a URL such as"),
        (("mae_vit_h", "--from", "none.pth"), "none.pth: no such file (--from)"),
        (("vitae_s",), "cannot be downloaded: https://drive.google.com/"),
        (("mask_rcnn_vitae_s_coco",), "its link is dead (https://1drv.ms/"),
        (("mask_rcnn_vitae_s_coco",), "(vitdet train mask_rcnn_vitae_s_coco --output FOLDER)"),
    ],
)
def test_invalid_arguments_are_rejected_in_one_line(
    vitdet: Run, web: Web, tmp_path: Path, words: tuple, says: str
) -> None:
    code, output, errors = vitdet("weights", "fetch", *words, "--output", "w")
    assert (code, output) == (1, "") and errors.count("\n") == 1 and says in errors
    assert not (tmp_path / "w").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_ten_log_lines_or_one_changing_terminal_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    clock = iter(number / 16 for number in range(1000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    for stream in (io.StringIO(), Terminal()):
        bar = Bar("some", stream)
        for done in range(0, 2_000_001, 50_000):
            bar.at(done, 2_000_000)
        bar.end()
        bar.end()
        text = stream.getvalue()
        if isinstance(stream, Terminal):
            parts = text.split("\r\x1b[2K")
            assert len(parts) == 22 and text.endswith("]\n")
            assert all(len(part) <= 70 for part in parts)
            assert parts[1].startswith("some    0%  0.0 of 2.0 MB  [-")
            assert "#" in parts[11] and "-" in parts[11]
        else:
            lines = text.splitlines()
            assert lines[5] == "some   50%  1.0 of 2.0 MB  0.8 MB/s  0:01 left" and len(lines) == 11
    bar = Bar("some", log := io.StringIO())
    for done in range(0, 250_000_000, 10_000_000):
        bar.at(done, None)
    sizes = [line.split("  ")[1] for line in log.getvalue().splitlines()]
    assert sizes == ["0.0 MB", "100.0 MB", "200.0 MB"]


def test_a_file_is_converted(vitdet: Run, web: Web, tmp_path: Path) -> None:
    (tmp_path / "copy.pth").write_bytes(web.content)
    words = ("weights", "convert", "copy.pth")
    assert vitdet(*words, "out.safetensors", "--format", "mae") == (0, "out.safetensors\n", "")
    bias = load_file(tmp_path / "out.safetensors")["backbone.patch_embed.proj.bias"]
    assert bias.tolist() == [1, 1]
    code, output, errors = vitdet(*words, "x.safetensors", "--format", "mae", "--recipe", "tiny")
    assert (code, output, errors.count("\n")) == (1, "", 1) and "does not fit" in errors
    assert sorted(os.listdir()) == ["copy.pth", "out.safetensors"]
