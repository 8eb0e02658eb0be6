"""Stages of training on sampled episodes.

Episodes of round k are drawn from weights at most `max_staleness` rounds old: they are asked for as soon as such
weights exist, and drawn while the rounds before are trained. A checkpoint is a barrier, which no request crosses. So
the schedule follows from the config alone, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinsmith.data import DataError
from tinsmith.kitchen.advantages import Advantages
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.environments import DrawnSequence, RolloutLimits, TaskSource
from tinsmith.kitchen.errors import ConfigError, WorkflowError, nearest
from tinsmith.kitchen.ports import EnvironmentSource, Pending, Sampler
from tinsmith.kitchen.reference import Reference
from tinsmith.kitchen.rollouts import Batch, Episode, RolloutSpec, draw_batch
from tinsmith.kitchen.run_log import RunLog, checkpoint_name
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.stages.common import count, is_due
from tinsmith.kitchen.stages.supervised import check_warmup
from tinsmith.kitchen.tasks import ENVIRONMENTS
from tinsmith.types import ForwardBackwardOutput, OptimStepResponse

CLIPPED = ("ppo", "gspo", "cispo")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCourse:
    num_steps: int
    remarks: tuple[str, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A sequence and the advantage of each of its positions, float32 `[N]`."""

    sequence: DrawnSequence
    advantages_N: np.ndarray
    task: int


class PlanRollouts(Stage):
    """Find the environment: an adapter's, or the one that the config names."""

    name = "plan_rollouts"

    def validate(self, ctx: Context) -> None:
        if "environment" not in ctx.adapters and ctx.config.environment not in ENVIRONMENTS:
            name = ctx.config.environment
            known = ", ".join(ENVIRONMENTS)
            raise ConfigError(f"environment={name!r} is none of {known}{nearest(name, ENVIRONMENTS)}")
        check_warmup(ctx.config.warmup_steps, ctx.config.num_rollouts)
        _source(ctx)

    def execute(self, ctx: Context) -> Context:
        config = ctx.config
        advantages = Advantages(
            rule=config.advantages, normalize=config.normalize_advantages, gamma=config.gae_gamma, lam=config.gae_lambda
        )
        course = RolloutCourse(
            num_steps=config.num_rollouts,
            remarks=(
                f"{count(config.num_rollouts, 'round')} of {count(config.groups_per_batch, 'group')} of "
                f"{count(config.group_size, 'episode')}",
            ),
            facts={"environment": config.environment},
        )
        return ctx.put(course=course, spec=rollout_spec(ctx, _source(ctx)), advantages=advantages)


def _source(ctx: Context) -> EnvironmentSource:
    """A task set, which ends, is gone round; its last `eval_size` tasks are held out. Raises `ConfigError`."""
    config, found = ctx.config, ctx.adapters.get("environment")
    if found is None:
        return ENVIRONMENTS[config.environment](config.seed)
    if not hasattr(found, "__len__"):
        source: EnvironmentSource = found
        return source
    try:
        return TaskSource(tasks=found, num_held_out=config.eval_size)
    except DataError as error:
        raise ConfigError(f"eval_size={config.eval_size}: {error}") from error


def rollout_spec(ctx: Context, source: EnvironmentSource) -> RolloutSpec:
    config = ctx.config
    return RolloutSpec(
        source=source,
        renderer=ctx.state.renderer,
        group_size=config.group_size,
        groups=config.groups_per_batch,
        temperature=config.temperature,
        limits=RolloutLimits(
            max_turns=config.max_turns,
            max_tokens=config.max_tokens,
            max_context=_context(config, ctx.get_state("max_context", None)),
            timeout_s=config.rollout_timeout_s,
        ),
    )


def _context(config: Any, of_model: int | None) -> int:
    """What an episode may have. It may also be scored as a prompt, which needs room for a token behind it."""
    return int(config.max_context) if of_model is None else min(config.max_context, of_model - 1)


class StartRollouts(Stage):
    """Ask for the episodes of every round that may be drawn from the present weights."""

    name = "start_rollouts"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        present, under_way = ctx.state.rounds_current, dict(ctx.get_state("under_way", {}))
        wanted = [number for number in _allowed(ctx, present) if number not in under_way]
        if wanted:
            client, session = ctx.get_adapter("training_client"), ctx.state.session
            sampler: Sampler = await asyncio.to_thread(client.sampler, session)
            for number in wanted:
                under_way[number] = asyncio.create_task(_draw(ctx, sampler, number, version=present))
        return ctx.put(under_way=under_way)


def _allowed(ctx: Context, present: int) -> range:
    """Rounds from the present one to the last that is young enough and before the next barrier."""
    config = ctx.config
    last = min(present + config.max_staleness, config.num_rollouts - 1)
    if config.save_every:
        last = min(last, present - present % config.save_every + config.save_every - 1)
    return range(present, last + 1)


async def _draw(ctx: Context, sampler: Sampler, number: int, *, version: int) -> Batch:
    spec: RolloutSpec = ctx.state.spec

    def seed_of(group: int, turn: int, episode: int) -> int:
        text = f"tinsmith/rollout/{ctx.config.seed}/{number}/{group}/{turn}/{episode}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    return await draw_batch(spec, sampler, first_task=number * spec.groups, version=version, seed_of=seed_of)


class AwaitRollouts(Stage):
    name = "await_rollouts"

    async def execute(self, ctx: Context) -> Context:
        under_way = dict(ctx.state.under_way)
        present = ctx.state.rounds_current
        batch: Batch = await under_way.pop(present)
        ctx.emit(
            "rl.rollout",
            {"round": present, "episodes": len(batch.episodes), "staleness": present - batch.version},
        )
        return ctx.put(under_way=under_way, batch=batch)


class Assemble(Stage):
    """Advantages of every drawn token, and a readable row of every episode.

    Stuck and failed episodes are left out and counted; the others of their group are compared without them. Raises
    `WorkflowError` if every episode failed: that is no bad luck.
    """

    name = "assemble"

    async def execute(self, ctx: Context) -> Context:
        batch: Batch = ctx.state.batch
        _tell_failures(ctx, batch)
        weighted = [item for group in batch.groups for item in _weigh_group(ctx, group)]
        whole = batch.whole
        figures = {
            "reward": float(np.mean([episode.reward for episode in whole])) if whole else 0.0,
            "staleness": float(ctx.state.rounds_current - batch.version),
            "overlong": float(np.mean([episode.rollout.is_overlong for episode in whole])) if whole else 0.0,
            "stuck": float(sum(episode.rollout.ending == "timeout" for episode in batch.episodes)),
            "failed": float(sum(episode.rollout.ending == "failed" for episode in batch.episodes)),
            "splits": float(sum(episode.rollout.num_splits for episode in whole)),
        }
        return ctx.put(weighted=weighted, figures=figures)


def _tell_failures(ctx: Context, batch: Batch) -> None:
    if all(episode.rollout.ending == "overlong" and not episode.rollout.turns for episode in batch.episodes):
        room = f"max_context={ctx.state.spec.limits.max_context} leaves no room after the prompts"
        raise WorkflowError(f"no episode of the round was answered: {room}")
    failed = [episode for episode in batch.episodes if episode.rollout.ending == "failed"]
    if not failed:
        return
    first = f"task {failed[0].task}: {failed[0].rollout.error}"
    if len(failed) == len(batch.episodes):
        raise WorkflowError(f"every episode of the round failed; the first, {first}")
    ctx.state.log.note(f"round {ctx.state.rounds_current + 1}: {count(len(failed), 'episode')} failed; {first}")


def _weigh_group(ctx: Context, group: Sequence[Episode]) -> list[Weighted]:
    """The sequences to train on of one group; writes down all of its episodes."""
    config, step = ctx.config, ctx.state.rounds_current + 1
    rule: Advantages = ctx.state.advantages
    whole = [episode for episode in group if episode.is_whole]
    earned = [episode.earned(forfeit=config.overlong == "zero" and episode.rollout.is_overlong) for episode in whole]
    of_episode = {
        episode.index: advantages_T for episode, advantages_T in zip(whole, rule.of_group(earned), strict=True)
    }
    weighted: list[Weighted] = []
    for episode in group:
        advantages_T = of_episode.get(episode.index, np.zeros(0))
        if config.overlong == "drop" and episode.rollout.is_overlong:
            advantages_T = np.zeros(0)
        ctx.state.log.rollout(
            episode.row(step=step, advantage=float(advantages_T.mean()) if len(advantages_T) else 0.0)
        )
        start = 0
        for sequence in episode.rollout.sequences() if len(advantages_T) else []:
            advantages_N = np.zeros(len(sequence.turns_N))
            advantages_N[sequence.turns_N >= 0] = advantages_T[start : start + sequence.num_drawn]
            start += sequence.num_drawn
            weighted.append(Weighted(sequence=sequence, advantages_N=advantages_N, task=episode.task))
    return weighted


class PenalizeDivergence(Stage):
    """Take `divergence_coef` times the log-ratio to a reference off each drawn token's advantage (reverse KL).

    The batch's mean log-ratio is the baseline: it leaves the expected gradient as it is and lessens its noise.
    """

    name = "penalize_divergence"
    needs = ("sampling_client",)

    async def execute(self, ctx: Context) -> Context:
        weighted: Sequence[Weighted] = ctx.state.weighted
        coefficient: float = ctx.get_state("divergence_coef")
        if not coefficient:
            return ctx
        gaps = await log_ratios(ctx.state.reference, [(item.sequence, item.task) for item in weighted])
        drawn = float(sum(item.sequence.num_drawn for item in weighted))
        divergence = sum(float(gap_N.sum()) for gap_N in gaps) / max(drawn, 1.0)
        penalized = [
            replace(item, advantages_N=item.advantages_N - coefficient * (gap_N - divergence))
            for item, gap_N in zip(weighted, gaps, strict=True)
        ]
        return ctx.put(weighted=penalized, figures={**ctx.state.figures, "reference_kl": divergence})


async def log_ratios(reference: Reference, sequences: Sequence[tuple[DrawnSequence, int]]) -> list[np.ndarray]:
    """Per position log p(drawn) - log reference(drawn), 0 where nothing was drawn; its mean estimates the KL.

    Each sequence comes with its task.
    """

    async def one(sequence: DrawnSequence, task: int) -> np.ndarray:
        found: np.ndarray = (
            sequence.logprobs_N - await reference.logprobs(sequence.tokens, task=task)
        ) * sequence.drawn_N
        return found

    return list(await asyncio.gather(*(one(sequence, task) for sequence, task in sequences)))


class OpenReference(Stage):
    """The base model, if the config asks for a penalty on leaving it."""

    name = "open_reference"
    needs = ("sampling_client",)

    async def execute(self, ctx: Context) -> Context:
        coefficient = ctx.config.kl_penalty_coef
        if not coefficient:
            return ctx.put(divergence_coef=0.0)
        client = ctx.get_adapter("sampling_client")
        sampler = await asyncio.to_thread(client.open_sampler, ctx.config.model)
        return ctx.put(divergence_coef=coefficient, reference=Reference(samplers=(sampler,)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    forward_backward: Pending[ForwardBackwardOutput]
    optim_step: Pending[OptimStepResponse]


class Update(Stage):
    """One pass over the round's sequences and one optimizer step; nothing where no advantage differs from 0."""

    name = "update"
    needs = ("training_client",)

    def execute(self, ctx: Context) -> Context:
        config, client, session = ctx.config, ctx.get_adapter("training_client"), ctx.state.session
        weighted = [item for item in ctx.state.weighted if np.any(item.advantages_N * item.sequence.drawn_N)]
        if not weighted:
            return ctx
        scale = 1.0 / float(sum(item.sequence.num_drawn for item in weighted))
        data = [item.sequence.datum(item.advantages_N * scale, loss_fn=config.loss) for item in weighted]
        clip = {"clip_low_threshold": 1 - config.clip_epsilon, "clip_high_threshold": 1 + config.clip_epsilon}
        passed = client.forward_backward(session, data, config.loss, clip if config.loss in CLIPPED else None)
        stepped = client.optim_step(
            session, config.adam_params(ctx.state.rounds_current + 1, ctx.state.course.num_steps)
        )
        updated = Updated(forward_backward=passed, optim_step=stepped)
        return ctx.put(
            updates=(*ctx.get_state("updates", ()), updated),
            num_tokens=sum(datum.model_input.length for datum in data),
        )


class LogRound(Stage):
    """Wait for the round's updates and write it down."""

    name = "log_round"

    async def execute(self, ctx: Context) -> Context:
        log: RunLog = ctx.state.log
        loss, grad_norm, metrics = 0.0, None, {"approx_kl": 0.0}
        for updated in ctx.get_state("updates", ()):
            output = await updated.forward_backward
            stepped = (await updated.optim_step).metrics or {}
            loss, grad_norm = output.loss_sum, stepped.get("grad_norm:mean")
            metrics["approx_kl"] = output.metrics.get("approx_kl:mean", 0.0)
        step = ctx.state.rounds_current + 1
        tokens = ctx.get_state("num_tokens", 0)
        row = log.step(
            step=step,
            epoch=1,
            loss=loss,
            loss_sum=loss,
            tokens=tokens,
            learning_rate=ctx.config.adam_params(step, ctx.state.course.num_steps).learning_rate,
            grad_norm=grad_norm,
            metrics={**ctx.state.figures, **metrics},
        )
        ctx.emit("training.step", {"step": step, "loss": loss, "learning_rate": row.learning_rate})
        ctx.emit(ctx.get_state("step_event", "rl.step"), {"step": step, **row.metrics})
        reward = row.metrics.get("reward", 0.0)
        return ctx.put(row=row).drop_state("updates", "num_tokens").record_metric("reward", reward, step)


def evaluation_is_due(ctx: Context) -> bool:
    step, config = ctx.state.rounds_current + 1, ctx.config
    return bool(config.eval_size) and (step == config.num_rollouts or is_due(step, config.eval_every))


class EvaluateHeldOut(Stage):
    """The mean reward of the most likely answers to tasks that are never trained on."""

    name = "evaluate_held_out"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        client, step = ctx.get_adapter("training_client"), ctx.state.rounds_current + 1
        sampler = await asyncio.to_thread(client.sampler, ctx.state.session)
        spec: RolloutSpec = ctx.state.spec
        greedy = replace(
            spec,
            group_size=1,
            groups=ctx.config.eval_size,
            temperature=0.0,
            limits=replace(spec.limits, timeout_s=None),
        )
        first_task = -ctx.config.eval_size
        batch = await draw_batch(
            greedy, sampler, first_task=first_task, version=step, seed_of=lambda group, turn, episode: 0
        )
        reward = float(np.mean([episode.reward for episode in batch.episodes]))
        ctx.state.log.evaluated(step, test_reward=reward)
        ctx.emit("eval.complete", {"step": step, "test_reward": reward})
        return ctx


def checkpoint_is_due(ctx: Context) -> bool:
    step = ctx.state.rounds_current + 1
    return step == ctx.state.course.num_steps or is_due(step, ctx.config.save_every)


class SaveRound(Stage):
    """A checkpoint of a moment at which nothing is under way."""

    name = "save_round"
    needs = ("training_client",)
    commits = True

    async def execute(self, ctx: Context) -> Context:
        client, session, row = ctx.get_adapter("training_client"), ctx.state.session, ctx.state.row
        paths = await client.save_checkpoint(session, checkpoint_name(row.step))
        run_id, kept = client.run_id(session), ctx.get_state("kept", {})
        record = ctx.state.log.saved(row, paths, run_id=run_id, cursor=ctx.cursor, kept=kept)
        ctx.emit("training.checkpoint", {"step": row.step}, path=record.sampler_path)
        return ctx


class StopRollouts(Stage):
    """Give up episodes that are still being drawn when a run ends early."""

    name = "stop_rollouts"

    async def execute(self, ctx: Context) -> None:
        tasks = list(ctx.get_state("under_way", {}).values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
