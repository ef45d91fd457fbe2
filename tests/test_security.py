"""SECURITY.md's promises about files, held by attacks on every loader. What a promise says of the source stands in
test_security_source.py, damage by chance in test_security_fuzz.py, the reward server in test_security_server.py."""
import io
import json
import os
import pickle
import shutil
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.geneval.evaluate import read_record
from benchmark.geneval.summary import read_results
from benchmark.lookup import _run_config
from dataset.images import captioned_folder, load_image
from dataset.labels import load_class_names
from dataset.prepare_coco import captions_by_image
from dataset.prompts import load_prompts
from fid_evaluation import load_statistics
from models.checkpoint import load_gpt
from models.gpt import GPTConfig
from models.text import TextEncoder, make_tiny_t5
from reward_utils.answers import parse_final_score, parse_score_json
from reward_utils.clip import load_clip
from reward_utils.fid_reward import load_moments
from reward_utils.inception import ShapesFeatures
from reward_utils.mask2former import load_mask2former
from reward_utils.reference_image import find_references
from reward_utils.settings import RewardSettings
from reward_utils.weights import load_state
from tests.tiny_world import make_world
from utils import files
from utils.config import _read_preset, resolved
from utils.files import read_object
from utils.image_files import LIMIT_VARIABLE, count_images, read_batches, read_image

TINY = GPTConfig(dim=32, n_layer=1, n_head=4, multiple_of=16, vocab_size=16, block_size=16)


@pytest.fixture(autouse=True)
def no_hang():
    """What keeps its reader busy for a minute has won."""
    def over(number, frame):
        raise AssertionError("still at it after 60 seconds")
    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    make_tiny_t5(folder / "t5", ["a b c"])
    return folder


def refused(load, path, name=None):
    """The one line with which load(path) refuses."""
    with pytest.raises(ValueError) as error:
        load(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1500 and (name or Path(path).name) in text, text
    return text


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- nothing in a file is run ----------------------------------------------------------------------------------------

class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def torch_file(path, target, zipped):
    torch.save({"state_dict": {"weight": Payload(target)}}, path, _use_new_zipfile_serialization=zipped)


def object_npz(path, target):
    objects = np.array([Payload(target)], dtype=object)
    np.savez(path, arr_0=objects, mu=objects, sigma=np.eye(64))


def hub_folder(path, target, source):
    shutil.copytree(source, path)
    (path / "model.safetensors").unlink()
    torch_file(path / "pytorch_model.bin", target, True)


TENSOR_LOADERS = {"gpt": lambda path: load_gpt(path, TINY), "reward weights": lambda path: load_state(path, "weights"),
                  "mask2former": load_mask2former}
NPZ_LOADERS = {"images": lambda path: list(read_batches(path, 4)), "count": count_images,
               "fid reward": lambda path: load_moments(path, "shapes", 64),
               "statistics": lambda path: load_statistics(path, ShapesFeatures(), "shapes")}


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("loader", TENSOR_LOADERS)
def test_a_pickle_of_tensors_runs_nothing(tmp_path, loader, form):
    """Also test_bad_input.py (training scripts, trainer.pt), test_checkpoint.py and test_weights.py."""
    file, target = tmp_path / "evil.pth", tmp_path / "it_ran"
    if form == "bare":
        write(file, pickle.dumps({"state_dict": Payload(target)}))
    else:
        torch_file(file, target, form == "zip")
    refused(TENSOR_LOADERS[loader], file)
    assert not target.exists()


@pytest.mark.parametrize("loader", NPZ_LOADERS)
def test_a_pickle_in_an_npz_runs_nothing(tmp_path, loader):
    file, target = tmp_path / "evil.npz", tmp_path / "it_ran"
    object_npz(file, target)
    refused(NPZ_LOADERS[loader], file)
    assert not target.exists()
    np.load(file, allow_pickle=True)["arr_0"]
    assert target.exists()  # the payload works


def test_a_pickle_in_a_hub_folder_runs_nothing(tmp_path, world):
    target = tmp_path / "it_ran"
    hub_folder(tmp_path / "t5", target, world / "t5")
    refused(TextEncoder, tmp_path / "t5")
    from transformers import CLIPConfig, CLIPModel
    CLIPConfig(text_config={"vocab_size": 99}).save_pretrained(tmp_path / "clip")
    torch_file(tmp_path / "clip" / "pytorch_model.bin", target, True)
    refused(lambda path: load_clip("clip_model", path, CLIPModel), tmp_path / "clip")
    assert not target.exists()


def test_code_in_a_hub_folder_is_not_imported(tmp_path, world):
    """A tokenizer and a model that bring their own classes, and attention by a kernel of the hub."""
    folder, target = tmp_path / "t5", tmp_path / "it_ran"
    shutil.copytree(world / "t5", folder)
    write(folder / "evil.py", f"import os\nos.mkdir({str(target)!r})\nclass T: pass\n")
    for name, entry in (("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
                        ("config.json", {"AutoModel": "evil.T", "AutoTokenizer": ["evil.T", "evil.T"]})):
        config = json.loads((folder / name).read_text())
        write(folder / name, json.dumps(config | {"auto_map": entry, "attn_implementation": "someone/kernel"}))
    encoder = TextEncoder(folder)  # with the classes and the attention that transformers has itself
    assert len(encoder.encode(["a b"])) and not target.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir [TARGET]", "!!python/name:os.mkdir",
                                 "!!python/object/new:os.mkdir [TARGET]", "!!python/module:os"])
def test_a_tag_in_yaml_runs_nothing(tmp_path, tag):
    target = tmp_path / "it_ran"
    value = tag.replace("TARGET", str(target))
    refused(load_prompts, write(tmp_path / "m.yaml", f"datasets: {value}\n"))
    refused(preset, write(tmp_path / "p.yaml", f"beta: {value}\n"))
    assert not target.exists()


# ---- texts -----------------------------------------------------------------------------------------------------------

def preset(path):
    return _read_preset(str(path), {}, ignored_keys={"beta"})


TEXTS = {"prompts.json": load_prompts, "prompts.jsonl": load_prompts, "names.json": load_class_names,
         "captions.json": captions_by_image, "metadata.jsonl": lambda path: captioned_folder(path.parent, 8),
         "config.json": lambda path: _run_config(path.parent), "sampling.json": read_object,
         "results.jsonl": read_results,
         "record.jsonl": lambda path: read_record(path, "shapes"),
         "model.safetensors.index.json": lambda path: load_gpt(path.parent, TINY),
         "model.json": lambda path: load_gpt(write(path.parent / "model.safetensors", "").parent)}
HOSTILE_JSON = {"nested": "[" * 100_000, "nested and closed": "[" * 500 + "]" * 500,
                "objects": '{"a":' * 500 + "1" + "}" * 500, "digits": '[{"a": %s}]' % ("9" * 5000),
                "long": '{"a": %s}' % ("9" * 200), "nan": '[{"a": NaN}]', "infinity": '{"a": -Infinity}',
                "too large": '{"a": 1e999}', "bytes": b"\xff\xfe\x00"}


@pytest.mark.parametrize("content", HOSTILE_JSON)
@pytest.mark.parametrize("name", TEXTS)
def test_hostile_json(tmp_path, name, content):
    refused(TEXTS[name], write(tmp_path / name, HOSTILE_JSON[content]))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
HOSTILE_YAML = {"laughs": LAUGHS + "datasets: [{json_path: x.json, sampling_strategy: *i}]\nbeta: *i\n",
                "endless": "datasets: &a [*a]\n", "merge": "x: &x {a: 1}\nbeta: {<<: *x}\n",
                "nested": "beta: " + "[" * 50_000, "indented": "beta:\n" + "".join(" " * i + "-\n" for i in range(300)),
                "large": "# " + "x" * (1 << 18) + "\nbeta: 1", "tag int": 'datasets: !!int ""\nbeta: !!int ""\n',
                "tag bool": "datasets: !!bool x\nbeta: !!bool x\n", "date": "datasets: 2001-99-99\nbeta: 2001-99-99\n",
                "tag time": "datasets: !!timestamp x\nbeta: !!timestamp x\n", "key": "{[]: 1}: 2\n",
                "two": "--- 1\n--- 2\n", "bytes": b"\x80\x81"}


@pytest.mark.parametrize("content", HOSTILE_YAML)
def test_hostile_yaml(tmp_path, content):
    refused(load_prompts, write(tmp_path / "m.yaml", HOSTILE_YAML[content]))
    refused(preset, write(tmp_path / "p.yaml", HOSTILE_YAML[content]))


def test_numbers_of_a_preset_that_fit_no_float(tmp_path):
    from grpo_trainer import GRPOConfig
    from utils.config import parse_args
    file = write(tmp_path / "p.yaml", "beta: 1" + "0" * 400 + "\n")
    with pytest.raises(SystemExit):
        parse_args((GRPOConfig,), ["--config", str(file)])


@pytest.mark.parametrize("load", [load_prompts, lambda path: read_image(path, path), load_class_names])
def test_pipes_and_devices_are_not_waited_for(tmp_path, load):
    os.mkfifo(tmp_path / "pipe.txt")
    refused(load, tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    refused(load, tmp_path / "zero.txt")


def test_texts_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files.read_text, "__defaults__", ("", 100))
    assert "more than the 100 bytes" in refused(load_prompts, write(tmp_path / "a.txt", "word " * 100))


ANSWERS = {"blanks": "Final Score" + " " * 60_000, "lines": "{" + "\n" * 60_000, "quotes": '{"' + '" ' * 30_000,
           "digits": '{"score": ' + "1" * 60_000 + "x", "stars": "Final Score" + "*" * 60_000,
           "scores": "Final Score:" * 5000, "nested": "[" * 60_000, "megabytes": '{"score": 3}' * 200_000}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_judges_answer_takes_no_time(answer):
    for parse in (parse_score_json, parse_final_score):
        value, reason = parse(ANSWERS[answer])
        assert reason is None or len(reason) < 400
        assert value != value or answer == "digits" or parse is parse_score_json


# ---- names that records bring ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["/etc/hostname", "../x.png", "a/../../x.png", "..", "a/b/../../../c.png", "x\0.png"])
def test_a_record_names_no_file_outside_its_folder(tmp_path, name):
    write(tmp_path / "x.png", "outside")
    prompts = write(tmp_path / "set" / "p.json", json.dumps([{"prompt": "a", "image": "in.png"},
                                                            {"prompt": "a", "image": name}]))
    assert "record 2" in refused(load_prompts, prompts) and "leads out" in refused(load_prompts, prompts)
    write(tmp_path / "set" / "metadata.jsonl", json.dumps({"file_name": name, "text": "a"}))
    assert "leads out" in refused(lambda path: captioned_folder(path, 8), tmp_path / "set", "metadata.jsonl:1")
    index = {"weight_map": {"tok_embeddings.weight": name}}
    write(tmp_path / "set" / "model.safetensors.index.json", json.dumps(index))
    refused(lambda path: load_gpt(path, TINY), tmp_path / "set", "index.json")


def test_images_that_other_parts_of_a_record_name_are_dropped(tmp_path):
    record = {"tag": "t", "include": [{"class": "dog", "count": 1}], "image": "/etc/hostname", "prompt": "p"}
    wrapped = {"prompt": "p", "geneval_json": record}
    condition, = load_prompts(write(tmp_path / "p.json", json.dumps([wrapped])))
    assert "image" not in condition.metadata and condition.metadata["tag"] == "t"
    condition, = load_prompts(write(tmp_path / "p.json", json.dumps([record | {"image": ["/etc/hostname"]}])))
    assert "image" not in condition.metadata


# ---- images ----------------------------------------------------------------------------------------------------------

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=b"", depth=8):
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(kind, frames=1, size=(16, 16), mode="RGB", **options):
    buffer = io.BytesIO()
    pictures = [Image.new(mode, size, i) for i in range(frames)]
    more = {"save_all": True, "append_images": pictures[1:]} if frames > 1 else {}
    pictures[0].save(buffer, format=kind, **more, **options)
    return buffer.getvalue()


HOSTILE_IMAGES = {
    "bomb": (png(12_000, 12_000), "more than the 100000000 allowed"), "bomb for Pillow": (png(20_000, 20_000), "bomb"),
    "huge": (png(2 ** 31 - 1, 2 ** 31 - 1), ""),
    "real bomb": (saved("PNG", size=(10_001, 10_000), mode="1"), "10001x10000 pixels, more than"),
    "zero": (png(0, 16), ""), "line": (png(16, 60_000), "no picture"), "no rows": (png(16, 16), "not a readable"),
    "truncated": (saved("PNG")[:50], "not a readable"), "truncated jpeg": (saved("JPEG")[:300], "not a readable"),
    "truncated webp": (saved("WEBP")[:30], "not a readable"), "empty": (b"", "not a readable"),
    "text": (b"hello", "not a readable"), "gif": (saved("GIF"), "wanted PNG or JPEG or WEBP"),
    "frames gif": (saved("GIF", 50), "not a readable"), "tiff": (saved("TIFF", 5), "not a readable"),
    "eps": (saved("EPS"), "not a readable"), "ico": (saved("ICO"), "not a readable"),
    "webp frames": (saved("WEBP", 5, lossless=True), "animation of 5 pictures"),
    "apng": (saved("PNG", 5), "animation"),
    "text bomb": (saved("PNG")[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * (8 << 20))) + saved("PNG")[33:],
                  "not a readable"),
}


@pytest.mark.parametrize("name", HOSTILE_IMAGES)
def test_hostile_images_for_every_reader(tmp_path, name):
    content, message = HOSTILE_IMAGES[name]
    path = write(tmp_path / "set" / "evil.png", content)
    for load in (lambda path: read_image(path, path), lambda path: load_image(path, 8),
                 lambda path: list(read_batches(path.parent, 4))):
        assert message in refused(load, path)
    skipped = []
    assert list(read_batches(path.parent, 4, skipped=skipped)) == [] and "evil.png" in skipped[0]
    references, failures = find_references([{"image": str(path)}], 8, 8)
    assert not references and message in failures[0]


def test_no_other_decoder_is_tried(tmp_path, monkeypatch):
    """A PostScript file under a picture's name would start Ghostscript."""
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript was started"))
    refused(lambda path: read_image(path, path), write(tmp_path / "x.png", saved("EPS")))


def test_the_limit_is_set_in_one_place(tmp_path, monkeypatch):
    path = write(tmp_path / "set" / "a.png", saved("PNG"))
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    assert read_image(path, path).shape == (16, 16, 3)
    monkeypatch.setenv(LIMIT_VARIABLE, "255")
    assert "more than the 255 allowed" in refused(lambda path: read_image(path, path), path)
    assert "more than the 255 allowed" in refused(count_images, tmp_path / "a.npz")
    monkeypatch.setenv(LIMIT_VARIABLE, "many")
    with pytest.raises(ValueError, match="ARGRPO_MAX_PIXELS must be a number of pixels, got 'many'"):
        read_image(path, path)


# ---- arrays ----------------------------------------------------------------------------------------------------------

def npy(header, data=b"", version=1, length=None):
    text = header.encode() if isinstance(header, str) else repr(header).encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", size) + text + data


def claimed(shape, descr="|u1", data=b"", fortran=False):
    return npy({"descr": descr, "fortran_order": fortran, "shape": shape}, data)


HOSTILE_NPY = {
    "count": claimed((10 ** 12, 64, 64, 3)), "pixels": claimed((1, 10 ** 6, 10 ** 6, 3)), "line": claimed(
        (1, 1, 4096, 3), data=b"x" * 12288), "negative": claimed((-1, -8, 8, 3), data=b"x" * 999),
    "zeros": claimed((0, 64, 64, 3)), "objects": claimed((1,), "|O", b"cos\nsystem\n."), "header": npy("{" * 4000),
    "minus": npy("-" * 3900 + "1"), "long header": npy("{}", version=2, length=1 << 31),
    "long text": npy("{'descr': '|u1', " + " " * 30000), "version": npy("{}", version=9), "empty": b"", "code": npy(
        "__import__('os').system('x')"), "record": claimed((4,), [("a", "|u1"), ("b", "|O")]),
    "nothing": claimed((10 ** 15, 1, 1, 3), "|V0"), "no shape": npy({"descr": "|u1"}), "huge side": claimed(
        (10 ** 400, 1, 1, 3))}


@pytest.mark.parametrize("name", HOSTILE_NPY)
def test_hostile_arrays(tmp_path, name):
    """Refused by their headers: nothing is read or allocated by a number that a file claims."""
    path = tmp_path / "evil.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in ("arr_0", "mu", "sigma", "features"):
            archive.writestr(f"{member}.npy", HOSTILE_NPY[name])
    for load in NPZ_LOADERS.values():
        refused(load, path)


def test_what_grows_a_thousandfold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.npz.BOMB_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros((400, 64, 64, 3), np.uint8), mu=np.zeros(64),
                        sigma=np.zeros((64, 64)))
    assert "grows from" in refused(lambda path: list(read_batches(path, 4)), tmp_path / "bomb.npz")
    monkeypatch.setattr("utils.npz.MAX_ARRAY_BYTES", 1000)
    assert "more than the 1000 allowed" in refused(NPZ_LOADERS["fid reward"], tmp_path / "bomb.npz")


def test_zips_that_numpy_never_writes(tmp_path):
    for name, method in (("bz", zipfile.ZIP_BZIP2), ("lz", zipfile.ZIP_LZMA)):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", method) as archive:
            archive.writestr("arr_0.npy", claimed((1, 2, 2, 3), data=b"x" * 12))
        assert "in a way that numpy never uses" in refused(count_images, tmp_path / f"{name}.npz")
    data = bytearray((tmp_path / "bz.npz").read_bytes().replace(struct.pack("<H", 12), struct.pack("<H", 0)))
    for at in (6, data.index(b"PK\1\2") + 8):
        data[at] |= 1  # "encrypted"
    refused(count_images, write(tmp_path / "locked.npz", bytes(data)))


# ---- weights ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 90_000_000) + b"{}",
                                     struct.pack("<Q", 2) + b"{}", b"", struct.pack("<Q", 70) + (
    b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4]}}  ')])
def test_headers_of_safetensors(tmp_path, content):
    path = write(tmp_path / "model.safetensors", content)
    refused(lambda path: load_gpt(path, TINY), path)


def test_weights_that_grow_when_they_are_read(tmp_path):
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(100_000)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "small.pt", "w",
                                                                          zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert load_state(tmp_path / "plain.pt", "w") and "is compressed" in refused(TENSOR_LOADERS["gpt"],
                                                                               tmp_path / "small.pt")
    assert "is compressed" in refused(TENSOR_LOADERS["reward weights"], tmp_path / "small.pt")


@pytest.mark.parametrize("change", [
    {"n_layer": 10 ** 9}, {"block_size": 10 ** 12}, {"block_size": 2 ** 40, "grid_size": [2 ** 20, 2 ** 20]},
    {"dim": 0}, {"n_head": 0}, {"dim": "x" * 10000}, {"dim": 64.0}, {"n_head": None}, {"dim": -64}, {"n_layer": True},
    {"grid_size": [1] * 10 ** 5}, {"vocab_size": 10 ** 18}, {"cls_token_num": 10 ** 9, "model_type": "t2i"},
    {"multiple_of": 0}, {"ffn_dim_multiplier": 1e300}, {"rope_base": "x"}, {"no_field": 1}, {"dim": []}])
def test_a_model_json_that_asks_for_the_impossible(tmp_path, world, change):
    shutil.copytree(world / "gpt", tmp_path / "gpt")
    manifest = json.loads((tmp_path / "gpt" / "model.json").read_text())
    manifest["config"] |= change
    write(tmp_path / "gpt" / "model.json", json.dumps(manifest))
    refused(load_gpt, tmp_path / "gpt")


# ---- keys ------------------------------------------------------------------------------------------------------------

def test_keys_are_not_written_down(monkeypatch):
    """Also test_remote_http.py: messages, redirects, other hosts."""
    monkeypatch.setenv("REWARD_API_KEY", "sesame")
    settings = RewardSettings(reward_api_key="sesame")
    assert "sesame" not in json.dumps(resolved(settings)) + repr(settings)
