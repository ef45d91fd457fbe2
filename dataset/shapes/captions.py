"""Captions and GenEval records of the shapes world: every prompt, the held-out split, conditions, and the way back.

A record is GenEval's: {"tag", "include": [{"class", "count", "color"?, "position"?: [relation, include index]}],
"exclude" (counting only), "prompt"}. The caption set is finite, so parsing is a look-up. Records are shared: don't
change them. Left out: same-shape pairs and, for color_attr, same-colour pairs (GenEval has neither).
"""
import hashlib
from functools import lru_cache
from itertools import permutations

from dataset import Condition
from dataset.shapes.scene import CLASS_NAMES, COLORS, RELATIONS, SHAPES

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLIT_TASKS = ("colors", "position", "color_attr")   # the others are too small to hold out: all prompts in both splits
TEST_SHARE = 0.2
NUMBERS = {2: "two", 3: "three", 4: "four"}


def all_prompts():
    """Every text-to-image record, in a fixed order: 4 + 12 + 12 + 32 + 48 + 672."""
    return list(_all_prompts())


def split_prompts(split, seed=0):
    """The records of "train" or "test". A fifth of each task of SPLIT_TASKS is held out by hash, and by meaning:
    two captions that ask for the same scene ("A left of B", "B right of A") are on the same side."""
    return list(_split_prompts(split, seed))


def sample_record(rng, split="train"):
    """A uniform task, then a uniform prompt of that task and split."""
    records = _records_by_task(split)[TASKS[rng.integers(len(TASKS))]]
    return records[rng.integers(len(records))]


def class_condition(class_id):
    """The class-to-image request: "a photo of red circle", as the ImageNet template says it."""
    if not 0 <= class_id < len(CLASS_NAMES):
        raise ValueError(f"class {class_id} is not in the shapes world; classes are 0 to {len(CLASS_NAMES) - 1}")
    record = _class_record(CLASS_NAMES[class_id])
    return Condition(record["prompt"], class_id, record)


def prompt_condition(record):
    return Condition(record["prompt"], None, record)


def parse_caption(prompt):
    """The record behind a caption of the world, text-to-image or class-to-image."""
    record = _records_by_prompt().get(prompt)
    if record is None:
        raise ValueError(f"not a caption of the shapes world: {prompt!r}; write e.g. 'a photo of a red circle'")
    return record


def _named(include):
    """ "an orange star" """
    words = f"{include['color']} {include['class']}" if "color" in include else include["class"]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _group(shape, color=None, count=1, position=None):
    optional = {"color": color, "position": position}
    return {"class": shape, "count": count} | {key: value for key, value in optional.items() if value is not None}


def _record(tag, include, text, **extra):
    return {"tag": tag, "include": include, **extra, "prompt": f"a photo of {text}"}


def _class_record(name):
    color, shape = name.split()
    return _record("colors", [_group(shape, color)], name)


def _pair(tag, first, second):
    return _record(tag, [first, second], f"{_named(first)} and {_named(second)}")


def _count(shape, count):
    exclude = [{"class": shape, "count": count + 1}]
    return _record("counting", [_group(shape, count=count)], f"{NUMBERS[count]} {shape}s", exclude=exclude)


def _position(shape, relation, reference):
    include = [_group(reference), _group(shape, position=[relation, 0])]   # GenEval lists the reference first
    return _record("position", include, f"{_named(include[1])} {relation} {_named(include[0])}")


@lru_cache(maxsize=1)
def _all_prompts():
    pairs = list(permutations(SHAPES, 2))
    single = [_record("single_object", [_group(shape)], _named(_group(shape))) for shape in SHAPES]
    two = [_pair("two_object", _group(a), _group(b)) for a, b in pairs]
    counting = [_count(shape, count) for shape in SHAPES for count in NUMBERS]
    groups = [_group(shape, color) for shape in SHAPES for color in COLORS]
    colors = [_record("colors", [group], _named(group)) for group in groups]
    position = [_position(a, relation, b) for a, b in pairs for relation in RELATIONS]
    attributes = [_pair("color_attr", _group(a, x), _group(b, y)) for a, b in pairs for x, y in permutations(COLORS, 2)]
    return tuple(single + two + counting + colors + position + attributes)


def _meaning(record):
    """One key for all captions of the same scene."""
    if record["tag"] == "position":
        reference, item = record["include"]
        x, y = RELATIONS[item["position"][0]]
        ends = {item["class"]: (x, y), reference["class"]: (-x, -y)}
    else:
        ends = {group["class"]: group.get("color") for group in record["include"]}
    return str(sorted(ends.items()))


@lru_cache(maxsize=8)
def _held_out(seed):
    """The (task, meaning) pairs of the test split: the TEST_SHARE of each split task with the smallest hashes."""
    held_out = set()
    for task in SPLIT_TASKS:
        meanings = {_meaning(record) for record in _all_prompts() if record["tag"] == task}
        ranked = sorted(meanings, key=lambda key: hashlib.sha256(f"{seed}/{task}/{key}".encode()).digest())
        held_out |= {(task, key) for key in ranked[:round(TEST_SHARE * len(ranked))]}
    return held_out


@lru_cache(maxsize=16)
def _split_prompts(split, seed=0):
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: write 'train' or 'test'")
    held_out = _held_out(seed)
    return tuple(record for record in _all_prompts() if record["tag"] not in SPLIT_TASKS
                 or ((record["tag"], _meaning(record)) in held_out) == (split == "test"))


@lru_cache(maxsize=2)
def _records_by_task(split):
    return {task: [record for record in _split_prompts(split) if record["tag"] == task] for task in TASKS}


@lru_cache(maxsize=1)
def _records_by_prompt():
    classes = [_class_record(name) for name in CLASS_NAMES]
    return {record["prompt"]: record for record in (*_all_prompts(), *classes)}
