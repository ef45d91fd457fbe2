"""A generator with some ten thousand weights that paints 64-pixel images, and a trainer around it.

Its tokenizer decodes each code to flat blocks, light or coloured, so that the shapes rewards vary between samples;
`brightness` is a reward that a few updates can raise.
"""
from dataclasses import replace
from pathlib import Path

import torch

from dataset.labels import class_conditions
from dataset.shapes import CLASS_NAMES
from grpo_trainer import GRPOConfig, GRPOTrainer
from img_gen_grpo_rewards import REWARDS, Reward, RewardSet
from models.build import PolicyConfig, load_policy, save_policy
from models.checkpoint import save_model
from models.generate import SamplingConfig
from models.gpt import GPT, GPTConfig
from models.vq import VQConfig, VQModel
from tests.golden.recipe import recipe_
from trainer_utils.run_folder import RunFolder

CODES, CLASSES, SIDE = 16, len(CLASS_NAMES), 4
CONDITIONS = class_conditions(CLASS_NAMES)  # the shapes rewards read their prompts
POLICY_FIELDS = {"dtype", "rollout_dtype"}  # of PolicyConfig
SMALL = dict(num_generations=4, per_device_train_batch_size=16, learning_rate=1e-3, exit_step=2, eval_steps=0,
             save_steps=1000)


class Brightness(Reward):
    """Mean of the red channel."""

    def score(self, names, images, prompts, metadata):
        return {name: images[:, 0].float().mean(dim=(1, 2)) / 255 for name in names}


def make_world(folder: Path) -> None:
    """folder/gpt and folder/vq."""
    vq = recipe_(VQModel(VQConfig(codebook_size=CODES, codebook_show_usage=False, encoder_ch_mult=(1, 1),
                                  decoder_ch_mult=(1, 1), z_channels=8, ch=8, num_res_blocks=1, patch=8, local=True)),
                 "tiny vq")
    last = vq.decoder.conv_out
    with torch.no_grad():  # the 8 x 8 pixels of a block share a colour, mostly a light one
        last.weight.copy_(last.weight.unflatten(0, (3, -1))[:, :1].expand(-1, 64, -1, -1, -1).flatten(0, 1))
        last.bias.fill_(0.6)
    save_model(folder / "vq", vq)
    gpt = GPT(GPTConfig(dim=32, n_layer=2, n_head=4, multiple_of=16, vocab_size=CODES, block_size=SIDE ** 2,
                        num_classes=CLASSES))
    save_model(folder / "gpt", recipe_(gpt, "tiny gpt"))


def policy_config(folder: Path) -> PolicyConfig:
    return PolicyConfig(str(folder / "gpt"), str(folder / "vq"), image_size=64, num_classes=CLASSES,
                        class_names="shapes")


def make_trainer(world: Path, run: Path | None, *, rewards=("brightness",), weights=None, sampling=None, device="cpu",
                 **config) -> GRPOTrainer:
    """As trainer_utils/composition.py does it, with `config` (also POLICY_FIELDS) on top of SMALL; run: where to log,
    None for nowhere."""
    stored = replace(policy_config(world), **{name: config.pop(name) for name in POLICY_FIELDS & config.keys()})
    grpo = GRPOConfig(**{**SMALL, **config})
    sampling = SamplingConfig(**(sampling or {}))
    REWARDS["brightness"] = Brightness
    policy = load_policy(stored, sampling, torch.device(device))
    reward_set = RewardSet(rewards, weights)
    return GRPOTrainer(grpo, policy, (CONDITIONS, reward_set), (CONDITIONS[:3], reward_set),
                       run and RunFolder(run, {"config": repr(grpo)}, "none"),
                       lambda folder, weights: save_policy(folder, policy, stored, weights))


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.scorer.gpt.state_dict().items()}


def command_line(world: Path, output: Path, *flags) -> list[str]:
    """train_c2i.py's arguments for the world, with the shapes rewards; later flags override."""
    return ["--gpt_ckpt", str(world / "gpt"), "--vq_ckpt", str(world / "vq"), "--image_size", "64",
            "--num_classes", str(CLASSES), "--class_names", "shapes", "--reward_funcs", "shapes_quality",
            "--num_generations", "4", "--per_device_train_batch_size", "16", "--learning_rate", "1e-3",
            "--eval_num_prompts", "2", "--eval_generations", "2", "--num_threads", "1", "--report_to", "none",
            "--output_dir", str(output), "--run_name", "run", *map(str, flags)]
