"""Supervised fine-tuning in one plain loop, nothing hidden: data, batches, a schedule, a test loss, a checkpoint.

    python examples/sl_loop.py [EPOCHS]

`tinsmith run supervised` does all of this and more; here one can see it.
"""

import random
import sys

import tinsmith as tinker
from tinsmith import types
from tinsmith.data import DEMO_CONVERSATIONS, choose_renderer, read_conversations, to_datum

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 3
BATCH_SIZE, TEST_SIZE, PEAK_LEARNING_RATE = 8, 8, 3e-3

service = tinker.ServiceClient()
training = service.create_lora_training_client("tinsmith/tiny", rank=16, seed=0).result()
renderer = choose_renderer(training.get_tokenizer())

# Every conversation becomes tokens, and weights that are 1 on what is to be learned: the answers.
conversations = list(read_conversations(DEMO_CONVERSATIONS).conversations)
random.Random(0).shuffle(conversations)
rendered = [renderer.render(conversation, "all_assistant_messages") for conversation in conversations]
test, lessons = rendered[:TEST_SIZE], rendered[TEST_SIZE:]


def data_of(examples: list) -> list[types.Datum]:
    """A loss is a sum over tokens; weights that add up to 1 make it a mean, whatever the lengths."""
    scale = 1.0 / sum(example.num_trained for example in examples)
    return [to_datum(example.tokens, [weight * scale for weight in example.weights]) for example in examples]


def test_loss() -> float:
    return training.forward(data_of(test), "cross_entropy").result().metrics["loss:sum"]


batches_per_epoch = -(-len(lessons) // BATCH_SIZE)
num_steps = EPOCHS * batches_per_epoch
print(f"{len(lessons)} conversations to learn, {len(test)} to test; {num_steps} steps; test loss {test_loss():.4f}")

for step in range(num_steps):
    epoch, batch = divmod(step, batches_per_epoch)
    order = random.Random(f"epoch {epoch}").sample(range(len(lessons)), len(lessons))
    chosen = [lessons[index] for index in order[batch * BATCH_SIZE : (batch + 1) * BATCH_SIZE]]
    adam = types.AdamParams(learning_rate=PEAK_LEARNING_RATE * (1 - step / num_steps))
    # Both are on their way before either is waited for: the server never waits for this program.
    passed = training.forward_backward(data_of(chosen), "cross_entropy")
    stepped = training.optim_step(adam)
    loss = passed.result().metrics["loss:sum"]
    stepped.result()
    if batch == batches_per_epoch - 1:
        print(f"epoch {epoch + 1}  loss {loss:.4f}  test loss {test_loss():.4f}", flush=True)

state = training.save_state("last").result().path  # weights and optimizer: to train on from
weights = training.save_weights_for_sampler("last").result().path  # weights alone: to sample from
print(f"to train on: {state}\nto sample:   {weights}")

sampler = service.create_sampling_client(model_path=weights).result()
question = conversations[TEST_SIZE].messages[:1]
params = types.SamplingParams(max_tokens=32, temperature=0.0, stop=renderer.stop)
drawn = sampler.sample(types.ModelInput.from_ints(renderer.generation_prompt(question)), 1, params).result()
print(f"{question[0].content}\n{renderer.parse_response(drawn.sequences[0].tokens).content}")
service.close("success").result()
