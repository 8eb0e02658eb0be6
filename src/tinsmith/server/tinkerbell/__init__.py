"""The Tinkerbell dialect: chats instead of tokens, a synchronous and an asynchronous path for most operations.

routes.py      the paths, and what each answers
dialect.py     whose request it is, where Tinker has the same path
operations.py  what is started, in the order of arrival
adapters.py    keys, their sessions and their adapters
rendering.py   tokenizers and chat templates
training.py    chats and rewards to datums; rewards.py the loss of the latter
sampling.py    prompts to completions
results.py     outcomes as JSON
"""

from tinsmith.server.tinkerbell.routes import OPERATIONS, listing, routes

__all__ = ["OPERATIONS", "listing", "routes"]
