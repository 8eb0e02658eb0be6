"""Make an adapter, say "ready", and train it when a line comes in. Usage: seeded_loop.py URL SEED STEPS

Prints the losses, and when training began and ended, as one line of JSON.
"""

import json
import sys
import time

import requests

url, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
CHATS = [[{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A bell, and I ring."}]]


def post(path: str, **body: object) -> dict:
    answer = requests.post(f"{url}/api/v1/{path}", json=body)
    answer.raise_for_status()
    return answer.json()


model = post("add_lora", base_model="base", rank=16, alpha=32, seed=seed)["model_id"]
post("forward", model_id=model, data=CHATS)
print("ready", flush=True)
sys.stdin.readline()
began, losses = time.time(), []
for _ in range(steps):
    losses.append(post("forward_backward", model_id=model, data=CHATS, loss_fn="cross_entropy")["loss"])
    post("optim_step", model_id=model, adam_params={"learning_rate": 0.001})
print(json.dumps({"losses": losses, "began": began, "ended": time.time()}), flush=True)
