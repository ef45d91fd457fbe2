"""GRPO for text-to-image generators: as train_c2i.py, with captions in place of classes.

    bash run_t2i_train.sh                                        # sets up, then the shapes world
    python train_t2i.py --config t2i_shapes --run_name try --cfg_scale 2
    torchrun --nproc_per_node 4 train_t2i.py --config t2i_llamagen_xl_256 --prompt_files my_captions.jsonl
"""
from dataclasses import dataclass, field

import numpy as np

from dataset import Condition, shapes
from dataset.prompts import load_prompts
from train_c2i import CONFIGS, spread_out, train
from utils import distributed
from utils.config import one_line_errors, parse_args

NUM_SHAPES_PROMPTS = 1920  # drawn with the six tasks equally often


@dataclass(frozen=True)
class PromptConfig:
    prompt_files: list[str] = field(metadata={"help": "shapes, or prompt files (.json .jsonl .txt .yaml)"})
    eval_prompt_files: list[str] = field(metadata={"help": "held-out prompts, likewise"})


def load_conditions(files: list[str], split: str, count: int, seed: int) -> list[Condition]:
    """files: ["shapes"] draws `count` captions of the split, task by task; else prompt files, read whole."""
    if files != ["shapes"]:
        return load_prompts(files, seed)
    rng = np.random.default_rng((seed, ("train", "test").index(split)))
    return [shapes.prompt_condition(shapes.sample_record(rng, split)) for _ in range(count)]


def main() -> None:
    configs = parse_args((*CONFIGS, PromptConfig), description=__doc__)
    run_config, grpo, prompts = configs[0], configs[3], configs[-1]
    held_out = load_conditions(prompts.eval_prompt_files, "test", run_config.eval_num_prompts, grpo.data_seed)
    train(configs, load_conditions(prompts.prompt_files, "train", NUM_SHAPES_PROMPTS, grpo.data_seed),
          spread_out(held_out, run_config.eval_num_prompts))


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
