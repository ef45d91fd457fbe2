"""Damage by chance, the same at every run: a damaged file is loaded, or refused in one line that names it."""
import io
import json
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.lookup import _run_config
from dataset.prompts import load_prompts
from models.checkpoint import load_gpt
from reward_utils.fid_reward import load_moments
from reward_utils.weights import load_state
from trainer_utils.report import _read_config
from utils.config import _read_preset
from utils.image_files import read_batches, read_image

CASES = 12  # of each kind of file; 6,000 of each were run once, by hand
SYNTAX = b'\0\xff09{}[]"\',:-&*!eE\n<'
RECORDS = [{"prompt": "a dog", "category": "x", "image": "a/b.png"},
           {"conversations": [{"from": "human", "value": "x"}]},
           {"prompt": "q", "tag": "t", "include": [{"class": "dog", "count": 2}]}]
MIXTURE = "datasets:\n- json_path: p.json\n  sampling_strategy: first:10\n- json_path: p.json\n  sampling_strategy: 50%"
PRESET = "# a preset\nbeta: 0.1\nx: [1, 2, {a: b}]\ns: 'quoted'\nd: 2001-01-01\nb: yes\nl: |\n  text\n"


def encoded(save, *args, **options):
    buffer = io.BytesIO()
    save(buffer, *args, **options)
    return buffer.getvalue()


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))


def in_folder(world, name):
    """The tiny GPT's folder with `name` damaged."""
    def load(path):
        folder = path.parent / "gpt"
        shutil.copytree(world / "gpt", folder, dirs_exist_ok=True)
        shutil.copy(path, folder / name)
        load_gpt(folder)
    return (world / "gpt" / name).read_bytes(), load


def keys(path):
    return _read_preset(str(path), {}, ignored_keys={"beta", "x", "s", "d", "b", "l"})


IMAGES = {"arr_0": np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)}
MOMENTS = {"mu": np.zeros(4), "sigma": np.eye(4), "features": np.array("shapes")}
KINDS = {  # file name -> its content and who reads it, given the world
    "a.png": lambda world: (encoded(picture().save, "PNG"), lambda path: read_image(path, path)),
    "palette.png": lambda world: (encoded(picture().convert("P").save, "PNG"), lambda path: read_image(path, path)),
    "a.jpg": lambda world: (encoded(picture().save, "JPEG", progressive=True), lambda path: read_image(path, path)),
    "a.webp": lambda world: (encoded(picture().save, "WEBP"), lambda path: read_image(path, path)),
    "a.npz": lambda world: (encoded(np.savez, **IMAGES), lambda path: list(read_batches(path, 2))),
    "small.npz": lambda world: (encoded(np.savez_compressed, **IMAGES), lambda path: list(read_batches(path, 2))),
    "moments.npz": lambda world: (encoded(np.savez, **MOMENTS), lambda path: load_moments(path, "shapes", 4)),
    "model.safetensors": lambda world: in_folder(world, "model.safetensors"),
    "model.json": lambda world: in_folder(world, "model.json"),
    "weights.pt": lambda world: (encoded(lambda file: torch.save({"model": {"a": torch.ones(9)}}, file)),
                                 lambda path: load_state(path, "weights")),
    "old.pt": lambda world: (encoded(lambda file: torch.save({"a": torch.ones(9)}, file,
                                                             _use_new_zipfile_serialization=False)),
                             lambda path: load_state(path, "weights")),
    "prompts.json": lambda world: (json.dumps(RECORDS).encode(), load_prompts),
    "prompts.jsonl": lambda world: ("\n".join(map(json.dumps, RECORDS)).encode(), load_prompts),
    "prompts.txt": lambda world: ("a cat\n\na dog\u2028\n".encode(), load_prompts),
    "mixture.yaml": lambda world: (MIXTURE.encode(), load_prompts),
    "preset.yaml": lambda world: (PRESET.encode(), keys),
    "config.json": lambda world: (json.dumps({"beta": 1e-3, "x": [1, {"y": None}]}).encode(),
                                  lambda path: (_read_config(path), _run_config(path.parent))),
}


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Cut short; bits, bytes or pieces changed, half of them near either end, where headers are."""
    if generator.random() < 0.25:
        return content[:generator.randrange(len(content))]
    data, edge = bytearray(content), min(len(content), 700)
    how = generator.choice(("bit", "byte", "piece"))
    for _ in range(generator.choice((1, 1, 2, 8))):
        at = generator.choice((generator.randrange(len(data)), generator.randrange(min(edge, len(data))),
                               len(data) - 1 - generator.randrange(min(edge, len(data)))))
        if how == "bit":
            data[at] ^= 1 << generator.randrange(8)
        elif how == "byte":
            data[at] = generator.choice(SYNTAX)
        else:
            data[at:at + generator.randrange(9)] = generator.randbytes(generator.randrange(1, 9))
    return bytes(data)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_loaded_or_refused_in_one_line(tmp_path, world, name):
    content, load = KINDS[name](world)
    path = tmp_path / name
    (tmp_path / "p.json").write_text(json.dumps(RECORDS))
    path.write_bytes(content)
    load(path)
    generator, refusals = random.Random(name), 0
    signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("still at it after 60 seconds"))
    signal.alarm(60)
    try:
        for _ in range(CASES):
            path.write_bytes(damaged(content, generator))
            try:
                load(path)
            except ValueError as error:  # any other error ends the test
                text, refusals = str(error), refusals + 1
                place = {"model.safetensors": "gpt", "model.json": "gpt", "mixture.yaml": ""}.get(name, name)
                assert "\n" not in text and str(tmp_path / place) in text, text  # a mixture names files of its own
    finally:
        signal.alarm(0)
    assert refusals, "the damage damages nothing"
