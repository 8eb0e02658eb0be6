"""The Anthropic dialect: messages. Its model list is the one of the OpenAI dialect."""

from tinsmith.server.anthropic.messages import router

__all__ = ["PREFIX", "router"]

PREFIX = "/v1"
