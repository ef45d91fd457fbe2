"""Mask2Former's detections as mmdet 2.x makes them (GenEval's detector), with transformers' modules and no mmdet.

    detector = load_mask2former(Path("mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"))
    detector(images)                       # uint8 [N, 3, H, W] -> N x Instances

mmdet's own checkpoint is converted tensor by tensor; a hub folder (facebook/mask2former-swin-small-coco-instance) is
another training run of the same architecture. Resizing, padding and post-processing are mmdet's for both: transformers'
own post-processing lets masks overwrite each other and returns no boxes. Left out: backbones other than Swin.

Legend: N images, Q queries, C classes, K instances, (H, W) the image's size, (h, w) that of the mask logits.
"""
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_utils.pixels import normalize
from reward_utils.weights import load_state
from utils.files import parse_json, read_text

NUM_CLASSES = 80  # COCO's
LONG_SIDE, SHORT_SIDE = 1333, 800  # px; an image is scaled to fit both
SIZE_DIVISOR = 32
PAD_VALUE = 128  # grey level, before normalisation
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # grey levels
BATCH_SIZE = 8  # images in one forward pass at most: SHORT_SIDE px are many
MAX_INSTANCES = 100  # per image
NUM_POINTS = 4  # of deformable attention, per head and level: fixed in both implementations
SWIN_SMALL = ([2, 2, 18, 2], 96, 100)  # depths, width, queries of GenEval's checkpoint
WHAT = "Mask2Former with a Swin backbone for COCO's 80 classes"
COEFFICIENT_BITS = 11  # of OpenCV's fixed-point resize

# mmdet's names -> the hub's (transformers maps those to its own of the day); every row is applied, in this order
RENAMES = [(re.compile(pattern), new) for pattern, new in (
    (r"\.patch_embed\.projection\.", ".embeddings.patch_embeddings.projection."),
    (r"\.patch_embed\.norm\.", ".embeddings.norm."),
    *((rf"^backbone\.norm{i}\.", f"backbone.hidden_states_norms.stage{i + 1}.") for i in range(4)),
    (r"^backbone\.stages\.", "backbone.encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ffn\.layers\.0\.0\.", ".intermediate.dense."),
    (r"\.ffn\.layers\.1\.", ".output.dense."),
    (r"\.attn\.w_msa\.proj\.", ".attention.output.dense."),
    (r"\.attn\.w_msa\.", ".attention.self."),
    (r"\.input_convs\.(\d+)\.conv\.", r".input_projections.\1.0."),
    (r"\.input_convs\.(\d+)\.gn\.", r".input_projections.\1.1."),
    (r"\.lateral_convs\.0\.conv\.", ".adapter_1.0."),
    (r"\.lateral_convs\.0\.gn\.", ".adapter_1.1."),
    (r"\.output_convs\.0\.conv\.", ".layer_1.0."),
    (r"\.output_convs\.0\.gn\.", ".layer_1.1."),
    (r"\.mask_feature\.", ".mask_projection."),
    (r"\.level_encoding\.weight$", ".level_embed"),
    (r"\.ffns\.0\.layers\.0\.0\.", ".fc1."),
    (r"\.ffns\.0\.layers\.1\.", ".fc2."),
    (r"(pixel_decoder\..*)\.norms\.0\.", r"\1.self_attn_layer_norm."),
    (r"(pixel_decoder\..*)\.norms\.1\.", r"\1.final_layer_norm."),
    (r"(pixel_decoder\..*)\.attentions\.0\.", r"\1.self_attn."),
    (r"(transformer_decoder\..*)\.norms\.0\.", r"\1.cross_attn_layer_norm."),
    (r"(transformer_decoder\..*)\.norms\.1\.", r"\1.self_attn_layer_norm."),
    (r"(transformer_decoder\..*)\.norms\.2\.", r"\1.final_layer_norm."),
    (r"\.attentions\.0\.attn\.", ".cross_attn."),
    (r"\.attentions\.1\.attn\.", ".self_attn."),
    (r"\.post_norm\.", ".layernorm."),
    (r"^panoptic_head\.mask_embed\.0\.", "panoptic_head.transformer_decoder.mask_predictor.mask_embedder.0.0."),
    (r"^panoptic_head\.mask_embed\.2\.", "panoptic_head.transformer_decoder.mask_predictor.mask_embedder.1.0."),
    (r"^panoptic_head\.mask_embed\.4\.", "panoptic_head.transformer_decoder.mask_predictor.mask_embedder.2.0."),
    (r"^panoptic_head\.query_embed\.", "model.transformer_module.queries_embedder."),
    (r"^panoptic_head\.query_feat\.", "model.transformer_module.queries_features."),
    (r"^panoptic_head\.level_embed\.", "model.transformer_module.level_embed."),
    (r"^panoptic_head\.cls_embed\.", "class_predictor."),
    (r"^backbone\.", "model.pixel_level_module.encoder."),
    (r"^panoptic_head\.pixel_decoder\.", "model.pixel_level_module.decoder."),
    (r"^panoptic_head\.transformer_decoder\.", "model.transformer_module.decoder."),
)]
PACKED = {".attention.self.qkv.": [f".attention.self.{part}." for part in ("query", "key", "value")],
          ".self_attn.in_proj_": [f".self_attn.{part}_proj." for part in "qkv"]}
# Not mmdet's: an unused norm, a weight of the loss, and what transformers computes
MAY_LACK = ("swin.layernorm.", "encoder.layernorm.", "criterion.empty_weight", "relative_position_index")


class Instances(NamedTuple):
    """What was found in one image, in no order."""

    labels: Tensor  # int64 [K], index of the class
    boxes: Tensor  # float [K, 4]: x1, y1, x2, y2 in px of the image; zeros for an empty mask
    scores: Tensor  # float [K] in [0, 1]
    masks: Tensor  # bool [K, H, W]


class Mask2Former(nn.Module):
    """uint8 [N, 3, H, W] on any device -> N x Instances, on the model's device.

    name: the checkpoint's; is_geneval: whether it has the format and size of the detector that GenEval uses.
    """

    def __init__(self, model: nn.Module, name: str, is_geneval: bool):
        super().__init__()
        self.model, self.name, self.is_geneval = model.eval().requires_grad_(False), name, is_geneval

    @torch.inference_mode()
    def forward(self, images: Tensor, min_score: float = 0.0) -> list[Instances]:
        """Instances that cannot score above `min_score` may be left out, which saves most of the time after the model.

        An image's instances don't depend on its neighbours: all of a batch have one size, so padding is the same.
        """
        parameter = next(self.model.parameters())
        found = []
        for batch in images.split(BATCH_SIZE):
            pixels, resized = preprocess(batch.to(parameter.device))
            # TF32 convolutions move scores that sit near GenEval's thresholds
            with torch.backends.cudnn.flags(allow_tf32=False):
                output = self.model(pixel_values=pixels.to(parameter.dtype))
            sizes = (tuple(pixels.shape[2:]), resized, tuple(images.shape[2:]))
            found += [postprocess(*logits, sizes, min_score)
                      for logits in zip(output.class_queries_logits, output.masks_queries_logits)]
        return found


# ---- before and after the model --------------------------------------------------------------------------------------

def preprocess(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """uint8 [N, 3, H, W] -> (float32 [N, 3, padded height, padded width], (height, width) before padding)."""
    height, width = images.shape[2:]
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    size = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    padding = (0, -size[1] % SIZE_DIVISOR, 0, -size[0] % SIZE_DIVISOR)
    pixels = F.pad(resize_like_opencv(images, *size), padding, value=PAD_VALUE)
    return normalize(pixels.float(), MEAN, STD), size


def resize_like_opencv(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 [N, 3, H, W] -> uint8 [N, 3, height, width], equal to cv2.resize's INTER_LINEAR bit by bit.

    OpenCV weighs bytes with 11-bit integers; torch's and PIL's bilinear differ from it by a level here and there.
    """
    columns, column_weights = (x.to(images.device) for x in _taps(images.shape[3], width, clamp=True))  # each [2, w]
    rows, row_weights = (x.to(images.device) for x in _taps(images.shape[2], height, clamp=False))  # each [2, h]
    pixels = images.int()
    pixels = sum(pixels[:, :, :, columns[i]] * column_weights[i] for i in (0, 1)) >> 4  # [N, 3, H, w]
    pixels = sum(pixels[:, :, rows[i]] * row_weights[i, :, None] >> 16 for i in (0, 1))  # [N, 3, h, w]
    return (pixels + 2 >> 2).to(torch.uint8)


def _taps(old: int, new: int, clamp: bool) -> tuple[Tensor, Tensor]:
    """The two neighbours of each new pixel along one axis, and their integer weights; OpenCV clamps columns only."""
    position = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    low = np.floor(position).astype(np.int64)
    share = position - low.astype(np.float32)
    if clamp:
        share[(low < 0) | (low >= old - 1)] = 0
    weights = np.rint(np.stack([1 - share, share]) * np.float32(2 ** COEFFICIENT_BITS)).astype(np.int32)
    return torch.from_numpy(np.stack([low, low + 1]).clip(0, old - 1)), torch.from_numpy(weights)


def postprocess(class_logits: Tensor, mask_logits: Tensor, sizes: tuple[tuple[int, int], ...], min_score: float = 0.0,
                max_instances: int = MAX_INSTANCES) -> Instances:
    """class_logits [Q, C + 1], mask_logits [Q, h, w] of one image -> Instances.

    sizes: (height, width) of the model's input, of the image in it without padding, and of the image itself.
    """
    network, resized, original = sizes
    class_scores = class_logits.softmax(-1)[:, :-1]  # [Q, C]
    scores, index = class_scores.flatten().topk(min(max_instances, class_scores.numel()))  # [K]
    # a mask's own score is below 1, so these are all that can pass
    scores, index = scores[scores > min_score], index[scores > min_score]
    labels, queries = index % class_scores.shape[1], index // class_scores.shape[1]
    used, place = queries.unique(return_inverse=True)
    # masks as a batch, not as channels: torch resizes an empty batch
    logits = F.interpolate(mask_logits[used, None], network, mode="bilinear", align_corners=False)
    logits = logits[:, :, :resized[0], :resized[1]]
    logits = F.interpolate(logits, original, mode="bilinear", align_corners=False)[:, 0]  # [used, H, W]
    masks = logits > 0
    areas = masks.flatten(1).sum(1)
    mask_scores = (logits.sigmoid() * masks).flatten(1).sum(1) / (areas + 1e-6)  # [used]
    boxes = mask_boxes(masks).to(scores.dtype)
    return Instances(labels, boxes[place], scores * mask_scores[place], masks[place])


def mask_boxes(masks: Tensor) -> Tensor:
    """bool [K, H, W] -> int64 [K, 4]: x1, y1 and x2, y2 of the first pixel beyond; zeros for an empty mask."""
    ends = []
    for axis in (1, 2):  # over rows: which columns are used; over columns: which rows
        used = masks.any(axis).int()  # [K, W] or [K, H]; argmax takes the first of equal maxima
        ends.append((used.argmax(1), used.shape[1] - used.flip(1).argmax(1)))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], 1) * masks.flatten(1).any(1)[:, None]


# ---- loading ---------------------------------------------------------------------------------------------------------

def load_mask2former(path: Path) -> Mask2Former:
    """mmdet's .pth or a hub folder -> float32 on the CPU; ValueError for anything else, and for other classes."""
    state = None if path.is_dir() else load_state(path, WHAT)
    config = read_config(path) if state is None else config_of(state, path)
    if config.num_labels != NUM_CLASSES:
        raise ValueError(f"{path}: detects {config.num_labels} classes; wanted: {WHAT}")
    model = load_model(path, config, state)
    swin = config.backbone_config
    is_geneval = state is not None and (list(swin.depths), swin.embed_dim, config.num_queries) == SWIN_SMALL
    return Mask2Former(model, path.name, is_geneval)


def read_config(folder: Path):
    from transformers import Mask2FormerConfig

    file = folder / "config.json"
    try:
        model_type = parse_json(read_text(file), str(file))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no hub folder of {WHAT}: its config.json cannot be read ({error})") from error
    if model_type != "mask2former":
        raise ValueError(f"{folder}: holds a model of type {model_type}; wanted: {WHAT}")
    return Mask2FormerConfig.from_pretrained(folder)


def load_model(path: Path, config, state: dict[str, Tensor] | None) -> nn.Module:
    """With the hub folder's weights, or those of an mmdet state dict."""
    from safetensors import SafetensorError
    from transformers import Mask2FormerForUniversalSegmentation

    source, converted = (path, None) if state is None else (None, convert(state))
    try:
        with quiet_transformers():
            model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
                source, config=config, state_dict=converted, output_loading_info=True, dtype=torch.float32,
                local_files_only=True, ignore_mismatched_sizes=True,
                # transformers' own choices, said because a config.json can name compiled code on the hub instead
                attn_implementation={"": "eager", "backbone_config": "sdpa"})
    except pickle.UnpicklingError as error:  # torch's message would advise to run what is in it
        raise ValueError(f"{path}: refused, it is damaged or holds more than tensors (nothing was run)") from error
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, EOFError,
            SafetensorError) as error:
        raise ValueError(f"{path}: cannot be loaded as {WHAT} ({' '.join(str(error).split())[:300]})") from error
    check_complete(info, path)
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its report of missing tensors, which check_complete judges."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_complete(info: dict, path: Path) -> None:
    """ValueError for a weight that is missing, unknown or of another shape: transformers would go on without it."""
    missing = sorted(key for key in info["missing_keys"] if not any(part in key for part in MAY_LACK))
    problems = {"without": missing, "with unknown": sorted(info["unexpected_keys"]),
                "of another shape": sorted(map(str, info["mismatched_keys"]))}
    found = [f"{word} {', '.join(keys[:3])} ({len(keys)} in all)" for word, keys in problems.items() if keys]
    if found:
        import transformers

        raise ValueError(f"{path}: not the weights of {WHAT}: {'; '.join(found)}. If they are, then transformers "
                         f"{transformers.__version__} names its weights in a new way: 5.0 to 5.23 are known to fit")


def config_of(state: dict[str, Tensor], path: Path):
    """transformers' configuration of an mmdet state dict, read from its shapes."""
    from transformers import Mask2FormerConfig, SwinConfig

    def layers(prefix: str) -> int:
        numbers = [int(match[1]) for key in state if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", key))]
        return max(numbers, default=-1) + 1

    decoder, head = "panoptic_head.pixel_decoder", "panoptic_head.transformer_decoder"
    table = "backbone.stages.{}.blocks.0.attn.w_msa.relative_position_bias_table"
    try:
        num_levels, hidden = state["panoptic_head.level_embed.weight"].shape
        points = state[f"{decoder}.encoder.layers.0.attentions.0.sampling_offsets.bias"].numel()
        swin = SwinConfig(
            image_size=224, patch_size=state["backbone.patch_embed.projection.weight"].shape[-1],
            embed_dim=state["backbone.patch_embed.projection.bias"].numel(),
            depths=[layers(f"backbone.stages.{i}.blocks") for i in range(4)],
            num_heads=[state[table.format(i)].shape[1] for i in range(4)],
            window_size=(int(state[table.format(0)].shape[0] ** 0.5) + 1) // 2,
            out_features=["stage1", "stage2", "stage3", "stage4"])
        return Mask2FormerConfig(
            backbone_config=swin, num_labels=state["panoptic_head.cls_embed.bias"].numel() - 1,
            num_queries=len(state["panoptic_head.query_feat.weight"]), hidden_dim=hidden,
            feature_size=hidden, mask_feature_size=state[f"{decoder}.mask_feature.bias"].numel(),
            num_attention_heads=points // (2 * NUM_POINTS * num_levels),
            encoder_layers=layers(f"{decoder}.encoder.layers"), decoder_layers=layers(f"{head}.layers") + 1,
            encoder_feedforward_dim=state[f"{decoder}.encoder.layers.0.ffns.0.layers.0.0.bias"].numel(),
            dim_feedforward=state[f"{head}.layers.0.ffns.0.layers.0.0.bias"].numel())
    except KeyError as error:
        raise ValueError(f"{path}: not the weights of {WHAT}: no tensor {error}") from error


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdet's tensors under the hub's names: projections unpacked, patch merging in the other order of channels."""
    converted = {}
    for key, value in state.items():
        if key.endswith(".relative_position_index"):  # transformers computes it
            continue
        for pattern, new in RENAMES:
            key = pattern.sub(new, key)
        if ".downsample." in key:
            value = reorder_patches(value)
        names = next(([key.replace(packed, part) for part in parts] for packed, parts in PACKED.items()
                      if packed in key), [key])
        converted.update(zip(names, value.chunk(len(names))))
    return converted


def reorder_patches(value: Tensor) -> Tensor:
    """[..., 4C] of mmdet's patch merging (unfold: channel by channel) -> [..., 4C] patch by patch, columns first.

    The shapes are the same either way: nothing but the numbers tells.
    """
    patches = value.unflatten(-1, (-1, 4)).transpose(-1, -2)  # [..., 4, C]
    return patches[..., [0, 2, 1, 3], :].flatten(-2).contiguous()
