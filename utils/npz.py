"""Arrays of an .npz file, checked before memory is taken for them; nothing in them is ever unpickled.

    with open_npz(path) as archive:
        header = peek(archive, "mu")           # shape and type as the file claims them
        mu = read_array(archive, "mu")         # after the caller has judged the shape

A zip's member may claim a shape that it does not hold, hold a thousand times the bytes that it takes on the disk, or
begin with a header of gigabytes. Left out: arrays of objects or of records.
"""
import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_HEADER = 4096  # bytes; numpy writes 118 for images
MAX_ARRAY_BYTES = 1 << 28  # of an array that is read whole: sigma_s of Inception takes 33 MB
BOMB_BYTES, BOMB_RATIO = 1 << 30, 100  # nothing worth reading is this large and shrinks this far
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy's two
# NotImplementedError: a compression unknown to zipfile; RuntimeError: encrypted; OSError: a member outside the file
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, LookupError,
           OverflowError, struct.error)


class Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype


@contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """A complaint inside, of damage too, is a ValueError that names the file."""
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"{path}: no such .npz file or folder of images")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged or truncated npz ({' '.join(str(error).split())[:200]})") from error
    except ValueError as error:  # it may quote names that stand in the file
        text = " ".join(str(error).splitlines())
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def npz_keys(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist()]


@contextmanager
def open_array(archive: zipfile.ZipFile, key: str) -> Iterator[tuple]:
    """(byte stream behind the header, Header) of a member that holds as many bytes as its header announces."""
    member = archive.getinfo(f"{key}.npy")
    if member.compress_type not in METHODS:
        raise ValueError(f"{key} is compressed in a way that numpy never uses")
    if member.file_size > max(BOMB_BYTES, BOMB_RATIO * member.compress_size):
        raise ValueError(f"{key} grows from {member.compress_size} bytes to {member.file_size}: refused")
    with archive.open(member) as stream:
        header = _read_header(stream, key)
        announced = math.prod(header.shape) * header.dtype.itemsize
        if member.file_size - stream.tell() < announced:
            raise ValueError(f"{key} announces {list(header.shape)} {header.dtype} but ends before its "
                             f"{announced} bytes")
        yield stream, header


def peek(archive: zipfile.ZipFile, key: str) -> Header:
    with open_array(archive, key) as (_, header):
        return header


def read_text(archive: zipfile.ZipFile, key: str) -> str:
    return str(read_array(archive, key, kinds="U"))


def read_array(archive: zipfile.ZipFile, key: str, kinds: str = "fiu") -> np.ndarray:
    """The whole array, at most MAX_ARRAY_BYTES; kinds: of numpy's types."""
    with open_array(archive, key) as (stream, header):
        if header.dtype.kind not in kinds:
            raise ValueError(f"{key} holds {header.dtype}, wanted {'text' if kinds == 'U' else 'numbers'}")
        size = math.prod(header.shape) * header.dtype.itemsize
        if size > MAX_ARRAY_BYTES:
            raise ValueError(f"{key} {list(header.shape)} takes {size} bytes, more than the {MAX_ARRAY_BYTES} allowed")
        data = stream.read(size)
        if len(data) != size:
            raise ValueError(f"{key} ends before its {size} bytes")
        while stream.read(1 << 16):  # to the end, where the checksum is compared
            pass
    order = "F" if header.fortran_order else "C"
    return np.frombuffer(bytearray(data), header.dtype).reshape(header.shape, order=order)


def _read_header(stream, key: str) -> Header:
    start = stream.read(8)
    if start[:6] != np.lib.format.MAGIC_PREFIX or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ValueError(f"{key} is no array in numpy's format")
    length = int.from_bytes(stream.read(2 if start[6:] == b"\1\0" else 4), "little")
    if length > MAX_HEADER:
        raise ValueError(f"{key} has a header of {length} bytes, at most {MAX_HEADER} are read")
    text = stream.read(length)
    try:  # versions 2 and 3 differ in the length's width and in the encoding of names, which no plain array has
        header = Header(*np.lib.format.read_array_header_1_0(io.BytesIO(struct.pack("<H", len(text)) + text)))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, LookupError,
            tokenize.TokenError) as error:
        raise ValueError(f"{key} has no readable header ({' '.join(str(error).split())[:100]})") from error
    if header.dtype.kind not in "biufU" or header.dtype.itemsize < 1:
        raise ValueError(f"{key} holds {header.dtype}, not plain numbers or text; objects are never loaded")
    if any(isinstance(side, bool) or side < 0 for side in header.shape):
        raise ValueError(f"{key} has the shape {list(header.shape)}")
    return header
