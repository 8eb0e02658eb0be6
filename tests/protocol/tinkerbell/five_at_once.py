"""Five gradients are asked for before the first is there, then five steps are taken. Usage: five_at_once.py URL"""

import sys

from futures import Server

CHATS = [[{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there!"}]]

server = Server(sys.argv[1])
model = server.adapter()
waiting = [server.train(model, CHATS) for _ in range(5)]
for future in waiting:
    print(server.result(future)["loss"])
    server.result(server.step(model))
