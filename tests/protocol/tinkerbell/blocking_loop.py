"""A blocking script: every request waits for its result. Usage: blocking_loop.py URL"""

import sys

import requests

URL = sys.argv[1]
CHATS = [[{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there!"}]]

made = requests.post(f"{URL}/api/v1/add_lora", json={"base_model": "base", "rank": 16, "alpha": 32})
model = made.json()["model_id"]
for _ in range(5):
    body = {"model_id": model, "data": CHATS, "loss_fn": "cross_entropy"}
    print(requests.post(f"{URL}/api/v1/forward_backward", json=body).json()["loss"])
    requests.post(f"{URL}/api/v1/optim_step", json={"model_id": model, "adam_params": {"learning_rate": 0.001}})
