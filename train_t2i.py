"""GRPO for text-to-image generators: as train_c2i.py, with captions in place of classes.

    bash run_t2i_train.sh                                        # sets up, then the shapes world
    python train_t2i.py --config t2i_shapes --run_name try --cfg_scale 2
    torchrun --nproc_per_node 4 train_t2i.py --config t2i_llamagen_xl_256 --prompt_files my_captions.jsonl
"""
from benchmark.shapes.statistics import shapes_statistics
from benchmark.speed.planner import plan_lines
from grpo_trainer import GRPOTrainer
from trainer_utils.composition import CONFIGS, PromptConfig, load_conditions, train
from utils import distributed
from utils.config import one_line_errors, parse_args
from utils.lists import evenly

NUM_SHAPES_PROMPTS = 1920  # drawn with the six tasks equally often


def main() -> None:
    configs = parse_args((*CONFIGS, PromptConfig), description=__doc__)
    run_config, grpo, prompts = configs[0], configs[3], configs[-1]
    held_out = load_conditions(prompts.eval_prompt_files, "test", run_config.eval_num_prompts, grpo.data_seed)
    conditions = load_conditions(prompts.prompt_files, "train", NUM_SHAPES_PROMPTS, grpo.data_seed)
    for line in train(GRPOTrainer, configs, conditions, evenly(held_out, run_config.eval_num_prompts), plan_lines,
                      shapes_statistics):
        print(line)


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
