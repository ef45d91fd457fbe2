"""Prompt files -> `Condition`s: .json, .jsonl, .txt, and .yaml mixtures of them.

A record is a string or an object whose text stands under `prompt`, `caption`, `text` or AR-GRPO's
`conversations[0].value`. GenEval's records (`tag`, `include`, ...; also under AR-GRPO's key `geneval_json`) become the
metadata; of other records a `category` is kept, for means by category. A record's `image`, a path from the file's
folder that stays inside it, becomes the reference of the rewards mse and lpips, which alone open it. A mixture is the
user's own, as a preset is, and may name files anywhere. The text is kept as it is: cleaning captions is the text
encoder's business. A file that cannot be understood stops with one ValueError that names the file and the line or
record.
"""
import random
import re
from fractions import Fraction
from math import ceil
from pathlib import Path

from dataset import Condition
from utils.files import inside, parse_json, read_text, read_yaml

WHAT = "prompt file"
TEXT_KEYS = ("prompt", "caption", "text")
STRATEGY = re.compile(r"(?:(first|end|random):)?(\d+(?:\.\d+)?%|\d+)")


def load_prompts(paths: str | Path | list, seed: int = 0) -> list[Condition]:
    """All prompts of one file, of a list of files, or of "a.json,b.txt". `seed` decides the `random:` subsets only."""
    if isinstance(paths, (str, Path)):
        paths = [paths] if Path(paths).is_file() else str(paths).split(",")
    if not paths:
        raise ValueError("no prompt file given")
    conditions = []
    for path in paths:
        path = Path(str(path).strip())
        conditions += _load_mixture(path, seed) if path.suffix in (".yaml", ".yml") else _load_file(path)
    return conditions


def select(items: list, strategy: str, key: str) -> list:
    """`all`, `first:N`, `end:N`, `random:N`, with N a count or a percentage (rounded up); `10%` alone is `random:10%`.

    A count above the length takes everything. `key` seeds the random subset, which keeps the file's order.
    """
    if strategy == "all":
        return items
    match = STRATEGY.fullmatch(strategy)
    if not match or not (match[1] or match[2].endswith("%")):
        raise ValueError(f"sampling_strategy '{strategy}' is none of all, first:1000, end:3000, random:999, 10%")
    amount = match[2]
    count = ceil(Fraction(amount[:-1]) * len(items) / 100) if amount.endswith("%") else int(amount)
    if count == 0:
        raise ValueError(f"sampling_strategy '{strategy}' takes nothing")
    count = min(count, len(items))
    if match[1] == "first":
        return items[:count]
    if match[1] == "end":
        return items[len(items) - count:]
    return [items[i] for i in sorted(random.Random(key).sample(range(len(items)), count))]


def _load_mixture(path: Path, seed: int) -> list[Condition]:
    """`datasets:` list of {json_path, sampling_strategy}; a relative json_path starts at the yaml's own folder."""
    data = read_yaml(path, WHAT)
    entries = data.get("datasets") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} needs a list `datasets:` of {{json_path, sampling_strategy}}")
    conditions = []
    for number, entry in enumerate(entries, 1):
        where = f"{path} dataset {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise ValueError(f"{where} has no json_path")
        unknown = sorted(map(str, entry.keys() - {"json_path", "sampling_strategy"}))
        if unknown:
            raise ValueError(f"{where} has unknown keys {unknown}: only json_path and sampling_strategy are read")
        records = _load_file(path.parent / entry["json_path"])
        strategy = str(entry.get("sampling_strategy", "all")).strip()
        try:
            conditions += select(records, strategy, key=f"{seed}/{number}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return conditions


def _load_file(path: Path) -> list[Condition]:
    if path.suffix not in READERS:
        raise ValueError(f"prompt file {path}: unknown suffix '{path.suffix}', use .json, .jsonl, .txt or .yaml")
    conditions = [_condition(record, where, path.parent) for where, record in READERS[path.suffix](path)]
    if not conditions:
        raise ValueError(f"prompt file {path} is empty")
    return conditions


def _lines(path: Path):
    # not splitlines(): it would also cut at characters such as U+2028, which are legal inside a JSON string
    for number, line in enumerate(read_text(path, WHAT).split("\n"), 1):
        if line.strip():
            yield f"{path} line {number}", line


def _json_lines(path: Path):
    for where, line in _lines(path):
        yield where, parse_json(line, where, by_line=False)


def _json_list(path: Path):
    text = read_text(path, WHAT)
    if not text.strip():
        return
    data = parse_json(text, str(path))
    if not isinstance(data, list):
        is_coco = isinstance(data, dict) and "annotations" in data
        hint = " (a COCO annotation file? run `python -m dataset.prepare_coco` on it)" if is_coco else ""
        raise ValueError(f"{path} must hold a list of records, got {type(data).__name__}{hint}")
    for number, record in enumerate(data, 1):
        yield f"{path} record {number}", record


READERS = {".json": _json_list, ".jsonl": _json_lines, ".txt": _lines}


def _condition(record, where: str, folder: Path) -> Condition:
    text = record if isinstance(record, str) else _record_text(record)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no text (looked for {', '.join(TEXT_KEYS)} and conversations[0].value)")
    # only the record's own image, checked: GenEval's part of it may name another
    metadata = {key: value for key, value in _metadata(record, where).items() if key != "image"}
    if isinstance(record, dict) and isinstance(record.get("image"), str) and record["image"]:
        metadata["image"] = str(inside(folder, record["image"], where))
    return Condition(prompt=text.strip(), metadata=metadata)


def _record_text(record):
    """The text of an object, or None."""
    if not isinstance(record, dict):
        return None
    for key in TEXT_KEYS:
        if record.get(key):
            return record[key]
    turns = record.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    return first.get("value") if isinstance(first, dict) else None


def _metadata(record, where: str) -> dict:
    """GenEval's record, whole; of other records their category, if they have one."""
    if not isinstance(record, dict):
        return {}
    if "geneval_json" in record:
        if not isinstance(record["geneval_json"], dict):
            raise ValueError(f"{where}: geneval_json must be an object")
        return record["geneval_json"]
    if "include" in record:
        return record
    return {"category": record["category"]} if isinstance(record.get("category"), str) else {}
