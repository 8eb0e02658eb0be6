"""What an error of a training loop means: a run that can be recovered, and from what, or a mistake that stays one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from tinsmith.client.errors import (
    APIConnectionError,
    APIStatusError,
    ClientClosedError,
    PromiseExpiredError,
    RequestFailedError,
    TinkerError,
)
from tinsmith.client.http import Pool, Retry, escaped, get, post
from tinsmith.types.errors import RequestErrorCategory
from tinsmith.types.rest import GetInfoResponse, TrainingRun

if TYPE_CHECKING:
    from tinsmith.client.session import Link

_ASK_AGAIN_AFTER_S = (0.0, 0.1, 0.4)
"""A server may write down that a run is corrupted a moment after it has refused a request for it."""
PROBE_S = 10.0
"""How long one question to the server may take, retries included."""


class Trigger(StrEnum):
    CORRUPTED = "corrupted"
    """The server refuses to train the model further: its numbers are not finite."""
    DEAD_SESSION = "dead_session"
    """The server ended the session, or forgot it when it was restarted."""
    LOST_MODEL = "lost_model"
    """The session lives, the model is gone."""
    LOST_CONNECTION = "lost_connection"
    """The server cannot be reached for longer than the client waits by itself."""
    SERVER_FAILURE = "server_failure"
    """The server accepted a request and could not do it."""
    NAN_LOSS = "nan_loss"
    """The loop reported a loss that is not finite."""
    STALLED = "stalled"
    """A step took longer than the policy allows."""

    @property
    def needs_new_session(self) -> bool:
        return self not in (Trigger.CORRUPTED, Trigger.NAN_LOSS, Trigger.LOST_MODEL)


class NotFiniteLoss(TinkerError):
    """Raised by `Step.report` for a loss that is NaN or infinite."""

    type = "nan_loss"


class Stalled(TinkerError):
    type = "stalled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    trigger: Trigger
    reason: str


async def diagnose(error: BaseException, link: Link, run_id: str) -> Diagnosis | None:
    """On the client's event loop: what `error` says about the run, if need be after asking the server.

    `None` for errors that recovering cannot help: the caller's own, and mistakes in requests.
    """
    match error:
        case NotFiniteLoss():
            return Diagnosis(trigger=Trigger.NAN_LOSS, reason=str(error))
        case Stalled():
            return Diagnosis(trigger=Trigger.STALLED, reason=str(error))
        case APIConnectionError():
            return Diagnosis(trigger=Trigger.LOST_CONNECTION, reason=str(error))
        case ClientClosedError():
            gone = link.session_gone
            return Diagnosis(trigger=Trigger.DEAD_SESSION, reason=gone) if gone else None
        case RequestFailedError() | APIStatusError():
            return await _ask(error, link, run_id)
    return None


async def _ask(error: RequestFailedError | APIStatusError, link: Link, run_id: str) -> Diagnosis | None:
    try:
        if gone := await session_ended(link):
            return Diagnosis(trigger=Trigger.DEAD_SESSION, reason=gone)
        for pause_s in _ASK_AGAIN_AFTER_S:
            await asyncio.sleep(pause_s)
            if found := await run_state(link, run_id):
                return found
    except APIConnectionError as lost:
        return Diagnosis(trigger=Trigger.LOST_CONNECTION, reason=str(lost))
    if isinstance(error, PromiseExpiredError):
        return Diagnosis(trigger=Trigger.LOST_MODEL, reason=str(error))
    if error.category is RequestErrorCategory.User:
        return None
    return Diagnosis(trigger=Trigger.SERVER_FAILURE, reason=str(error))


async def session_ended(link: Link) -> str | None:
    """Why the session is over, if it is. Raises `APIConnectionError` if the server cannot be reached."""
    if link.session_gone is not None:
        return link.session_gone
    session_id = link.opened_session_id
    if session_id is None:
        return None
    call = post("session_heartbeat", {"session_id": session_id, "type": "session_heartbeat"}, pool=Pool.SESSION)
    try:
        await link.http.send(call, Retry(give_up_after=PROBE_S))
    except APIStatusError as error:
        if error.status_code in (404, 410):
            return str(error)
    return None


async def run_state(link: Link, run_id: str) -> Diagnosis | None:
    """Whether the run is corrupted or gone. Raises `APIConnectionError` if the server cannot be reached."""
    retry = Retry(give_up_after=PROBE_S)
    try:
        run = await link.http.send_for(get(f"training_runs/{escaped(run_id)}"), TrainingRun, retry)
        if run.corrupted:
            return Diagnosis(trigger=Trigger.CORRUPTED, reason=f"the server says that run {run_id!r} is corrupted")
        await link.http.send_for(post("get_info", {"model_id": run_id, "type": "get_info"}), GetInfoResponse, retry)
    except APIStatusError as error:
        if error.status_code in (400, 404, 410):
            return Diagnosis(trigger=Trigger.LOST_MODEL, reason=str(error))
    return None
