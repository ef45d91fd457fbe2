"""Settings of GRPO side by side on the shapes world, at equal training time: the tables of benchmark/RESULTS.md.

    python -m benchmark.shapes.sweep --kind c2i --seconds 90 --seeds 1 2 3 --rows default argrpo_compat

Each run gets one CPU thread and as many steps as fit into --seconds of training (calibrated by a short run of the same
setting beside the same neighbours). Every trained model is then sampled at guidance 1 and 2, whatever it was trained
at, with the same seeds. Prints a Markdown table: means over seeds, ± their standard deviation.
"""
import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmark.shapes.statistics import shapes_statistics
from dataset import shapes
from dataset.sampler import row_seeds
from img_gen_grpo_rewards import RewardSet
from models.build import PolicyConfig, load_policy
from models.generate import SamplingConfig
from trainer_utils.rollout import sample_and_score
from trainer_utils.statistics import token_hamming
from utils.config import Parser, one_line_errors

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "models/pretrained/shapes"
NUM_PROMPTS = {"c2i": 32, "t2i": 256}
NUM_IMAGES, EVAL_SEED = 1024, 7
# AR-GRPO's settings with this world's models, rewards and batch: what is left are its choices of the objective.
COMPAT = ["--config", "{kind}_argrpo_compat", "--gpt_ckpt", WEIGHTS + "/gpt_{kind}", "--gpt_model", "none",
          "--vq_ckpt", WEIGHTS + "/vq", "--vq_model", "none", "--image_size", "64", "--class_names", "shapes",
          "--num_classes", "32", "--reward_funcs", "shapes_graded", "shapes_quality", "--reward_weights", "1.0", "0.5",
          "--per_device_train_batch_size", "128"]
ROWS = {
    "default": [],
    "beta 0": ["--beta", "0"],
    "beta 0.1": ["--beta", "0.1"],
    "1 update a rollout": ["--num_minibatches", "1", "--gradient_accumulation_steps", "4"],
    "8 updates a rollout": ["--num_iterations", "2"],
    "learning rate 1e-4": ["--learning_rate", "1e-4"],
    "guidance 2, guided": ["--cfg_scale", "2"],
    "guidance 2, conditional": ["--cfg_scale", "2", "--guidance_logprob", "conditional"],
    "argrpo_compat": COMPAT,
}


def train(row: str, kind: str, seed: int, steps: int, folder: Path) -> tuple[Path, list[float]]:
    """One run: its last checkpoint, and the seconds of each step."""
    run = folder / f"{kind}_{row}_{seed}_{steps}".replace(" ", "_").replace(",", "")
    flags = [word.format(kind=kind) for word in ROWS[row]]
    config = [] if "--config" in flags else ["--config", f"{kind}_shapes"]
    command = [sys.executable, f"train_{kind}.py", *config, *flags, "--data_seed", str(seed), "--num_threads", "1",
               "--exit_step", str(steps), "--eval_steps", "0", "--save_steps", str(steps), "--report_to", "none",
               "--output_dir", str(folder), "--run_name", run.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return run / f"checkpoint-{steps}", [line["seconds/step"] for line in lines]


def measure(kind: str, row: str, seed: int, seconds: float, folder: Path) -> dict:
    """Trains for about `seconds`, then evaluates at guidance 1 and 2."""
    _, calibration = train(row, kind, seed, 4, folder)
    checkpoint, spent = train(row, kind, seed, max(1, round(seconds / np.median(calibration[1:]))), folder)
    return {"steps": len(spent), "seconds": sum(spent), **evaluate(checkpoint, kind)}


def evaluate(checkpoint: str | Path, kind: str) -> dict:
    """{column: number} of NUM_IMAGES images on held-out seeds (c2i) or held-out captions (t2i)."""
    if kind == "c2i":
        conditions = [shapes.class_condition(i) for i in range(NUM_PROMPTS[kind])]
    else:
        rng = np.random.default_rng(EVAL_SEED)
        conditions = [shapes.prompt_condition(shapes.sample_record(rng, "test")) for _ in range(NUM_PROMPTS[kind])]
    group, numbers, statistics = NUM_IMAGES // len(conditions), {}, shapes_statistics(kind)
    config = PolicyConfig(str(checkpoint), f"{ROOT}/{WEIGHTS}/vq", kind, image_size=64, num_classes=32,
                          class_names="shapes", t5_path=f"{ROOT}/{WEIGHTS}/t5")
    for scale in (1.0, 2.0):
        policy = load_policy(config, SamplingConfig(cfg_scale=scale), torch.device("cpu"))
        seeds = row_seeds(EVAL_SEED, 0, range(len(conditions)), group)
        reward_set = RewardSet(["shapes_strict"])
        samples = sample_and_score(policy, conditions, seeds, group, reward_set, 256)
        strict = reward_set.collect(samples.pending).scores["shapes_strict"].mean().item()
        found = statistics(samples.images, [condition for condition in conditions for _ in range(group)])
        numbers |= {f"strict @{scale:g}": strict, f"FID @{scale:g}": found["fid"],
                    f"entropy @{scale:g}": samples.entropies.mean().item(),
                    f"Hamming @{scale:g}": token_hamming(samples.tokens, group).item(),
                    f"spread @{scale:g}": found["position_spread"]}
    return numbers


def table_row(row: str, results: list[dict]) -> str:
    cells = []
    for column in results[0]:
        values = [result[column] for result in results]
        spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 and "@" in column else ""
        cells.append(f"{np.mean(values):.4g}{spread}")
    return f"| {row} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("c2i", "t2i"), default="c2i")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "checkpoints" / "sweep")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = {"steps": 0, "seconds": 0, **evaluate(ROOT / WEIGHTS / f"gpt_{args.kind}", args.kind)}
    print("| setting | " + " | ".join(base) + " |\n|" + "---|" * (len(base) + 1), table_row("base", [base]),
          sep="\n", flush=True)
    jobs = [(row, seed) for row in args.rows for seed in args.seeds]
    with ThreadPoolExecutor(args.parallel) as pool:
        results = list(pool.map(lambda job: measure(args.kind, *job, args.seconds, args.output_dir), jobs))
    for row in args.rows:
        print(table_row(row, [result for (name, _), result in zip(jobs, results) if name == row]))


if __name__ == "__main__":
    with one_line_errors():
        main()
