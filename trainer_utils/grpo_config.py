"""The settings of the trainer (grpo_trainer.GRPOTrainer), and the arithmetic of its batches."""
from dataclasses import dataclass
from typing import Literal

from utils.config import check_flags, flag


@dataclass(frozen=True)
class GRPOConfig:
    """The objective and the training loop."""

    num_generations: int = flag(8, "G, images per prompt")
    per_device_train_batch_size: int = flag(8, "images per micro-batch and process, for the arithmetic of batches",
                                            least=1, resume=True)
    micro_batch_size: Literal["auto"] | int | None = flag(
        None, "images of one pass, which changes no gradient; auto: as many as fit into free memory; none: "
        "per_device_train_batch_size", least=1, resume=True)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer update", least=1, resume=True)
    num_minibatches: int = flag(1, "optimizer updates that share one pass over a rollout", least=1)
    num_iterations: int = flag(1, "passes over a rollout", least=1)
    rollout_batch_size: int = flag(0, "images sampled and scored at a time; 0: all of a step", resume=True)
    beta: float = flag(0.01, "weight of the KL penalty to the starting model; 0: no reference model", least=0)
    reference: Literal["auto", "float32", "bf16", "cpu", "lora_base"] = flag(
        "auto", "form of that model: float32: a copy; bf16: its matrices halved; cpu: it waits there; lora_base: the "
        "trained model with its adapters off; auto: lora_base with adapters, else float32")
    kl_form: Literal["k3", "k2", "js"] = flag(
        "k3", "the penalty's form: k3 has the gradient of KL(ref | policy), k2 that of KL(policy | ref), js pulls a "
        "quarter as hard near the reference")
    kl_ratio_weight: bool = flag(False, "the penalty times the probability ratio: unbiased after the first update too")
    diversity_advantage: Literal["none", "tokens"] = flag(
        "none", "tokens: positive advantages grow with the distance to the nearest other image of the group, measured "
        "on the codes' embeddings (GARDO, arXiv 2512.24138)")
    diversity_power: float = flag(1.0, "how strongly", least=0)
    epsilon: float = flag(0.2, "lower clip of the probability ratio, 1 - epsilon", least=0)
    epsilon_high: float | None = flag(None, "upper clip, 1 + epsilon_high; none: epsilon", least=0)
    scale_rewards: Literal["group", "batch", "none"] = flag(
        "group", "advantages are divided by the spread of the group or of the batch; none: not (Dr.GRPO, arXiv "
        "2503.20783)")
    reward_aggregation: Literal["sum", "normalise"] = flag(
        "sum", "sum: rewards are added, then normalised; normalise: each in its group, then added")
    importance_sampling_level: Literal["token", "sequence"] = flag(
        "token", "whose probability ratio is clipped; sequence: GSPO, arXiv 2507.18071")
    guidance_logprob: Literal["guided", "guided_detach_uncond", "conditional"] = flag(
        "guided", "what is scored when sampling is guided: what was sampled, the same without gradient through the "
        "unconditional half, or the conditional model as in AR-GRPO")
    head_chunk_tokens: int = flag(1024, "tokens whose logits are held at a time", least=1, resume=True)
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = flag(
        "adamw", "adamw_fused: faster on GPUs; adamw_8bit: a quarter of the memory for moments")
    sharding: Literal["none", "full", "hybrid"] = flag(
        "none", "each process holds a slice of weights, gradients and moments: full: of all processes; hybrid: of a "
        "machine's, with copies between machines", resume=True)
    learning_rate: float = flag(1e-5, "AdamW's, after the warm-up", least=0)
    lr_scheduler: Literal["constant", "cosine"] = flag("constant", "after the warm-up")
    warmup_steps: int = flag(0, "steps of linear warm-up", least=0)
    weight_decay: float = flag(0.0, "AdamW's", least=0)
    adam_beta2: float = flag(0.99, "AdamW's second moment; 0.99 remembers 100 updates, as runs are short", least=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", least=0)
    exit_step: int = flag(400, "steps (rollouts) of the run", least=1, resume=True)
    eval_steps: int = flag(100, "evaluate each so many steps, and before the first; 0: never", least=0, resume=True)
    eval_generations: int = flag(4, "images per held-out prompt", least=1)
    save_steps: int = flag(100, "save a checkpoint each so many steps", least=1, resume=True)
    save_total_limit: int | None = flag(2, "checkpoints to keep; none: all", least=1, resume=True)
    async_save: bool = flag(False, "write checkpoints in the background, from copies", resume=True)
    on_save_failure: Literal["continue", "stop"] = flag(
        "continue", "when a checkpoint cannot be written (full disk); the last one's failure always ends the run",
        resume=True)
    max_logp_gap: float = flag(0.1, "nats between sampler and trainer that stop the run: they disagree on the policy",
                               resume=True)
    max_reward_failures: float = flag(0.5, "share of a step's images without a reward that stops the run", resume=True)
    max_constant_steps: int = flag(5, "steps in a row whose rewards are equal in every group that end the run, as "
                                   "nothing is learned from them; 0: never", least=0, resume=True)
    max_bad_updates: int = flag(5, "updates in a row with a non-finite gradient that on_divergence answers", least=1,
                                resume=True)
    max_kl: float | None = flag(None, "KL to the starting model, nats a token, above which on_divergence answers",
                                resume=True)
    min_entropy: float | None = flag(None, "entropy, nats a token, below which on_divergence answers", resume=True)
    on_divergence: Literal["stop", "rollback"] = flag(
        "stop", "rollback: back to a checkpoint from before, with new seeds for the images", resume=True)
    max_rollbacks: int = flag(3, "times the run goes back before it stops", least=0, resume=True)
    data_seed: int = flag(42, "keys prompts and images", aliases=("seed",))

    def __post_init__(self):
        check_flags(self)
        if self.max_kl is not None and not self.beta:
            raise ValueError("max_kl needs a reference to measure the KL to: give a beta above 0, or no max_kl")
        if self.sharding != "none" and self.optimizer == "adamw_8bit":
            raise ValueError(f"optimizer adamw_8bit does not go with sharding {self.sharding}: its blocks would cross "
                             "the shards, which divide AdamW's memory already; leave one of the two out")
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2 (advantages are relative to the group), got "
                             f"{self.num_generations}")
        if self.images_per_update % self.num_generations:
            raise ValueError(
                f"images per update and process ({self.per_device_train_batch_size} per_device_train_batch_size x "
                f"{self.gradient_accumulation_steps} gradient_accumulation_steps = {self.images_per_update}) must be "
                f"a multiple of num_generations ({self.num_generations})")
        if self.rollout_batch_size < 0 or self.rollout_batch_size % self.num_generations:
            raise ValueError(f"rollout_batch_size must be 0 or a multiple of num_generations ({self.num_generations}), "
                             f"got {self.rollout_batch_size}")

    @property
    def images_per_update(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        """P, per process."""
        return self.images_per_update * self.num_minibatches // self.num_generations

    def arithmetic(self, world_size: int) -> str:
        images = self.prompts_per_step * self.num_generations * world_size
        updates = self.num_minibatches * self.num_iterations
        return (f"{images} images a step = {self.prompts_per_step} prompts x {self.num_generations} generations x "
                f"{world_size} processes; {updates} updates a step, each of {self.images_per_update * world_size} "
                f"images in {self.gradient_accumulation_steps} micro-batches of {self.per_device_train_batch_size}")
