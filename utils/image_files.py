"""Images from outside, within bounds: one file, or sets batch by batch, an .npz file (`arr_0`, uint8 [N, H, W, 3]) or a
folder of PNG, JPEG or WebP files.

    image = read_image(path, path)             # uint8 [H, W, 3]
    for batch in read_batches(path, 256):      # batch.images: uint8 [n, H, W, 3]

Only one batch is in memory; several processes take shares that don't overlap. Left out: folders inside the folder,
arrays in Fortran order. CMYK becomes RGB, 16 bits of grey become 8.
"""
import math
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.files import one_line, require_regular
from utils.npz import npz_keys, open_array, open_npz

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Only these decoders are ever tried, whatever a file is called: PIL has one that starts Ghostscript (EPS), and many
# that few have looked at.
FORMATS = ("PNG", "JPEG", "WEBP")
COLOURS = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCCK", "I;16", "I;16B", "I;16L", "I")
DEEP = ("I;16", "I;16B", "I;16L", "I")  # 16 bits of grey
MAX_PIXELS = 100_000_000  # a small file can claim far more memory than it brings
LIMIT_VARIABLE = "ARGRPO_MAX_PIXELS"  # in its place, for all that reads images; Pillow itself stops at 178,956,970
MAX_ASPECT = 100  # a line of pixels, resized by its short side, would be far larger than the file's picture
# What PIL is seen to raise for damaged files; a broken PNG is a SyntaxError. The warning: where warnings are errors.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, struct.error, zlib.error,
           Image.DecompressionBombError, Image.DecompressionBombWarning)
MAX_BATCH_BYTES = 1 << 29  # large images come in smaller batches
NUM_THREADS = 8  # Pillow decodes outside the interpreter's lock


# ---- one image -------------------------------------------------------------------------------------------------------

class Refused(ValueError):
    """A readable image that is not taken."""


def max_pixels() -> int:
    """Of one image: MAX_PIXELS, or what the environment gives in its place."""
    given = os.environ.get(LIMIT_VARIABLE)
    if given is None:
        return MAX_PIXELS
    if not (given.isascii() and given.isdigit()) or len(given) > 12 or int(given) < 1:
        raise ValueError(f"{LIMIT_VARIABLE} must be a number of pixels, got {given[:40]!r}")
    return int(given)


def check_size(width: int, height: int, name: str | Path, limit: int | None = None) -> None:
    """Before any memory is taken: ValueError for a picture that is too large, empty, or next to a line."""
    limit = max_pixels() if limit is None else limit
    if width * height > limit:
        raise Refused(f"{name}: {width}x{height} pixels, more than the {limit} allowed")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused(f"{name}: {width}x{height} pixels are no picture; its sides may differ by a factor of "
                      f"{MAX_ASPECT}")


def read_image(source, name: str | Path, limit: int | None = None, formats: tuple = FORMATS,
               modes: tuple = COLOURS) -> np.ndarray:
    """uint8 [H, W, 3] of an image file (a path or an open binary stream); `name` is what a complaint calls it.

    Every image from outside is read here. limit: its pixels, None for `max_pixels()`.
    """
    try:
        if isinstance(source, (str, Path)):
            require_regular(Path(source), name)
        with Image.open(source, formats=formats) as file:
            check_size(file.width, file.height, name, limit)  # nothing is decompressed yet
            if file.mode not in modes:
                raise Refused(f"{name}: pixels of mode {file.mode}, wanted colours or grey ({', '.join(modes)})")
            # MPO: a phone's photograph, whose further pictures are its depth or preview
            if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                raise Refused(f"{name}: an animation of {file.n_frames} pictures, wanted one")
            if file.mode in DEEP:
                levels = np.asarray(file).astype(np.int64)
                if levels.min() < 0 or levels.max() > 65535:
                    raise Refused(f"{name}: grey levels from {levels.min()} to {levels.max()}, wanted at most 16 bits")
                return np.repeat(((levels + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)  # 65535 / 255 = 257
            return np.asarray(file.convert("RGB"))
    except Refused:
        raise
    except DAMAGED as error:
        raise ValueError(f"{name}: not a readable image, wanted {' or '.join(formats)} ({one_line(error)})") from error


# ---- sets ------------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    indices: np.ndarray  # int64 [n], positions in the whole set
    images: np.ndarray  # uint8 [n, H, W, 3]


class Share(NamedTuple):
    """Which part of a set a process reads; all shares together are the set."""

    rank: int = 0
    world_size: int = 1


def count_images(path: Path) -> int:
    """Number of images in an .npz file or a folder."""
    if path.is_dir():
        return len(_image_files(path))
    with _open_images(path) as (_, shape):
        return shape[0]


def read_batches(path: Path, batch_size: int, share: Share = Share(),
                 skipped: list[str] | None = None) -> Iterator[Batch]:
    """Batches of an .npz file (in its order) or a folder (by name), all of one image size.

    ValueError names the file that cannot be read, or differs in size. With a list in `skipped`, files that cannot be
    read are left out and the reasons listed there.
    """
    return _folder_batches(path, batch_size, share, skipped) if path.is_dir() else _npz_batches(path, batch_size, share)


# ---- folders ---------------------------------------------------------------------------------------------------------

def _image_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no PNG, JPEG or WebP file in this folder")
    return files


def _folder_batches(folder: Path, batch_size: int, share: Share, skipped: list[str] | None) -> Iterator[Batch]:
    files = _image_files(folder)
    own = range(share.rank, len(files), share.world_size)
    pending = []
    for index, image in _decoded(files, own, skipped):
        pending.append((index, image))
        if len(pending) >= _fitting(batch_size, image.nbytes):
            yield _stacked(pending)
            pending = []
    if pending:
        yield _stacked(pending)


def _stacked(pending: list[tuple[int, np.ndarray]]) -> Batch:
    indices, images = zip(*pending)
    return Batch(np.array(indices), np.stack(images))


def _fitting(batch_size: int, image_bytes: int) -> int:
    return max(1, min(batch_size, MAX_BATCH_BYTES // image_bytes))


def _decoded(files: list[Path], own: range, skipped: list[str] | None) -> Iterator[tuple[int, np.ndarray]]:
    """(index, uint8 [H, W, 3]) of the readable files[own], all of one size."""
    first = None
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(own), 2 * NUM_THREADS):
            indices = own[start:start + 2 * NUM_THREADS]
            for index, future in [(i, pool.submit(read_image, files[i], files[i])) for i in indices]:
                try:
                    image = future.result()
                except ValueError as error:
                    if skipped is None:
                        raise
                    skipped.append(str(error))
                    continue
                first = first or (files[index].name, image.shape)
                if image.shape != first[1]:
                    raise ValueError(f"{files[index]}: {image.shape[1]}x{image.shape[0]} pixels, but {first[0]} has "
                                     f"{first[1][1]}x{first[1][0]}")
                yield index, image


# ---- npz files -------------------------------------------------------------------------------------------------------

@contextmanager
def _open_images(path: Path) -> Iterator[tuple]:
    """The byte stream of member arr_0 behind its npy header, and its shape (N, H, W, 3)."""
    with open_npz(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"{path}: no images under the key arr_0; keys: {', '.join(npz_keys(archive)) or 'none'}")
        with open_array(archive, "arr_0") as (stream, (shape, fortran_order, dtype)):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or fortran_order:
                raise ValueError(f"{path}: arr_0 must be uint8 [N, H, W, 3] in C order with N > 0, "
                                 f"not {dtype} {list(shape)}{' in Fortran order' if fortran_order else ''}")
            check_size(shape[2], shape[1], f"{path}: images of arr_0")
            yield stream, shape


def _npz_batches(path: Path, batch_size: int, share: Share) -> Iterator[Batch]:
    with _open_images(path) as (stream, (count, *shape)):
        batch_size = _fitting(batch_size, math.prod(shape))
        for number, start in enumerate(range(0, count, batch_size)):
            indices = np.arange(start, min(start + batch_size, count))
            # others' batches are read too: so every process finds damage anywhere, and seeking is no faster in a zip
            data = stream.read(len(indices) * math.prod(shape))
            if len(data) != len(indices) * math.prod(shape):
                raise ValueError(f"{path}: arr_0 ends before its {count} images")
            if number % share.world_size == share.rank:
                yield Batch(indices, np.frombuffer(data, dtype=np.uint8).reshape(-1, *shape))
