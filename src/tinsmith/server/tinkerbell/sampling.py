"""Prompts in text to completions in text: publish the adapter's present weights, draw from every prompt, decode."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinsmith.control.errors import SamplerGone
from tinsmith.control.futures import Outcome, SamplerSaved
from tinsmith.control.guarded import GuardedControl
from tinsmith.control.requests import DrawSamples, SaveForSampler
from tinsmith.server.bodies import fingerprint
from tinsmith.server.tinkerbell.adapters import Adapter, Owner
from tinsmith.server.tinkerbell.rendering import ModelTexts
from tinsmith.server.tinkerbell.results import PromptsSampled
from tinsmith.server.tinkerbell.schemas import PromptsBody
from tinsmith.types import ModelInput, SamplingParams
from tinsmith.types.errors import InvalidInput
from tinsmith.types.results import SampleResponse

WAIT_S = 60.0
"""How long one look at a future lasts; a future always ends, so the looks do too."""


class Drawing:
    def __init__(self, control: GuardedControl, texts: ModelTexts) -> None:
        self._control = control
        self._texts = texts
        self._numbers = itertools.count(1)

    # ---- where from ----

    def publish(self, owner: Owner, adapter: Adapter) -> asyncio.Task[str]:
        """The sampler of the weights that the adapter has after all requests so far. Takes its turn at once."""
        if adapter.published is not None and adapter.published[0] == adapter.version:
            publication = adapter.published[1]
            if not publication.done() or publication.exception() is None:
                return publication
        number = next(owner.sampler_numbers)
        asked = SaveForSampler(model_id=adapter.model_id, seq_id=0, sampling_session_seq_id=number)
        receipt = self._control.submit(asked, fingerprint("sample", adapter.model_id.encode()))
        publication = asyncio.create_task(self._published(receipt.request_id))
        adapter.published = (adapter.version, publication)
        return publication

    async def _published(self, request_id: str) -> str:
        saved = await self.answer(request_id)
        assert isinstance(saved, SamplerSaved)
        assert saved.sampling_session_id is not None
        return saved.sampling_session_id

    async def fixed_sampler(self, owner: Owner, *, base_model: str | None = None, path: str | None = None) -> str:
        """The sampler of a base model or a checkpoint. Raises `NotFound`, `InvalidInput`, or what loading meets."""
        what = path or base_model or ""
        if what not in owner.samplers:
            number = next(owner.sampler_numbers)
            owner.samplers[what] = await self._control.create_sampling_session(
                owner.session_id, number, None if path else base_model, path
            )
        return owner.samplers[what]

    # ---- drawing ----

    async def from_adapter(
        self, owner: Owner, adapter: Adapter, body: PromptsBody, publication: asyncio.Task[str], version: int
    ) -> PromptsSampled:
        """`publication` is of `version`. The server keeps a number of unnamed samplers; where this one was pushed out
        and the weights are still the same, they are published again."""
        sampler_id = await asyncio.shield(publication)
        try:
            return await self.draw(sampler_id, body)
        except SamplerGone:
            if adapter.version != version or adapter.name not in owner.adapters:
                raise
        adapter.published = None
        return await self.draw(await asyncio.shield(self.publish(owner, adapter)), body)

    async def draw(self, sampler_id: str, body: PromptsBody) -> PromptsSampled:
        """Raises what any of the prompts meets."""
        text = await self._texts.of(self._control.get_sampler(sampler_id).base_model)
        prompts = await text.run(lambda: [text.encode(prompt) for prompt in body.prompts])
        params = SamplingParams.model_construct(**body.sampling_params.model_dump(exclude_none=True))
        pending = [
            self._submit(sampler_id, tokens, params, body.num_samples, prompt_logprobs=body.prompt_logprobs)
            for tokens in prompts
        ]
        responses = [await self._of_prompt(index, request_id) for index, request_id in enumerate(pending)]
        sequences = [sequence for response in responses for sequence in response.sequences]
        completions = await text.run(lambda: [text.decode(sequence.tokens) for sequence in sequences])
        return PromptsSampled(
            sequences=sequences,
            completions=completions,
            prompt_cache_hit_tokens=sum(response.prompt_cache_hit_tokens for response in responses),
            logprobs_of_prompts=[response.prompt_logprobs or [] for response in responses]
            if body.prompt_logprobs
            else None,
        )

    async def _of_prompt(self, index: int, request_id: str) -> SampleResponse:
        try:
            response = await self.answer(request_id)
        except InvalidInput as error:
            raise InvalidInput(f"prompts[{index}]: {error}") from error
        assert isinstance(response, SampleResponse)
        return response

    def _submit(
        self, sampler_id: str, tokens: Sequence[int], params: SamplingParams, num_samples: int, *, prompt_logprobs: bool
    ) -> str:
        number = next(self._numbers)
        asked = DrawSamples(
            sampling_session_id=sampler_id,
            seq_id=number,
            prompt=ModelInput.from_ints(tokens),
            num_samples=num_samples,
            params=params,
            prompt_logprobs=prompt_logprobs,
        )
        return self._control.submit_sample(asked, fingerprint("sample", number.to_bytes(8, "big"))).request_id

    async def score_base(self, owner: Owner, base_model: str, tokens: Sequence[int]) -> np.ndarray:
        """Log-probability of each token under the base model, float32 `[N]`, NaN for the first."""
        sampler_id = await self.fixed_sampler(owner, base_model=base_model)
        params = SamplingParams(max_tokens=1, temperature=1.0, seed=0)
        response = await self.answer(self._submit(sampler_id, tokens, params, 1, prompt_logprobs=True))
        assert isinstance(response, SampleResponse)
        assert response.prompt_logprobs_np is not None
        return response.prompt_logprobs_np

    async def answer(self, request_id: str) -> Any:
        """The result of a future. Raises its error."""
        while True:
            state = await self._control.wait_future(request_id, WAIT_S)
            if isinstance(state, Outcome):
                if state.error is not None:
                    raise state.error
                return state.result
