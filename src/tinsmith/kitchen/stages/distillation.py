"""Stages of distillation.

A teacher is a name: a base model, a checkpoint's path, or the adapter that the workflow itself taught, whose path the
checkpoints of the run keep. It answers through its own sampler and is never what the session holds now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from tinsmith.data import BatchPlan, Conversation, ConversationDataset, ConversationFile, DataError, build_dataset
from tinsmith.data.jsonl import conversations_of
from tinsmith.kitchen.advantages import Advantages
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.distilled import DistilledDataset, TeacherAnswer
from tinsmith.kitchen.ports import Sampler, SessionSpec
from tinsmith.kitchen.reference import Reference
from tinsmith.kitchen.rollouts import draw_batch
from tinsmith.kitchen.run_log import RunLog
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.stages.common import begin_of, count, data_path
from tinsmith.kitchen.stages.reinforcement import RolloutCourse, log_ratios, rollout_spec
from tinsmith.kitchen.stages.supervised import LOSS_FN, SupervisedCourse, check_warmup
from tinsmith.kitchen.tasks import Prompts
from tinsmith.types import SampledSequence, SamplingParams

TEACHER = "teacher"


def teacher_is_missing(ctx: Context) -> bool:
    return ctx.config.teacher is None and "teacher" not in _kept(ctx)


def _kept(ctx: Context) -> dict[str, Any]:
    """What the checkpoint that the run goes on from knows, and what was found out since."""
    begin = begin_of(ctx)
    return {**(begin.kept if begin else {}), **ctx.get_state("kept", {})}


class ReadPrompts(Stage):
    """The conversations of the data, and the prompts they begin with: all up to the last answer.

    Raises `DataError`; and `RenderError` for a prompt that the format has no place for, before anything is drawn.
    """

    name = "read_prompts"

    def execute(self, ctx: Context) -> Context:
        dataset = ctx.state.dataset
        records = [(record.values, record.source) for record in dataset]
        file: ConversationFile = conversations_of(data_path(ctx), records, sha256=dataset.sha256)
        found: dict[tuple[str, int], Conversation] = {}
        for conversation, (values, source) in zip(file.conversations, records, strict=True):
            prompt = _prompt(conversation)
            tokens = ctx.state.renderer.generation_prompt(prompt.messages, tools=prompt.tools, source=source)
            if _room(ctx, len(tokens)) < 1:
                raise DataError(
                    f"{source}: a prompt of {len(tokens)} tokens leaves no room for an answer in the model's context "
                    f"of {ctx.state.max_context}; shorten it"
                )
            same = repr((prompt.messages, prompt.tools))
            found.setdefault((same, _owner(ctx.config, values, source)), prompt)
        return ctx.put(
            taught=_taught(ctx, file) if teacher_is_missing(ctx) else None,
            prompts=tuple(found.values()),
            prompt_owners=tuple(owner for _, owner in found) if ctx.config.teacher_of == "record" else (),
        )


def _taught(ctx: Context, file: ConversationFile) -> ConversationDataset:
    """What the teacher is to learn."""
    return build_dataset(
        file.conversations,
        ctx.state.renderer,
        train_on="all_assistant_messages",
        max_length=None,
        max_context=ctx.get_state("max_context", None),
    )


def _room(ctx: Context, num_prompt: int) -> int:
    """Tokens that an answer may have. It is also scored as a prompt, which needs room for a token behind it."""
    max_tokens, max_context = int(ctx.config.max_tokens), ctx.get_state("max_context", None)
    return max_tokens if max_context is None else min(max_tokens, max_context - 1 - num_prompt)


def _owner(config: Any, values: Mapping[str, Any], source: str) -> int:
    """The teacher (from 0) that a record names by its number (from 1). Raises `DataError`."""
    if config.teacher_of == "mixed":
        return 0
    number, count = values.get("teacher"), len(config.teacher_names)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= count:
        raise DataError(f"{source}: teacher={number!r} is no number of a teacher, from 1 to {count}")
    return number - 1


def _prompt(conversation: Conversation) -> Conversation:
    """Raises `DataError` if nothing is left to answer."""
    messages = conversation.messages
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    if last == 0:
        raise DataError(f"{conversation.source}: it begins with its only answer: there is no prompt to distil on")
    return replace(conversation, messages=messages[:last])


class StartTeacher(Stage):
    """A fresh adapter that will be taught on the answers in the data."""

    name = "start_teacher"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        config, client = ctx.config, ctx.get_adapter("training_client")
        spec = SessionSpec(model=config.model, lora_rank=config.lora_rank, seed=config.seed, metadata={"role": TEACHER})
        taught = ctx.state.taught
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
        config, client = ctx.config, ctx.get_adapter("sampling_client")
        names = config.teacher_names or (kept["teacher"],)
        samplers = [await asyncio.to_thread(client.open_sampler, name) for name in names]
        reference = Reference(
            samplers=tuple(samplers), weights=config.weights_of(len(names)), of_prompt=ctx.state.prompt_owners
        )
        return ctx.put(reference=reference, divergence_coef=1.0, kept={**kept, "teacher": ",".join(names)})


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
    on_resume = "skip"

    async def execute(self, ctx: Context) -> Context:
        log: RunLog = ctx.state.log
        step = log.rows[-1].step if log.rows else 0
        if any(row["step"] == step for row in log.evaluations):
            return ctx  # a run that is resumed after its end has measured it already
        client, config = ctx.get_adapter("training_client"), ctx.config
        sampler: Sampler = await asyncio.to_thread(client.sampler, ctx.state.session)
        spec = rollout_spec(ctx, Prompts(prompts=ctx.state.prompts))
        batch = await draw_batch(
            spec, sampler, first_task=0, version=0, seed_of=lambda group, turn, episode: config.seed + group
        )
        sequences = [(sequence, episode.task) for episode in batch.whole for sequence in episode.rollout.sequences()]
        gaps = await log_ratios(ctx.state.reference, sequences)
        drawn = float(sum(sequence.num_drawn for sequence, _ in sequences))
        divergence = float(sum(gap_N.sum() for gap_N in gaps)) / max(drawn, 1.0)
        log.evaluated(step, teacher_kl=divergence)
        ctx.emit("eval.complete", {"step": step, "teacher_kl": divergence})
        return ctx


class TeacherAnswers(Stage):
    """The teacher answers every prompt `group_size` times; the student is trained on these answers."""

    name = "teacher_answers"

    async def execute(self, ctx: Context) -> Context:
        config, prompts = ctx.config, ctx.state.prompts
        groups = await asyncio.gather(*(_answers(ctx, prompt, number) for number, prompt in enumerate(prompts)))
        answers = tuple(answer for group in groups for answer in group)
        plan = BatchPlan(
            num_examples=len(answers), batch_size=config.batch_size, epochs=config.epochs, seed=config.seed
        )
        check_warmup(config.warmup_steps, plan.num_steps)
        facts: dict[str, Any] = {
            "prompts": len(prompts),
            "answers": len(answers),
            "teacher": ctx.state.kept["teacher"],
        }
        remarks = (f"{count(len(answers), 'answer')} of the teacher to {count(len(prompts), 'prompt')}",)
        course = SupervisedCourse(
            training=DistilledDataset(answers=answers), test=None, plan=plan, remarks=remarks, facts=facts
        )
        return ctx.put(course=course, teacher_answers=answers)


async def _answers(ctx: Context, prompt: Conversation, number: int) -> list[TeacherAnswer]:
    """One request asks a teacher for all answers that are its own; with several, each answer's is drawn by weight."""
    config, renderer, reference = ctx.config, ctx.state.renderer, ctx.state.reference
    tokens = renderer.generation_prompt(prompt.messages, tools=prompt.tools, source=prompt.source)
    seed = (config.seed * 1_000_003 + number) % 2**31
    rng = Random(f"tinsmith/teachers/{config.seed}/{number}")
    drawn: list[SampledSequence] = []
    for sampler, num_samples in reference.answering(number, config.group_size, rng):
        params = SamplingParams(
            max_tokens=_room(ctx, len(tokens)), temperature=config.temperature, seed=seed, stop=renderer.stop
        )
        response = await sampler.sample(tokens, params, num_samples=num_samples)
        drawn += response.sequences
    said = "\n".join(f"{message.role}: {message.content}" for message in prompt.messages)
    return list(await asyncio.gather(*(_answer(ctx, said, tokens, one, number) for one in drawn)))


async def _answer(ctx: Context, said: str, prompt: Sequence[int], drawn: SampledSequence, number: int) -> TeacherAnswer:
    tokens, k = (*prompt, *drawn.tokens), ctx.config.top_k
    rows = (await ctx.state.reference.top_k(tokens, k, task=number))[len(prompt) - 1 :] if k else []
    return TeacherAnswer(
        prompt=said,
        text=ctx.state.renderer.parse_answer(drawn.tokens).message.content,
        tokens=tokens,
        num_prompt=len(prompt),
        top_k=tuple(rows),
    )


class LogTeacherAnswers(Stage):
    """Write the teacher's answers down as readable rows."""

    name = "log_teacher_answers"
    on_resume = "run"

    def execute(self, ctx: Context) -> None:
        if begin_of(ctx) is not None:
            return
        for answer in ctx.state.teacher_answers:
            ctx.state.log.rollout({"step": 0, "prompt": answer.prompt, "answer": answer.text, "reward": None})


class CloseTeacher(Stage):
    """On every path: a teacher's session that is still open is given back."""

    name = "close_teacher"

    def execute(self, ctx: Context) -> None:
        session = ctx.get_state("teacher_session", None)
        if session is not None:
            ctx.get_adapter("training_client").close_session(session)
