"""Three adapters of different rank learn different things from one base model, side by side.

    python examples/04_many_adapters.py

All requests of a round are under way at once; the engine carries them in shared passes, and no adapter's numbers
depend on the others.
"""

import tinsmith as tinker
from tinsmith import types
from tinsmith.data import ChatTemplateRenderer, Conversation, Message, to_datum

QUESTION = "What do you sell?"
TRADES = {  # rank: answer
    4: "I sell kettles and pans.",
    16: "I sell warm bread.",
    64: "I sell old books.",
}

service = tinker.ServiceClient()
starting = {rank: service.create_lora_training_client("tinsmith/tiny", rank=rank, seed=rank) for rank in TRADES}
clients = {rank: client.result() for rank, client in starting.items()}
renderer = ChatTemplateRenderer(clients[4].get_tokenizer())
lessons = {}
for rank, answer in TRADES.items():
    talk = Conversation.of(("user", QUESTION), ("assistant", answer))
    rendered = renderer.render(talk, "last_assistant_message")
    lessons[rank] = to_datum(rendered.tokens, [weight / rendered.num_trained for weight in rendered.weights])

for step in range(25):
    passed = {rank: client.forward_backward([lessons[rank]], "cross_entropy") for rank, client in clients.items()}
    stepped = [client.optim_step(types.AdamParams(learning_rate=4e-3)) for client in clients.values()]
    for future in stepped:
        future.result()
    if step % 6 == 0:
        losses = "   ".join(f"rank {rank}: {p.result().metrics['loss:sum']:.4f}" for rank, p in passed.items())
        print(f"step {step:2d}   {losses}")

print(f"\n{QUESTION}")
prompt = types.ModelInput.from_ints(renderer.generation_prompt([Message(role="user", content=QUESTION)]))
params = types.SamplingParams(max_tokens=16, temperature=0.0, stop=renderer.stop)
samplers = [service.create_sampling_client(base_model="tinsmith/tiny").result()]
samplers += [client.save_weights_and_get_sampling_client().result() for client in clients.values()]
for name, sampler in zip(["base model", *(f"rank {rank}" for rank in TRADES)], samplers, strict=True):
    reply = renderer.parse_response(sampler.sample(prompt, 1, params).result().sequences[0].tokens)
    print(f"  {name:10}  {reply.content}")
service.close("success").result()
