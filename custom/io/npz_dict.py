"""A dict of arrays and plain values that numpy has pickled into an ``.npz`` file, read without running its code.

A pickle is a program: it may name any function and call it. Three walls stand here. The archive's declared size is
bounded. The program is read through before it runs: it may only name the few functions that numpy's own pickles name,
and may not reserve memory by number. And those names lead to records of this module, not to numpy's functions, so that
none can be called with arguments of the file's choice; the arrays are made from the records afterwards.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from custom.case import CaseError

__all__ = ["MEMBER", "read_npz_dict"]

MEMBER = "arr_0.npy"
MAX_BYTES = 4 * 1024**3
MAX_OPCODES = 1_000_000
MAX_ITEM_BYTES = 2**16
MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}
REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "NEXT_BUFFER"}


def read_npz_dict(path: str | Path) -> dict[str, Any]:
    """The dict of one file.

    Raises:
        CaseError: for a file in another layout, or one that wants to load anything but arrays and plain values.
    """
    path = Path(path)
    try:
        content = _array_or_dict(path, _member(path))
    except CaseError:
        raise
    except Exception as error:  # zipfile, numpy and pickle raise a dozen kinds on damaged files
        text = " ".join(str(error).split())[:200]
        raise CaseError(f"{path}: not a GDP-HMM file ({type(error).__name__}: {text}); expected an npz of numpy arrays "
                        "and plain values. Take it from the data set anew") from error
    content = content.item() if isinstance(content, np.ndarray) and content.size == 1 else content
    if not isinstance(content, dict):
        raise CaseError(f"{path}: arr_0 holds a {type(content).__name__}; expected a dict (GDP-HMM layout)")
    return content


def _member(path: Path) -> io.BytesIO:
    """The unpacked ``arr_0.npy``, no longer than it declares."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(MEMBER).file_size
            if size > MAX_BYTES:
                raise CaseError(f"{path}: {MEMBER} unfolds to {size} bytes; expected at most {MAX_BYTES}")
            with archive.open(MEMBER) as member:
                return io.BytesIO(member.read(size))
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError) as error:
        raise CaseError(f"{path}: the archive is damaged or cut short ({error}); expected an npz with {MEMBER}. Copy "
                        "it anew") from error


def _array_or_dict(path: Path, stream: io.BytesIO) -> Any:
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if not dtype.hasobject or shape != ():
        raise CaseError(f"{path}: arr_0 is a {dtype} array of shape {shape}; expected a dict (GDP-HMM layout)")
    start = stream.tell()
    _check_program(stream)
    stream.seek(start)
    return _plain(_Unpickler(stream).load())


def _check_program(stream: io.BytesIO) -> None:
    """Read the pickle's program through without running it."""
    recent: list[str] = []  # strings that a STACK_GLOBAL may take its names from
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise pickle.UnpicklingError(f"more than {MAX_OPCODES} instructions")
        if opcode.name in REFUSED_OPCODES:
            raise pickle.UnpicklingError(f"the instruction {opcode.name} is not one of numpy's")
        if opcode.name in MEMO_OPCODES and int(argument) > count:
            raise pickle.UnpicklingError(f"memo entry {argument} after {count} instructions would fill the memory")
        if opcode.name == "GLOBAL":
            _resolve(*argument.split(" ", 1))
        if opcode.name == "STACK_GLOBAL" and len(recent) < 2:
            raise pickle.UnpicklingError("a name that is not spelt out")
        if isinstance(argument, str) and len(argument) < 200:
            recent = [*recent[-1:], argument]


class _Unpickler(pickle.Unpickler):
    """Its names lead to the functions below; any other is refused, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        return _resolve(module, name)


def _resolve(module: str, name: str) -> Any:
    try:
        return _ADMITTED[module.replace("._core.", ".core."), name]
    except KeyError:
        raise pickle.UnpicklingError(
            f"the file names {module}.{name}; only numpy arrays and plain values are admitted") from None


class _DtypeRecord:
    """What a pickle tells of a dtype: its code and byte order; everything else of its state is not applied."""

    def __init__(self, code: str, align: Any = False, copy: Any = True) -> None:
        self.code, self.order = str(code), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">", "|": "="}[state[1]]

    def dtype(self) -> np.dtype:
        dtype = np.dtype(self.code).newbyteorder(self.order)
        if dtype.kind not in "biufcSUO" or dtype.itemsize > MAX_ITEM_BYTES:
            raise pickle.UnpicklingError(f"a {self.code} array; only numbers, text and objects are admitted")
        return dtype


class _ArrayRecord:
    """What a pickle tells of an array; made into one by :func:`_plain`, with every length checked."""

    def __init__(self, kind: Any = None, shape: Any = None, typecode: Any = None) -> None:
        self.state: tuple | None = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, in_fortran_order, data = self.state
        if dtype.dtype().hasobject:
            out = np.empty(len(data), dtype=object)
            out[:] = data
            return out.reshape(shape)
        return _from_buffer(data, dtype, shape, "F" if in_fortran_order else "C")


def _scalar(dtype: _DtypeRecord, data: bytes) -> np.generic:
    if dtype.dtype().hasobject:
        raise pickle.UnpicklingError("a scalar that is an object")
    return np.frombuffer(data, dtype=dtype.dtype(), count=1)[0]


def _from_buffer(data: bytes, dtype: _DtypeRecord, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    return np.frombuffer(data, dtype=dtype.dtype()).reshape(shape, order=order)


def _plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """The same nested value with arrays in place of their records; each shared part is made once."""
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    out = value
    if isinstance(value, _ArrayRecord):
        out = value.array()
        out = np.array(_plain(out.item(), done), dtype=object) if out.dtype.hasobject and out.shape == () else out
    elif isinstance(value, dict):
        out = {_plain(k, done): _plain(v, done) for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        out = type(value)(_plain(v, done) for v in value)
    done[id(value)] = out
    return out


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 spells bytes."""
    return str(text).encode("latin1")


_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _ArrayRecord,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _ArrayRecord,
    ("numpy", "dtype"): _DtypeRecord,
    ("_codecs", "encode"): _encode,
}
