"""Settings of GRPO side by side on the shapes world, at equal training time: the tables of benchmark/RESULTS.md.

    python -m benchmark.shapes.sweep --kind c2i --seconds 120 --seeds 1 2 3 --rows default argrpo_compat

Each run gets one CPU thread and as many steps as fit into --seconds of training (calibrated by a short run of the same
setting beside the same neighbours; evaluations are not counted). Prints a Markdown table: means over seeds.
"""
import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
# AR-GRPO's settings with this world's models, rewards and batch: what is left are its choices of the objective.
COMPAT = ["--config", "{kind}_argrpo_compat",
          "--gpt_ckpt", "models/pretrained/shapes/gpt_{kind}", "--gpt_model", "none",
          "--vq_ckpt", "models/pretrained/shapes/vq", "--vq_model", "none", "--image_size", "64",
          "--class_names", "shapes", "--num_classes", "32", "--image_statistics", "shapes",
          "--reward_funcs", "shapes_graded", "shapes_quality", "--reward_weights", "1.0", "0.5",
          "--eval_reward_funcs", "shapes_strict", "--eval_generations", "32", "--per_device_train_batch_size", "128"]
COMPAT_T2I = ["--t5_path", "models/pretrained/shapes/t5", "--prompt_files", "shapes", "--eval_prompt_files", "shapes",
              "--bf16", "false", "--eval_num_prompts", "256", "--eval_generations", "4"]
ROWS = {
    "default": [],
    "beta 0": ["--beta", "0"],
    "beta 0.04": ["--beta", "0.04"],
    "1 update": ["--num_minibatches", "1", "--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "4"],
    "8 updates": ["--num_iterations", "2"],
    "guidance 2, guided": ["--cfg_scale", "2"],
    "guidance 2, uncond detached": ["--cfg_scale", "2", "--guidance_logprob", "guided_detach_uncond"],
    "guidance 2, conditional": ["--cfg_scale", "2", "--guidance_logprob", "conditional"],
    "argrpo_compat": COMPAT,
    "argrpo_compat, lr 1e-4": [*COMPAT, "--learning_rate", "1e-4"],
}
COLUMNS = ("eval/rewards/shapes_strict", "eval/fid", "eval/recall", "eval/entropy", "eval/token_hamming",
           "eval/position_spread")


def train(kind: str, row: str, seed: int, steps: int, folder: Path) -> list[dict]:
    """One run; its metric lines."""
    name = f"{kind}_{row}_{seed}_{steps}".replace(" ", "_").replace(",", "")
    flags = [word.format(kind=kind) for word in ROWS[row]]
    flags += COMPAT_T2I if kind == "t2i" and flags[:1] == ["--config"] else []
    config = [] if "--config" in flags else ["--config", f"{kind}_shapes"]
    command = [sys.executable, f"train_{kind}.py", *config, *flags, "--data_seed", str(seed), "--num_threads", "1",
               "--exit_step", str(steps), "--eval_steps", str(steps), "--save_steps", str(steps), "--report_to", "none",
               "--output_dir", str(folder), "--run_name", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def measure(kind: str, row: str, seed: int, seconds: float, folder: Path) -> dict:
    """Evaluation numbers before and after about `seconds` of training."""
    per_step = np.median([line["seconds/step"] for line in train(kind, row, seed, 4, folder) if "reward" in line][1:])
    lines = train(kind, row, seed, max(1, round(seconds / per_step)), folder)
    evaluations = [line for line in lines if COLUMNS[0] in line]
    steps = [line for line in lines if "reward" in line]
    return {"before": evaluations[0], "after": evaluations[-1], "steps": len(steps),
            "seconds": sum(line["seconds/step"] for line in steps)}


def table_row(row: str, results: list[dict]) -> str:
    cells = []
    for column in COLUMNS:
        before, after = ([result[when][column] for result in results] for when in ("before", "after"))
        spread = f" ± {np.std(after, ddof=1):.3f}" if len(after) > 1 else ""
        cells.append(f"{np.mean(before):.3f} -> {np.mean(after):.3f}{spread}")
    seconds, steps = (np.mean([result[key] for result in results]) for key in ("seconds", "steps"))
    return f"| {row} | {steps:.0f} / {seconds:.0f} s | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("c2i", "t2i"), default="c2i")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "checkpoints" / "sweep")
    args = parser.parse_args()
    jobs = [(row, seed) for row in args.rows for seed in args.seeds]
    with ThreadPoolExecutor(args.parallel) as pool:
        results = list(pool.map(lambda job: measure(args.kind, *job, args.seconds, args.output_dir), jobs))
    print("| setting | steps / time | strict | FID | recall | entropy | token Hamming | position spread |\n"
          "|---|---|---|---|---|---|---|---|")
    for row in args.rows:
        print(table_row(row, [result for (name, _), result in zip(jobs, results) if name == row]))


if __name__ == "__main__":
    main()
