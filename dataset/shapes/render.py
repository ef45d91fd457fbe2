"""Scene -> 64x64 RGB pixels, antialiased from signed distances.

Radii and lattice positions are few, so each shape's coverage patch is computed once and blended: about 0.1 ms an image.
Left out: shading, texture, noise: each would cost every background token information.
"""
from functools import lru_cache

import numpy as np

from dataset.shapes.scene import BACKGROUNDS, IMAGE_SIZE, PALETTE

STAR_INNER = 0.48            # inner over outer radius: fat enough for an 8x tokenizer, thin enough to be no circle
SQUARE_SIDE = 0.9            # of the bounding box, so that a square does not outweigh the other shapes


def render(scene):
    """uint8 [64, 64, 3]."""
    image = np.tile(np.array(BACKGROUNDS[scene.background], np.float32), (IMAGE_SIZE, IMAGE_SIZE, 1))   # [H, W, 3]
    for item in scene.objects:
        left, top = int(np.floor(item.x - item.radius)) - 1, int(np.floor(item.y - item.radius)) - 1
        cover = coverage(item.shape, item.radius, item.x - left, item.y - top)   # [h, w]
        rows, cols = slice(max(top, 0), top + cover.shape[0]), slice(max(left, 0), left + cover.shape[1])
        window = image[rows, cols]   # a view; smaller than the patch only where the border cuts the shape
        cover = cover[rows.start - top:, cols.start - left:][:window.shape[0], :window.shape[1], None]
        window += cover * (np.array(PALETTE[item.color], np.float32) - window)
    return np.rint(image).astype(np.uint8)


@lru_cache(maxsize=4096)
def coverage(shape, radius, centre_x, centre_y):
    """Share of each pixel that the shape covers, on a patch just large enough: float32 [h, w]."""
    size = int(np.ceil(max(centre_x, centre_y) + radius)) + 1
    pixels = np.arange(size) + 0.5
    points = np.stack(np.meshgrid(pixels - centre_x, pixels - centre_y), axis=-1)   # [h, w, 2] (x, y)
    distance = np.hypot(points[..., 0], points[..., 1]) - radius if shape == "circle" else \
        _polygon_distance(points, radius * _outline(shape))
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _outline(shape):
    """Corners [K, 2] (x, y), y down, scaled to a bounding box of half side 1 that is centred on the origin."""
    corners, radii = {"square": (4, (1,)), "triangle": (3, (1,)), "star": (10, (1, STAR_INNER))}[shape]
    turn = 2 * np.pi * (np.arange(corners) + (0.5 if shape == "square" else 0)) / corners
    outline = np.tile(radii, corners // len(radii))[:, None] * np.stack([np.sin(turn), -np.cos(turn)], axis=1)
    low, high = outline.min(axis=0), outline.max(axis=0)
    outline = (outline - (low + high) / 2) / ((high - low).max() / 2)
    return outline * (SQUARE_SIDE if shape == "square" else 1)


def _polygon_distance(points, corners):
    """Signed distance to a closed polygon, negative inside: points [h, w, 2], corners [K, 2] -> [h, w]."""
    start = corners[:, None, None]                          # [K, 1, 1, 2]
    edge = np.roll(corners, -1, axis=0)[:, None, None] - start
    to_point = points - start                               # [K, h, w, 2]
    along = np.clip((to_point * edge).sum(-1) / (edge ** 2).sum(-1), 0, 1)
    distance = np.linalg.norm(to_point - along[..., None] * edge, axis=-1).min(axis=0)   # [h, w]
    # Even-odd rule: a ray to the right crosses the outline an odd number of times from inside.
    spans = (to_point[..., 1] < 0) != (to_point[..., 1] < edge[..., 1])
    rise = np.where(edge[..., 1] == 0, 1, edge[..., 1])     # a level edge spans nothing: any divisor will do
    right = to_point[..., 0] < to_point[..., 1] / rise * edge[..., 0]
    inside = (spans & right).sum(axis=0) % 2 == 1
    return np.where(inside, -distance, distance)
