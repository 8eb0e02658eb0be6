"""Stages of distillation.

The teacher is a name: a base model, a checkpoint's path, or the adapter that the workflow itself taught, whose path the
checkpoints of the run keep. It answers through its own sampler and is never what the session holds now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinsmith.data import BatchPlan, ConversationDataset, ConversationFile, Message, RenderedConversation, build_dataset
from tinsmith.data.jsonl import conversations_of
from tinsmith.kitchen.advantages import Advantages
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.ports import Sampler, SessionSpec
from tinsmith.kitchen.rollouts import draw_batch
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.stages.common import begin_of, count, data_path
from tinsmith.kitchen.stages.reinforcement import RolloutCourse, log_ratios, rollout_spec
from tinsmith.kitchen.stages.supervised import LOSS_FN, SupervisedCourse, check_warmup
from tinsmith.kitchen.tasks import Prompts
from tinsmith.types import SamplingParams

TEACHER = "teacher"


def teacher_is_missing(ctx: Context) -> bool:
    return ctx.config.teacher is None and "teacher" not in _kept(ctx)


def _kept(ctx: Context) -> dict[str, Any]:
    """What the checkpoint that the run goes on from knows, and what was found out since."""
    begin = begin_of(ctx)
    return {**(begin.kept if begin else {}), **ctx.get_state("kept", {})}


class ReadPrompts(Stage):
    """The conversations of the data, and the prompts they begin with: all up to the last answer."""

    name = "read_prompts"

    def execute(self, ctx: Context) -> Context:
        dataset = ctx.state.dataset
        records = [(record.values, record.source) for record in dataset]
        file: ConversationFile = conversations_of(data_path(ctx), records, sha256=dataset.sha256)
        prompts = tuple(_prompt(conversation.messages) for conversation in file.conversations)
        return ctx.put(conversations=file.conversations, prompts=tuple(dict.fromkeys(prompts)))


def _prompt(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Raises `ConfigError` if nothing is left to answer."""
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    if last == 0:
        raise ConfigError("a conversation begins with its only answer: there is no prompt to distil on")
    return tuple(messages[:last])


class StartTeacher(Stage):
    """A fresh adapter that will be taught on the answers in the data."""

    name = "start_teacher"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        config, client = ctx.config, ctx.get_adapter("training_client")
        spec = SessionSpec(model=config.model, lora_rank=config.lora_rank, seed=config.seed, metadata={"role": TEACHER})
        taught = build_dataset(
            ctx.state.conversations, ctx.state.renderer, train_on="all_assistant_messages", max_length=None
        )
        plan = BatchPlan(
            num_examples=len(taught.examples), batch_size=8, epochs=config.teacher_epochs, seed=config.seed
        )
        session = await asyncio.to_thread(client.start_session, spec)
        return ctx.put(teacher_session=session, teacher_data=taught, teacher_plan=plan)


class TeachStep(Stage):
    name = "teach_step"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        client, session, step = ctx.get_adapter("training_client"), ctx.state.teacher_session, ctx.state.lessons_current
        data, _ = ctx.state.teacher_data.data(ctx.state.teacher_plan.batch(step))
        passed = client.forward_backward(session, data, LOSS_FN)
        rate = ctx.config.teacher_learning_rate * (1 - step / ctx.state.teacher_plan.num_steps)
        await client.optim_step(session, rate)
        return ctx.record_metric("teacher_loss", (await passed).loss_sum, step + 1)


class SaveTeacher(Stage):
    """Store the taught adapter; checkpoints of the run keep its path."""

    name = "save_teacher"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        client, session = ctx.get_adapter("training_client"), ctx.state.teacher_session
        paths = await client.save_checkpoint(session, TEACHER)
        client.close_session(session)
        return ctx.put(kept={**ctx.get_state("kept", {}), "teacher": paths.sampler}).drop_state(
            "teacher_session", "teacher_data", "teacher_plan"
        )


class OpenTeacher(Stage):
    name = "open_teacher"
    needs = ("sampling_client",)

    async def execute(self, ctx: Context) -> Context:
        kept = _kept(ctx)
        name = ctx.config.teacher or kept["teacher"]
        sampler = await asyncio.to_thread(ctx.get_adapter("sampling_client").open_sampler, name)
        return ctx.put(reference_sampler=sampler, divergence_coef=1.0, kept={**kept, "teacher": name})


class PlanOnPolicy(Stage):
    """The student answers the prompts; the advantage of each token is the teacher's log-probability less its own."""

    name = "plan_on_policy"

    def execute(self, ctx: Context) -> Context:
        config = ctx.config
        check_warmup(config.warmup_steps, config.num_rollouts)
        course = RolloutCourse(
            num_steps=config.num_rollouts,
            remarks=(
                f"{count(len(ctx.state.prompts), 'prompt')}; {count(config.num_rollouts, 'round')} of "
                f"{count(config.groups_per_batch, 'prompt')} with {count(config.group_size, 'answer')} each",
            ),
            facts={"prompts": len(ctx.state.prompts), "teacher": config.teacher or "taught on the data"},
        )
        spec = rollout_spec(ctx, Prompts(prompts=ctx.state.prompts))
        return ctx.put(course=course, spec=spec, advantages=Advantages(), step_event="distillation.step")


class MeasureTeacherKl(Stage):
    """Reverse KL to the teacher, in nats per token, on answers that the student draws to prompts from the data."""

    name = "measure_teacher_kl"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        client, config = ctx.get_adapter("training_client"), ctx.config
        sampler: Sampler = await asyncio.to_thread(client.sampler, ctx.state.session)
        spec = rollout_spec(ctx, Prompts(prompts=ctx.state.prompts))
        batch = await draw_batch(
            spec, sampler, first_task=0, version=0, seed_of=lambda group, turn, episode: config.seed + group
        )
        sequences = [sequence for episode in batch.whole for sequence in episode.rollout.sequences()]
        gaps = await log_ratios(ctx.state.reference_sampler, sequences)
        drawn = float(sum(sequence.num_drawn for sequence in sequences))
        divergence = float(sum(gap_N.sum() for gap_N in gaps)) / max(drawn, 1.0)
        step = 0 if "row" not in ctx.state else ctx.state.row.step
        begin = begin_of(ctx)
        if step or begin is None:
            ctx.state.log.evaluated(step, teacher_kl=divergence)
            ctx.emit("eval.complete", {"step": step, "teacher_kl": divergence})
        return ctx


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    prompt: tuple[Message, ...]
    tokens: tuple[int, ...]
    """Prompt and answer."""
    num_prompt: int
    text: str


class TeacherAnswers(Stage):
    """The teacher answers every prompt `group_size` times; the student is trained on these answers."""

    name = "teacher_answers"

    async def execute(self, ctx: Context) -> Context:
        config, prompts = ctx.config, ctx.state.prompts
        answers = await asyncio.gather(*(_answers(ctx, prompt, number) for number, prompt in enumerate(prompts)))
        examples = tuple(
            RenderedConversation(
                tokens=answer.tokens,
                weights=(0.0,) * answer.num_prompt + (1.0,) * (len(answer.tokens) - answer.num_prompt),
                source="the teacher",
            )
            for group in answers
            for answer in group
        )
        training = ConversationDataset(examples=examples, num_truncated=0, num_skipped=0)
        plan = BatchPlan(
            num_examples=len(examples), batch_size=config.batch_size, epochs=config.epochs, seed=config.seed
        )
        check_warmup(config.warmup_steps, plan.num_steps)
        facts: dict[str, Any] = {
            "prompts": len(prompts),
            "answers": len(examples),
            "teacher": ctx.state.kept["teacher"],
        }
        remarks = (f"{count(len(examples), 'answer')} of the teacher to {count(len(prompts), 'prompt')}",)
        course = SupervisedCourse(training=training, test=None, plan=plan, remarks=remarks, facts=facts)
        return ctx.put(course=course, teacher_texts=tuple(answer for group in answers for answer in group))


async def _answers(ctx: Context, prompt: tuple[Message, ...], number: int) -> list[Answer]:
    config, renderer = ctx.config, ctx.state.renderer
    tokens = renderer.generation_prompt(prompt, source=f"prompt {number}")
    params = SamplingParams(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=(config.seed * 1_000_003 + number) % 2**31,
        stop=renderer.stop,
    )
    drawn = await ctx.state.reference_sampler.sample(tokens, params, num_samples=config.group_size)
    return [
        Answer(
            prompt=prompt,
            tokens=(*tokens, *sequence.tokens),
            num_prompt=len(tokens),
            text=renderer.parse_response(sequence.tokens).content,
        )
        for sequence in drawn.sequences
    ]


class LogTeacherAnswers(Stage):
    """Write the teacher's answers down as readable rows."""

    name = "log_teacher_answers"
    on_resume = "run"

    def execute(self, ctx: Context) -> None:
        if begin_of(ctx) is not None:
            return
        for answer in ctx.state.teacher_texts:
            prompt = "\n".join(f"{message.role}: {message.content}" for message in answer.prompt)
            ctx.state.log.rollout({"step": 0, "prompt": prompt, "answer": answer.text, "reward": None})


class CloseTeacher(Stage):
    """On every path: a teacher's session that is still open is given back."""

    name = "close_teacher"

    def execute(self, ctx: Context) -> None:
        session = ctx.get_state("teacher_session", None)
        if session is not None:
            ctx.get_adapter("training_client").close_session(session)
