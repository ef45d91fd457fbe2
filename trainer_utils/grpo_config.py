"""The settings of the trainer (grpo_trainer.GRPOTrainer), and the arithmetic of its batches."""
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class GRPOConfig:
    num_generations: int = 8  # G, images per prompt
    per_device_train_batch_size: int = 8  # images per micro-batch and process, for the arithmetic of batches
    micro_batch_size: Literal["auto"] | int | None = field(default=None, metadata={  # changes no gradient
        "help": "images of one pass; auto: as many as fit into free memory; none: per_device_train_batch_size"})
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer update
    num_minibatches: int = 1  # optimizer updates that share one pass over a rollout
    num_iterations: int = 1  # passes over a rollout
    rollout_batch_size: int = 0  # images sampled and scored at a time; 0: all of a step
    beta: float = 0.01  # weight of the KL penalty to the starting model; 0: no reference model
    reference: Literal["auto", "float32", "bf16", "cpu", "lora_base"] = field(default="auto", metadata={
        "help": "form of that model: float32 (a copy), bf16, cpu (waits there), lora_base; trainer_utils/reference.py"})
    epsilon: float = 0.2  # lower clip of the probability ratio, 1 - epsilon
    epsilon_high: float | None = None  # upper clip, 1 + epsilon_high; None: epsilon
    scale_rewards: str = "group"  # divide by the spread of: group, batch, none (Dr.GRPO, arXiv 2503.20783)
    reward_aggregation: str = "sum"  # sum: then normalise; normalise: each reward in its group, then the sum
    importance_sampling_level: str = "token"  # token, or sequence (GSPO, arXiv 2507.18071)
    guidance_logprob: str = "guided"  # what is scored: guided, guided_detach_uncond, conditional (models/policy.py)
    head_chunk_tokens: int = 1024  # tokens whose logits are held at a time
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"] = "adamw"
    sharding: Literal["none", "full", "hybrid"] = field(default="none", metadata={
        "help": "each process holds a slice of weights, gradients and moments: full: of all processes; hybrid: of a "
                "machine's, with copies between machines"})
    learning_rate: float = 1e-5
    lr_scheduler: str = "constant"  # after the warm-up: constant, cosine
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta2: float = 0.99  # a memory of 100 updates: runs are short
    max_grad_norm: float = 1.0
    exit_step: int = 400  # steps (rollouts) of the run
    eval_steps: int = 100  # evaluate each so many steps, and before the first; 0: never
    eval_generations: int = 4  # images per held-out prompt
    save_steps: int = 100
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep; none: all"})
    async_save: bool = field(default=False, metadata={"help": "write checkpoints in the background, from copies"})
    on_save_failure: Literal["continue", "stop"] = field(default="continue", metadata={
        "help": "when a checkpoint cannot be written (full disk); the last one's failure always ends the run"})
    max_logp_gap: float = 0.1  # nats between sampler and trainer that stop the run: they disagree on the policy
    max_reward_failures: float = 0.5  # share of a step's images without a reward that stops the run
    max_bad_updates: int = 5  # updates in a row with a non-finite gradient that on_divergence answers
    max_kl: float | None = None  # KL to the starting model, nats a token, above which on_divergence answers
    min_entropy: float | None = None  # entropy, nats a token, below which on_divergence answers
    on_divergence: Literal["stop", "rollback"] = field(default="stop", metadata={
        "help": "rollback: back to a checkpoint from before, with new seeds for the images"})
    max_rollbacks: int = 3  # then the run stops
    data_seed: int = field(default=42, metadata={"aliases": ["seed"], "help": "keys prompts and images"})

    def __post_init__(self):
        for name, choices in (("scale_rewards", ("group", "batch", "none")),
                              ("reward_aggregation", ("sum", "normalise")),
                              ("importance_sampling_level", ("token", "sequence")),
                              ("lr_scheduler", ("constant", "cosine"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_minibatches", "num_iterations",
                  "exit_step", "save_steps", "save_total_limit", "eval_generations", "max_bad_updates",
                  "head_chunk_tokens", "micro_batch_size")
        for name in (*counts, "beta", "epsilon", "epsilon_high", "max_grad_norm", "eval_steps", "max_rollbacks"):
            value, least = getattr(self, name), int(name in counts)
            if value not in (None, "auto") and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
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
