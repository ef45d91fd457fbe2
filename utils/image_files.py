"""Sets of images, batch by batch: an .npz file (`arr_0`, uint8 [N, H, W, 3]) or a folder of PNG, JPEG or WebP files.

    for batch in read_batches(path, 256):      # batch.images: uint8 [n, H, W, 3]

Only one batch is in memory; several processes take shares that don't overlap. Left out: folders inside the folder,
arrays in Fortran order, pixels deeper than 8 bits.
"""
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.images import IMAGE_SUFFIXES, check_size, read_image
from reward_utils.npz import npz_keys, open_array, open_npz

MAX_BATCH_BYTES = 1 << 29  # large images come in smaller batches
NUM_THREADS = 8  # Pillow decodes outside the interpreter's lock


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
