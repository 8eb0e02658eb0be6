"""Stages that every shipped workflow has: data, session, folder, gate, end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from tinsmith.data import DataError, Message, choose_renderer
from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import ConfigError, GateFailed
from tinsmith.kitchen.manifest import make_manifest
from tinsmith.kitchen.ports import Dataset, ModelRegistry, Sampler, SessionSpec
from tinsmith.kitchen.run_folder import CheckpointRecord, RunFolder
from tinsmith.kitchen.run_log import RunLog, check_same_data
from tinsmith.kitchen.stage import Stage
from tinsmith.observe import plot_loss
from tinsmith.types import Datum, ModelInput, SamplingParams, TensorData

GATE_GAP_MAX: Final = 0.1
"""Nats per token that sampling and training may differ by, on the mean: more spoils every importance ratio."""
GATE_PROMPT: Final = "Who are you?"
GATE_TOKENS: Final = 16


class LoadDataset(Stage):
    """Read the records that the config names.

    Raises `DataError` for several splits: one that is there to test on must not be trained on. Raises `RunFolderError`
    if a resumed run was made with other records.
    """

    name = "load_dataset"
    needs = ("dataset_store",)

    def execute(self, ctx: Context) -> Context:
        dataset: Dataset = ctx.get_adapter("dataset_store").load_dataset(str(ctx.config.data))
        if len(dataset.splits) > 1:
            splits = ", ".join(map(repr, dataset.splits))
            raise DataError(f"{dataset.name!r} has the splits {splits}; name the one to train on")
        if ctx.config.resume:
            check_same_data(folder_of(ctx), sha256=dataset.sha256, name=str(ctx.config.data))
        ctx.emit("dataset.load", {"records": len(dataset)}, name=dataset.name, sha256=dataset.sha256)
        return ctx.put(dataset=dataset)


class StartSession(Stage):
    """A fresh adapter, or the one of the checkpoint that the run goes on from."""

    name = "start_session"
    needs = ("training_client",)

    async def execute(self, ctx: Context) -> Context:
        config, client, begin = ctx.config, ctx.get_adapter("training_client"), begin_of(ctx)
        spec = SessionSpec(
            model=config.model,
            lora_rank=config.lora_rank,
            seed=config.seed,
            resume_from=begin.state_path if begin else None,
            metadata={"recipe": ctx.state.recipe},
        )
        session = await asyncio.to_thread(client.start_session, spec)
        tokenizer = client.get_tokenizer(session)
        return ctx.put(
            session=session,
            tokenizer=tokenizer,
            renderer=choose_renderer(tokenizer),
            max_context=getattr(session, "max_context", None),
        )


class OpenRun(Stage):
    """Make the run's folder, or rewind that of a resumed run to its checkpoint, and open its log.

    `course` must be in the state by now, so nothing is written before data and config are known to fit.
    """

    name = "open_run"

    def execute(self, ctx: Context) -> Context:
        config, folder, begin, course = ctx.config, folder_of(ctx), begin_of(ctx), ctx.state.course
        client, session = ctx.get_adapter("training_client"), ctx.state.session
        if config.resume:
            folder.rewind(begin.step if begin else -1)
        else:
            folder.create(
                config=config.model_copy(update={"output": folder.path}).model_dump(mode="json"),
                manifest=make_manifest(
                    recipe=ctx.state.recipe,
                    config=config,
                    dataset=ctx.get_state("dataset", None),
                    facts=course.facts,
                    run_id=client.run_id(session),
                    base_url=getattr(client, "location", None),
                    started=ctx.metadata.started_at,
                ),
            )
        clock = ctx.get_state("clock", None)
        log = RunLog(folder, ctx.get_state("observers", ()), begin=begin, **({"clock": clock} if clock else {}))
        return ctx.put(log=log)


class BeginTraining(Stage):
    """Tell the watchers what will happen."""

    name = "begin_training"

    def execute(self, ctx: Context) -> Context:
        log: RunLog = ctx.state.log
        num_steps = ctx.state.course.num_steps
        log.start(f"training {ctx.config.model}", num_steps=num_steps, remarks=ctx.state.course.remarks)
        return ctx


class NumericsGate(Stage):
    """Stop unless the numbers are right at the start.

    Sampler and trainer must agree on the log-probabilities of a sampled answer, and a fresh adapter must score it as
    the base model does: LoRA's B is zero.
    """

    name = "numerics_gate"
    needs = ("training_client", "sampling_client")

    async def execute(self, ctx: Context) -> Context:
        if not ctx.config.numerics_gate:
            return ctx
        client, session = ctx.get_adapter("training_client"), ctx.state.session
        prompt = ctx.state.renderer.generation_prompt([Message(role="user", content=GATE_PROMPT)])
        sampler: Sampler = await asyncio.to_thread(client.sampler, session)
        params = SamplingParams(max_tokens=GATE_TOKENS, seed=ctx.config.seed, stop=ctx.state.renderer.stop)
        drawn = (await sampler.sample(prompt, params, num_samples=1)).sequences[0]
        tokens = [*prompt, *drawn.tokens]
        scored = (await client.forward(session, [scoring_datum(tokens)])).loss_fn_outputs[0]["logprobs"].to_numpy()
        trained_N = scored[len(prompt) - 1 :]
        gap = _check_gap("sampler and trainer disagree", np.asarray(drawn.logprobs), trained_N)
        base_gap = 0.0
        if begin_of(ctx) is None:
            base = await asyncio.to_thread(ctx.get_adapter("sampling_client").open_sampler, ctx.config.model)
            of_base = [value for value in await base.compute_logprobs(tokens) if value is not None]
            base_gap = _check_gap("a fresh adapter is not the base model", np.asarray(of_base), scored)
        ctx.emit("gate.passed", {"sampler_gap": gap, "base_gap": base_gap})
        return ctx.record_metric("gate/sampler_gap", gap).record_metric("gate/base_gap", base_gap)


class FinishRun(Stage):
    """Close the log, draw the curve, write the report."""

    name = "finish_run"
    on_resume = "run"

    def execute(self, ctx: Context) -> Context:
        from tinsmith.kitchen.report import write_report

        log: RunLog = ctx.state.log
        log.end()
        plot_loss(log.rows, log.folder.plot_file, title=f"Training loss of {ctx.config.model}")
        write_report(log.folder)
        artifacts: dict[str, Any] = {
            "output": log.folder.path,
            "checkpoint": log.checkpoint,
            "report": log.folder.report_file,
        }
        return ctx.put(artifacts={**ctx.get_state("artifacts", {}), **artifacts})


class RegisterModel(Stage):
    """The next version under the name that the config gives; nothing without one."""

    name = "register_model"
    on_resume = "run"

    def validate(self, ctx: Context) -> None:
        if ctx.config.register_as is not None and "model_registry" not in ctx.adapters:
            raise ConfigError(f"register_as={ctx.config.register_as!r} needs an adapter for 'model_registry'")

    def execute(self, ctx: Context) -> Context:
        name, log = ctx.config.register_as, ctx.state.log
        if name is None:
            return ctx
        record: CheckpointRecord = log.checkpoint
        registry: ModelRegistry = ctx.get_adapter("model_registry")
        made = next((model for model in registry.list(name) if model.path == record.sampler_path), None)
        if made is None:  # a run that is resumed after its end has registered it already
            metadata = {"recipe": ctx.state.recipe, "base": ctx.config.model, "step": record.step, "run": record.run_id}
            made = registry.register(name, record.sampler_path, metadata=metadata)
            ctx.emit("model.registered", {"version": made.version}, name=name, path=made.path)
        log.note(f"registered as {name}:{made.version}")
        return ctx.put(registered=made, artifacts={**ctx.get_state("artifacts", {}), "registered": made})


class CloseRun(Stage):
    """On every path: close the log and give the session back."""

    name = "close_run"

    def execute(self, ctx: Context) -> None:
        log: RunLog | None = ctx.get_state("log", None)
        if log is not None:
            log.end()
        session = ctx.get_state("session", None)
        if session is not None:
            ctx.get_adapter("training_client").close_session(session)


def folder_of(ctx: Context) -> RunFolder:
    folder: RunFolder = ctx.get_state("folder")
    return folder


def begin_of(ctx: Context) -> CheckpointRecord | None:
    return CheckpointRecord(**ctx.metadata.resumed) if ctx.metadata.resumed else None


def scoring_datum(tokens: list[int]) -> Datum:
    """All tokens after the first as targets, without weight."""
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": TensorData.from_numpy(np.asarray(tokens[1:], dtype=np.int64)),
            "weights": TensorData.from_numpy(np.zeros(len(tokens) - 1, dtype=np.float32)),
        },
    )


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def unread_keys(name: str, keys: Mapping[str, int]) -> list[str]:
    """A remark on keys of the records that nothing read, and how many had each."""
    shown = ", ".join(f"{key!r} ({count(number, 'line')})" for key, number in keys.items())
    return [f"keys in {Path(name).name} that were not read: {shown}"] if keys else []


def data_path(ctx: Context) -> Path:
    return Path(str(ctx.config.data))


def _check_gap(what: str, first_N: np.ndarray, second_N: np.ndarray) -> float:
    """The mean difference in nats. Raises `GateFailed` if it is too large."""
    gap = float(np.abs(first_N.astype(np.float64) - second_N.astype(np.float64)).mean()) if len(first_N) else 0.0
    if not math.isfinite(gap) or gap > GATE_GAP_MAX:
        raise GateFailed(
            f"{what}: their log-probabilities of the same tokens differ by {gap:.3f} nats on the mean, "
            f"more than {GATE_GAP_MAX}. Policy losses and references would be wrong from the first step. "
            "Check that both use the same weights, tokenizer and precision; numerics_gate=false goes on anyway"
        )
    return gap
