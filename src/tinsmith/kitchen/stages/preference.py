"""Stages of preference training.

The reference is a name — the base model, or a checkpoint's path — and scored through its own sampler, never "what the
session holds now": a resumed run has the same reference.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from tinsmith.data import (
    BatchPlan,
    Conversation,
    DataError,
    Message,
    Renderer,
    conversation_from_record,
    hold_out,
    to_datum,
)
from tinsmith.data.records import REFUSED_KEYS
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import ConfigError, GateFailed
from tinsmith.kitchen.ports import Pending, Record, Sampler
from tinsmith.kitchen.preferences import WITHOUT_REFERENCE, Pair, make_loss, preference_loss, score_pairs
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.stages.common import begin_of, count, unread_keys
from tinsmith.kitchen.stages.steps import Measured, submit_step
from tinsmith.kitchen.stages.supervised import check_warmup
from tinsmith.types import Datum, ForwardBackwardOutput

LN2_TOLERANCE: Final = 0.02
PAIR_KEYS: Final = frozenset({"prompt", "messages", "tools", "chosen", "rejected"})
"""Keys of a record that are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceCourse:
    """All that is decided before the first step."""

    pairs: tuple[Pair, ...]
    """To train on first, then held out."""
    num_training: int
    plan: BatchPlan
    remarks: tuple[str, ...]
    facts: Mapping[str, Any]

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    @property
    def test_indices(self) -> range:
        return range(self.num_training, len(self.pairs))

    def data(self, indices: Sequence[int]) -> list[Datum]:
        return [datum for index in indices for datum in (self.pairs[index].chosen, self.pairs[index].rejected)]


class BuildPairs(Stage):
    """Render every pair. Raises `DataError` naming file and line, `RenderError`, `ConfigError`."""

    name = "build_pairs"

    def execute(self, ctx: Context) -> Context:
        config, dataset = ctx.config, ctx.state.dataset
        max_context = ctx.get_state("max_context", None)
        pairs = [_pair(record, ctx.state.renderer, config.max_length, max_context) for record in dataset]
        ignored = Counter(key for record in dataset for key in record.values if key not in PAIR_KEYS)
        if not pairs:
            raise DataError(f"{dataset.name} holds no pair")
        try:
            training, test = hold_out(len(pairs), test_size=config.test_size, seed=config.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        plan = BatchPlan(
            num_examples=len(training), batch_size=config.batch_size, epochs=config.epochs, seed=config.seed
        )
        check_warmup(config.warmup_steps, plan.num_steps)
        course = PreferenceCourse(
            pairs=tuple(pairs[index] for index in (*training, *test)),
            num_training=len(training),
            plan=plan,
            remarks=(
                f"{count(len(training), 'pair')}, {len(test)} held out; {count(plan.num_steps, 'step')}",
                *unread_keys(dataset.name, ignored),
            ),
            facts={"pairs": len(pairs), "reference": reference_name(config), "ignored_keys": dict(ignored)},
        )
        return ctx.put(course=course)


def reference_name(config: Any) -> str:
    return str(config.reference or config.model)


def _pair(record: Record, renderer: Renderer, max_length: int, max_context: int | None) -> Pair:
    values = record.values
    for key in ("chosen", "rejected"):
        if not isinstance(values.get(key), str) or not values[key]:
            raise DataError(f"{record.source}: field {key!r} must be a text that is not empty, not {values.get(key)!r}")
    if values["chosen"] == values["rejected"]:
        raise DataError(f"{record.source}: chosen and rejected are the same, {values['chosen']!r}")
    prompt = _prompt(values, record.source)

    def datum(key: str) -> Datum:
        answer = Message(role="assistant", content=values[key])
        rendered = renderer.render(
            replace(prompt, messages=(*prompt.messages, answer)), "last_assistant_message"
        ).require_text()
        if len(rendered.tokens) > max_length:
            raise DataError(
                f"{record.source}: {len(rendered.tokens)} tokens with {key!r} are more than max_length {max_length}"
            )
        if max_context is not None and len(rendered.tokens) >= max_context:  # the reference scores it as a prompt
            raise DataError(
                f"{record.source}: {len(rendered.tokens)} tokens with {key!r} do not fit into the model's context of "
                f"{max_context}; shorten the prompt or the answer"
            )
        return to_datum(rendered.tokens, rendered.weights)

    return Pair(chosen=datum("chosen"), rejected=datum("rejected"), source=record.source)


def _prompt(values: Mapping[str, Any], source: str) -> Conversation:
    """Without the answer. Raises `DataError`; also for keys that would change the prompt and are not read here."""
    given = [values[key] for key in ("prompt", "messages") if values.get(key) is not None]
    if not given:
        raise DataError(f"{source}: field 'prompt' is missing; expected a text, or messages")
    if len(given) > 1:
        raise DataError(f"{source}: the line has both 'prompt' and 'messages'; keep one")
    messages = [{"role": "user", "content": given[0]}] if isinstance(given[0], str) else given[0]
    beside = {
        key: values[key] for key in ("tools", *REFUSED_KEYS) if key in values and key not in ("chosen", "rejected")
    }
    return conversation_from_record({**beside, "messages": messages}, source=source)


class ScoreReference(Stage):
    """Log-probabilities of both answers of every pair under the reference, all at once."""

    name = "score_reference"
    needs = ("sampling_client",)

    async def execute(self, ctx: Context) -> Context:
        course: PreferenceCourse = ctx.state.course
        if ctx.config.loss in WITHOUT_REFERENCE:
            return ctx.put(reference=[(0.0, 0.0)] * len(course.pairs))
        client = ctx.get_adapter("sampling_client")
        sampler: Sampler = await asyncio.to_thread(client.open_sampler, reference_name(ctx.config))
        data = course.data(range(len(course.pairs)))
        scores = await asyncio.gather(*(_reference_score(sampler, datum) for datum in data))
        return ctx.put(reference=list(zip(scores[::2], scores[1::2], strict=True)))


async def _reference_score(sampler: Sampler, datum: Datum) -> float:
    tokens = [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])]
    logprobs = np.asarray([value or 0.0 for value in await sampler.compute_logprobs(tokens)][1:], dtype=np.float64)
    return float((logprobs * (datum.loss_fn_inputs["weights"].to_numpy() != 0)).sum())


class PreferenceGate(Stage):
    """A fresh adapter is its own reference: the first loss must be what a margin of 0 gives: ln 2 for dpo."""

    name = "preference_gate"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        config, course = ctx.config, ctx.state.course
        is_fresh = begin_of(ctx) is None and config.reference is None
        if not config.numerics_gate or not is_fresh or config.loss in WITHOUT_REFERENCE:
            return ctx
        indices = course.plan.batch(0)
        data = course.data(indices)
        output = await ctx.get_adapter("training_client").forward(ctx.state.session, data)
        logprobs = [values.to_numpy() for values in output.logprobs]
        reference = [ctx.state.reference[index] for index in indices]
        found = preference_loss(
            config.loss, score_pairs(data, logprobs, reference), beta=config.beta, gamma=config.gamma
        )
        expected = {"dpo": math.log(2), "ipo": (1 / (2 * config.beta)) ** 2, "kto": 0.5}[config.loss]
        if abs(found.loss - expected) > LN2_TOLERANCE * expected:
            raise GateFailed(
                f"the {config.loss} loss before the first step is {found.loss:.4f}, not {expected:.4f}: the reference "
                f"{reference_name(config)!r} does not score as the fresh adapter does. Check that it is the base that "
                "is trained; numerics_gate=false goes on anyway"
            )
        ctx.emit("gate.passed", {"loss": found.loss, "expected": expected})
        return ctx.record_metric("gate/loss", found.loss)


class SubmitPairs(Stage):
    name = "submit_pairs"
    needs = ("training_client",)

    def execute(self, ctx: Context) -> Context:
        config, course = ctx.config, ctx.state.course
        client, session, step = ctx.get_adapter("training_client"), ctx.state.session, ctx.state.steps_current + 1
        indices = course.plan.batch(step - 1)
        data = course.data(indices)
        reference = [ctx.state.reference[index] for index in indices]
        loss = make_loss(config.loss, reference, beta=config.beta, gamma=config.gamma)
        names = ("accuracy", "margin", "chosen_reward", "rejected_reward")

        def evaluate() -> Pending[ForwardBackwardOutput]:
            found: Pending[ForwardBackwardOutput] = client.forward(session, course.data(course.test_indices))
            return found

        return submit_step(
            ctx,
            step=step,
            epoch=course.plan.epoch_of(step - 1) + 1,
            num_tokens=sum(datum.model_input.length for datum in data),
            forward_backward=client.forward_backward_custom(session, data, loss),
            measure=lambda output: Measured(
                loss=output.loss_sum,
                loss_sum=output.loss_sum * len(indices),
                metrics={name: output.metrics[name] for name in names},
            ),
            evaluate=evaluate if course.test_indices else None,
            measure_evaluation=lambda output: _evaluation(ctx, output),
            event="dpo.step",
        )


def _evaluation(ctx: Context, output: ForwardBackwardOutput) -> Mapping[str, float]:
    config, course = ctx.config, ctx.state.course
    reference = [ctx.state.reference[index] for index in course.test_indices]
    logprobs = [values.to_numpy() for values in output.logprobs]
    scores = score_pairs(course.data(course.test_indices), logprobs, reference)
    found = preference_loss(config.loss, scores, beta=config.beta, gamma=config.gamma)
    return {
        "test_loss": found.loss,
        "test_accuracy": found.metrics["accuracy"],
        "test_margin": found.metrics["margin"],
        "test_likelier": scores.likelier,
    }
