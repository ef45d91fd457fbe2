"""Mask2Former against mmdet 2.28.2's numbers (golden/rewards/mask2former_small.json), and what mmdet does around it.

The golden case builds a model of 43 M weights from named pseudo-weights: half of this file's time.
"""
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Mask2FormerForUniversalSegmentation

from reward_utils import mask2former
from reward_utils.mask2former import (
    check_complete,
    config_of,
    convert,
    load_mask2former,
    mask_boxes,
    postprocess,
    preprocess,
    reorder_patches,
    resize_like_opencv,
)
from tests.tiny_geneval import MASK2FORMER as GOLDEN
from tests.tiny_geneval import RULE, SHRINK, mmdet_state, write_mmdet


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost seconds where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny detector through the loader of mmdet's files, with varied classes and scores."""
    path = tmp_path_factory.mktemp("mmdet") / "tiny.pth"
    torch.save({"state_dict": mmdet_state(SHRINK), "meta": {}}, path)
    return load_mask2former(path)


def noise(count, height, width, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (count, 3, height, width)).astype(np.uint8))


# ---- mmdet's numbers -------------------------------------------------------------------------------------------------

def test_logits_and_detections_are_mmdets(tmp_path):
    path = tmp_path / "mask2former.pth"
    torch.save({"state_dict": mmdet_state(), "meta": {"mmdet_version": "2.28.2"}}, path)
    detector = load_mask2former(path)
    assert not detector.is_geneval  # two blocks a stage, 20 queries
    pixels = torch.from_numpy(RULE.gauss("m2f/x", 1, 3, 64, 96))
    with torch.no_grad():
        output = detector.model.double()(pixel_values=pixels)
    classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
    for name, logits in (("cls", classes), ("mask", masks)):
        assert logits.flatten()[:6].tolist() == pytest.approx(GOLDEN[f"{name}_first"], abs=1e-6)
        assert [logits.mean().item(), logits.std().item()] == pytest.approx(
            [GOLDEN[f"{name}_mean"], GOLDEN[f"{name}_std"]], abs=1e-6)
    found = postprocess(classes, masks, ((64, 96), (64, 96), (48, 72)), max_instances=20)
    top = found.scores.argsort(descending=True)[:10]
    rows = torch.cat([found.labels[top, None].double(), found.boxes[top], found.scores[top, None]], 1)
    assert rows.tolist() == [pytest.approx(row, abs=1e-6) for row in GOLDEN["dets"]]


@pytest.mark.parametrize("old, new, checksum", [
    ((64, 64), (100, 100), 3789325877), ((50, 90), (37, 66), 1480405978), ((120, 80), (60, 40), 3668109239),
    ((31, 47), (40, 61), 1441064577)])
def test_resizing_is_opencvs_bit_by_bit(old, new, checksum):
    """Checksums of cv2.resize's INTER_LINEAR (opencv-python-headless 4.11) on the same pixels."""
    image = np.random.RandomState(old[0]).randint(0, 256, (*old, 3)).astype(np.uint8)
    resized = resize_like_opencv(torch.from_numpy(image).permute(2, 0, 1)[None], *new)
    assert zlib.crc32(np.ascontiguousarray(resized[0].permute(1, 2, 0)).tobytes()) == checksum


# ---- around the model ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, resized, padded", [
    ((256, 256), (800, 800), (800, 800)), ((300, 500), (800, 1333), (800, 1344)),
    ((200, 500), (533, 1333), (544, 1344)), ((1600, 1200), (1067, 800), (1088, 800)),
    ((900, 700), (1029, 800), (1056, 800))])
def test_images_fit_800_by_1333_and_are_padded_with_grey(size, resized, padded):
    pixels, inner = preprocess(torch.full((1, 3, *size), 200, dtype=torch.uint8))
    assert inner == resized and tuple(pixels.shape) == (1, 3, *padded) and pixels.dtype == torch.float32
    mean, std = torch.tensor(mask2former.MEAN), torch.tensor(mask2former.STD)
    assert torch.allclose(pixels[0, :, 0, 0], (200 - mean) / std)
    assert padded == resized or torch.allclose(pixels[0, :, -1, -1], (128 - mean) / std)


def naive_detections(class_logits, mask_logits, network, resized, original):
    """mmdet's steps with loops: {(query, label): (box, score, mask)}."""
    scores = class_logits.softmax(-1)[:, :-1]
    ranked = sorted(((scores[q, c].item(), q, c) for q in range(scores.shape[0]) for c in range(scores.shape[1])),
                    reverse=True)[:mask2former.MAX_INSTANCES]
    found = {}
    for score, query, label in ranked:
        logits = F.interpolate(mask_logits[None, query: query + 1], network, mode="bilinear")
        logits = F.interpolate(logits[..., :resized[0], :resized[1]], original, mode="bilinear")[0, 0]
        mask = logits > 0
        rows, columns = np.nonzero(mask.numpy())
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
        mask_score = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        found[query, label] = (box, score * mask_score.item(), mask)
    return found


def test_postprocessing_cuts_the_padding_and_weighs_by_the_mask():
    generator = torch.Generator().manual_seed(0)
    class_logits = 2 * torch.randn(7, 6, generator=generator)
    mask_logits = torch.randn(7, 16, 24, generator=generator) - torch.tensor([0, 1, 2, 0, 9, 1, 0])[:, None, None]
    sizes = ((64, 96), (50, 90), (25, 40))
    naive = naive_detections(class_logits, mask_logits, *sizes)
    found = postprocess(class_logits, mask_logits, sizes)
    assert len(found.labels) == len(naive) == 35 and found.masks.shape == (35, 25, 40)
    expected = sorted((label, *box, round(score, 6)) for (_, label), (box, score, _) in naive.items())
    rows = zip(found.labels.tolist(), found.boxes.tolist(), found.scores.tolist())
    assert sorted((label, *map(int, box), round(score, 6)) for label, box, score in rows) == expected
    areas = sorted(mask.sum().item() for _, _, mask in naive.values())
    assert sorted(found.masks.flatten(1).sum(1).tolist()) == areas and areas[0] == 0  # an empty mask is among them

    few = postprocess(class_logits, mask_logits, sizes, min_score=0.3)
    kept = [i for i in range(35) if found.scores[i] > 0.3]
    passing = [i for i in range(len(few.scores)) if few.scores[i] > 0.3]
    assert 0 < len(kept) < len(few.scores) + 1 <= 35 and torch.equal(few.masks[passing], found.masks[kept])
    assert torch.equal(few.scores[passing], found.scores[kept])
    none = postprocess(class_logits, mask_logits, sizes, min_score=1.0)
    assert [tuple(part.shape) for part in none] == [(0,), (0, 4), (0,), (0, 25, 40)]


def test_boxes_of_masks():
    masks = torch.zeros(3, 5, 6, dtype=torch.bool)
    masks[0, 1, 2] = masks[0, 3, 4] = masks[1] = True
    assert mask_boxes(masks).tolist() == [[2, 1, 5, 4], [0, 0, 6, 5], [0, 0, 0, 0]]


def test_a_batch_equals_its_images(tiny, monkeypatch):
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 96)
    monkeypatch.setattr(mask2former, "BATCH_SIZE", 2)
    images = noise(3, 40, 56)
    together = tiny(images)
    assert len(together) == 3 and not torch.equal(together[0].scores, together[1].scores)
    for image, found in zip(images, together):
        alone = tiny(image[None])[0]
        assert torch.allclose(alone.scores, found.scores, atol=1e-6) and alone.masks.shape[1:] == (40, 56)
        assert (alone.masks != found.masks).float().mean() < 1e-3


# ---- loading ---------------------------------------------------------------------------------------------------------

def test_patch_merging_is_reordered():
    """mmdet unfolds (channel, row, column), transformers concatenates columns of (row, channel)."""
    patch = torch.arange(8.0).view(2, 2, 2)  # [channel, row, column]
    mmdet, other = patch.flatten(), torch.cat([patch[:, row, column] for column in (0, 1) for row in (0, 1)])
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(reorder_patches(weight) @ other, weight @ mmdet)
    assert torch.equal(reorder_patches(mmdet), other)


def test_every_weight_is_converted():
    state = mmdet_state(SHRINK)
    converted = convert(state)
    numbers = sum(value.numel() for key, value in state.items() if not key.endswith("relative_position_index"))
    assert sum(value.numel() for value in converted.values()) == numbers
    assert not [key for key in converted if not key.startswith(("model.", "class_predictor."))]


def test_the_size_is_read_from_the_weights(tmp_path):
    config = config_of(mmdet_state(SHRINK), tmp_path)
    swin = config.backbone_config
    assert (list(swin.depths), list(swin.num_heads)) == ([2] * 4, [3, 6, 12, 24])
    assert (swin.embed_dim, swin.window_size, config.num_queries, config.num_attention_heads) == (12, 7, 20, 8)
    assert (config.encoder_layers, config.decoder_layers) == (2, 4)
    assert (config.hidden_dim, config.dim_feedforward, config.encoder_feedforward_dim) == (32, 256, 128)


def test_hub_folders_load_too_and_are_told_apart(tmp_path, tiny):
    tiny.model.save_pretrained(tmp_path / "hub")  # writes the names that the hub's files have
    from_hub = load_mask2former(tmp_path / "hub")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [model(pixel_values=pixels).masks_queries_logits for model in (from_hub.model, tiny.model)]
    assert torch.equal(*outputs) and from_hub.name == "hub" and not from_hub.is_geneval


def test_genevals_detector_is_known_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(mask2former, "SWIN_SMALL", ([2] * 4, 12, 20))
    assert load_mask2former(write_mmdet(tmp_path / "a.pth")).is_geneval


def broken(change):
    state = mmdet_state(SHRINK)
    change(state)
    return state


@pytest.mark.parametrize("content, words", [
    (lambda: broken(lambda s: s.pop("panoptic_head.mask_embed.2.bias")), ["without", "mask_embedder.1.0.bias"]),
    (lambda: broken(lambda s: s.update({"bbox_head.weight": torch.zeros(2)})), ["unknown bbox_head.weight"]),
    (lambda: broken(lambda s: s.update({"panoptic_head.query_embed.weight": torch.zeros(3, 32)})), ["another shape"]),
    (lambda: broken(lambda s: s.update({"panoptic_head.cls_embed.bias": torch.zeros(134)})), ["133 classes"]),
    (lambda: broken(lambda s: s.pop("panoptic_head.query_feat.weight")), ["no tensor", "query_feat"]),
    (lambda: {"a": 1}, ["no state dict"]),
    (lambda: Mask2FormerForUniversalSegmentation, ["refused"]),
])
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "other.pth"
    torch.save(content(), path)
    with pytest.raises(ValueError) as error:
        load_mask2former(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config, words", [(None, "config.json"), ('{"model_type": "clip"}', "type clip"),
                                           ("{", "config.json")])
def test_other_folders_are_refused(tmp_path, config, words):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=words):
        load_mask2former(tmp_path)


def test_a_renamed_weight_is_named(tmp_path):
    info = {"missing_keys": {"model.new_name.weight", "criterion.empty_weight"},
            "unexpected_keys": {"model.old.weight"}, "mismatched_keys": set()}
    with pytest.raises(ValueError, match="without model.new_name.weight .1 in all.; with unknown model.old.weight"):
        check_complete(info, tmp_path)
    check_complete({"missing_keys": {"criterion.empty_weight"}, "unexpected_keys": set(), "mismatched_keys": set()},
                   tmp_path)
