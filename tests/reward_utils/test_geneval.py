"""GenEval's rules (against the original's golden/rewards/geneval_rules.json), colours, scorers and prompts."""
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPModel

from benchmark.geneval import prompts
from benchmark.geneval.prompts import SHA256, make_records, write_prompts
from dataset import shapes
from reward_utils import mask2former
from reward_utils.geneval import (
    CLASS_NAMES,
    COLORS,
    ColorClassifier,
    DetectedObject,
    GenevalScorer,
    ShapesScorer,
    coloured_objects,
    cut_out,
    evaluate,
    graded_score,
    overlap,
    record_problem,
    relative_position,
    select,
)
from reward_utils.mask2former import Instances
from reward_utils.pixels import CLIP_MEAN, CLIP_STD
from reward_utils.settings import RewardSettings
from tests.tiny_geneval import GOLDEN, rendered, write_clip, write_mmdet

RULES = json.loads((GOLDEN / "geneval_rules.json").read_text(encoding="utf-8"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost seconds where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return RewardSettings(geneval_model=str(write_mmdet(root / "dogs.pth", "dog")),
                          geneval_clip_model=str(write_clip(root / "clip")), reward_batch_size=2)


@pytest.fixture(scope="module")
def scorer(settings):
    return GenevalScorer(settings, CPU)


def objects_of(rows):
    """{class: [[x1, y1, x2, y2, colour?], ...]} -> Objects"""
    return {name: [DetectedObject(tuple(row[:4]), 1.0, None, row[4] if len(row) > 4 else None) for row in group]
            for name, group in rows.items()}


def group(name, count=1, **more):
    return {"class": name, "count": count, **more}


# ---- the rules -------------------------------------------------------------------------------------------------------

def test_relations_are_genevals():
    assert len(RULES["relative_position"]) > 20
    for case in RULES["relative_position"]:
        assert sorted(relative_position(case["a"], case["b"])) == sorted(case["relations"]), case


def test_verdicts_and_reasons_are_genevals():
    for case in RULES["evaluate"]:
        assert evaluate(objects_of(case["objects"]), case["metadata"]) == (case["correct"], case["reason"]), case


def test_overlap_is_genevals():
    for case in RULES["compute_iou"]:
        assert overlap(case["a"], case["b"]) == case["iou"]


LEFT, RIGHT, BELOW = [0, 0, 10, 10], [40, 0, 50, 10], [42, 42, 52, 52]


@pytest.mark.parametrize("rows, include, reason", [
    ({"dog": [RIGHT]}, [group("cat"), group("dog", position=["left of", 0])],
     "expected cat>=1, found 0\nno target for dog to be left of"),
    ({"cat": [LEFT], "dog": [BELOW]}, [group("cat"), group("dog", position=["left of", 0])],
     "expected dog left of target, found below and right of target"),
    ({"cat": [LEFT], "dog": [LEFT]}, [group("cat"), group("dog", position=["left of", 0])],
     "expected dog left of target, found  target"),
    # a colour that is wrong ends its clause: the position is not looked at
    ({"cat": [LEFT], "dog": [[*LEFT, "red"]]}, [group("cat"), group("dog", color="blue", position=["above", 0])],
     "expected blue dog>=1, found 0 blue; and 1 red"),
    # every pair counts, and only the best `count`
    ({"cat": [LEFT, BELOW], "dog": [RIGHT]}, [group("cat", 2), group("dog", position=["right of", 0])],
     "expected dog right of target, found above target"),
    ({"cat": [LEFT, BELOW], "dog": [RIGHT]}, [group("cat", 1), group("dog", position=["right of", 0])], ""),
    ({"dog": [[*LEFT, "white"], [*RIGHT, "red"], [*BELOW, "white"]]}, [group("dog", 3, color="red")],
     "expected red dog>=3, found 1 red; and 1 red, 2 white"),
])
def test_reasons_beyond_the_golden_ones(rows, include, reason):
    assert evaluate(objects_of(rows), {"include": include}) == (reason == "", reason)


def test_selection_by_score_tag_and_overlap():
    found = {"dog": [DetectedObject((i, 0, i + 10, 10), score) for i, score in enumerate((0.3, 0.95, 0.31, 0.9))],
             "cat": [DetectedObject((0, 0, 1, 1), 0.2)]}
    assert [item.score for item in select(found, "colors")["dog"]] == [0.95, 0.9, 0.31]
    assert [item.score for item in select(found, "counting")["dog"]] == [0.95] and "cat" not in select(found, None)
    many = {"dog": [DetectedObject((0, 0, 9, 9), 0.5 + i / 100) for i in range(20)]}
    assert [item.score for item in select(many, "colors")["dog"]] == [0.5 + i / 100 for i in range(19, 3, -1)]
    assert [item.score for item in select(many, "colors", max_overlap=0.99)["dog"]] == [0.69]
    assert [item.score for item in select(found, None, max_overlap=0.7)["dog"]] == [0.95, 0.9]


@pytest.mark.parametrize("rows, include, score", [
    ({"dog": [LEFT]}, [group("dog")], 1),
    ({}, [group("dog", color="red")], 0),                                   # 0 found, and 0 for the colour
    ({"dog": [LEFT] * 3}, [group("dog", 4)], 0.75),
    ({"dog": [LEFT] * 3}, [group("dog")], -1),                              # twice too many is 0, more is negative
    ({"dog": [[*LEFT, "red"]], "cat": [[*LEFT, "red"]]}, [group("dog", color="red"), group("cat", color="blue")], 0.75),
    ({"dog": [LEFT, RIGHT], "cat": [LEFT]}, [group("dog", color="red"), group("cat")], 1 / 3),  # extra: not looked at
    ({"cat": [LEFT], "dog": [RIGHT]}, [group("cat"), group("dog", position=["right of", 0])], 1),
    ({"cat": [LEFT], "dog": [RIGHT]}, [group("cat"), group("dog", position=["above", 0])], 0.75),  # 1, 1, 0 and 1
    ({"dog": [RIGHT]}, [group("cat"), group("dog", position=["above", 0])], 1 / 3),             # 0, 1, 0
    ({"cat": [LEFT]}, [group("cat"), group("dog", position=["above", 0])], 1 / 3),              # 1, 0, 0
])
def test_graded_score_is_flow_grpos(rows, include, score):
    assert graded_score(objects_of(rows), {"include": include}) == pytest.approx(score)


@pytest.mark.parametrize("record, words", [
    ({}, "no GenEval record"), ({"include": []}, "no GenEval record"),
    ({"include": [group("unicorn")]}, "'unicorn' is none"),
    ({"include": [group("dog", 0)]}, "whole number"),
    ({"include": [group("dog", color="teal")]}, "'teal' is none"),
    ({"include": [group("dog", position=["left of", 0])]}, "earlier requirement"),
    ({"include": [group("cat"), group("dog", position=["near", 0])]}, "earlier requirement"),
    ({"include": [group("cat")], "exclude": [group("dgo", 2)]}, "'dgo' is none"),
    ({"include": ["dog"]}, "'dog' is none"),
])
def test_records_that_cannot_be_judged(record, words):
    assert words in record_problem(record)


# ---- colours ---------------------------------------------------------------------------------------------------------

def test_cut_out_is_pils_composite_and_crop():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), rng.random((20, 30)) > 0.5
    blank = Image.new("RGB", (30, 20), "#999")
    box = (2.5, 3.5, 25.4, 17.0)
    expected = Image.composite(Image.fromarray(image), blank, Image.fromarray(mask)).crop(box)
    item = DetectedObject(box, 1.0, torch.from_numpy(mask))
    cut = cut_out(torch.from_numpy(image).permute(2, 0, 1), item)
    assert np.array_equal(cut.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_colours_are_those_of_open_clips_transform_and_genevals_prompts(settings):
    """One crop and one text at a time, with torchvision's transform, against the batched classifier."""
    classifier = ColorClassifier(Path(settings.geneval_clip_model))
    model = CLIPModel.from_pretrained(settings.geneval_clip_model, dtype=torch.float32).eval()
    assert model.config.vision_config.hidden_act == "quick_gelu"
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(),
                         Normalize(CLIP_MEAN, CLIP_STD)])
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randint(0, 256, (3, 1, 1), generator=generator) // 2
             + torch.randint(0, 128, (3, *size), generator=generator)
             for size in ((32, 32), (50, 41), (33, 90), (7, 12), (64, 20), (48, 48))]
    crops, names = [crop.to(torch.uint8) for crop in crops], ["dog", "apple", "dog", "cup", "dog", "cup"]
    weights = {}
    for name in set(names):
        for color in COLORS:
            texts = [f"a photo of a {color}{words}" for words in (f" {name}", f"-colored {name}", " object")]
            embedded = [model.text_projection(model.text_model(**classifier.tokenizer(
                text, return_tensors="pt")).pooler_output)[0].detach() for text in texts]
            mean = torch.stack([one / one.norm() for one in embedded]).mean(0)
            weights[name, color] = mean / mean.norm()
    expected = torch.empty(len(crops), len(COLORS))
    for i, (crop, name) in enumerate(zip(crops, names)):
        with torch.no_grad():
            pixels = transform(Image.fromarray(crop.permute(1, 2, 0).numpy()))[None]
            feature = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
        expected[i] = torch.stack([feature / feature.norm() @ weights[name, color] for color in COLORS])
    similarities = classifier.similarities(crops, names)
    assert torch.allclose(similarities, expected, atol=2e-6) and expected.std(0).max() > 0.02  # crops differ, too
    assert classifier(crops, names) == [COLORS[i] for i in expected.argmax(1).tolist()]
    assert set(classifier.class_weights) == set(names)


def test_only_colours_that_a_rule_reads_are_classified():
    found = objects_of({"dog": [LEFT, RIGHT, BELOW], "cat": [LEFT]})
    record = {"include": [group("dog", 2, color="red"), group("cat", 2, color="red"), group("cat")]}
    assert coloured_objects(found, record) == [("dog", 0), ("dog", 1)]


# ---- the scorers -----------------------------------------------------------------------------------------------------

def detections(*rows, size=16):
    """Instances of (class, box, score), each mask filling its box."""
    masks = torch.zeros(len(rows), size, size, dtype=torch.bool)
    for mask, (_, (x1, y1, x2, y2), _) in zip(masks, rows):
        mask[y1:y2, x1:x2] = True
    return Instances(torch.tensor([CLASS_NAMES.index(name) for name, _, _ in rows]),
                     torch.tensor([[float(side) for side in box] for _, box, _ in rows]),
                     torch.tensor([score for *_, score in rows]), masks)


def test_scorer_joins_detector_colours_and_rules(scorer, monkeypatch):
    """A detector and a classifier that tell what they were given, in batches of two, with records that fail."""
    dog, cat = ("dog", (1, 2, 9, 9), 0.5), ("cat", (10, 2, 15, 9), 0.8)
    seen, asked = [], []

    def detect(images, min_score):
        assert min_score == 0.3
        seen.extend(images[:, 0, 0, 0].tolist())
        return [detections(dog, cat) if value % 2 else detections(cat) for value in images[:, 0, 0, 0].tolist()]

    def colors(crops, names):
        asked.append([(name, *crop.shape) for crop, name in zip(crops, names)])
        return ["red"] * len(names)

    monkeypatch.setattr(scorer.detector, "forward", detect)
    monkeypatch.setattr(scorer.colors, "forward", colors)
    red = {"tag": "color_attr", "include": [group("dog", color="red"), group("cat", color="red")]}
    counted = {"tag": "counting", "include": [group("cat")]}
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 16, 16)
    verdicts = scorer(images, [red, red, {}, counted, {"include": [group("yeti")]}, red])
    assert seen == [0, 1, 3, 5] and asked == [[("cat", 3, 7, 5), ("dog", 3, 7, 8)], [("cat", 3, 7, 5)],
                                              [("dog", 3, 7, 8), ("cat", 3, 7, 5)]]
    assert [one["correct"] for one in verdicts] == [False, True, None, False, None, True]
    assert verdicts[0]["reason"] == "expected dog>=1, found 0" and verdicts[0]["graded"] == 0.5
    assert verdicts[1]["details"] == {"dog": [[1, 2, 9, 9, 0.5]], "cat": [[10, 2, 15, 9, pytest.approx(0.8)]]}
    assert verdicts[3]["details"] == {} and math.isnan(verdicts[2]["graded"])  # counting wants scores above 0.9
    assert "no GenEval record" in verdicts[2]["reason"] and "yeti" in verdicts[4]["reason"]


def test_an_image_with_nothing_in_it(settings, tmp_path, monkeypatch):
    """Through the real detector: no instance reaches the threshold."""
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 96)
    scorer = GenevalScorer(replace(settings, geneval_model=str(write_mmdet(tmp_path / "blind.pth", None))), CPU)
    images = torch.zeros(3, 3, 32, 40, dtype=torch.uint8)
    wrong = {"correct": False, "reason": "expected dog>=1, found 0", "graded": 0.0, "details": {}}
    assert scorer(images, [{"include": [group("dog", color="red")]}] * 3) == [wrong] * 3
    assert scorer(images[:0], []) == []


def test_missing_weights_say_what_to_fetch(tmp_path):
    with pytest.raises(ValueError, match="openmmlab.*put it at REWARD_MODELS/mask2former_swin-s"):
        GenevalScorer(RewardSettings(reward_models=str(tmp_path)), CPU)


def test_shapes_detector_obeys_the_same_rules():
    """Rendered images are right for their own prompt; both scores of the shapes world say so."""
    scorer, records = ShapesScorer(), shapes.all_prompts()[::7]
    images = np.stack([rendered(record, 1, seed)[0] for seed, record in enumerate(records)])
    verdicts = scorer(torch.from_numpy(images).permute(0, 3, 1, 2), records)
    assert all(one["correct"] and one["graded"] == 1 for one in verdicts)
    swapped = records[1:] + records[:1]
    verdicts = scorer(torch.from_numpy(images).permute(0, 3, 1, 2), swapped)
    strict = [shapes.strict_score(shapes.detect(image), record) == 1 for image, record in zip(images, swapped)]
    # GenEval's rules overlook surplus objects, the strict score does not; nothing else differs
    assert all(one["correct"] or not right for one, right in zip(verdicts, strict))
    disagreeing = [i for i, one in enumerate(verdicts) if one["correct"] != strict[i]]
    assert all(sum(map(len, verdicts[i]["details"].values())) > sum(g["count"] for g in swapped[i]["include"])
               for i in disagreeing) and sum(one["correct"] for one in verdicts) < 15
    with pytest.raises(ValueError, match="64 x 64 px, not 32 x 64"):
        scorer(torch.zeros(1, 3, 64, 32, dtype=torch.uint8), [records[0]])


# ---- the prompts -----------------------------------------------------------------------------------------------------

def test_prompts_are_genevals_byte_for_byte(tmp_path):
    write_prompts(tmp_path / "new")
    for name, digest in SHA256.items():
        assert hashlib.sha256((tmp_path / "new" / name).read_bytes()).hexdigest() == digest
    assert SHA256 == {
        "evaluation_metadata.jsonl": "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        "generation_prompts.txt": "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"}
    records = make_records()
    assert len(records) == 553 and not [record for record in records if record_problem(record)]


def test_prompts_command(tmp_path, capsys):
    prompts.main([str(tmp_path / "a" / "b")])
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == set(SHA256)
    assert "wrote evaluation_metadata.jsonl" in capsys.readouterr().out
    for words in ([], ["--help"], ["a", "b"]):
        with pytest.raises(ValueError, match="usage: python -m benchmark.geneval.prompts OUT_DIR"):
            prompts.main(words)


def test_another_numpys_prompts_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "SEED", 44)
    with pytest.raises(ValueError, match="would differ from GenEval's"):
        write_prompts(tmp_path / "new")
    assert not (tmp_path / "new").exists()
