"""Prompts in text to completions in text: publish the adapter's present weights, draw from every prompt, decode."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinsmith.control.errors import FutureExpired, SamplerGone
from tinsmith.control.execution import sampler_name
from tinsmith.control.futures import Outcome
from tinsmith.control.guarded import GuardedControl
from tinsmith.control.requests import DrawSamples, SaveForSampler
from tinsmith.server.bodies import fingerprint
from tinsmith.server.tinkerbell.memory import Adapter, Owner, Publication
from tinsmith.server.tinkerbell.rendering import ModelTexts
from tinsmith.server.tinkerbell.results import PromptsSampled
from tinsmith.server.tinkerbell.schemas import PromptsBody
from tinsmith.types import ModelInput, SamplingParams
from tinsmith.types.errors import InvalidInput, TinsmithError
from tinsmith.types.results import SampleResponse

WAIT_S = 60.0
"""How long one look at a future lasts; a future always ends, so the looks do too."""


class Drawing:
    def __init__(self, control: GuardedControl, texts: ModelTexts) -> None:
        self._control = control
        self._texts = texts

    # ---- where from ----

    def publish(self, owner: Owner, adapter: Adapter) -> Publication:
        """The sampler of the weights that the adapter has after all requests so far. Takes its turn at once."""
        if adapter.published is not None and adapter.published.version == adapter.version:
            return adapter.published
        number = next(owner.sampler_numbers)
        asked = SaveForSampler(model_id=adapter.model_id, seq_id=0, sampling_session_seq_id=number)
        receipt = self._control.submit(asked, fingerprint("sample", adapter.model_id.encode()))
        adapter.published = Publication(
            version=adapter.version,
            sampler_id=sampler_name(owner.session_id, number),
            request_id=receipt.request_id,
        )
        return adapter.published

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
        self, owner: Owner, name: str, publication: Publication, body: PromptsBody, numbers: Sequence[int]
    ) -> PromptsSampled:
        """The server keeps a number of unnamed samplers; where this one was pushed out and the weights are still the
        same, they are published again."""
        adapter = owner.adapters.get(name)
        try:
            await self._wait_published(publication)
        except TinsmithError:
            _unpublish(adapter, publication)
            raise
        try:
            return await self.draw(owner, publication.sampler_id, body, numbers)
        except SamplerGone:
            if adapter is None or owner.adapters.get(name) is not adapter or adapter.version != publication.version:
                raise
        _unpublish(adapter, publication)
        again = self.publish(owner, adapter)
        await self._wait_published(again)
        return await self.draw(owner, again.sampler_id, body, numbers)

    async def _wait_published(self, publication: Publication) -> None:
        try:
            await self.answer(publication.request_id)
        except FutureExpired:
            return  # long done: whether the sampler is still there is found when it is asked

    async def draw(self, owner: Owner, sampler_id: str, body: PromptsBody, numbers: Sequence[int]) -> PromptsSampled:
        """The sample of each prompt has its number; asked for again, it is the same. Raises what any of them meets."""
        text = await self._texts.of(self._control.get_sampler(sampler_id).base_model)
        prompts = await text.run(lambda: [text.encode(prompt) for prompt in body.prompts])
        given = body.sampling_params.model_dump(exclude_none=True)
        pending = []
        for tokens, number in zip(prompts, numbers, strict=True):
            params = SamplingParams.model_construct(**({"seed": _seed(owner, number)} | given))
            pending.append(
                self._submit(
                    sampler_id, tokens, params, body.num_samples, number=number, prompt_logprobs=body.prompt_logprobs
                )
            )
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
        self,
        sampler_id: str,
        tokens: Sequence[int],
        params: SamplingParams,
        num_samples: int,
        *,
        number: int,
        prompt_logprobs: bool,
    ) -> str:
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
        number = next(owner.sample_numbers)
        response = await self.answer(self._submit(sampler_id, tokens, params, 1, number=number, prompt_logprobs=True))
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


def _unpublish(adapter: Adapter | None, publication: Publication) -> None:
    """Whoever samples next publishes anew."""
    if adapter is not None and adapter.published is publication:
        adapter.published = None


def _seed(owner: Owner, number: int) -> int:
    """Of a sample without one: as good as random, for the session's id is, and the same if it is drawn again."""
    return int.from_bytes(hashlib.sha256(f"{owner.session_id}:{number}".encode()).digest()[:8], "big") >> 2
