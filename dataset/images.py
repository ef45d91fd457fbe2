"""Images with their conditions, for pretraining: the shapes world, an ImageFolder, or a captioned folder.

Every source has `batch(indices) -> (images uint8 [N, H, W, 3], conditions)` and a length; item i is always the same.
Leaves out augmentation beyond resize and centre crop.
"""
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import Condition, shapes
from dataset.files import inside, one_line, parse_json, read_text, require_regular
from dataset.labels import load_class_names

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Only these decoders are ever tried, whatever a file is called: PIL has one that starts Ghostscript (EPS), and many
# that few have looked at.
FORMATS = ("PNG", "JPEG", "WEBP")
COLOURS = ("RGB", "RGBA", "L", "LA", "P", "1")
MAX_PIXELS = 100_000_000  # a small file can claim far more memory than it brings
LIMIT_VARIABLE = "ARGRPO_MAX_PIXELS"  # in its place, for all that reads images; Pillow itself stops at 178,956,970
MAX_ASPECT = 100  # a line of pixels, resized by its short side, would be far larger than the file's picture
# What PIL is seen to raise for damaged files; a broken PNG is a SyntaxError. The warning: where warnings are errors.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, struct.error, zlib.error,
           Image.DecompressionBombError, Image.DecompressionBombWarning)


class ShapesImages:
    """Endless rendered scenes: of one class (kind c2i) or of a caption of the training split (kind t2i)."""

    def __init__(self, kind: str, seed: int = 0, split: str = "train"):
        self.kind, self.seed, self.split = kind, seed, split

    def __len__(self) -> int:
        return 2 ** 31

    def item(self, index: int) -> tuple[np.ndarray, Condition]:
        rng = np.random.default_rng((self.seed, index))
        if self.kind == "c2i":
            condition = shapes.class_condition(int(rng.integers(len(shapes.CLASS_NAMES))))
        else:
            condition = shapes.prompt_condition(shapes.sample_record(rng, self.split))
        return shapes.render(shapes.sample_scene(condition.metadata, rng)), condition

    def batch(self, indices) -> tuple[np.ndarray, list[Condition]]:
        images, conditions = zip(*(self.item(int(i)) for i in indices))
        return np.stack(images), list(conditions)


class FolderImages:
    """Image files with conditions, resized on the short side and cropped to the centre."""

    def __init__(self, items: list[tuple[Path, Condition]], image_size: int):
        self.items, self.image_size = items, image_size

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices) -> tuple[np.ndarray, list[Condition]]:
        chosen = [self.items[int(i)] for i in indices]
        return np.stack([load_image(path, self.image_size) for path, _ in chosen]), [c for _, c in chosen]


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
                raise Refused(f"{name}: pixels of mode {file.mode}, wanted 8-bit colours ({', '.join(modes)})")
            # MPO: a phone's photograph, whose further pictures are its depth or preview
            if getattr(file, "n_frames", 1) > 1 and file.format != "MPO":
                raise Refused(f"{name}: an animation of {file.n_frames} pictures, wanted one")
            return np.asarray(file.convert("RGB"))
    except Refused:
        raise
    except DAMAGED as error:
        raise ValueError(f"{name}: not a readable image, wanted {' or '.join(formats)} ({one_line(error)})") from error


def load_image(path: Path, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: short side resized to `size` (bicubic), centre crop."""
    image = Image.fromarray(read_image(path, path))
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def class_folder(folder: Path, image_size: int) -> FolderImages:
    """One sub-folder per class, as torchvision's ImageFolder: the sorted position is the class id."""
    names = load_class_names(str(folder))
    class_dirs = sorted(path for path in folder.iterdir() if path.is_dir())
    items = [(path, Condition(f"a photo of {name}", class_id))
             for class_id, (directory, name) in enumerate(zip(class_dirs, names))
             for path in sorted(directory.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not items:
        raise ValueError(f"{folder}: no images ({' '.join(IMAGE_SUFFIXES)}) in its class folders")
    return FolderImages(items, image_size)


def captioned_folder(folder: Path, image_size: int) -> FolderImages:
    """Images beside a `metadata.jsonl` of {"file_name", "text"} records, or each with a .txt file of the same stem."""
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        items = []
        for number, line in enumerate(read_text(metadata).split("\n"), 1):
            if not line.strip():
                continue
            record = parse_json(line, f"{metadata}:{number}", by_line=False)
            if not isinstance(record, dict) or not all(isinstance(record.get(key), str)
                                                       for key in ("file_name", "text")):
                raise ValueError(f'{metadata}:{number}: not a record {{"file_name", "text"}} of two texts')
            items.append((inside(folder, record["file_name"], f"{metadata}:{number}"), Condition(record["text"])))
    else:
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        items = [(path, Condition(read_text(path.with_suffix(".txt")).strip())) for path in pictures
                 if path.with_suffix(".txt").exists()]
    if not items:
        raise ValueError(f"{folder}: no captioned images: give a metadata.jsonl or a .txt file beside each picture")
    return FolderImages(items, image_size)


def load_images(data: str, kind: str, image_size: int, seed: int = 0):
    """data: "shapes" or a folder; kind: c2i (class folders) or t2i (captions)."""
    if data == "shapes":
        return ShapesImages(kind, seed)
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"--data {data}: neither 'shapes' nor a folder")
    return (class_folder if kind == "c2i" else captioned_folder)(folder, image_size)
