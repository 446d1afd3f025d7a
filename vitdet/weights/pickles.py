"""Reading of third-party weights files without running code from them.

A .pkl may reference only functions that create numbers, numeric arrays, bytes or dicts. These
functions are replaced by versions that check their arguments. A .pth is read with
torch.load(weights_only=True); classes that are known but not needed become `Inert` or OrderedDict.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from vitdet.files import damaged_record, first_line
from vitdet.weights.signature import check_whole

# magic number of old torch files, which are not zip archives
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[:-1]


class Inert:
    """A placeholder for instances of the classes in OBJECTS, whose content is not needed."""

    def __init__(self, *values: object) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


# Classes of options saved by MAE, ViTAE and timm, and of scores saved by mmcv, mmengine and timm
OBJECTS = """
argparse.Namespace datetime.datetime
pathlib.PosixPath pathlib.WindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath
numpy.dtype numpy.ndarray numpy.dtypes.Float64DType
numpy.core.multiarray.scalar numpy._core.multiarray.scalar
numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct
mmcv.utils.config.Config mmengine.config.config.Config
mmengine.logging.history_buffer.HistoryBuffer
""".split()
# Config classes of mmcv, mmengine and Detectron2
DICTS = """
mmcv.utils.config.ConfigDict mmengine.config.config.ConfigDict addict.addict.Dict
fvcore.common.config.CfgNode yacs.config.CfgNode detectron2.config.config.CfgNode
""".split()
INERT: list[Any] = [*((Inert, name) for name in OBJECTS), *((OrderedDict, name) for name in DICTS)]


class _ForbiddenError(Exception):
    """A pickle references a forbidden global. The message is the name of this global."""


def read_file(path: Path) -> dict:
    """Read a weights file: tensors by name from .safetensors and .npz, any dict from .pth and .pkl.

    Raises FileNotFoundError, and ValueError if the file is truncated, is not a weights file, or
    could run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    check_whole(path)
    kind = {".safetensors": "safetensors file", ".npz": "npz file of numbers"}
    try:
        content = _reader(path)(path)
    except _ForbiddenError as error:
        # the name in a damaged file may contain any characters
        shown = str(error).encode("unicode_escape").decode()[:200]
        raise ValueError(
            f"{path}: rejected: it references {shown}, which could run code; expected only numbers "
            "and text"
        ) from error
    except Exception as error:  # reading a damaged file can raise any exception
        whole = f"not a complete {kind.get(path.suffix, 'weights file')}"
        raise ValueError(f"{path}: {whole} ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of weights, got {type(content).__name__}")
    return content


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a .safetensors file, or {} for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _reader(path: Path) -> Callable[[Path], object]:
    """Return the reader for the file's suffix or magic number."""
    if path.suffix in (".safetensors", ".npz"):
        return _read_safetensors if path.suffix == ".safetensors" else _read_npz
    head = _head(path)
    return _read_torch if head[:2] == b"PK" or head == LEGACY else _read_pickle


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(LEGACY))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def _read_torch(path: Path) -> object:
    if _head(path)[:2] == b"PK" and (record := damaged_record(path)):
        raise ValueError(f"the checksum of {record} does not match: the file is damaged")
    try:
        with torch.serialization.safe_globals(INERT), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about old file formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise _ForbiddenError(named[1]) from error
        # remove torch's advice to set weights_only=False
        cause = str(error).rpartition("WeightsUnpickler error: ")[2]
        raise ValueError(" ".join(cause.split())) from error


def _read_pickle(path: Path) -> object:
    with open(path, "rb") as file:
        return _tensors(_Unpickler(file).load())


class _Maker:
    """A function that a pickle may call but not modify."""

    __slots__ = ("call",)
    call: Callable[..., object]

    def __init__(self, call: Callable) -> None:
        object.__setattr__(self, "call", call)

    def __call__(self, *values: object) -> object:
        return self.call(*values)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("a pickle must not modify the functions that create arrays")


class _Table(dict):
    """A dict without instance attributes."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Ignore the attributes of an OrderedDict, e.g. `_metadata` of a PyTorch state dict."""


class _Type:
    """A numeric NumPy dtype: a code such as 'f4', and a byte order, which __setstate__ sets."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1|\?", code):
            raise ValueError(f"an array has the type {code!r}, expected numbers")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "=", "|") or any(part is not None for part in rest[:3]):
            raise ValueError("an array has a structured type, expected numbers")
        self.order = order

    def dtype(self) -> np.dtype:
        return np.dtype(self.order.replace("|", "=") + self.code)


class _Array:
    """A NumPy array whose content is set by __setstate__."""

    __slots__ = ("array",)

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, columns_first, raw = state
        self.array = _fill(raw, kind, shape, "F" if columns_first else "C")


def _from_buffer(raw: object, kind: object, shape: object, order: object) -> _Array:
    made = _Array()
    made.array = _fill(raw, kind, shape, order)
    return made


def _fill(raw: object, kind: object, shape: object, order: object) -> np.ndarray:
    if isinstance(raw, str):
        raw = raw.encode("latin1")  # as written by Python 2
    if not isinstance(raw, bytes | bytearray) or not isinstance(kind, _Type):
        raise ValueError("an array has elements other than numbers")
    if order not in ("C", "F"):
        raise ValueError(f"an array has the invalid order {order!r}")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"an array has the invalid shape {shape!r}")
    dtype = kind.dtype()
    if (size := math.prod(shape) * dtype.itemsize) != len(raw):
        raise ValueError(f"an array of shape {shape} has {len(raw)} bytes, expected {size}")
    array = np.frombuffer(raw, dtype).reshape(shape, order=order)
    return np.asarray(array, dtype.newbyteorder("="), order="C")


def _scalar(kind: object, raw: object) -> object:
    return _fill(raw, kind, (), "C").item()


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("expected a string in latin1 encoding")
    return text.encode("latin1")


_MAKERS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _Table,
}
for _core in ("numpy.core", "numpy._core"):
    _MAKERS[f"{_core}.multiarray", "_reconstruct"] = _Array
    _MAKERS[f"{_core}.multiarray", "scalar"] = _scalar
    _MAKERS[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle._Unpickler):
    """Pure-Python unpickler: the C version would allocate a memo of any size declared in a file."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> _Maker:
        if (module, name) not in _MAKERS:
            raise _ForbiddenError(f"{module}.{name}")
        return _Maker(_MAKERS[module, name])


def _tensors(content: object) -> object:
    """Convert arrays in nested dicts to tensors."""
    if isinstance(content, dict):
        return {name: _tensors(value) for name, value in content.items()}
    if isinstance(content, _Array):
        if content.array is None:
            raise ValueError("an array has no content")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about read-only arrays
            return torch.from_numpy(content.array)
    return content
