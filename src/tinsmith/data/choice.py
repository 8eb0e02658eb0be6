"""Renderers by name, and the one that fits a tokenizer.

Names are not the source of truth: a family's renderer compares itself with the tokenizer's own chat template when it is
made, and `choose_renderer` takes the first whose text is the template's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Final, TypeAlias

from tinsmith.data.errors import RenderError
from tinsmith.data.families import (
    DeepSeekRenderer,
    HarmonyRenderer,
    KimiRenderer,
    Llama3Renderer,
    Qwen3Renderer,
    RoleColonRenderer,
)
from tinsmith.data.renderer import ChatTemplateRenderer
from tinsmith.data.rendering import SegmentRenderer
from tinsmith.data.tokenizers import ChatTokenizer

Maker: TypeAlias = Callable[[ChatTokenizer], SegmentRenderer]

RENDERERS: Final[Mapping[str, Maker]] = {
    "chat_template": ChatTemplateRenderer,
    "qwen3": Qwen3Renderer,
    "qwen3_no_thinking": lambda tokenizer: Qwen3Renderer(tokenizer, "no_thinking"),
    "qwen3_thinking": lambda tokenizer: Qwen3Renderer(tokenizer, "thinking"),
    "qwen3_instruct": lambda tokenizer: Qwen3Renderer(tokenizer, "instruct"),
    "qwen3_vl": lambda tokenizer: Qwen3Renderer(tokenizer, "instruct", images=True),
    "llama3": lambda tokenizer: Llama3Renderer(tokenizer, dated=False),
    "llama3_1": Llama3Renderer,
    "gpt_oss": HarmonyRenderer,
    "deepseek_v3": DeepSeekRenderer,
    "deepseek_v3_thinking": lambda tokenizer: DeepSeekRenderer(tokenizer, thinking=True),
    "kimi_k2": KimiRenderer,
    "kimi_k2_thinking": lambda tokenizer: KimiRenderer(tokenizer, thinking=True),
    "role_colon": RoleColonRenderer,
}
"""Every renderer that a name can choose."""

_CANDIDATES: Final[Mapping[str, Maker]] = {
    "qwen3_vl": RENDERERS["qwen3_vl"],
    "qwen3": RENDERERS["qwen3"],
    "qwen3_thinking": RENDERERS["qwen3_thinking"],
    "qwen3_instruct": RENDERERS["qwen3_instruct"],
    "llama3_1": RENDERERS["llama3_1"],
    "llama3": RENDERERS["llama3"],
    "gpt_oss": RENDERERS["gpt_oss"],
    "gpt_oss, older template": lambda tokenizer: HarmonyRenderer(tokenizer, gap_after_instructions=False),
    "deepseek_v3": RENDERERS["deepseek_v3"],
    "kimi_k2": RENDERERS["kimi_k2"],
    "kimi_k2, wide tools": lambda tokenizer: KimiRenderer(tokenizer, compact_tools=False),
    "kimi_k2_thinking": RENDERERS["kimi_k2_thinking"],
    "kimi_k2_thinking, wide tools": lambda tokenizer: KimiRenderer(tokenizer, thinking=True, compact_tools=False),
    "role_colon": RENDERERS["role_colon"],
}


def make_renderer(name: str, tokenizer: ChatTokenizer) -> SegmentRenderer:
    """Raises `RenderError` for an unknown name, and if the tokenizer's template writes another format."""
    if name not in RENDERERS:
        nearest = get_close_matches(name, RENDERERS, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise RenderError(f"unknown renderer {name!r}; {hint}The renderers are {', '.join(RENDERERS)}")
    return RENDERERS[name](tokenizer)


def choose_renderer(tokenizer: ChatTokenizer) -> SegmentRenderer:
    """The family whose text is that of the tokenizer's template, else the template itself; `role_colon` without one."""
    if not tokenizer.chat_template:
        return RoleColonRenderer(tokenizer)
    for make in _CANDIDATES.values():
        try:
            return make(tokenizer)
        except RenderError:
            continue  # another format
    return ChatTemplateRenderer(tokenizer)
