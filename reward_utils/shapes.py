"""Scores of the shapes world, from its exact detector: one detection per image, whatever scores are asked."""
import numpy as np
from torch import Tensor

from dataset import shapes

# name -> score of (detections, record); see dataset/shapes/scores.py
SHAPES_SCORES = {
    "graded": shapes.graded_score,
    "strict": shapes.strict_score,
    "quality": lambda detections, record: shapes.quality_score(detections),
}


def score_shapes(names: list[str], images: Tensor, prompts: list[str], metadata: list[dict]) -> dict[str, np.ndarray]:
    """images uint8 [N, 3, 64, 64] -> {"shapes_NAME": float32 [N]} in [0, 1].

    What the image should show comes from its GenEval record, or from the prompt where there is none; a prompt that is
    no caption of the shapes world is a ValueError.
    """
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    scores = np.empty((len(names), len(pixels)), dtype=np.float32)
    for i, (image, prompt, record) in enumerate(zip(pixels, prompts, metadata)):
        record = record if "include" in record else shapes.parse_caption(prompt)
        detections = shapes.detect(image)
        scores[:, i] = [SHAPES_SCORES[name](detections, record) for name in names]
    return {f"shapes_{name}": row for name, row in zip(names, scores)}
