"""Stages of the feedback loop: enough new feedback, or enough of it bad, trains a model on what was good.

What was seen lives in the blob store under `feedback/`: `baseline.json` says how many entries are behind the model in
use, `curated-N.json` what was taken of those after the first N. An interrupted loop finds the latter and trains on the
same data, however much feedback has come in since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import WorkflowError
from tinsmith.kitchen.ports import BlobStore, Feedback, dataset_of
from tinsmith.kitchen.run_log import check_same_data
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.stages.common import folder_of
from tinsmith.types.errors import NotFound

BASELINE: Final = "feedback/baseline.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    after: int = 0
    """Feedback entries that the model in use has behind it."""
    model: str | None = None
    """`NAME:VERSION` of that model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    reason: str | None
    """Why to train; `None` for no reason."""
    num_new: int
    bad_share: float
    """Of the new entries, those rated below 0."""


def find_trigger(new: Sequence[Feedback], *, min_new: int, bad_share_max: float | None, bad_min: int) -> Trigger:
    """`bad_share_max` counts from `bad_min` new entries on."""
    bad_share = sum(entry.rating < 0 for entry in new) / len(new) if new else 0.0
    reason = None
    if len(new) >= min_new:
        reason = f"{len(new)} new entries"
    elif bad_share_max is not None and len(new) >= bad_min and bad_share > bad_share_max:
        reason = f"{bad_share:.0%} of {len(new)} new entries are bad"
    return Trigger(reason=reason, num_new=len(new), bad_share=bad_share)


def curate(entries: Sequence[Feedback], *, min_rating: float) -> list[dict[str, str]]:
    """Corrections, and responses rated `min_rating` or better; the newest for each prompt."""
    good: dict[str, str] = {}
    for entry in entries:
        if entry.correction is not None:
            good[entry.prompt] = entry.correction
        elif entry.rating >= min_rating:
            good[entry.prompt] = entry.response
    return [{"prompt": prompt, "completion": completion} for prompt, completion in good.items()]


class CheckTriggers(Stage):
    name = "check_triggers"
    needs = ("feedback_client", "blob_store")

    def execute(self, ctx: Context) -> Context:
        config, blobs = ctx.config, ctx.get_adapter("blob_store")
        baseline = Baseline(**(_read(blobs, BASELINE) or {}))
        new = ctx.get_adapter("feedback_client").read(after=baseline.after)
        trigger = find_trigger(new, min_new=config.min_new, bad_share_max=config.bad_share_max, bad_min=config.bad_min)
        begun = _read(blobs, _curated_key(baseline))
        reason = "a loop that was interrupted goes on" if begun else trigger.reason
        ctx.emit(
            "feedback.trigger",
            {"new": trigger.num_new, "bad_share": trigger.bad_share, "triggered": float(reason is not None)},
            reason=reason,
        )
        outcome = reason or f"{trigger.num_new} new entries of {config.min_new}, {trigger.bad_share:.0%} of them bad"
        return ctx.put(baseline=baseline, new_feedback=new, retrains=reason is not None, outcome=outcome)


def should_retrain(ctx: Context) -> bool:
    return bool(ctx.state.retrains)


class Curate(Stage):
    """What to learn of the new feedback. Raises `WorkflowError` if nothing of it was good."""

    name = "curate"
    needs = ("blob_store",)

    def execute(self, ctx: Context) -> Context:
        begun = _read(ctx.get_adapter("blob_store"), _curated_key(ctx.state.baseline))
        if begun is not None:
            return ctx.put(curated=begun)
        entries: Sequence[Feedback] = ctx.state.new_feedback
        rows = curate(entries, min_rating=ctx.config.min_rating)
        if not rows:
            raise WorkflowError(
                f"none of {len(entries)} entries has a correction or is rated {ctx.config.min_rating} or better"
            )
        return ctx.put(curated={"until": ctx.state.baseline.after + len(entries), "rows": rows})


class Export(Stage):
    """Store what was taken, before anything is trained on it."""

    name = "export"
    needs = ("blob_store",)

    def execute(self, ctx: Context) -> Context:
        curated: Mapping[str, Any] = ctx.state.curated
        _write(ctx.get_adapter("blob_store"), _curated_key(ctx.state.baseline), curated)
        dataset = dataset_of("feedback", curated["rows"])
        if ctx.config.resume:
            check_same_data(folder_of(ctx), sha256=dataset.sha256, name="feedback")
        ctx.emit("dataset.load", {"records": len(dataset)}, name=dataset.name, sha256=dataset.sha256)
        return ctx.put(dataset=dataset)


class UpdateBaseline(Stage):
    """From here on the feedback that was used is old."""

    name = "update_baseline"
    needs = ("blob_store",)
    on_resume = "run"

    def execute(self, ctx: Context) -> Context:
        made = ctx.state.registered
        after = Baseline(after=int(ctx.state.curated["until"]), model=f"{made.name}:{made.version}")
        _write(ctx.get_adapter("blob_store"), BASELINE, asdict(after))
        return ctx.put(artifacts={**ctx.get_state("artifacts", {}), "baseline": after})


def _curated_key(baseline: Baseline) -> str:
    return f"feedback/curated-{baseline.after}.json"


def _read(blobs: BlobStore, key: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(blobs.read(key))
    except NotFound:
        return None
    return found


def _write(blobs: BlobStore, key: str, value: Mapping[str, Any]) -> None:
    blobs.write(key, json.dumps(value, ensure_ascii=False, indent=1).encode())
