"""GRPO for class-to-image generators: flags -> policy, rewards, classes -> trainer.

    bash run_c2i_train.sh                                        # sets up, then the shapes world
    python train_c2i.py --config c2i_shapes --run_name try --beta 0.02
    torchrun --nproc_per_node 4 train_c2i.py --config c2i_llamagen_xl_384

Running the same command again resumes. One step is in grpo_trainer.py, the objective in trainer_utils/objective.py,
sampling and scoring in models/; trainer_utils/composition.py puts them together.
"""
from benchmark.shapes.statistics import shapes_statistics
from benchmark.speed.planner import plan_lines
from dataset.labels import class_conditions, load_class_names
from grpo_trainer import GRPOTrainer
from trainer_utils.composition import CONFIGS, train
from utils import distributed
from utils.config import one_line_errors, parse_args
from utils.lists import evenly


def main() -> None:
    configs = parse_args(CONFIGS, description=__doc__)
    run_config, policy_config = configs[:2]
    classes = class_conditions(load_class_names(policy_config.class_names))
    if len(classes) != policy_config.num_classes:
        raise ValueError(f"--class_names {policy_config.class_names} holds {len(classes)} names, but --num_classes is "
                         f"{policy_config.num_classes}")
    for line in train(GRPOTrainer, configs, classes, evenly(classes, run_config.eval_num_prompts), plan_lines,
                      shapes_statistics):
        print(line)


if __name__ == "__main__":
    with one_line_errors(), distributed.translated_errors():
        main()
