"""The shapes world: scenes keep its rules, the detector reads what is rendered, captions and scores are exact."""
import hashlib
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import ndimage

from dataset.shapes import (
    CLASS_NAMES,
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    TASKS,
    Detection,
    Scene,
    SceneObject,
    all_prompts,
    class_condition,
    detect,
    graded_score,
    parse_caption,
    prompt_condition,
    quality_score,
    render,
    sample_record,
    sample_scene,
    split_prompts,
    strict_score,
)
from dataset.shapes import scene as world
from dataset.shapes.captions import SPLIT_TASKS

NUM_SCENES = 600


@pytest.fixture(scope="module")
def scenes():
    """[(record, scene)], 100 of each task."""
    rng = np.random.default_rng(0)
    by_task = {task: [record for record in all_prompts() if record["tag"] == task] for task in TASKS}
    records = [by_task[task][rng.integers(len(by_task[task]))] for task in TASKS for _ in range(NUM_SCENES // 6)]
    return [(record, sample_scene(record, rng)) for record in records]


def strict_rate(pairs, spoil=lambda image: image):
    return np.mean([strict_score(detect(spoil(render(scene))), record) for record, scene in pairs])


def found(shape, color, x, y):
    return Detection(shape, color, x, y, area=250, score=0.97)


def test_scenes_keep_lattice_radii_gaps_and_border(scenes):
    for _, scene in scenes:
        for item in scene.objects:
            assert item.x % world.POSITION_LATTICE == 0 and item.y % world.POSITION_LATTICE == 0
            assert item.radius in world.RADII[len(scene.objects)]
            assert min(item.x, item.y, IMAGE_SIZE - item.x, IMAGE_SIZE - item.y) >= item.radius + world.EDGE_MARGIN
        for a, b in combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + world.MIN_GAP


def test_scenes_hold_exactly_the_named_objects(scenes):
    for record, scene in scenes:
        wanted = world.wanted_objects(record)
        assert [item.shape for item in scene.objects] == [shape for shape, _ in wanted]
        assert all(color in (None, item.color) for item, (_, color) in zip(scene.objects, wanted))


def test_position_scenes_are_clear_in_the_named_direction_only(scenes):
    for record, scene in scenes:
        for index, relation, reference in world.wanted_relations(record):
            item, other = scene.objects[index], scene.objects[reference]
            dx, dy = item.x - other.x, item.y - other.y
            along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
            assert along >= 19 and along >= 2 * min(abs(dx), abs(dy))


def test_free_attributes_use_the_whole_range(scenes):
    assert {scene.background for _, scene in scenes} == set(range(len(world.BACKGROUNDS)))
    free = [scene.objects[0] for record, scene in scenes if record["tag"] == "single_object"]
    assert {item.color for item in free} == set(COLORS)
    assert {item.radius for item in free} == set(world.RADII[1])
    assert len({(item.x, item.y) for item in free}) > 40


def test_scenes_depend_on_the_seed_alone():
    def images(seed):
        rng = np.random.default_rng(seed)
        return np.stack([render(sample_scene(sample_record(rng), rng)) for _ in range(8)])
    assert np.array_equal(images(3), images(3))
    assert not np.array_equal(images(3), images(4))


def test_sampling_ends_when_no_draw_fits(monkeypatch):
    monkeypatch.setattr(world, "layouts_valid", lambda centres, radii, relations: np.zeros(len(centres), bool))
    rng = np.random.default_rng(0)
    pairs = [(record, sample_scene(record, rng)) for record in all_prompts()[:120]]   # all tasks, all counts
    assert {record["tag"] for record, _ in pairs} == set(TASKS)
    assert strict_rate(pairs) == 1


def test_five_objects_are_refused():
    with pytest.raises(ValueError, match="5 objects"):
        sample_scene({"include": [{"class": "star", "count": 5}]}, np.random.default_rng(0))


def test_renderer_draws_the_scene_with_soft_edges():
    image = render(Scene((SceneObject("circle", "blue", 20.0, 40.0, 10.5),), background=1))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert tuple(image[40, 20]) == world.PALETTE["blue"]
    assert np.abs(image[5, 60].astype(int) - world.BACKGROUNDS[1]).max() <= 3
    reds, tint_red = image[27:53, 7:33, 0].astype(float), float(image[40, 60, 0])
    blue_share = (reds - tint_red) / (world.PALETTE["blue"][0] - tint_red)
    assert blue_share.sum() == pytest.approx(np.pi * 10.5 ** 2, rel=0.03)
    assert ((blue_share > 0.2) & (blue_share < 0.8)).sum() > 20   # antialiased rim


def test_renderer_cuts_shapes_at_the_border():
    image = render(Scene((SceneObject("square", "red", 2.0, 62.0, 10.5),), background=0))
    assert tuple(image[63, 0]) == world.PALETTE["red"]


def test_rendered_scenes_are_read_back_exactly(scenes):
    assert strict_rate(scenes) >= 0.99
    for _, scene in scenes[:60]:
        for item in scene.objects:
            nearest = min(detect(render(scene)), key=lambda hit: abs(hit.x - item.x) + abs(hit.y - item.y))
            assert (nearest.shape, nearest.color) == (item.shape, item.color)
            assert abs(nearest.x - item.x) <= 1 and abs(nearest.y - item.y) <= 2.5   # a star's box is off by its points


def test_every_class_is_read_back_at_every_size_and_tint():
    for class_id, name in enumerate(CLASS_NAMES):
        condition = class_condition(class_id)
        color, shape = name.split()
        for radius in world.RADII[1] + world.RADII[4]:
            for tint in range(len(world.BACKGROUNDS)):
                image = render(Scene((SceneObject(shape, color, 32.0, 28.0, radius),), tint))
                assert strict_score(detect(image), condition.metadata) == 1, (name, radius, tint)


def test_detector_stands_blur_and_noise(scenes):
    rng = np.random.default_rng(1)

    def spoil(image):
        soft = ndimage.gaussian_filter(image.astype(float), (0.9, 0.9, 0)) + rng.normal(0, 6, image.shape)
        return np.clip(soft, 0, 255).astype(np.uint8)
    assert strict_rate(scenes[::3], spoil) >= 0.97


def test_detector_reports_pieces_that_are_no_shape():
    background = np.full((64, 64, 3), 215, np.uint8)
    assert detect(background) == []
    bar, full, dust = background.copy(), np.full_like(background, 0), background.copy()
    bar[10:14, 5:55] = world.PALETTE["red"]
    dust[20:22, 20:22] = 0
    assert [(hit.shape, hit.color) for hit in detect(bar)] == [(None, "red")]
    assert [(hit.shape, hit.score) for hit in detect(full)] == [(None, 0.0)]
    assert detect(dust) == []


def test_detector_refuses_float_images():
    with pytest.raises(ValueError, match="uint8"):
        detect(np.zeros((64, 64, 3), np.float32))


def test_captions_are_distinct_and_parse_back():
    records = all_prompts()
    assert Counter(record["tag"] for record in records) == dict(
        single_object=4, two_object=12, counting=12, colors=32, position=48, color_attr=672)
    assert len({record["prompt"] for record in records}) == len(records)
    assert all(parse_caption(record["prompt"]) == record for record in records)


def test_captions_follow_geneval():
    record = parse_caption("a photo of a square left of a star")
    assert record == {"tag": "position", "prompt": "a photo of a square left of a star", "include": [
        {"class": "star", "count": 1}, {"class": "square", "count": 1, "position": ["left of", 0]}]}
    record = parse_caption("a photo of an orange star and a blue circle")
    assert record["include"] == [{"class": "star", "count": 1, "color": "orange"},
                                 {"class": "circle", "count": 1, "color": "blue"}]
    record = parse_caption("a photo of three circles")
    assert record["include"] == [{"class": "circle", "count": 3}]
    assert record["exclude"] == [{"class": "circle", "count": 4}]


@pytest.mark.parametrize("caption", ["a photo of a dog", "a photo of five stars", "a photo of a orange star", ""])
def test_foreign_captions_are_named(caption):
    with pytest.raises(ValueError, match=repr(caption)):
        parse_caption(caption)


def test_class_conditions():
    assert len(CLASS_NAMES) == 32 and CLASS_NAMES[SHAPES.index("star") * 8 + COLORS.index("pink")] == "pink star"
    condition = class_condition(0)
    assert (condition.prompt, condition.class_id) == ("a photo of red circle", 0)
    assert parse_caption(condition.prompt) == condition.metadata
    assert condition.metadata["include"] == parse_caption("a photo of a red circle")["include"]
    with pytest.raises(ValueError, match="class 32"):
        class_condition(32)
    record = all_prompts()[0]
    assert prompt_condition(record).metadata == record and prompt_condition(record).class_id is None


def test_split_holds_out_a_fifth_by_meaning():
    train, test = split_prompts("train"), split_prompts("test")
    for task in TASKS:
        both, held, everything = ({record["prompt"] for record in records if record["tag"] == task}
                                  for records in (train, test, all_prompts()))
        if task in SPLIT_TASKS:
            assert both | held == everything and not both & held
            assert 0.15 < len(held) / len(everything) < 0.25
        else:
            assert both == held == everything
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    held = {record["prompt"] for record in test}
    for record in test:
        if record["tag"] == "position":
            reference, item = record["include"]
            relation = mirrored[item["position"][0]]
            assert f"a photo of a {reference['class']} {relation} a {item['class']}" in held


def test_split_is_stable_and_seeded():
    digest = hashlib.sha256("\n".join(record["prompt"] for record in split_prompts("test")).encode()).hexdigest()
    assert digest == "a2814f405916cdc8d60d3b374981c9660eeff1fed866d3c932f15ec6986542d5", "held-out prompts moved"
    assert split_prompts("test", seed=1) != split_prompts("test")
    with pytest.raises(ValueError, match="'val'"):
        split_prompts("val")


def test_sample_record_is_uniform_over_tasks_and_keeps_to_its_split():
    rng = np.random.default_rng(0)
    drawn = [sample_record(rng, "test") for _ in range(600)]
    assert min(Counter(record["tag"] for record in drawn).values()) > 60
    assert {record["prompt"] for record in drawn} <= {record["prompt"] for record in split_prompts("test")}


def test_scores_of_a_colored_object():
    record = parse_caption("a photo of a red circle")
    right = [found("circle", "red", 30, 30)]
    wrong_color, wrong_both = [found("circle", "blue", 30, 30)], [found("star", "blue", 30, 30)]
    assert strict_score(right, record) == graded_score(right, record) == 1
    assert strict_score(wrong_color, record) == 0
    assert 1 > graded_score(wrong_color, record) > graded_score(wrong_both, record) > graded_score([], record) == 0
    doubled = right + [found("circle", "red", 50, 50)]
    assert strict_score(doubled, record) == 0 and graded_score(doubled, record) == 0.5
    speckled = right + [Detection(None, "red", 5, 5, 20, 0.0)]
    assert strict_score(speckled, record) == 0 and graded_score(speckled, record) == 0.5


def test_scores_of_counting_fall_on_both_sides():
    record = parse_caption("a photo of three stars")
    graded = [graded_score([found("star", "red", 10 * i, 10) for i in range(n)], record) for n in range(6)]
    strict = [strict_score([found("star", "red", 10 * i, 10) for i in range(n)], record) for n in range(6)]
    assert strict == [0, 0, 0, 1, 0, 0]
    assert graded[0] == 0 and graded[:4] == sorted(set(graded[:4])) and graded[3] == 1 > graded[4] > graded[5]


def test_scores_of_color_attribution_use_the_best_assignment():
    record = parse_caption("a photo of a red circle and a blue square")
    right = [found("square", "blue", 10, 10), found("circle", "red", 50, 50)]
    swapped = [found("square", "red", 10, 10), found("circle", "blue", 50, 50)]
    assert strict_score(right, record) == 1 and strict_score(swapped, record) == 0
    assert graded_score(swapped, record) < graded_score([right[0], swapped[1]], record) < 1


def test_scores_of_a_relation():
    record = parse_caption("a photo of a square left of a star")
    right = [found("star", "red", 50, 30), found("square", "blue", 14, 34)]
    swapped = [replace(right[0], x=14.0), replace(right[1], x=50.0)]
    stacked = [replace(right[0], x=30.0, y=10.0), replace(right[1], x=28.0, y=50.0)]
    assert strict_score(right, record) == 1
    assert strict_score(swapped, record) == strict_score(stacked, record) == 0
    assert 1 > graded_score(swapped, record) > graded_score(swapped[:1], record) > 0


def test_blank_and_filled_images_earn_nothing():
    for image in (np.full((64, 64, 3), 215, np.uint8), np.full((64, 64, 3), (215, 35, 35), np.uint8)):
        hits = detect(image)
        assert quality_score(hits) == 0
        assert max(graded_score(hits, record) for record in all_prompts()) == 0


def test_graded_is_one_exactly_when_strict_is(scenes):
    records = [record for record, _ in scenes]
    for (_, scene), record in zip(scenes, records[7:] + records[:7]):   # mostly foreign records
        hits = detect(render(scene))
        graded, strict = graded_score(hits, record), strict_score(hits, record)
        assert 0 <= graded <= 1 and (graded == 1) == (strict == 1)


def test_quality_is_high_for_shapes_and_falls_with_malformed_pieces(scenes):
    assert np.mean([quality_score(detect(render(scene))) for _, scene in scenes[::5]]) > 0.9
    good = found("star", "red", 20, 20)
    assert quality_score([good]) == 1
    assert quality_score([good, Detection(None, "red", 50, 50, 90, 0.55)]) == 0.5
