"""The embedded shapes world: 64x64 images of 1-4 coloured shapes with exact captions, detector and scores.

    record = sample_record(rng)                                  # GenEval's metadata, its caption under "prompt"
    image = render(sample_scene(record, rng))                    # uint8 [64, 64, 3]
    strict_score(detect(image), record)                          # 1.0
"""
from dataset.shapes.captions import (
                                     TASKS,
                                     all_prompts,
                                     class_condition,
                                     parse_caption,
                                     prompt_condition,
                                     sample_record,
                                     split_prompts,
)
from dataset.shapes.detector import Detection, detect
from dataset.shapes.render import render
from dataset.shapes.scene import CLASS_NAMES, COLORS, IMAGE_SIZE, SHAPES, Scene, SceneObject, sample_scene
from dataset.shapes.scores import graded_score, quality_score, strict_score

__all__ = ["CLASS_NAMES", "COLORS", "IMAGE_SIZE", "SHAPES", "TASKS", "Detection", "Scene", "SceneObject", "all_prompts",
           "class_condition", "detect", "graded_score", "parse_caption", "prompt_condition", "quality_score", "render",
           "sample_record", "sample_scene", "split_prompts", "strict_score"]
