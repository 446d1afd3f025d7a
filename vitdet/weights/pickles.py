"""Reading files of weights that others made, without running code from them.

A pickle is a program: it names functions, and reading it calls them. Here a .pkl may name those alone that make arrays
of numbers, and in their place stand readers of our own that check shape, type and length. A .pth is read by
torch.load(weights_only=True); what trainings leave beside the weights (options, configs, scores) becomes `Inert`, which
keeps nothing and does nothing.
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

from vitdet.files import damaged_record
from vitdet.weights.signature import check_whole

# how torch's files began before they were zips
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[:-1]


class Inert:
    """Stands for any object beside the weights."""

    def __init__(self, *values: object) -> None:
        """Forgets what it is made of."""

    def __setstate__(self, state: object) -> None:
        """Forgets what it held."""


# Who leaves them: MAE, ViTAE and timm their options; mmcv, mmengine and timm scores of numpy; mmcv, mmengine and
# Detectron2 configs, which are tables.
INERT: tuple[tuple[type, str], ...] = (
    *(
        (Inert, name)
        for name in (
            "argparse.Namespace",
            "datetime.datetime",
            "pathlib.PosixPath",
            "pathlib.WindowsPath",
            "pathlib._local.PosixPath",  # as Python 3.13 pickles it
            "pathlib._local.WindowsPath",
            "numpy.dtype",
            "numpy.ndarray",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct",
            "numpy._core.multiarray._reconstruct",
            "numpy.dtypes.Float64DType",
            "mmcv.utils.config.Config",
            "mmengine.config.config.Config",
            "mmengine.logging.history_buffer.HistoryBuffer",
        )
    ),
    *(
        (OrderedDict, name)
        for name in (
            "mmcv.utils.config.ConfigDict",
            "mmengine.config.config.ConfigDict",
            "addict.addict.Dict",
            "fvcore.common.config.CfgNode",
            "yacs.config.CfgNode",
            "detectron2.config.config.CfgNode",
        )
    ),
)


def read_file(path: Path) -> dict:
    """What a file holds: {name: tensor} of .safetensors and .npz, {name: anything plain} of torch files and pickles.

    Raises FileNotFoundError, and ValueError with one line for a file that is cut off, of another kind, or that could
    run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    check_whole(path)
    content = _reader(path)(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a table of weights, got a {type(content).__name__}")
    return content


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _reader(path: Path) -> Callable[[Path], object]:
    """By suffix where that means one thing; else a torch file is a zip, or begins with a number of its own."""
    if path.suffix in (".safetensors", ".npz"):
        return read_safetensors if path.suffix == ".safetensors" else _read_npz
    with open(path, "rb") as file:
        head = file.read(len(LEGACY))
    return _read_torch if head[:2] == b"PK" or head == LEGACY else _read_pickle


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; raises ValueError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def metadata(path: Path) -> dict[str, str]:
    """What a .safetensors file says of itself; nothing for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as error:  # a damaged file raises anything
        raise ValueError(
            f"{path}: not a whole npz file of numbers ({_first_line(error)})"
        ) from error


def _read_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(list(INERT)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats
            if _is_zip(path) and (record := damaged_record(path)):
                raise ValueError(f"{record} differs from its checksum: the file is damaged")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise ValueError(refusal(path, named.group(1))) from error
        # torch's advice, to run the code, goes before it
        cause = str(error).rpartition("WeightsUnpickler error: ")[2]
        raise ValueError(
            f"{path}: not a whole file of weights ({' '.join(cause.split())[:120]})"
        ) from error
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{path}: not a whole file of weights ({_first_line(error)})") from error


def _read_pickle(path: Path) -> object:
    try:
        with open(path, "rb") as file:
            return _tensors(_Unpickler(file).load())
    except _ForbiddenError as error:
        raise ValueError(refusal(path, str(error))) from error
    except Exception as error:  # a damaged file raises anything: struct.error, RecursionError, ...
        raise ValueError(f"{path}: not a whole file of weights ({_first_line(error)})") from error


def refusal(path: Path, name: str) -> str:
    """The one line about a file that names something else than data."""
    shown = name.encode("unicode_escape").decode()[:200]  # in a damaged file it may be anything
    return f"{path}: refused: it names {shown}, and reading that could run code; weights need numbers and text alone"


class _ForbiddenError(Exception):
    """A pickle names a global that is not for weights."""


class _Maker:
    """A function that a pickle may call. Unlike a real one it cannot be changed by the pickle."""

    __slots__ = ("call",)
    call: Callable[..., object]

    def __init__(self, call: Callable) -> None:
        object.__setattr__(self, "call", call)

    def __call__(self, *values: object) -> object:
        return self.call(*values)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("a pickle may not change what makes arrays")


class _Table(dict):
    """A dict without attributes of its own."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """An OrderedDict's attributes, such as PyTorch's versions of modules, have no use."""


class _Type:
    """A type of numbers, in numpy's words: 'f4' and, by the second step of its making, '<'."""

    __slots__ = ("code", "order")

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1|\?", code):
            raise ValueError(f"arrays of type {code!r}, expected numbers")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "=", "|") or any(part is not None for part in rest[:3]):
            raise ValueError("an array of a composed type, expected numbers")
        self.order = order

    def dtype(self) -> np.dtype:
        """As numpy has it."""
        return np.dtype(self.order.replace("|", "=") + self.code)


class _Array:
    """An array whose content follows in the second step of its making."""

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
        raw = raw.encode("latin1")  # a pickle of Python 2
    if (
        not isinstance(raw, bytes | bytearray)
        or not isinstance(kind, _Type)
        or order not in ("C", "F")
    ):
        raise ValueError("an array that is not made of plain numbers")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"an array of shape {shape!r}")
    dtype = kind.dtype()
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(
            f"an array of shape {shape} and {dtype.itemsize} bytes a number with {len(raw)} bytes"
        )
    array = np.frombuffer(raw, dtype).reshape(shape, order=order)
    return (
        np.ascontiguousarray(array, dtype.newbyteorder("="))
        if array.ndim
        else array.astype(dtype.newbyteorder("="))
    )


def _scalar(kind: object, raw: object) -> object:
    return _fill(raw, kind, (), "C").item()


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("text in an unexpected encoding")
    return text.encode("latin1")


_MAKERS = {
    **{
        (f"numpy.{core}.{module}", name): make
        for core in ("core", "_core")
        for module, name, make in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _Table,
}


class _Unpickler(pickle._Unpickler):
    """The pure-Python one: the other reserves as much memory as a file claims to need for its memo."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> _Maker:
        if (module, name) not in _MAKERS:
            raise _ForbiddenError(f"{module}.{name}")
        return _Maker(_MAKERS[module, name])


def _tensors(content: object) -> object:
    """The same with tensors for arrays, in tables within tables."""
    if isinstance(content, dict):
        return {name: _tensors(value) for name, value in content.items()}
    if isinstance(content, _Array):
        if content.array is None:
            raise ValueError("an array without content")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may not be written to, and is not
            return torch.from_numpy(content.array)
    return content


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
