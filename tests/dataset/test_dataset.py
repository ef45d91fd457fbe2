"""Class labels, prompt files, the COCO preparation, and the sampler's arithmetic."""
import json
from collections import Counter

import pytest

from dataset import Condition
from dataset.labels import class_conditions, imagenet_names, load_class_names
from dataset.prepare_coco import main as prepare_coco
from dataset.prompts import load_prompts
from dataset.sampler import PromptSampler, row_seed, row_seeds, shard
from utils.config import one_line_errors

GENEVAL = {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],
           "prompt": "a photo of two cups"}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def texts(*args, **kwargs):
    return [c.prompt for c in load_prompts(*args, **kwargs)]


# ---- labels

def test_imagenet_names_carry_all_synonyms_in_wnid_order():
    names = imagenet_names()
    assert len(names) == 1000
    assert names[0] == "tench, Tinca tinca"
    assert names[207] == "golden retriever"
    assert names[134] == names[517] == "crane"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert load_class_names("imagenet") == names


def test_class_lists_from_files_and_the_shapes_world(tmp_path):
    assert load_class_names(write(tmp_path / "a.txt", "red fox\n cat \n\n")) == ["red fox", "cat"]
    assert load_class_names(str(write(tmp_path / "a.json", ["x", "y"]))) == ["x", "y"]
    ids = {str(i): f"c{i}" for i in reversed(range(12))}     # "10" must not sort before "2"
    assert load_class_names(write(tmp_path / "b.json", ids)) == [f"c{i}" for i in range(12)]
    shapes = load_class_names("shapes")
    assert len(shapes) == len(set(shapes)) > 1 and "red star" in shapes


def test_class_names_from_an_image_folder(tmp_path):
    for name in ("zebra", "apple", ".cache"):
        (tmp_path / "plain" / name).mkdir(parents=True)
    for wnid in ("n02099601", "n01440764"):
        (tmp_path / "wnids" / wnid).mkdir(parents=True)
    write(tmp_path / "plain" / "readme.txt", "not a class")
    assert load_class_names(tmp_path / "plain") == ["apple", "zebra"]
    assert load_class_names(tmp_path / "wnids") == ["tench, Tinca tinca", "golden retriever"]
    (tmp_path / "wnids" / "other").mkdir()
    assert load_class_names(tmp_path / "wnids") == ["n01440764", "n02099601", "other"]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "cat\n\ndog\n", r"a\.txt line 2 is blank"),
    ("a.txt", "", r"a\.txt line 1 is blank"),
    ("a.json", {"0": "cat", "2": "dog"}, r"no id 1"),
    ("a.json", [], "non-empty"),
    ("a.json", ["cat", 3], "class 1"),
    ("a.json", "[\n1,", r"a\.json line 2"),
    ("a.csv", "cat", "imagenet, shapes"),
])
def test_bad_class_lists_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load_class_names(write(tmp_path / name, content))


def test_bad_class_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no class folders"):
        load_class_names(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        load_class_names(tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="splits"):
        load_class_names(tmp_path)
    (tmp_path / "w" / "n99999999").mkdir(parents=True)
    with pytest.raises(ValueError, match="n99999999"):
        load_class_names(tmp_path / "w")


def test_class_conditions():
    assert class_conditions(["cat", "{dog}"]) == [Condition("a photo of cat", 0), Condition("a photo of {dog}", 1)]
    assert class_conditions(["cat"], "one {name}!")[0].prompt == "one cat!"
    with pytest.raises(ValueError, match="name"):
        class_conditions(["cat"], "a photo")


# ---- prompt files

def test_every_record_form(tmp_path):
    records = [{"id": "0", "conversations": [{"from": "human", "value": " a dog "}, {"from": "gpt", "value": ""}]},
               {"prompt": "p"}, {"caption": "c"}, {"text": "t"}, "plain", GENEVAL,
               {"prompt": "trained on", "geneval_json": GENEVAL}]
    expected = ["a dog", "p", "c", "t", "plain", GENEVAL["prompt"], "trained on"]
    as_json = load_prompts(write(tmp_path / "a.json", records))
    assert [c.prompt for c in as_json] == expected
    assert [c.metadata for c in as_json] == [{}] * 5 + [GENEVAL] * 2
    assert all(c.class_id is None for c in as_json)
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n"
    assert load_prompts(write(tmp_path / "a.jsonl", lines)) == as_json


def test_reference_images_are_paths_from_the_files_folder(tmp_path):
    records = [{"prompt": "a", "image": "coco/1.jpg"}, {"prompt": "b", "image": "a/../2.jpg", "category": "x"},
               {"prompt": "c", "image": None}, {"prompt": "d", "image": ""},
               {"prompt": "e", "image": "5.png", "geneval_json": GENEVAL}]
    assert [c.metadata for c in load_prompts(write(tmp_path / "a.json", records))] == [
        {"image": str(tmp_path / "coco/1.jpg")}, {"category": "x", "image": str(tmp_path / "a/../2.jpg")}, {}, {},
        {**GENEVAL, "image": str(tmp_path / "5.png")}]


def test_text_files_and_several_at_once(tmp_path):
    one = write(tmp_path / "one.txt", "\ufeffa cat\r\n\r\n  a caf\u00e9 \n")
    two = write(tmp_path / "two.jsonl", '{"text": "line\u2028separator"}')
    assert texts(one) == ["a cat", "a caf\u00e9"]
    assert texts([one, str(two)]) == texts(f"{one},{two}") == ["a cat", "a caf\u00e9", "line\u2028separator"]


def mixture(tmp_path, *entries, name="mix.yaml"):
    write(tmp_path / "data" / "n.json", [str(i) for i in range(30)])
    lines = [f"  - json_path: data/n.json\n    sampling_strategy: {e}\n" for e in entries]
    return write(tmp_path / name, "datasets:\n" + "".join(lines))


@pytest.mark.parametrize("strategy, expected", [
    ("all", range(30)), ("first:3", range(3)), ("end:2", range(28, 30)), ("first:10%", range(3)),
    ("end:11%", range(26, 30)), ("first:1000", range(30)), ("end:1000", range(30)),
])
def test_mixture_strategies(tmp_path, strategy, expected):
    assert texts(mixture(tmp_path, strategy)) == [str(i) for i in expected]


def test_random_mixtures_are_seeded(tmp_path):
    path = mixture(tmp_path, "random:9", "10%")
    picked = texts(path, seed=1)
    assert len(picked) == 12 and len(set(picked[:9])) == 9
    assert picked == texts(path, seed=1) != texts(path, seed=2)
    assert texts(mixture(tmp_path, "random:10%", name="m2.yaml"), seed=1) \
        == texts(mixture(tmp_path, "10%", name="m3.yaml"), seed=1)
    assert texts(mixture(tmp_path, "random:5", name="m4.yml")) != texts(mixture(tmp_path, "first:5", name="m5.yml"))


def test_mixture_default_strategy_and_order(tmp_path):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.jsonl", '{"prompt": "b"}')
    path = write(tmp_path / "m.yaml", f"datasets:\n- json_path: {tmp_path}/a.txt\n- json_path: b.jsonl\n")
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize("name, content, message", [
    ("a.json", "", r"a\.json is empty"),
    ("a.json", [], r"a\.json is empty"),
    ("a.txt", "\n \n", r"a\.txt is empty"),
    ("a.jsonl", "\n", r"a\.jsonl is empty"),
    ("a.csv", "x", r"a\.csv: unknown suffix '\.csv'"),
    ("a.json", [{"prompt": "x"}, {"image": "y"}], r"a\.json record 2 has no text"),
    ("a.json", ["x", "  "], r"a\.json record 2 has no text"),
    ("a.json", [{"conversations": []}], r"record 1 has no text"),
    ("a.json", [{"conversations": [{"from": "human"}]}], r"record 1 has no text"),
    ("a.json", [{"prompt": 3}], r"record 1 has no text"),
    ("a.json", [None], r"record 1 has no text"),
    ("a.json", '["x",\n"y"', r"a\.json line 2 is not valid JSON"),
    ("a.json", "7", r"must hold a list"),
    ("a.json", {"annotations": []}, r"prepare_coco"),
    ("a.json", [{"prompt": "x", "geneval_json": "{}"}], r"record 1: geneval_json"),
    ("a.jsonl", '{"prompt": "x"}\n\n{"prompt"\n', r"a\.jsonl line 3 is not valid JSON"),
    ("a.jsonl", '{"prompt": "x"}\n{}\n', r"a\.jsonl line 2 has no text"),
    ("m.yaml", "datasets: []", r"m\.yaml needs a list"),
    ("m.yaml", "", r"m\.yaml needs a list"),
    ("m.yaml", "datasets:\n- a: [\n", r"m\.yaml line \d is not valid YAML"),
    ("m.yaml", "datasets:\n- json_path: x.txt\n  strategy: first:1\n", r"m\.yaml dataset 1 has unknown keys"),
    ("m.yaml", "datasets:\n- sampling_strategy: all\n", r"m\.yaml dataset 1 has no json_path"),
    ("m.yaml", "datasets:\n- json_path: gone.json\n", r"gone\.json cannot be read"),
    ("m.yaml", "datasets:\n- json_path: m.yaml\n", r"unknown suffix '\.yaml'"),
])
def test_bad_prompt_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("strategy", ["some", "first", "first:x", "middle:3", "100", "first:0", "end:0%", "first:-3"])
def test_bad_strategies_are_named(tmp_path, strategy):
    with pytest.raises(ValueError, match=r"mix\.yaml dataset 2: sampling_strategy"):
        load_prompts(mixture(tmp_path, "all", strategy))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read"):
        load_prompts(tmp_path / "gone.txt")
    (tmp_path / "bin.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"bin\.txt is not UTF-8"):
        load_prompts(tmp_path / "bin.txt")
    with pytest.raises(ValueError, match="no prompt file"):
        load_prompts([])


# ---- COCO

def coco(tmp_path):
    annotations = [{"id": 10 * i + j, "image_id": i, "caption": f"image {i}\n caption {j} "}
                   for j in range(5) for i in range(20)]
    return write(tmp_path / "captions.json", {"images": [], "annotations": annotations})


def test_prepare_coco_draws_one_caption_per_image(tmp_path):
    source, target = coco(tmp_path), tmp_path / "new" / "coco.json"
    prepare_coco([str(source), str(target), "--num", "15"])
    first = target.read_bytes()
    records = json.loads(first)
    assert len({r["id"] for r in records}) == len(records) == 15
    assert records[0]["conversations"][0]["from"] == "human"
    prompts = texts(target)
    assert all(f"coco_{int(p.split()[1]):012d}" == r["id"] for p, r in zip(prompts, records))
    assert len({p.split()[-1] for p in prompts}) > 1, "always the same of the five captions"
    prepare_coco([str(source), str(target), "--num", "15"])
    assert target.read_bytes() == first
    prepare_coco([str(source), str(target), "--num", "15", "--seed", "1"])
    assert target.read_bytes() != first
    assert [p.name for p in target.parent.iterdir()] == ["coco.json"]


def test_prepare_coco_errors_leave_the_target_alone(tmp_path, capsys):
    target = write(tmp_path / "coco.json", "old")
    for source, message in ((coco(tmp_path), "20 images"), (tmp_path / "gone.json", "cannot be read"),
                            (write(tmp_path / "i.json", {"annotations": [{"image_id": 1, "bbox": []}]}),
                             "annotation 1"), (write(tmp_path / "l.json", []), "annotations")):
        with pytest.raises(SystemExit) as error, one_line_errors():
            prepare_coco([str(source), str(target), "--num", "21"])
        assert error.value.code == 2 and message in capsys.readouterr().err
    assert target.read_text() == "old"


# ---- sampler

@pytest.mark.parametrize("num_conditions, num_prompts", [(10, 4), (7, 16), (12, 3), (1, 2)])
def test_epochs_have_no_gaps_or_repeats(num_conditions, num_prompts):
    sampler = PromptSampler(num_conditions, seed=3)
    steps = 3 * num_conditions
    stream = [i for step in range(steps) for i in sampler.indices(step, num_prompts)]
    epochs = [stream[e:e + num_conditions] for e in range(0, len(stream) - num_conditions + 1, num_conditions)]
    assert all(sorted(epoch) == list(range(num_conditions)) for epoch in epochs)
    if num_conditions >= 7:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "every epoch has its own order"


def test_sampler_needs_only_seed_and_step():
    forward = [PromptSampler(50, seed=1).indices(s, 8) for s in range(20)]
    late = PromptSampler(50, seed=1)
    assert [late.indices(s, 8) for s in reversed(range(20))] == forward[::-1]
    assert PromptSampler(50, seed=2).indices(0, 8) != forward[0]
    assert all(type(i) is int for i in forward[0])
    # pinned: another order would silently break every resumed run
    assert PromptSampler(10, seed=0).indices(0, 10) == [2, 1, 0, 8, 4, 3, 5, 6, 9, 7]
    assert row_seed(0, 0, 0, 0) == 7087858873491589119


def test_shards_rebuild_the_global_batch():
    batch = PromptSampler(50, seed=1).indices(5, 12)
    for world_size in (1, 2, 3, 4, 6, 12):
        shards = [shard(batch, rank, world_size) for rank in range(world_size)]
        assert [shards[i % world_size][i // world_size] for i in range(12)] == batch
    with pytest.raises(ValueError, match="12 prompts .* 5 processes"):
        shard(batch, 0, 5)


def test_row_seeds():
    keys = [(s, t, p, m) for s in (0, 1) for t in (0, 1, 7) for p in range(16) for m in range(8)]
    seeds = [row_seed(*key) for key in keys]
    assert max(Counter(seeds).values()) == 1 and all(0 <= seed < 2 ** 63 for seed in seeds)
    assert row_seeds(0, 7, [3, 5], 2) == [row_seed(0, 7, 3, 0), row_seed(0, 7, 3, 1),
                                          row_seed(0, 7, 5, 0), row_seed(0, 7, 5, 1)]
    whole = row_seeds(0, 2, range(8), 4)
    halves = [row_seeds(0, 2, shard(range(8), rank, 2), 4) for rank in range(2)]
    assert [seed for p in range(8) for seed in halves[p % 2][p // 2 * 4:p // 2 * 4 + 4]] == whole
