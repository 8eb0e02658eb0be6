"""The Tinkerbell dialect: chats instead of tokens, a synchronous and an asynchronous path for most operations.

routes.py      the paths, and what each answers
dialect.py     whose request it is, where Tinker has the same path
operations.py  what is started, in the order of arrival
memory.py      keys, their sessions and their adapters, as they are remembered over a crash
adapters.py    what becomes of them
making.py      requests and answers that take text, by recipe
rendering.py   tokenizers and chat templates
training.py    chats and rewards to datums; rewards.py the loss of the latter
sampling.py    prompts to completions
results.py     outcomes as JSON
"""

from tinsmith.server.tinkerbell.routes import OPERATIONS, listing, routes

__all__ = ["OPERATIONS", "listing", "routes"]
