"""Three users train adapters of their own at the same time. Usage: three_users.py URL"""

import sys
from concurrent.futures import ThreadPoolExecutor

from futures import Server

server = Server(sys.argv[1])


def train(name: str) -> list[float]:
    model = server.adapter()
    chats = [[{"role": "user", "content": f"Hello {name}!"}, {"role": "assistant", "content": f"Hi {name}!"}]]
    losses = []
    for _ in range(3):
        losses.append(server.result(server.train(model, chats))["loss"])
        server.result(server.step(model))
    return losses


with ThreadPoolExecutor(max_workers=3) as pool:
    for losses in pool.map(train, ["Alice", "Bob", "Carol"]):
        print(*losses)
