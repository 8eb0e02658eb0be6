"""Recorded samples of agents (`tinsmith serve --record FOLDER`), read back to train on.

A line of a `trajectories-*.jsonl` file is one prompt and what was drawn after it, token for token; `read_trajectories`
yields one `Trajectory` per drawn sequence, in the order in which they were finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tinsmith.data.errors import DataError
from tinsmith.types import Datum, ModelInput, TensorData

FORMAT: Final = 1
"""Of a line; a reader refuses any other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    request_id: str
    conversation_id: str | None
    """The `X-Conversation-Id` header of the request: what joins the turns of one episode."""
    model: str
    """As the request named it."""
    base_model: str
    adapter_digest: str | None
    """Of the weights that drew it; `None` for the base model."""
    sampling: Mapping[str, Any]
    """temperature, top_p, top_k, seed, max_tokens."""
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of `tokens`, over the full vocabulary at `sampling["temperature"]` (at 0: of the unscaled model)."""
    stop_reason: str

    def datum(self, advantage: float) -> Datum:
        """For `importance_sampling`, `ppo` or `cispo`: every drawn token has `advantage`, the prompt has none."""
        tokens = [*self.prompt_tokens, *self.tokens]
        num_prompt = len(self.prompt_tokens) - 1
        advantages = [0.0] * num_prompt + [advantage] * len(self.tokens)
        logprobs = [0.0] * num_prompt + list(self.logprobs)
        return Datum(
            model_input=ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": TensorData.from_numpy(np.asarray(tokens[1:], dtype=np.int64)),
                "logprobs": TensorData.from_numpy(np.asarray(logprobs, dtype=np.float32)),
                "advantages": TensorData.from_numpy(np.asarray(advantages, dtype=np.float32)),
            },
        )


def read_trajectories(folder: Path | str) -> Iterator[Trajectory]:
    """All recorded sequences of all files in a folder. Raises `DataError` naming file, line and fault.

    A last line without its end is being written; it is left out.
    """
    for path in sorted(Path(folder).glob("trajectories-*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith("\n"):
                    yield from _trajectories(line, f"{path.name}, line {number}")


def _trajectories(line: str, where: str) -> list[Trajectory]:
    try:
        record = json.loads(line)
        if record["format"] != FORMAT:
            raise DataError(f"{where}: format is {record['format']!r}; this version reads {FORMAT}")
        return [
            Trajectory(
                request_id=record["request_id"],
                conversation_id=record["conversation_id"],
                model=record["model"],
                base_model=record["base_model"],
                adapter_digest=record["adapter_digest"],
                sampling=record["sampling"],
                prompt_tokens=tuple(record["prompt_tokens"]),
                tokens=tuple(sample["tokens"]),
                logprobs=tuple(sample["logprobs"]),
                stop_reason=sample["stop_reason"],
            )
            for sample in record["samples"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not a recorded trajectory: {error!r}") from error
