"""Reinforcement learning in one plain loop, with sampling that runs ahead of training and a clipped loss.

    python examples/rl_loop.py [ROUNDS]

Sums again, as in 03_rl_addition.py. While a round is trained, the next one is drawn already, from weights one round
old; each answer brings the log-probabilities it was drawn with, so the loss knows how far the policy has moved since
(PPO, arXiv 1707.06347) and clips where that is far. Rewards less the group's mean are advantages (GRPO, arXiv
2402.03300).
`tinsmith run math_rl max_staleness=1 loss=ppo` does the same with checkpoints, evaluation and a report.
"""

import asyncio
import random
import statistics
import sys

import tinsmith as tinker
from tinsmith import types
from tinsmith.data import Message, choose_renderer

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
GROUPS, GROUP_SIZE, LARGEST_TERM = 24, 8, 20
ADAM = types.AdamParams(learning_rate=2e-3, grad_clip_norm=1.0)
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.25}

Answers = list[tuple[list[int], str, types.SampleResponse]]
"""Of every group: the prompt, the right answer, what was drawn."""


async def draw(number: int, sampler: tinker.SamplingClient, renderer) -> Answers:
    sums = random.Random(f"round {number}")
    terms = [(sums.randint(0, LARGEST_TERM), sums.randint(0, LARGEST_TERM)) for _ in range(GROUPS)]
    prompts = [renderer.generation_prompt([Message(role="user", content=f"What is {a} + {b}?")]) for a, b in terms]
    params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=number, stop=renderer.stop)
    drawn = await asyncio.gather(*(sampler.sample(types.ModelInput.from_ints(p), GROUP_SIZE, params) for p in prompts))
    return [(prompt, str(a + b), answers) for prompt, (a, b), answers in zip(prompts, terms, drawn, strict=True)]


def datum_of(prompt: list[int], answer: types.SampledSequence, advantage: float) -> types.Datum:
    """Position i has token i + 1 as its target; the prompt's positions have no advantage and teach nothing."""
    tokens, num_given = prompt + answer.tokens, len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * num_given + answer.logprobs,
            "advantages": [0.0] * num_given + [advantage] * len(answer.tokens),
        },
    )


async def main() -> None:
    service = tinker.ServiceClient()
    training = await service.create_lora_training_client("tinsmith/tiny", rank=16, seed=0)
    renderer = choose_renderer(training.get_tokenizer())
    history: list[float] = []

    async def begin(number: int) -> asyncio.Task[Answers]:
        """The sampler has the weights of this moment; steps that come later do not change them."""
        sampler = await training.save_weights_and_get_sampling_client()
        return asyncio.create_task(draw(number, sampler, renderer))

    drawing = await begin(0)
    for number in range(ROUNDS):
        present = drawing
        if number + 1 < ROUNDS:
            drawing = await begin(number + 1)
        data, rewards = [], []
        for prompt, right, drawn in await present:
            scores = [float(renderer.parse_response(answer.tokens).content == right) for answer in drawn.sequences]
            rewards += scores
            mean = statistics.fmean(scores)
            for answer, score in zip(drawn.sequences, scores, strict=True):
                if score != mean:  # where all answers of a group fare alike there is nothing to learn
                    data.append(datum_of(prompt, answer, score - mean))
        if data:
            passed = training.forward_backward(data, "ppo", CLIP)
            stepped = training.optim_step(ADAM)
            await passed
            await stepped
        history.append(statistics.fmean(rewards))
        recent = statistics.fmean(history[-5:])
        print(f"round {number:3d}  right answers {history[-1]:5.1%}  last five rounds {recent:5.1%}", flush=True)
    await service.close("success")


asyncio.run(main())
