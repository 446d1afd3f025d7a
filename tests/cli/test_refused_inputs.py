"""Invalid command-line inputs and a full disk: one line, exit code 1, no partial files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.cli.test_cli import Run, largest_file, python, refused
from tests.conftest import ROOT, SLOW, minimal, options
from vitdet.checkpoint import MODEL, OPTIONAL, TRAINING, Checkpoints, load_model_file
from vitdet.config import load_config
from vitdet.data.layout import explicit_settings
from vitdet.files import atomic_dir, atomic_write, parse_yaml, write_jpeg, write_json
from vitdet.training.resume import state_to_resume

DEEP = "{a: " * 5000 + "1" + "}" * 5000
ODD = {
    "deep": f"model: {DEEP}",
    "a tag of Python": "model: !!python/object/apply:os.system ['touch proof']",
    "a tag": "train: !foo {seed: 1}",
    "a date": "train: {seed: 2020-99-99}",
    "a number": "train: {seed: !!int abc}",
    "base64": "train: {seed: !!binary a}",
    "no key": "? {a: 1}\n: 2",
    "a byte": "train: {seed: '\x00'}",
    "cut": "train: {seed: 'a",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_yaml_that_is_not_a_config_names_the_file(vitdet: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    for verb in (["config"], ["train", "--output", "run"]):
        refused(vitdet(*verb, "odd.yaml"), "odd.yaml: invalid YAML: ")
    assert os.listdir(tmp_path) == ["odd.yaml"]


@pytest.mark.parametrize("text", [DEEP, "2020-99-99", "!foo 1", "{a"])
def test_invalid_yaml_in_an_override_names_the_setting(text: str) -> None:
    with pytest.raises(ValueError, match=r"^train.seed: .* cannot be parsed as a value$"):
        load_config("tiny", [f"train.seed={text}"])
    with pytest.raises(ValueError, match=r"^train: "):
        load_config("tiny", [f"train={text}"])
    explicit_settings("tiny", [f"train={text}"])


@settings(max_examples=300, **SLOW)
@given(st.text("{}[]!&*:-?|>%@`'\"# \n\tab01.,~\x00é", max_size=40))
def test_any_text_is_parsed_or_refused_in_one_line(text: str) -> None:
    try:
        parse_yaml(text)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "command",
    [
        "config tiny --output",
        "train tiny --output",
        "train tiny --output run --checkpoints",
        "evaluate model.pt --output",
        "evaluate --results a --annotations b --output",
        "predict model.pt a.jpg --output",
        "register model.pt --output",
        "weights fetch mae_vit_b --output",
        "weights pretrain",
        "data tiny",
        "data report data --output",
        "bench evaluate --output",
        "bench data tiny --output",
    ],
)
def test_an_empty_path_is_refused(vitdet: Run, tmp_path: Path, command: str) -> None:
    refused(vitdet(*command.split(), ""), "empty path on the command line: ''")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("key", MODEL)
def test_a_checkpoint_with_a_bad_entry_is_refused(
    vitdet: Run, trained: Path, tmp_path: Path, key: str
) -> None:
    content, path = load_model_file(trained / "model.pt"), tmp_path / "model.pt"
    lacking = {name: value for name, value in content.items() if name != key}
    changes = [(content | {key: 3.5}, "has type float")]
    for changed, message in changes + [(lacking, "is missing")] * (key not in OPTIONAL):
        torch.save(changed, path)
        for verb in ("evaluate", "register"):
            refused(vitdet(verb, path), f"model.pt: {key!r} {message}")
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("key", TRAINING)
def test_a_training_state_with_a_bad_entry_is_refused(tmp_path: Path, key: str) -> None:
    states = Checkpoints(tmp_path, 2)
    parts = dict.fromkeys(("config", "model", "optimizer", "average", "meter", "metrics"), {})
    path = states.save(1, {**parts, "run_id": None})
    content = torch.load(path)
    for changed, message in (
        ({name: value for name, value in content.items() if name != key}, "is missing"),
        (content | {key: 3.5}, "has type float"),
    ):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=f"{path.name}: '{key}' {message}; the file was modi"):
            state_to_resume(load_config("tiny"), tmp_path / "run", {}, states)
    assert states.all() == [path] and not states.damaged


LIMITED = """
import resource, sys
from vitdet.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("limit", "command", "names"),
    [
        (10, "config tiny --output out.yaml", "out.yaml"),
        (10, "data report DATA --output out.html", "out.html"),
        (100, "weights convert WEIGHTS out.safetensors --format vitdet", "out.safetensors"),
        (100, "train tiny --output out OPTIONS", "config.yaml"),
        (100_000, "train tiny --output out OPTIONS", "step_00000000.pt"),
        (100, "predict MODEL IMAGE --output out", ".jpg"),
        (10, "evaluate MODEL --output out.json", "out.json"),
        (10, "bench evaluate --images 2 --output out.json", "annotations"),
        (10, "bench data DATA --split train --rounds 1 --output out.json", "out.json"),
        (2000, "data convert DATA out", "out"),
        (2000, "data tiny out --train 3 --val 2", "out"),
        (10_000, "register MODEL", "mlflow.db"),
    ],
)
@pytest.mark.slow
def test_a_full_disk_names_the_file(
    tiny: Path, trained: Path, tmp_path: Path, limit: int, command: str, names: str
) -> None:
    """The system calls that raise `No space left on device` raise `File too large` here."""
    words = {
        "DATA": [tiny],
        "MODEL": [trained / "model.pt"],
        "WEIGHTS": [ROOT / "vitdet/weights/mae_vit_tiny.safetensors"],
        "IMAGE": [next((tiny / "train").glob("*.jpg"), None)],
        "OPTIONS": options(minimal(tiny)),
    }
    arguments = [argument for word in command.split() for argument in words.get(word, [word])]
    done = python(tmp_path, "-c", LIMITED, limit, *arguments)
    said = [line for line in done.stderr.splitlines() if line.startswith("vitdet: ")]
    assert done.returncode == 1 and len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    full = "disk I/O error" if names == "mlflow.db" else "File too large"  # SQLite
    assert names in said[0] and full in said[0]
    files = [path for path in tmp_path.rglob("*") if "journal" not in path.parts]
    left = [path for path in files if path.suffix == ".tmp" or path.name == names]
    assert not [path for path in left if path.suffix != ".db"]  # SQLite leaves an empty file


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_dir(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert str(caught.value).endswith(f"'{tmp_path / 'a'}'") and not os.listdir(tmp_path)


def test_other_os_errors_keep_their_file_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a", {1, 2})
    with pytest.raises(FileNotFoundError) as caught, atomic_dir(tmp_path / "a") as folder:
        (folder / "none").read_text()
    assert caught.value.filename.endswith("none")


def test_a_truncated_picture_raises_an_error(tmp_path: Path) -> None:
    """On a full disk, Pillow writes a truncated picture and raises no error."""
    noise = Image.effect_noise((90, 60), 40).convert("RGB")
    with (
        pytest.raises(OSError, match="File too large: .*a.jpg"),
        largest_file(100),
        atomic_write(tmp_path / "a.jpg") as file,
    ):
        write_jpeg(file, noise, 92)
    assert not os.listdir(tmp_path)
