"""Text, JSON and YAML from outside: read without running anything in them, within bounds, or refused in one line.

    data = parse_json(read_text(path), str(path))

A file may claim anything: JSON nested until the stack ends or a number of a million digits, YAML whose aliases unfold
to gigabytes, a named pipe that never ends. Every complaint is a ValueError of one line that names the file. Left out:
tensors (models/checkpoint.py, reward_utils/weights.py), arrays (utils/npz.py), pictures (utils/image_files.py).
"""
import json
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import yaml

MAX_TEXT_BYTES = 1 << 30  # COCO's captions are 90 MB
MAX_YAML_BYTES = 1 << 18  # PyYAML reads about 100 kB a second; presets and mixtures are a few kB
MAX_YAML_DEPTH = 32
MAX_JSON_DEPTH = 64
MAX_DIGITS = 100  # of a whole number: it fits a float, and every seed is shorter
# What PyYAML raises beside YAMLError, for tags such as `!!int ""`, `!!bool x`, `!!timestamp x`.
YAML_FAULTS = (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


def read_text(path: Path, what: str = "", max_bytes: int = MAX_TEXT_BYTES) -> str:
    """A regular file's UTF-8 text, a byte order mark left out; `what` stands before the name in a complaint."""
    name = f"{what} {path}" if what else f"{path}"
    try:
        require_regular(path, name)
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"{name} has more than the {max_bytes} bytes allowed")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None


def require_regular(path: Path, name: str | Path) -> None:
    """OSError where nothing is, ValueError for what is no file: a pipe or a device could keep its reader for ever."""
    if "\0" in str(path):
        raise ValueError(f"{str(name)!r}: no file has such a name")
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} cannot be read: it is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")


def inside(folder: Path, name: str, where: str) -> Path:
    """folder/name, for a name that a file brings: refused where it leads out of the folder.

    Judged by the name alone: a link that the user made may lead elsewhere.
    """
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir or "\0" in name:
        raise ValueError(f"{where}: {name!r} leads out of the folder {folder}: only what lies inside is read (a link "
                         "there may lead elsewhere)")
    return folder / name


def refuse_compressed(path: Path) -> None:
    """ValueError for a zip whose members grow when they are read; torch.save never compresses."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            grown = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {one_line(error)}") from None
    if grown:
        raise ValueError(f"{path} was refused: {grown[0][:80]!r} in it is compressed, as torch.save leaves nothing")


def one_line(error: BaseException | str, length: int | None = 200) -> str:
    """The message on one line, cut to `length` characters (None: whole); an error without one gives its name."""
    text = " ".join(str(error).split())[:length]
    return text if text or isinstance(error, str) else type(error).__name__


# ---- JSON ------------------------------------------------------------------------------------------------------------

def parse_json(text: str, where: str, by_line: bool = True) -> Any:
    """The value; no NaN or infinity, no number of more than MAX_DIGITS digits, at most MAX_JSON_DEPTH containers deep.

    by_line: a complaint names the line, for texts that are whole files.
    """
    try:
        value = json.loads(text, parse_constant=_no_number, parse_int=_whole, parse_float=_finite)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if by_line else ""
        raise ValueError(f"{where}{line} is not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {one_line(error)}") from None
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError(f"{where} is not valid JSON: nested more than {MAX_JSON_DEPTH} deep")
    return value


def parse_object(text: str, where: str) -> dict:
    """The mapping that a whole file's text holds."""
    data = parse_json(text, where)
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold a JSON object, not a {type(data).__name__}")
    return data


def read_object(path: Path) -> dict:
    return parse_object(read_text(path), str(path))


def _no_number(word: str):
    raise ValueError(f"{word} is no number")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        if not level:
            return False
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)
                 if isinstance(child, (dict, list))]
    return bool(level)


# ---- YAML ------------------------------------------------------------------------------------------------------------

class _PlainLoader(yaml.SafeLoader):
    """Neither aliases, which can unfold to any size, nor deep nesting."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem=f"the alias *{event.anchor[:40]} is not taken: write the value itself",
                                       problem_mark=event.start_mark)
        if self.depth == MAX_YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_YAML_DEPTH} deep", problem_mark=event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def compose_yaml(path: Path, what: str = "") -> yaml.Node | None:
    """The file's tree of nodes, with their lines; None: it is empty. `yaml_value` makes values of them."""
    text = read_text(path, what, MAX_YAML_BYTES)
    try:
        return yaml.compose(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{_line(error)} is not valid YAML: {_problem(error)}") from None
    except YAML_FAULTS as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from None


def yaml_value(node: yaml.Node, path: Path) -> Any:
    """Builtin values only, as safe_load makes them."""
    try:
        return yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}{_line(error)} is not valid YAML: {_problem(error)}") from None
    except YAML_FAULTS as error:
        raise ValueError(f"{path} line {node.start_mark.line + 1} is not valid YAML: {one_line(error)}") from None


def read_yaml(path: Path, what: str = "") -> Any:
    node = compose_yaml(path, what)
    return None if node is None else yaml_value(node, path)


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())[:200]
