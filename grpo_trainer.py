"""Group Relative Policy Optimization for autoregressive image generators.

One step (`GRPOTrainer.train`): sample G images for each of P prompts -> score them with rewards -> advantages relative
to the group -> a few clipped policy-gradient updates with a KL penalty. The mathematics is pure functions,
trainer_utils/objective.py. Everything that a step draws is keyed by (seed, step, prompt, member), so that images don't
depend on the number of processes and a resumed run continues bit for bit.

Leaves out: what a policy, a reward or a prompt is (train_c2i.py and train_t2i.py compose them), how weights are sharded
and checkpoints written (utils/distributed.py, trainer_utils/checkpoints.py).

Shapes: P prompts per process and step, G generations per prompt, N = P G images, L tokens per image.
"""
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset import Condition
from dataset.sampler import PromptSampler, row_seeds, shard
from img_gen_grpo_rewards import RewardSet
from models.policy import Policy
from trainer_utils import evaluation, memory
from trainer_utils.checkpoints import Checkpoints
from trainer_utils.grpo_config import GRPOConfig
from trainer_utils.guards import Interruption, TrainingStopped, divergence
from trainer_utils.objective import (
    aggregate_advantages,
    diversity_shaped,
    group_advantages,
    grpo_loss,
    token_distances,
    weighted_sum,
)
from trainer_utils.optimizer import build_optimizer, learning_rate
from trainer_utils.reference import Reference, distribute
from trainer_utils.report import write_report
from trainer_utils.rollout import Samples, sample_and_score
from trainer_utils.run_folder import RunFolder
from trainer_utils.statistics import nan_std, without_spread
from utils import distributed

__all__ = ["GRPOConfig", "GRPOTrainer", "Rollout", "TrainingStopped", "aggregate_advantages", "group_advantages",
           "grpo_loss"]

logger = logging.getLogger(__name__)

EVAL_STEP = -1  # the step that keys evaluation seeds: the same images are asked for each time
NEW_SEED = 1_000_003  # added to the seed of images each time the run goes back


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
    """Trains `policy`; what it starts with is the reference of the KL penalty.

    eval_set may be None. run: on rank 0; None elsewhere, and nothing is written.
    save_policy(folder, weights) writes the model files of a checkpoint. image_metrics(images uint8 [M, 3, H, W],
    conditions) -> {name: number} adds to each evaluation on rank 0.
    """

    def __init__(self, config: GRPOConfig, policy: Policy, train_set: tuple[list[Condition], RewardSet],
                 eval_set: tuple[list[Condition], RewardSet] | None, run: RunFolder | None,
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
        self.constant_steps = 0  # in a row, without spread in any group
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
            script = "test.sh" if self.policy.text_encoder is None else "test_t2i.sh"
            logger.info("next: bash %s %s 0 latest %g", script, self.run.path, self.policy.sampling.cfg_scale)
            try:
                write_report(self.run.path)
            except (OSError, ValueError) as error:  # the run itself is safe
                logger.warning("no report (%s); make it with python -m trainer_utils.report %s", error, self.run.path)
        distributed.barrier()

    # -------------------------------------------------------------------------------------------- one step

    @contextmanager
    def gathered_weights(self):
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
        with self.gathered_weights():  # gathered once, however many parts the rollout has
            samples = sample_and_score(self.policy, conditions, seeds, group, self.reward_set,
                                       config.rollout_batch_size, metrics.timed)

        self.check_distribution(samples, step)
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
        own = self.shaped(advantages[self.rank::self.world_size], samples.tokens, metrics)  # [P, G]
        return Rollout(condition, mask, samples.tokens, old_logps, ref_logps, own.flatten())

    def shaped(self, advantages: Tensor, tokens: Tensor, metrics: distributed.Metrics) -> Tensor:
        """advantages [P, G] of this process, shaped by how far its images [P G, L] are from each other."""
        group = self.config.num_generations
        distances = token_distances(tokens.unflatten(0, (-1, group)), self.policy.vq.quantize.codebook())  # [P, G, G]
        metrics.add({"group_distance": distances.sum() / (len(distances) * group * (group - 1))})
        if self.config.diversity_advantage == "none":
            return advantages
        return diversity_shaped(advantages, distances, self.config.diversity_power)

    def check_distribution(self, samples: Samples, step: int) -> None:
        """Logits that overflowed draw tokens without complaint, and every other number looks healthy."""
        finite = samples.logps.isfinite().all() & samples.entropies.isfinite().all()
        for event, bad, what in (("non_finite_logits", ~finite, "the logits of sampled tokens are not finite"),
                                 ("certain_tokens", ~samples.entropies.any(), "every token is drawn with certainty, as "
                                  "the logits are beyond what their numbers resolve")):
            if distributed.reduce(bad, "max", self.device):
                self.checkpoints.stop(event, step + 1, (
                    f"step {step + 1}: {what}: look at --cfg_scale {self.policy.sampling.cfg_scale:g}, --temperature "
                    f"{self.policy.sampling.temperature:g} and the weights"))

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
            epsilon_high=config.epsilon_high, importance_sampling_level=config.importance_sampling_level,
            kl_form=config.kl_form, kl_ratio_weight=config.kl_ratio_weight)

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
        seeds = row_seeds(self.config.data_seed, EVAL_STEP, evaluation.positions_of_rank(len(conditions)), group)
        with self.gathered_weights():
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
                     "zero_spread_groups": (flat := without_spread(totals)).sum(),
                     "zero_spread_share": flat.float().mean(),
                     **{f"rewards/{name}": one.nanmean() for name, one in by_name.items()},
                     **{f"failures/{name}": one.isnan().sum() for name, one in by_name.items()}})
        if reason := distributed.failure_report(by_name, failures):
            logger.warning("step %d: %s", step, reason)
        if failed > self.config.max_reward_failures:
            self.checkpoints.save(step, last=True)
            self.checkpoints.stop("reward_failures", step, (
                f"step {step}: {failed:.0%} of the images have no reward, above --max_reward_failures "
                f"{self.config.max_reward_failures}: {reason}; saved checkpoint-{step}"))
        self.watch_constant_rewards(by_name, bool(flat.all()), step)

    def watch_constant_rewards(self, by_name: dict[str, Tensor], constant: bool, step: int) -> None:
        """A judge that says the same of every image looks healthy in all other numbers."""
        self.constant_steps = self.constant_steps + 1 if constant else 0
        if not constant:
            return
        weighted = [name for name, weight in zip(by_name, self.reward_set.weights) if weight]
        what = "every weight in --reward_weights is 0" if not weighted else "; ".join(
            f"{name} is {by_name[name].nanmean():.4g} for every image of a group" for name in weighted)
        if self.constant_steps == 1:
            logger.warning("step %d teaches nothing: %s", step + 1, what)
            self.checkpoints.event("constant_rewards", step=step + 1, reason=what, action="continue")
        if self.config.max_constant_steps and self.constant_steps >= self.config.max_constant_steps:
            self.checkpoints.stop("constant_rewards", step + 1, (
                f"the rewards were equal in every group for {self.constant_steps} steps in a row "
                f"(--max_constant_steps), so that nothing was learned: {what}"))

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
