"""Renderers of known formats, each checked against the tokenizer's own chat template when it is made."""

from tinsmith.data.families.deepseek import DeepSeekRenderer
from tinsmith.data.families.harmony import HarmonyRenderer
from tinsmith.data.families.kimi import KimiRenderer
from tinsmith.data.families.llama3 import Llama3Renderer
from tinsmith.data.families.qwen3 import Qwen3Renderer
from tinsmith.data.families.role_colon import RoleColonRenderer

__all__ = [
    "DeepSeekRenderer",
    "HarmonyRenderer",
    "KimiRenderer",
    "Llama3Renderer",
    "Qwen3Renderer",
    "RoleColonRenderer",
]
