"""The OpenAI dialect: completions and chat completions; the list of models is shared with the Anthropic dialect."""

from __future__ import annotations

from fastapi import APIRouter

from tinsmith.server.openai import chat, completions

PREFIX = "/v1"


def routers() -> list[APIRouter]:
    return [completions.router, chat.router]
