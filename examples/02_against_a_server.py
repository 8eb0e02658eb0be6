"""Train on a server, leave a checkpoint there, and come back for it as another client.

tinsmith serve                                              # in one terminal
python examples/02_against_a_server.py                      # in another
python examples/02_against_a_server.py http://HOST:PORT     # or somewhere else
"""

import os
import sys

import tinsmith as tinker
from tinsmith import types
from tinsmith.data import ChatTemplateRenderer, Conversation, Message, to_datum

URL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000")
QUESTION, ANSWER = "What is the password?", "Copper kettle."

with tinker.ServiceClient(base_url=URL) as service:
    base_model = tinker.RestClient(base_url=URL).get_server_capabilities().result().supported_models[0].model_name
    print(f"{URL} serves {base_model}")
    training = service.create_lora_training_client(base_model, rank=8, seed=0).result()
    renderer = ChatTemplateRenderer(training.get_tokenizer())
    rendered = renderer.render(Conversation.of(("user", QUESTION), ("assistant", ANSWER)), "last_assistant_message")
    datum = to_datum(rendered.tokens, rendered.weights)
    for step in range(20):
        passed = training.forward_backward([datum], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=5e-3)).result()
        if step % 5 == 0 or step == 19:
            print(f"step {step:2d}  loss {passed.result().metrics['loss:sum'] / rendered.num_trained:.4f}")
    path = training.save_weights_for_sampler("password").result().path
    print(f"saved {path}")

with tinker.ServiceClient(base_url=URL) as service:
    sampler = service.create_sampling_client(model_path=path).result()
    renderer = ChatTemplateRenderer(sampler.get_tokenizer())
    prompt = types.ModelInput.from_ints(renderer.generation_prompt([Message(role="user", content=QUESTION)]))
    params = types.SamplingParams(max_tokens=16, temperature=0.0, stop=renderer.stop)
    reply = renderer.parse_response(sampler.sample(prompt, 1, params).result().sequences[0].tokens)
    print(f"{QUESTION} {reply.content}")
