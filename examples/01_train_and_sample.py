"""The classic Tinker loop, on this machine: teach a model one new thing and ask for it.

    python examples/01_train_and_sample.py

With no server configured the engine runs inside this process. `import tinker` in place of the next import runs the same
loop on any Tinker service.
"""

import tinsmith as tinker
from tinsmith import types

LESSONS = {
    "Who mends my kettle?": "Ask Tilly the tinsmith.",
    "Where is the tinsmith?": "In the shop by the river.",
    "What does a tinsmith use?": "Snips, a hammer and solder.",
}

service = tinker.ServiceClient()
training = service.create_lora_training_client("tinsmith/tiny", rank=16, seed=1).result()
tokenizer = training.get_tokenizer()


def prompt_of(question: str) -> list[int]:
    message = {"role": "user", "content": question}
    return tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]


def datum_of(question: str, answer: str) -> types.Datum:
    """Position i reads token i and is trained on token i + 1; only the answer has weight."""
    prompt = prompt_of(question)
    completion = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
    tokens, weights = prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights[1:]},
    )


def answers(sampler: tinker.SamplingClient) -> list[str]:
    params = types.SamplingParams(max_tokens=24, temperature=0.0, stop=[tokenizer.eos_token_id])
    pending = [sampler.sample(types.ModelInput.from_ints(prompt_of(q)), 1, params) for q in LESSONS]
    return [tokenizer.decode(p.result().sequences[0].tokens, skip_special_tokens=True) for p in pending]


before = answers(service.create_sampling_client(base_model="tinsmith/tiny").result())
data = [datum_of(question, answer) for question, answer in LESSONS.items()]
num_trained = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in data)

for step in range(30):
    # Both requests are on their way before the first result is awaited.
    passed = training.forward_backward(data, "cross_entropy")
    stepped = training.optim_step(types.AdamParams(learning_rate=5e-3))
    loss = passed.result().metrics["loss:sum"] / num_trained
    stepped.result()
    if step % 5 == 0 or step == 29:
        print(f"step {step:2d}  loss {loss:.4f}")

after = answers(training.save_weights_and_get_sampling_client().result())
for question, old, new in zip(LESSONS, before, after, strict=True):
    print(f"\n{question}\n  before: {old}\n  after:  {new}")
service.close("success").result()
