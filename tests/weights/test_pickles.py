"""Third-party pickles: exploits have no effect, and the error names the forbidden object in one line."""

from __future__ import annotations

import argparse
import builtins
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from vitdet.weights.formats import FORMATS
from vitdet.weights.pickles import LEGACY, read_file
from vitdet.weights.unwrap import unwrap


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable, *values: object) -> None:
        self.what = function, values

    def __reduce__(self) -> tuple:
        return self.what


class Late:
    """An exploit in the state of a harmless class: unpickling the state calls a function."""

    def __init__(self, function: Callable, *values: object) -> None:
        self.what = function, values

    def __reduce__(self) -> tuple:
        return OrderedDict, (), {"x": Call(*self.what[:1], *self.what[1])}


def exploits(proof: Path) -> dict[str, object]:
    """Return objects whose pickles create `proof`."""
    made = f"open({str(proof)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {proof}"),
        "os.mkdir": Call(os.mkdir, str(proof)),
        "eval": Call(builtins.eval, made),
        "exec": Call(builtins.exec, made),
        "in the weights": {"model": {"w": Call(os.mkdir, str(proof))}},
        "as a key": {Call(os.mkdir, str(proof)): 1},
        "in a state": {"model": Late(os.mkdir, str(proof))},
        "within an array": {"model": {"w": np.array([Call(os.mkdir, str(proof))], dtype=object)}},
        "getattr": Call(builtins.getattr, Call(__import__, "os"), "system"),
        "numpy's own reader": Call(np.load, str(proof)),
    }


def one_line(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        unwrap(read_file(path), FORMATS["detectron2"], path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < len(str(path)) + 200
    return text


@pytest.mark.parametrize("name", exploits(Path("proof")))
@pytest.mark.parametrize(
    "how", ["pickle 0", "pickle 2", "pickle 4", "pickle 5", "torch", "torch before zips"]
)
def test_exploits_have_no_effect(tmp_path: Path, name: str, how: str) -> None:
    proof, path = tmp_path / "proof", tmp_path / ("model.pkl" if "pickle" in how else "model.pth")
    content = exploits(proof)[name]
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    text = one_line(path)
    assert "rejected: it references " in text or "getattr" in name or "array" in name, text
    assert not proof.exists()
    if name not in ("getattr", "numpy's own reader"):  # without the protection, it works
        read = pickle.load if "pickle" in how else partial(torch.load, weights_only=False)
        with open(path, "rb") as file:
            read(file)
        assert proof.exists()


def test_the_error_contains_the_forbidden_name(tmp_path: Path) -> None:
    for suffix in ("pkl", "pth"):
        path = tmp_path / f"model.{suffix}"
        # in the oldest protocol
        path.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
        assert "it references posix.system, which could run code" in one_line(path)
    torch.save({"model": {}, "x": Call(os.mkdir, "x")}, tmp_path / "model.pth")
    assert "it references posix.mkdir" in one_line(tmp_path / "model.pth")


def packed(path: Path, content: bytes) -> Path:
    """Write a torch file with this pickle; return its path."""
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, old in files.items():
            archive.writestr(name, content if name.endswith("data.pkl") else old)
    return path


def test_the_advice_of_torch_to_run_code_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    content = {"model": {"w": torch.ones(2)}, "x": Call(os.system, "true")}
    torch.save(content, path, pickle_protocol=4)
    text = one_line(path)
    assert "Unsupported operand 149" in text and "weights_only" not in text


def test_exploits_in_persistent_ids_have_no_effect(tmp_path: Path) -> None:
    path, op = tmp_path / "model.pth", b"(X\x07\0\0\0storage%sX\x01\0\0\00X\x03\0\0\0cpuK\x02tQ"
    broken = "not a complete weights file"
    for content, says in (
        (op % b"cposix\nsystem\n", "it references posix.system"),
        (op % (op % b"ctorch\nFloatStorage\n"), broken),
        (b"X\x02\0\0\0idQ", broken),
    ):
        assert says in one_line(packed(path, b"\x80\x02" + content + b"."))


def test_a_pickle_cannot_change_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    for state in (b"}S'call'\nS'x'\ns", b"(N}S'call'\nS'x'\nst", b"(N}S'__setattr__'\nS'x'\nst"):
        path.write_bytes(b"cnumpy\ndtype\n" + state + b"b.")
        assert "not a complete weights file" in one_line(path)
    path.write_bytes(b"cnumpy\ndtype\n).")  # the reader's own class instead of weights
    assert "weights, got " in one_line(path)
    path.write_bytes(b"cnumpy\ndtype\n)\x81.")
    assert "not a complete weights file" in one_line(path)


def array(shape: object, kind: bytes = b"f4", raw: bytes = b"\0" * 8, order: bytes = b"<") -> bytes:
    """Return a hand-written pickle of {'w': an array}."""
    dtype = (
        b"cnumpy\ndtype\n(S'" + kind + b"'\nI0\nI1\ntR(I3\nS'" + order + b"'\nNNNI-1\nI-1\nI0\ntb"
    )
    head = b"(dS'w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
    content = raw.decode().encode("unicode_escape")
    return head + shape + dtype + b"I00\nS'" + content + b"'\ntbs."


def test_invalid_arrays_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(array(b"(I2\nt"))
    assert read_file(path)["w"].tolist() == [0, 0]
    path.write_bytes(array(b"(I1\nI1\nt", b"i2", b"\x01\x02", b">"))
    assert read_file(path)["w"].tolist() == [[258]]
    huge = "an array of shape (1000000000000000,) has 8 bytes, expected 4000000000000000"
    made = b"(dS'w'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    for content, says in (
        (array(b"(L1000000000000000L\nt"), huge),
        (array(b"(I-2\nt"), "an array has the invalid shape (-2,)"),
        (array(b"(S'2'\nt"), "an array has the invalid shape ('2',)"),
        (array(b"(I2\nt", b"O8"), "an array has the type 'O8', expected numbers"),
        (array(b"(I2\nt", b"V4"), "an array has the type 'V4', expected numbers"),
        (made + b"s.", "an array has no content"),
        (b"\x80\x04B\xff\xff\xff\x7fx.", "not a complete weights file"),  # declares 2 GB
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.", "not a complete weights file"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "got NoneType"),  # a memo of 4 billion entries
        (b"\x80\x02(" + b"\x88" * 10 + b"Pid\n.", "not a complete weights file"),  # a persistent id
        (b"", "the file is empty"),
        (b"weights", "not a complete weights file"),
        (b"\x80\x02}", "not a complete weights file"),
    ):
        path.write_bytes(content)
        assert says in one_line(path), content


def test_a_detectron2_file_is_read(tmp_path: Path) -> None:
    arrays = {
        "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(2.5),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "half": np.ones(2, np.float16),
        "count": np.arange(3)[::-1],
        "flag": np.array([True, False]),
        "big": np.arange(2, dtype=">i4"),
    }
    path = tmp_path / "model.pkl"
    content = {"model": OrderedDict(arrays), "__author__": "x", "n": np.float32(1)}
    for protocol in range(6):
        path.write_bytes(pickle.dumps(content, protocol))
        found, _ = unwrap(read_file(path), FORMATS["detectron2"], path)
        assert list(found) == list(arrays)
        for name, tensor in found.items():
            assert np.array_equal(tensor.numpy(), arrays[name]), name
            assert tensor.shape == arrays[name].shape, name
    # as written by Python 2, where text is bytes
    path.write_bytes(array(b"(I2\nt", raw=b"\x00\x00\x01\x02\x00\x00\x01\x02"))
    assert read_file(path)["w"].shape == (2,)


def mmdet_file() -> dict:
    """Return a checkpoint with all that mmcv, MAE and timm store besides the weights."""
    weights = OrderedDict(w=torch.ones(2), n=torch.tensor(7))
    weights._metadata = OrderedDict({"": {"version": 1}})
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    scores = {"best_score": np.float64(0.5), "last": np.arange(3)}
    meta = {"epoch": 25, "CLASSES": ("person", "bicycle"), "config": "", "hook_msgs": scores}
    return {
        "meta": meta,
        "state_dict": weights,
        "optimizer": optimizer.state_dict(),
        "epoch": np.int64(3),
        "args": argparse.Namespace(path=Path("x"), lr=1e-4),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_is_read_without_its_objects(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "epoch_25.pth"
    torch.save(mmdet_file(), path, _use_new_zipfile_serialization=zipped)
    assert (path.read_bytes()[: len(LEGACY)] == LEGACY) != zipped
    content = read_file(path)
    assert unwrap(content, FORMATS["mmdet"], path)[0]["w"].tolist() == [1, 1]
    assert content["meta"]["CLASSES"] == ("person", "bicycle")
    assert not hasattr(content["args"], "lr")  # dropped


def test_a_missing_package_is_not_needed(tmp_path: Path) -> None:
    """mmcv's config, whose class is not installed here, is read as a dict."""
    path = tmp_path / "model.pth"
    packed(path, b"\x80\x02}U\x01c" + b"cmmcv.utils.config\nConfigDict\n)\x81U\x01kK\x05ss.")
    assert dict(read_file(path)["c"]) == {"k": 5}


def test_tensors_without_content_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    huge = [torch.zeros(1).expand(2**40), torch.empty(2**40, device="meta")]
    for tensor in (*huge, torch.zeros(2, 2).to_sparse()):
        torch.save({"model": {"w": tensor}}, path)
        assert "entries that are not complete tensors (1): w" in one_line(path)
    torch.save({"model": {"v": torch.ones(1), "w": 3}}, path)
    assert "tensors (1): w (int)" in one_line(path)
    torch.save({"state": {"w": 3}}, path)
    text = one_line(path)
    assert "expected tensors by name, or a dict of them" in text and "found state" in text


def test_other_files_are_read_or_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        read_file(tmp_path / "none.pkl")
    path = tmp_path / "w.npz"
    np.savez(path, w=np.arange(3))
    assert read_file(path)["w"].tolist() == [0, 1, 2]
    np.savez(path, w=np.array([{}], dtype=object))
    assert "not a complete npz file of numbers" in one_line(path)
    whole = tmp_path / "w.pth"
    torch.save({"model": {"w": torch.arange(1000)}}, whole)
    for part in (10, 200, -1, -500):
        cut = tmp_path / "cut.pth"
        cut.write_bytes(whole.read_bytes()[:part])
        assert "truncated: the zip central directory is missing" in one_line(cut)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_of_any_python_version_is_dropped(tmp_path: Path, module: str) -> None:
    """Python 3.13 pickles paths with another module name than other versions."""
    path = tmp_path / "model.pth"
    name = f"c{module}\nPosixPath\n".encode()
    packed(path, b"\x80\x02}(U\x01p" + name + b"U\x01a\x85RU\x01kK\x05u.")
    assert read_file(path)["k"] == 5
