"""What this dialect does by recipe: requests and answers that take text, and so more than one step. A recipe is in the
ledger, and what it makes is made again after a crash."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tinsmith.control.guarded import GuardedControl
from tinsmith.control.requests import ForwardBackward, Recipe
from tinsmith.server.tinkerbell import training
from tinsmith.server.tinkerbell.memory import Adapter, Memory, Owner, Publication
from tinsmith.server.tinkerbell.rendering import ModelTexts
from tinsmith.server.tinkerbell.results import PromptsSampled
from tinsmith.server.tinkerbell.sampling import Drawing
from tinsmith.server.tinkerbell.schemas import ForwardBody, PromptsBody
from tinsmith.types.errors import NotFound

FORWARD, SAMPLE = "tinkerbell.forward", "tinkerbell.sample"


def forward_recipe(owner: Owner, adapter: Adapter, body: ForwardBody, *, forward_only: bool) -> Recipe:
    details = {
        "session_id": owner.session_id,
        "model_id": adapter.model_id,
        "base_model": adapter.base_model,
        "forward_only": forward_only,
        "body": body.model_dump_json(exclude_none=True),
    }
    return Recipe(kind=FORWARD, details=details)


def sample_recipe(
    owner: Owner, sampler_id: str, body: PromptsBody, *, name: str = "", publication: Publication | None = None
) -> Recipe:
    """From a sampler that is there, or from one that will be when the adapter `name` is published."""
    details: dict[str, Any] = {
        "session_id": owner.session_id,
        "sampler_id": sampler_id,
        "numbers": [next(owner.sample_numbers) for _ in body.prompts],
        "body": body.model_dump_json(exclude_none=True),
    }
    if publication is not None:
        details |= {"name": name, "publication": publication.request_id, "version": publication.version}
    return Recipe(kind=SAMPLE, details=details)


class Making:
    """For all callers: what a recipe may do was looked at when it was taken."""

    def __init__(self, control: GuardedControl, memory: Memory, texts: ModelTexts) -> None:
        self._memory = memory
        self._texts = texts
        self._drawing = Drawing(control, texts)

    async def forward(self, details: Mapping[str, Any]) -> ForwardBackward:
        body = ForwardBody.model_validate_json(details["body"])
        return await training.prepare(
            body,
            details["model_id"],
            details["base_model"],
            self._texts,
            functools.partial(self._drawing.score_base, self._owner(details)),
            forward_only=details["forward_only"],
        )

    async def sample(self, details: Mapping[str, Any]) -> PromptsSampled:
        owner, body = self._owner(details), PromptsBody.model_validate_json(details["body"])
        sampler_id: str = details["sampler_id"]
        numbers: Sequence[int] = details["numbers"]
        if "publication" not in details:
            return await self._drawing.draw(owner, sampler_id, body, numbers)
        adapter = owner.adapters.get(details["name"])
        publication = None if adapter is None else adapter.published
        if publication is None or publication.request_id != details["publication"]:
            publication = Publication(
                version=details["version"], sampler_id=sampler_id, request_id=details["publication"]
            )
        return await self._drawing.from_adapter(owner, details["name"], publication, body, numbers)

    def _owner(self, details: Mapping[str, Any]) -> Owner:
        owner = self._memory.of_session(details["session_id"])
        if owner is None:
            raise NotFound(f"session {details['session_id']!r} has ended")
        return owner
