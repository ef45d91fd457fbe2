"""The shapes world's rules: its vocabulary, its tunable constants, scenes, and random scenes that obey a record.

A scene is 1-4 upright coloured shapes on a flat light tint. Everything that costs a tokenizer or a GPT information
(tints, radii, positions) is drawn from a small discrete set, named here and nowhere else. Left out: rotation, overlap,
colour jitter (pixels are a deterministic function of the scene).
"""
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "star")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
CLASS_NAMES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # unit (x, y), y points down

# Tunable: entropy of an image = log2(tints) + per object log2(radii * positions) + the colours left free.
# Every colour keeps chroma (max - min) >= 0.45 or, black, max <= 0.1; every tint keeps chroma <= 0.1 and min >= 0.74:
# the detector separates them at CHROMA_MIN and DARK_MAX with room for blur on both sides.
PALETTE = {"red": (215, 35, 35), "orange": (245, 135, 20), "yellow": (245, 215, 40), "green": (30, 160, 50),
           "blue": (40, 85, 215), "purple": (135, 45, 175), "pink": (245, 125, 190), "black": (25, 25, 25)}
BACKGROUNDS = ((228, 222, 212), (205, 217, 228), (208, 224, 211), (219, 211, 228), (229, 212, 212), (201, 203, 207))
POSITION_LATTICE = 4         # px between allowed object centres; divides the tokenizer's stride of 8: few patch phases
RADII = {1: (10.5, 13.5), 2: (8.5, 10.5), 3: (8.5,), 4: (8.5,)}   # px, half the bounding box, by objects in the scene
MIN_GAP = 3                  # px between bounding boxes, so that blurred neighbours don't merge
EDGE_MARGIN = 1              # px between a bounding box and the image border

ROUNDS = 40                  # bounded rejection: ROUNDS x DRAWS layouts, then the fixed one
DRAWS = 256                  # of four objects about 1 layout in 50 is free of overlap
FIXED_LAYOUTS = {1: ((32, 32),), 2: ((16, 32), (48, 32)), 3: ((16, 16), (48, 16), (32, 48)),
                 4: ((16, 16), (48, 16), (16, 48), (48, 48))}


@dataclass(frozen=True)
class SceneObject:
    """One upright shape; (x, y) is its bounding box's centre in px from the top left corner, radius half the box."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: int          # index into BACKGROUNDS


def wanted_objects(record):
    """The record's objects one by one, in include order: [(shape, color or None)]."""
    return [(group["class"], group.get("color")) for group in record["include"] for _ in range(group["count"])]


def wanted_relations(record):
    """[(object's include index, relation, reference's include index)]."""
    return [(index, *group["position"]) for index, group in enumerate(record["include"]) if "position" in group]


def sample_scene(record, rng):
    """A random scene with exactly the record's objects; free colours, radii, positions and tint are uniform."""
    wanted = wanted_objects(record)
    if len(wanted) not in RADII:
        raise ValueError(f"record {record.get('prompt')!r} has {len(wanted)} objects; scenes hold 1 to {max(RADII)}")
    radii = rng.choice(RADII[len(wanted)], size=len(wanted))
    centres = sample_centres(radii, wanted_relations(record), rng)
    colors = [color or COLORS[rng.integers(len(COLORS))] for _, color in wanted]
    objects = tuple(SceneObject(shape, color, float(x), float(y), float(radius))
                    for (shape, _), color, (x, y), radius in zip(wanted, colors, centres, radii))
    return Scene(objects, int(rng.integers(len(BACKGROUNDS))))


def sample_centres(radii, relations, rng):
    """Uniform over the lattice layouts that leave all gaps and hold all relations: [n, 2] (x, y)."""
    low = np.ceil((radii + EDGE_MARGIN) / POSITION_LATTICE).astype(int)    # [n]
    high = IMAGE_SIZE // POSITION_LATTICE - low
    draws = 8 if len(radii) == 1 else DRAWS
    for _ in range(ROUNDS):
        centres = POSITION_LATTICE * rng.integers(low[:, None], high[:, None] + 1, size=(draws, len(radii), 2))
        valid = np.flatnonzero(layouts_valid(centres, radii, relations))
        if len(valid):
            return centres[valid[0]]   # [n, 2]
    return fixed_centres(len(radii), relations)


def layouts_valid(centres, radii, relations):
    """Which of the layouts [B, n, 2] keep MIN_GAP between all boxes and hold the relations clearly: bool [B]."""
    valid = np.ones(len(centres), bool)
    for i in range(len(radii)):
        for j in range(i):
            apart = np.abs(centres[:, i] - centres[:, j]).max(axis=1)   # [B]
            valid &= apart >= radii[i] + radii[j] + MIN_GAP
    for index, relation, reference in relations:
        direction = np.array(RELATIONS[relation])
        offset = centres[:, index] - centres[:, reference]   # [B, 2]
        along, across = offset @ direction, np.abs(offset @ direction[::-1])
        valid &= (along >= radii[index] + radii[reference] + MIN_GAP) & (2 * across <= along)
    return valid


def fixed_centres(num_objects, relations):
    """The layout of last resort, so that sampling always ends."""
    if not relations:
        return np.array(FIXED_LAYOUTS[num_objects])
    assert num_objects == 2 and len(relations) == 1, f"no fixed layout for {num_objects} objects with {relations}"
    index, relation, _ = relations[0]
    step = 16 * np.array(RELATIONS[relation])
    return IMAGE_SIZE // 2 + np.stack([step, -step] if index == 0 else [-step, step])
