"""Token-exact trajectories as JSON lines: what was asked, what was drawn, and how likely each token was.

One file per server process; a line per prompt:

    {"format": 1, "time": "…Z", "request_id": "chatcmpl-…", "conversation_id": null, "dialect": "openai.chat",
     "model": "tinker://…", "base_model": "tinsmith/tiny", "adapter_digest": "…",
     "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": null, "max_tokens": 64},
     "prompt_tokens": [1, 52, …], "samples": [{"tokens": [...], "logprobs": [...], "stop_reason": "stop"}]}

Log-probabilities are those the tokens were drawn with: at `sampling.temperature` (at 0: of the unscaled model).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from tinsmith.server.chat.asks import Ask, Target
from tinsmith.types.errors import InvalidInput, StorageError
from tinsmith.types.results import SampleResponse

CONVERSATION_HEADER = "x-conversation-id"
MOST_CONVERSATION_CHARACTERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """Whose request it is."""

    request_id: str
    dialect: str
    conversation_id: str | None


class Recorder:
    """Appends in the order of completion. A line is in the file before the request is answered."""

    def __init__(self, folder: Path) -> None:
        """Raises `InvalidInput` if the folder cannot be written."""
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.path = folder / f"trajectories-{started}-{os.getpid()}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)
        except OSError as error:
            raise InvalidInput(f"cannot record to {str(folder)!r}: {error}") from error
        self._size = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tinsmith-recorder")

    async def write(self, target: Target, ask: Ask, visit: Visit, response: SampleResponse) -> None:
        """Raises `StorageError` if the disk refuses: what was not recorded is not answered."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._append, target, ask, visit, response)

    def _append(self, target: Target, ask: Ask, visit: Visit, response: SampleResponse) -> None:
        line = orjson.dumps(_record(target, ask, visit, response), option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
        try:
            if (written := self._file.write(line)) != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written")
            self._size += len(line)
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line is left: then its reader says so
                self._file.truncate(self._size)
            raise StorageError(f"the trajectory could not be recorded to {self.path}: {error}") from error

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._file.close()


def _record(target: Target, ask: Ask, visit: Visit, response: SampleResponse) -> dict[str, Any]:
    return {
        "format": 1,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": visit.request_id,
        "conversation_id": visit.conversation_id,
        "dialect": visit.dialect,
        "model": target.model,
        "base_model": target.card.name,
        "adapter_digest": target.digest,
        "sampling": {
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "top_k": ask.top_k,
            "seed": ask.seed,
            "max_tokens": ask.max_tokens,
        },
        "prompt_tokens": list(ask.prompt),
        "samples": [
            {"tokens": sequence.tokens_np, "logprobs": sequence.logprobs_np, "stop_reason": sequence.stop_reason}
            for sequence in response.sequences
        ],
    }
