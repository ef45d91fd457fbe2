"""Make GenEval's 553 prompts again: evaluation_metadata.jsonl and generation_prompts.txt, byte for byte.

    python -m benchmark.geneval.prompts OUT_DIR

Then sample with `bash test_t2i.sh ... --prompt_files OUT_DIR/evaluation_metadata.jsonl`. The order in which numbers are
drawn makes the files what they are: nothing here may be reordered.
"""
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from reward_utils.geneval import CLASS_NAMES, COLORS, RELATIONS
from utils.atomic import atomic_write_text
from utils.config import one_line_errors

SEED = 43
PROMPTS_PER_TASK = 100  # drawn; what repeats is dropped. single_object: every class once
NUMBERS = {2: "two", 3: "three", 4: "four"}
# person is class 0: "a red person" is not asked for
COLORED_CLASSES = len(CLASS_NAMES) - 1
SHA256 = {
    "evaluation_metadata.jsonl": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    "generation_prompts.txt": "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680",
}


def make_records() -> list[dict]:
    """GenEval's records {"tag", "include", "exclude"?, "prompt"}, in order."""
    rng = np.random.default_rng(SEED)
    records = [single_object(CLASS_NAMES[i]) for i in rng.choice(len(CLASS_NAMES), len(CLASS_NAMES), replace=False)]
    for draw in (two_object, counting, colors, position, color_attr):
        records += [draw(rng) for _ in range(PROMPTS_PER_TASK)]
    return list({json.dumps(record): record for record in records}.values())


def single_object(name: str) -> dict:
    return _record("single_object", [_group(name)], _article(name))


def two_object(rng: np.random.Generator) -> dict:
    first, second = _two_classes(rng)
    return _record("two_object", [_group(first), _group(second)], f"{_article(first)} and {_article(second)}")


def counting(rng: np.random.Generator) -> dict:
    name = CLASS_NAMES[rng.choice(len(CLASS_NAMES))]
    count = int(rng.integers(2, 4, endpoint=True))
    plural = name + ("es" if name.endswith("s") else "s")
    return _record("counting", [_group(name, count)], f"{NUMBERS[count]} {plural}", exclude=[_group(name, count + 1)])


def colors(rng: np.random.Generator) -> dict:
    name = CLASS_NAMES[rng.choice(COLORED_CLASSES) + 1]
    color = COLORS[rng.choice(len(COLORS))]
    return _record("colors", [_group(name, color=color)], f"{_article(color)} {name}")


def position(rng: np.random.Generator) -> dict:
    item, target = _two_classes(rng)
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    include = [_group(target), _group(item, position=[relation, 0])]
    return _record("position", include, f"{_article(item)} {relation} {_article(target)}")


def color_attr(rng: np.random.Generator) -> dict:
    names = [CLASS_NAMES[i + 1] for i in rng.choice(COLORED_CLASSES, 2, replace=False)]
    tints = [COLORS[i] for i in rng.choice(len(COLORS), 2, replace=False)]
    text = " and ".join(f"{_article(color)} {name}" for name, color in zip(names, tints))
    return _record("color_attr", [_group(name, color=color) for name, color in zip(names, tints)], text)


def _two_classes(rng: np.random.Generator) -> list[str]:
    return [CLASS_NAMES[i] for i in rng.choice(len(CLASS_NAMES), 2, replace=False)]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _group(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


def _record(tag: str, include: list[dict], text: str, **more) -> dict:
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {text}"}


def write_prompts(folder: Path) -> None:
    """Both files of SHA256; a folder is made. ValueError if this numpy draws other numbers."""
    records = make_records()
    files = {"evaluation_metadata.jsonl": "".join(json.dumps(record) + "\n" for record in records),
             "generation_prompts.txt": "".join(record["prompt"] + "\n" for record in records)}
    for name, text in files.items():
        if hashlib.sha256(text.encode()).hexdigest() != SHA256[name]:
            raise ValueError(f"{name} would differ from GenEval's: numpy {np.__version__} draws other numbers; use "
                             "numpy 2.4, whose files are right")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        atomic_write_text(folder / name, text)


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise ValueError("usage: python -m benchmark.geneval.prompts OUT_DIR")
    write_prompts(Path(argv[0]))
    print(f"wrote {' and '.join(SHA256)} to {argv[0]}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
