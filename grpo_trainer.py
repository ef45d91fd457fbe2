"""Group Relative Policy Optimization for autoregressive image generators.

One step (`GRPOTrainer.train`): sample G images for each of P prompts -> score them with rewards -> advantages relative
to the group -> a few clipped policy-gradient updates with a KL penalty. The mathematics is `group_advantages` and
`grpo_loss`, pure functions. Everything that a step draws is keyed by (seed, step, prompt, member), so that images
don't depend on the number of processes and a resumed run continues bit for bit.

Leaves out: what a policy, a reward or a prompt is (train_c2i.py and train_t2i.py compose them), how weights are sharded
and checkpoints written (utils/distributed.py, trainer_utils/checkpoints.py).

Shapes: P prompts per process and step, G generations per prompt, N = P G images, L tokens per image.
"""
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset.sampler import PromptSampler, row_seeds, shard
from trainer_utils import evaluation, memory
from trainer_utils.checkpoints import Checkpoints
from trainer_utils.guards import Interruption, TrainingStopped, divergence  # TrainingStopped: for those who call `train`
from trainer_utils.optimizer import build_optimizer, learning_rate
from trainer_utils.reference import Reference, distribute
from trainer_utils.report import write_report
from trainer_utils.statistics import centred, masked_mean, nan_std
from utils import distributed

logger = logging.getLogger(__name__)

EVAL_STEP = -1  # the step that keys evaluation seeds: the same images are asked for each time
NEW_SEED = 1_000_003  # added to the seed of images each time the run goes back


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


# ------------------------------------------------------------------------------------------------ mathematics


def group_advantages(rewards: Tensor, scale_rewards: str = "group", eps: float = 1e-4) -> Tensor:
    """rewards float [P, G] -> advantages [P, G]: (r - mean of its group) / (spread + eps), arXiv 2402.03300, sec. 4.1.

    The spread is the unbiased standard deviation of the group ("group") or of all rewards ("batch"), or is left out
    ("none"). A reward that failed (NaN) leaves the statistics of its group and gets a NaN advantage.
    """
    if scale_rewards == "none":
        return centred(rewards)
    if scale_rewards == "batch":
        return centred(rewards) / (nan_std(rewards.reshape(1, -1)) + eps)
    return centred(rewards) / (nan_std(rewards) + eps)


def aggregate_advantages(scores: Tensor, weights: list[float], aggregation: str, scale_rewards: str) -> Tensor:
    """scores [K, P, G] of K rewards -> advantages [P, G]; "sum" mixes rewards first, "normalise" mixes advantages."""
    if aggregation == "sum":
        return group_advantages(weighted_sum(scores, weights), scale_rewards)
    return weighted_sum(torch.stack([group_advantages(one, scale_rewards) for one in scores]), weights)


def weighted_sum(scores: Tensor, weights: list[float]) -> Tensor:
    """scores [K, P, G] -> [P, G]; a weight of 0 also takes that reward's NaNs out."""
    weight = torch.tensor(weights, dtype=scores.dtype, device=scores.device)[:, None, None]
    return torch.where(weight == 0, 0.0, weight * scores).sum(0)


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, *, epsilon: float = 0.2,
              epsilon_high: float | None = None, beta: float = 0.0, importance_sampling_level: str = "token",
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective with a KL penalty (arXiv 2402.03300 eq. 3; k3 estimator of eq. 4), a scalar to minimise.

    logps, old_logps, ref_logps: float [N, L], log-probabilities of the sampled tokens under the trained, the sampling
    and the reference policy (ref_logps may be None when beta is 0). advantages: float [N]; a NaN takes its sample out.
    Mean over tokens, then over the remaining samples. Metrics are detached scalars over the same samples.
    """
    valid = ~advantages.isnan()  # [N]
    advantage = advantages.nan_to_num(0.0)[:, None]  # [N, 1]
    log_ratio = logps - old_logps
    if importance_sampling_level == "sequence":
        log_ratio = log_ratio.mean(dim=1, keepdim=True)  # [N, 1]
    ratio = log_ratio.exp()
    high = epsilon if epsilon_high is None else epsilon_high
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)  # [N, L or 1]
    metrics = {"clip_low": ((ratio < 1 - epsilon) & (advantage < 0)).float(),
               "clip_high": ((ratio > 1 + high) & (advantage > 0)).float(), "ratio": ratio}
    if ref_logps is not None:
        delta = ref_logps - logps
        metrics["kl"] = delta.exp() - delta - 1  # k3: unbiased and never negative
    if beta:
        assert ref_logps is not None, "beta > 0 needs ref_logps"
        loss = loss + beta * metrics["kl"]
    return masked_mean(loss, valid), {name: masked_mean(value.detach(), valid) for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------- a rollout


@dataclass
class Rollout:
    """One step's samples on this process; every tensor has N rows, prompt-major."""

    condition: Tensor  # class ids int64 [N], or caption embeddings [N, T, C]
    condition_mask: Tensor | None  # bool [N, T]
    tokens: Tensor  # int64 [N, L]
    old_logps: Tensor  # float32 [N, L], the sampler's
    ref_logps: Tensor | None  # float32 [N, L]
    advantages: Tensor  # float32 [N], NaN where a reward failed

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, size: int) -> Iterator["Rollout"]:
        """Consecutive parts of `size` rows."""
        for start in range(0, len(self), size):
            yield Rollout(**{name: value if value is None else value[start: start + size]
                             for name, value in vars(self).items()})


class GRPOTrainer:
    """Trains `policy` (models.policy.Policy); what it starts with is the reference of the KL penalty.

    train_set, eval_set: (conditions, RewardSet); eval_set may be None. run: the RunFolder on rank 0, None elsewhere.
    save_policy(folder, weights) writes the model files of a checkpoint. image_metrics(images uint8 [M, 3, H, W],
    conditions) -> {name: number} adds to each evaluation on rank 0.
    """

    def __init__(self, config: GRPOConfig, policy, train_set: tuple, eval_set: tuple | None, run,
                 save_policy: Callable[[Path, dict], None], image_metrics: Callable | None = None):
        self.config, self.policy, self.run = config, policy, run
        self.conditions, self.reward_set = train_set
        self.eval_set, self.image_metrics = eval_set, image_metrics
        self.device, self.rank, self.world_size = policy.device, distributed.rank(), distributed.world_size()
        # eval(): dropout would make the scored policy another one than the sampled one.
        self.scorer = policy.scorer(config.guidance_logprob, config.head_chunk_tokens).eval()
        self.reference = Reference(self.scorer, config.reference, config.sharding) if config.beta else None
        self.model = distribute(policy, self.scorer, config.sharding)
        if self.reference:
            self.reference.shard(policy)
        self.parameters = [p for p in self.scorer.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config.optimizer, self.parameters, config.learning_rate, config.adam_beta2,
                                         config.weight_decay)
        # float16 has few exponents: gradients are made of a loss that is large enough not to vanish in it.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=policy.autocast_dtype == torch.float16)
        self.micro_batch_size = config.micro_batch_size or config.per_device_train_batch_size
        self.sampler = PromptSampler(len(self.conditions), config.data_seed)
        self.images_per_step = config.prompts_per_step * config.num_generations * self.world_size
        self.checkpoints = Checkpoints(run, self.scorer, self.optimizer, self.scaler, save_policy, config)

    def train(self) -> None:
        """The whole run: resumes where a checkpoint stands, trains to `exit_step`, leaves a report."""
        config, state = self.config, self.checkpoints
        step = state.resume()
        if step:
            logger.info("resuming after step %d%s", step, ": the run is finished" * (step >= config.exit_step))
        if step == 0 and config.eval_steps:
            self.log(0, self.evaluate(0))
        with Interruption() as interruption, tqdm(initial=step, total=config.exit_step, desc="GRPO",
                                                  disable=self.run is None) as progress:
            while step < config.exit_step and not distributed.reduce(interruption.received, "max", self.device):
                metrics, started = distributed.Metrics(self.device), time.perf_counter()

                rollout = self.rollout(step, metrics)
                for _ in range(config.num_iterations):
                    for minibatch in rollout.split(config.images_per_update):
                        self.update(minibatch, step, metrics)

                seconds, numbers = time.perf_counter() - started, metrics.means()
                if reason := divergence(numbers, state.bad_updates, config):
                    step = progress.n = state.go_back(step + 1, reason)
                    continue
                step, state.position = step + 1, state.position + config.prompts_per_step * self.world_size
                numbers |= {"seconds/step": seconds, "images_per_sec": self.images_per_step / seconds}
                progress.set_postfix(reward=f"{numbers['reward']:.3f}", kl=f"{numbers.get('kl', 0.0):.4f}")
                progress.update()
                if config.eval_steps and (step % config.eval_steps == 0 or step == config.exit_step):
                    numbers.update(self.evaluate(step))
                self.log(step, numbers)
                if step % config.save_steps == 0 or step == config.exit_step:
                    state.save(step, last=step == config.exit_step)
            self.finish(step, interruption)

    def finish(self, step: int, interruption: Interruption) -> None:
        """The end of the run, or its end for now: a signal leaves a checkpoint and its own exit code."""
        number = int(distributed.reduce(interruption.received, "max", self.device))
        if number and step < self.config.exit_step:
            self.checkpoints.interrupt(step, number)
        if self.run:
            try:
                write_report(self.run.path)
            except (OSError, ValueError) as error:  # the run itself is safe
                logger.warning("no report (%s); make it with python -m trainer_utils.report %s", error, self.run.path)
        distributed.barrier()

    # -------------------------------------------------------------------------------------------- one step

    @contextmanager
    def whole_weights(self):
        """What rollouts need; with sharding nothing else may hold them, the engine's copies neither."""
        with distributed.gathered(self.model):
            yield
        if self.config.sharding != "none":
            self.policy.engine.release()

    def rollout(self, step: int, metrics: distributed.Metrics) -> Rollout:
        """Samples G images for each of this process's prompts, scores them, and compares each group's members."""
        config, group = self.config, self.config.num_generations
        num_prompts = config.prompts_per_step * self.world_size
        positions = shard(range(num_prompts), self.rank, self.world_size)
        chosen = self.sampler.after(self.checkpoints.position, num_prompts)
        conditions = [self.conditions[chosen[position]] for position in positions]
        seeds = row_seeds(config.data_seed + NEW_SEED * self.checkpoints.attempt, step, positions, group)
        with self.whole_weights():  # gathered once, however many parts the rollout has
            samples = self.policy.sample_and_score(conditions, seeds, group, self.reward_set,
                                                   config.rollout_batch_size, metrics.timed)

        with metrics.timed("seconds/reference"):
            rows = torch.arange(len(conditions), device=self.device).repeat_interleave(group)
            condition, mask = (None if part is None else part[rows] for part in samples.encoded)
            size = config.per_device_train_batch_size if self.micro_batch_size == "auto" else self.micro_batch_size
            inputs = (condition, samples.tokens, mask, size)
            ref_logps = self.reference.score(self.policy, *inputs) if config.beta else None
            old_logps = samples.logps
            if config.guidance_logprob == "conditional":  # the ratio must start at 1: the scorer's own old values
                old_logps = self.policy.score(self.scorer, *inputs)
                log_gap(old_logps - samples.logps, metrics)

        with metrics.timed("seconds/score"):  # last: servers answered meanwhile
            result = self.reward_set.collect(samples.pending)
            # All processes see all groups: a spread over the batch and logged means need nothing else.
            scores = distributed.gather_groups(result.table.to(self.device), group).T  # [K, P W G]
            scores = scores.unflatten(1, (num_prompts, group))  # [K, P W, G]
            advantages = aggregate_advantages(scores, self.reward_set.weights, config.reward_aggregation,
                                              config.scale_rewards)
            self.log_rewards(scores, advantages, result.failures, step, metrics)
        own = advantages[self.rank::self.world_size].flatten()  # [N]
        return Rollout(condition, mask, samples.tokens, old_logps, ref_logps, own)

    def update(self, minibatch: Rollout, step: int, metrics: distributed.Metrics) -> None:
        """One optimizer update, in micro-batches whose gradients add up to that of the whole minibatch."""
        num_valid = distributed.reduce((~minibatch.advantages.isnan()).sum(), "sum", self.device)
        gaps = []
        with metrics.timed("seconds/update"):
            micro_batches = list(minibatch.split(self.rows_at_once(minibatch)))
            for i, micro in enumerate(micro_batches):
                with distributed.no_sync(self.model, skip=i + 1 < len(micro_batches)):
                    logps, entropies, loss, parts = self.loss(micro)
                    valid = (~micro.advantages.isnan()).sum()
                    # DDP averages over processes; the objective is a mean over all samples of the minibatch.
                    self.scaler.scale(loss * valid * self.world_size / max(num_valid, 1)).backward()
                gaps.append(logps.detach() - micro.old_logps)
                metrics.add({"entropy": entropies.mean()}, weight=len(micro))
                metrics.add({"loss": loss.detach(), **parts}, weight=valid)
            self.check_sampler_agrees(torch.cat(gaps), step, metrics)
            self.apply_gradient(step, metrics)

    def loss(self, micro: Rollout) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """-> (logps [n, L], entropies [n, L], loss, metrics of grpo_loss)."""
        config = self.config
        with self.policy.autocast():
            logps, entropies = self.model(micro.condition, micro.tokens, micro.condition_mask)
        return logps, entropies, *grpo_loss(
            logps, micro.old_logps, micro.ref_logps, micro.advantages, beta=config.beta, epsilon=config.epsilon,
            epsilon_high=config.epsilon_high, importance_sampling_level=config.importance_sampling_level)

    def rows_at_once(self, minibatch: Rollout) -> int:
        """Rows of one forward and backward pass; "auto" is measured once, by passes over a row or two."""
        if self.micro_batch_size == "auto":
            def work(rows: int) -> None:
                with distributed.no_sync(self.model, skip=False):  # else "hybrid" would keep the sums for the update
                    self.loss(next(minibatch.split(rows)))[2].backward()
            moments = 0 if self.optimizer.state else 2 * sum(map(distributed.local_bytes, self.parameters))  # to come
            fitting = memory.measured_rows(work, len(minibatch), self.device, moments)
            self.micro_batch_size = int(distributed.reduce(fitting, "min", self.device))  # as many passes on each
            self.optimizer.zero_grad()
            logger.info("--micro_batch_size auto: %d of %d rows at a time", self.micro_batch_size, len(minibatch))
        return self.micro_batch_size

    def check_sampler_agrees(self, gaps: Tensor, step: int, metrics: distributed.Metrics) -> None:
        """The parity gate: before a rollout's first update, sampler and trainer must hold the same policy."""
        if "logp_gap_mean" in metrics:  # checked already, or `conditional`, which scores another distribution
            return
        largest = distributed.reduce(log_gap(gaps, metrics), "max", self.device)
        if largest > self.config.max_logp_gap:
            self.checkpoints.stop("logp_gap", step + 1, (
                f"the sampler's and the trainer's log-probabilities differ by up to {largest:.3g} nats, above "
                f"--max_logp_gap {self.config.max_logp_gap}: they disagree on the policy (precision or kernels?)"))

    def apply_gradient(self, step: int, metrics: distributed.Metrics) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate = learning_rate(self.config, step)
        self.scaler.unscale_(self.optimizer)
        grad_norm = distributed.whole(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        finite = bool(torch.isfinite(grad_norm))  # the same on all processes: gradients are averaged
        if finite:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.scaler.update(0.5 * self.scaler.get_scale())  # not by what this process's shards found
            self.checkpoints.event("skipped_update", step=step + 1, reason=f"gradient norm {grad_norm}", action="skip")
        self.optimizer.zero_grad()
        self.checkpoints.bad_updates = 0 if finite else self.checkpoints.bad_updates + 1
        metrics.add({"grad_norm": grad_norm if finite else 0.0}, weight=float(finite))
        metrics.add({"learning_rate": rate, "skipped_updates": float(not finite)})

    # -------------------------------------------------------------------------------------------- rare work

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out prompts with the same seeds each time: rewards with standard errors, diversity, a sample grid."""
        if self.eval_set is None:
            return {}
        (conditions, reward_set), group = self.eval_set, self.config.eval_generations
        seeds = row_seeds(self.config.data_seed, EVAL_STEP, evaluation.own_positions(len(conditions)), group)
        with self.whole_weights():
            numbers, images, scores = evaluation.evaluate(self.policy, reward_set, conditions, seeds, group,
                                                          self.config.rollout_batch_size, step)
        asked = [condition for condition in conditions for _ in range(group)]
        if self.run:
            if self.image_metrics is not None:
                numbers.update({f"eval/{name}": value for name, value in self.image_metrics(images, asked).items()})
            picked, captions = evaluation.shown(asked, reward_set.names, scores)
            self.run.save_grid(step, images[picked].permute(0, 2, 3, 1).cpu().numpy(), captions, columns=8)
        distributed.barrier()
        return numbers

    # ---------------------------------------------------------------------------------------------- logging

    def log_rewards(self, scores: Tensor, advantages: Tensor, failures: dict, step: int,
                    metrics: distributed.Metrics) -> None:
        """scores [K, P, G], advantages [P, G] of all processes, failures of this one; too many end the run."""
        by_name = dict(zip(self.reward_set.names, scores))
        totals = weighted_sum(scores, self.reward_set.weights)
        failed = advantages.isnan().float().mean().item()
        metrics.add({"reward": totals.nanmean(), "reward_std": nan_std(totals).mean(), "reward_failures": failed,
                     "zero_spread_groups": (advantages.nan_to_num(0.0) == 0).all(dim=1).sum(),
                     **{f"rewards/{name}": one.nanmean() for name, one in by_name.items()},
                     **{f"failures/{name}": one.isnan().sum() for name, one in by_name.items()}})
        if told := distributed.failure_report(by_name, failures):
            logger.warning("step %d: %s", step, told)
        if failed > self.config.max_reward_failures:
            self.checkpoints.save(step, last=True)
            self.checkpoints.stop("reward_failures", step, (
                f"step {step}: {failed:.0%} of the images have no reward, above --max_reward_failures "
                f"{self.config.max_reward_failures}: {told}; saved checkpoint-{step}"))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        if self.run:
            self.run.log(step, numbers)
        else:  # a dry run
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))


def log_gap(gaps: Tensor, metrics: distributed.Metrics) -> Tensor:
    """Logs mean and largest |difference|, and returns the latter; a NaN counts as infinite."""
    gaps = gaps.abs().nan_to_num(nan=torch.inf)
    metrics.add({"logp_gap_mean": gaps.mean()})
    metrics.add_max({"logp_gap_max": gaps.max()})
    return gaps.max()
