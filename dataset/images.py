"""Images with their conditions, for pretraining: the shapes world, an ImageFolder, or a captioned folder.

Every source has `batch(indices) -> (images uint8 [N, H, W, 3], conditions)` and a length; item i is always the same.
Leaves out augmentation beyond resize and centre crop.
"""
from pathlib import Path

import numpy as np
from PIL import Image

from dataset import Condition, shapes
from dataset.labels import load_class_names
from utils.files import inside, parse_json, read_text
from utils.image_files import IMAGE_SUFFIXES, read_image


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
