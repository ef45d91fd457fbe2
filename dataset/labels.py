"""Class names for class-to-image models, and the `Condition`s made from them.

A class id is the position of its name in the list: sorted wnids for ImageNet, sorted folder names for an ImageFolder.
The images of an ImageFolder are not opened here: reinforcement learning needs the labels only.
"""
import re
from pathlib import Path

from dataset import Condition
from utils.files import parse_json, read_text

SPLIT_FOLDERS = {"train", "val", "test"}
WNID = re.compile(r"n\d{8}")


def imagenet_names() -> list[str]:
    """The 1000 names, e.g. "tench, Tinca tinca" for class 0 (all WordNet synonyms, as AR-GRPO's prompts have them).

    Two different classes are called "crane" (134 the bird, 517 the machine): only their ids tell them apart.
    """
    return _wnid_names(sorted(_imagenet_info().label_names()), "ImageNet")


def load_class_names(spec: str | Path) -> list[str]:
    """`spec`: "imagenet", "shapes", a .txt / .json list of names, or an ImageFolder (class folders inside)."""
    if spec == "imagenet":
        return imagenet_names()
    if spec == "shapes":
        from dataset.shapes import CLASS_NAMES
        return list(CLASS_NAMES)
    path = Path(spec)
    if path.is_dir():
        return _folder_names(path)
    if path.suffix not in (".txt", ".json") or not path.is_file():
        raise ValueError(f"class names '{spec}': give imagenet, shapes, an existing .txt or .json list, or a folder of "
                         "class folders")
    return _txt_names(path) if path.suffix == ".txt" else _json_names(path)


def class_conditions(names: list[str], template: str = "a photo of {name}") -> list[Condition]:
    """One `Condition` per class, in the order of the ids."""
    if "{name}" not in template:
        raise ValueError(f"the class template '{template}' has no {{name}} in it")
    return [Condition(prompt=template.replace("{name}", name), class_id=i) for i, name in enumerate(names)]


def _imagenet_info():
    from timm.data import ImageNetInfo  # timm takes seconds to import, and only ImageNet's names need it
    return ImageNetInfo("imagenet-1k")


def _wnid_names(wnids: list[str], where: str) -> list[str]:
    known = _imagenet_info()
    names = []
    for wnid in wnids:
        try:
            names.append(known.label_name_to_description(wnid))
        except KeyError:
            raise ValueError(f"{where}: '{wnid}' looks like a WordNet id, but WordNet has no such noun") from None
    return names


def _folder_names(root: Path) -> list[str]:
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{root} has no class folders inside")
    if set(folders) <= SPLIT_FOLDERS:
        raise ValueError(f"{root} holds the splits {folders}, not classes: give {root / folders[0]} or its like")
    if all(WNID.fullmatch(name) for name in folders):
        return _wnid_names(folders, str(root))
    return folders


def _txt_names(path: Path) -> list[str]:
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    for number, line in enumerate(lines, 1):
        if not line:     # skipping it would shift the id of every later class
            raise ValueError(f"{path} line {number} is blank: every line is the name of one class")
    return lines


def _json_names(path: Path) -> list[str]:
    data = parse_json(read_text(path), str(path))
    if isinstance(data, dict):
        missing = next((i for i in range(len(data)) if str(i) not in data), None)
        if missing is not None:
            raise ValueError(f"{path} has {len(data)} classes, but no id {missing}: ids must be 0 to {len(data) - 1}")
        data = [data[str(i)] for i in range(len(data))]
    if not isinstance(data, list) or not data:
        raise ValueError(f"{path} must hold a non-empty list of names or a {{id: name}} object")
    for i, name in enumerate(data):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path} class {i}: the name must be text, got {name!r}")
    return [name.strip() for name in data]
