"""How well detections answer a record: strict (0 or 1), graded (partial credit), and quality (whatever the prompt).

Stricter than GenEval: extra and malformed objects count against the image, so neither empty nor filled canvases pay.
Left out: any look at the pixels; everything comes from the detector.
"""
import numpy as np
from scipy.optimize import linear_sum_assignment

from dataset.shapes.scene import RELATIONS, wanted_objects, wanted_relations

# Points of the graded score. A well-formed object alone earns little; a relation weighs as much as two shapes.
WELL_FORMED, SHAPE, COLOR, RELATION = 1, 2, 2, 4
QUALITY_RANGE = (0.6, 0.94)  # best-template IoU of a shapeless blob, and of a cleanly rendered shape


def strict_score(detections, record):
    """1.0 if the image shows exactly what the record asks for, else 0.0."""
    return float(graded_score(detections, record) == 1)


def graded_score(detections, record):
    """Share of the points earned by the best assignment of objects, scaled down by surplus pieces: float in [0, 1]."""
    wanted = wanted_objects(record)
    relations = wanted_relations(record)
    possible = sum(_points(shape, color, shape, color) for shape, color in wanted) + RELATION * len(relations)
    formed = [item for item in detections if item.shape is not None]
    if not formed:
        return 0.0
    points = np.array([[_points(*slot, item.shape, item.color) for item in formed] for slot in wanted])
    earned = points[linear_sum_assignment(points, maximize=True)].sum()
    earned += RELATION * sum(_relation_shown(formed, record["include"], *relation) for relation in relations)
    return float(earned / possible) * len(wanted) / max(len(wanted), len(detections))


def quality_score(detections):
    """Well-formedness: mean over all pieces of the best-template IoU, rescaled to [0, 1]; 0 for an empty image."""
    if not detections:
        return 0.0
    low, high = QUALITY_RANGE
    return float(np.mean([np.clip((item.score - low) / (high - low), 0, 1) for item in detections]))


def relation_holds(relation, item, reference):
    """GenEval's rule: the offset, less a tenth of both sizes, is more than half the distance in that direction."""
    offset = np.array([item.x - reference.x, item.y - reference.y])
    margin = 0.1 * (np.sqrt(item.area) + np.sqrt(reference.area))   # root of the area for GenEval's box sides
    along = offset @ np.array(RELATIONS[relation])
    return bool(along - margin > 0.5 * np.hypot(*offset))


def _points(wanted_shape, wanted_color, shape, color):
    colored = wanted_color is not None and color == wanted_color
    return WELL_FORMED + SHAPE * (shape == wanted_shape) + COLOR * colored


def _relation_shown(formed, include, index, relation, reference):
    """Whether any two objects of the right shapes (and colours, if named) stand in the relation."""
    items, references = ([found for found in formed if found.shape == include[i]["class"]
                          and include[i].get("color", found.color) == found.color] for i in (index, reference))
    return any(relation_holds(relation, a, b) for a in items for b in references if a is not b)
