"""Reinforcement learning in one plain loop: a model that adds badly learns to add better from rewards alone.

    python examples/03_rl_addition.py [STEPS]

Each step draws a group of answers to each of some sums, rewards the right ones, takes the reward minus the mean of its
group as advantage (GRPO, arXiv 2402.03300), and makes one importance-sampling step on the sampled tokens.
"""

import random
import sys

import tinsmith as tinker
from tinsmith import types
from tinsmith.data import ChatTemplateRenderer, Message

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
SUMS_PER_STEP, GROUP_SIZE, LARGEST_TERM = 32, 8, 20
ADAM = types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0)

service = tinker.ServiceClient()
training = service.create_lora_training_client("tinsmith/tiny", rank=16, seed=0).result()
renderer = ChatTemplateRenderer(training.get_tokenizer())
random_sums = random.Random(0)
history: list[float] = []


def datum_of(prompt: list[int], answer: types.SampledSequence, advantage: float) -> types.Datum:
    """The prompt's positions have log-probability 0 and advantage 0: they contribute nothing."""
    tokens, num_given = prompt + answer.tokens, len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * num_given + answer.logprobs,
            "advantages": [0.0] * num_given + [advantage] * len(answer.tokens),
        },
    )


for step in range(STEPS):
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=step, stop=renderer.stop)
    groups = []
    for _ in range(SUMS_PER_STEP):
        a, b = random_sums.randint(0, LARGEST_TERM), random_sums.randint(0, LARGEST_TERM)
        prompt = renderer.generation_prompt([Message(role="user", content=f"What is {a} + {b}?")])
        groups.append((prompt, str(a + b), sampler.sample(types.ModelInput.from_ints(prompt), GROUP_SIZE, params)))

    data, rewards = [], []
    for prompt, right, drawn in groups:
        answers = drawn.result().sequences
        scores = [float(renderer.parse_response(answer.tokens).content == right) for answer in answers]
        rewards += scores
        mean = sum(scores) / len(scores)
        data += [
            datum_of(prompt, answer, score - mean)
            for answer, score in zip(answers, scores, strict=True)
            if score != mean
        ]

    if data:  # where all answers of every group fare alike there is nothing to learn
        passed = training.forward_backward(data, "importance_sampling")
        training.optim_step(ADAM).result()
        passed.result()
    history.append(sum(rewards) / len(rewards))
    recent = sum(history[-5:]) / len(history[-5:])
    bar = "#" * round(40 * recent)
    print(f"step {step:3d}  right answers {history[-1]:5.1%}  last five steps {recent:5.1%}  {bar}", flush=True)

service.close("success").result()
