"""Chat templates that write each family's documented format, in our own words, and small tokenizers that carry them.

They are not the vendors' files: those are not redistributed here. What they share with them is the text they produce.
"""

# ruff: noqa: E501 - templates are easier to read in long lines

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the tokenizers of these families cut text into words, line breaks above all."""

_QWEN_TOOLS = (
    "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>"
)
_QWEN_TOOLS_END = (
    "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": '
    "<args-json-object>}\\n</tool_call>"
)
_QWEN_HEAD = (
    "{% macro body(m) %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% set has_system = messages[0].role == 'system' %}"
    "{% if tools %}<|im_start|>system\n{% if has_system %}{{ body(messages[0]) }}\n\n{% endif %}"
    '{{ "'
    + _QWEN_TOOLS
    + '" }}{% for t in tools %}{{ "\n" }}{{ t | tojson }}{% endfor %}{{ "'
    + _QWEN_TOOLS_END
    + '" }}'
    "<|im_end|>\n{% elif has_system %}<|im_start|>system\n{{ body(messages[0]) }}<|im_end|>\n{% endif %}"
)
_QWEN_CALLS = (
    "{% for call in m.tool_calls or [] %}{% if not loop.first or content %}{{ '\n' }}{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
)
_QWEN_RESULT = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}{{ '\n' }}<tool_response>\n"
    "{{ m.content }}\n</tool_response>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n"
    "{% endif %}"
)


def qwen3(generation: str, *, thinks: bool) -> str:
    thought = (
        "{% if loop.index0 > found.query and (loop.last or thought) %}"
        "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{% else %}{{ content }}{% endif %}"
    )
    split = (
        "{% set thought, content = '', m.content %}{% if m.reasoning_content is string %}"
        "{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    )
    return (
        _QWEN_HEAD + "{% set found = namespace(query=messages | length - 1, open=true) %}"
        "{% for m in messages[::-1] %}{% if found.open and m.role == 'user' and not (m.content is string and "
        "m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
        "{% set found.open = false %}{% set found.query = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
        "<|im_start|>{{ m.role }}\n{{ body(m) }}<|im_end|>\n{% elif m.role == 'assistant' %}"
        + (split if thinks else "{% set content = m.content %}")
        + "<|im_start|>assistant\n"
        + (thought if thinks else "{{ content }}")
        + _QWEN_CALLS
        + "{% elif m.role == 'tool' %}"
        + _QWEN_RESULT
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        + generation
        + "{% endif %}"
    )


QWEN_SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\\n\\nRespond in the format {\\"name\\": function name, \\"parameters\\": dictionary of '
    "argument name and its value}.Do not use variables.\\n\\n"
)
LLAMA31 = (
    "{{ bos_token }}{% set rest = messages %}{% set system = '' %}"
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}"
    "{% endif %}<|start_header_id|>system<|end_header_id|>\n\n{% if tools %}Environment: ipython\n{% endif %}"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string or '26 Jul 2024' }}\n\n{{ system }}<|eot_id|>"
    "{% if tools %}{% set first = rest[0].content | trim %}{% set rest = rest[1:] %}"
    '<|start_header_id|>user<|end_header_id|>\n\n{{ "' + _LLAMA_TOOLS + '" }}'
    "{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{{ first }}<|eot_id|>{% endif %}"
    "{% for m in rest %}{% if m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>"
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GPT_OSS = (
    "{% macro kind(spec) %}{% if spec.type == 'array' %}{{ kind(spec['items']) }}[]"
    "{% elif spec.enum %}{{ '\"' + spec.enum | join('\" | \"') + '\"' }}"
    "{% elif spec.type == 'integer' %}number{% else %}{{ spec.type }}{% endif %}{% endmacro %}"
    "<|start|>system<|message|>{{ model_identity }}\nKnowledge cutoff: 2024-06\n"
    "Current date: {{ strftime_now('%Y-%m-%d') }}\n\nReasoning: {{ reasoning_effort }}\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    "{% if tools %}{{ '\n' }}Calls to these tools must go to the commentary channel: 'functions'.{% endif %}<|end|>"
    "{% set said = '' %}{% set rest = messages %}{% if messages[0].role in ['system', 'developer'] %}"
    "{% set said = messages[0].content %}{% set rest = messages[1:] %}{% endif %}"
    "{% if said or tools %}<|start|>developer<|message|>{% if said %}{{ '# Instructions\n\n' + said + '\n\n' }}"
    "{% endif %}{% if tools %}# Tools\n\n## functions\n\nnamespace functions {\n\n{% for t in tools %}"
    "{% set f = t.function %}// {{ f.description }}\ntype {{ f.name }} = {% if f.parameters.properties %}(_: {\n"
    "{% for name, spec in f.parameters.properties.items() %}{% if spec.description %}// {{ spec.description }}\n"
    "{% endif %}{{ name }}{% if name not in (f.parameters.required or []) %}?{% endif %}: {{ kind(spec) }}"
    "{% if spec.default is defined %}, // default: {{ spec.default if spec.enum else spec.default | tojson }}"
    "{% else %},{% endif %}{{ '\n' }}{% endfor %}}) => any;\n\n{% else %}() => any;\n\n{% endif %}{% endfor %}"
    "} // namespace functions{% endif %}<|end|>{% endif %}{% set last = namespace(call=none) %}"
    "{% for m in rest %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ last.call }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>{% elif m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{% set later = rest[loop.index:] | selectattr('role', 'equalto', 'assistant') "
    "| rejectattr('tool_calls', 'defined') | list %}"
    "{% if m.thinking and not later %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
    "{{ f.arguments | tojson }}<|call|>{% set last.call = f.name %}"
    "{% elif loop.last and not add_generation_prompt %}"
    "{% if 'thinking' in m %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}"
    "{% set before = namespace(role='') %}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
    "{% else %}{% if before.role == 'user' %}<｜Assistant｜></think>{% endif %}"
    "{% if m.tool_calls %}{{ m.content }}{% for c in m.tool_calls %}"
    "{% if loop.first %}<｜tool▁calls▁begin｜>{% endif %}"
    "<｜tool▁call▁begin｜>{{ c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>{% else %}"
    "{{ m.content.split('</think>', 1)[1] if '</think>' in m.content and before.role != 'tool' else m.content }}"
    "<｜end▁of▁sentence｜>{% endif %}{% endif %}{% set before.role = m.role %}{% endfor %}"
    "{% if add_generation_prompt and before.role == 'user' %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}"
    "{% endif %}"
)


def kimi(*, thinks: bool) -> str:
    thought = "<think>{{ m.reasoning_content or '' if loop.index0 > final.at else '' }}</think>" if thinks else ""
    return (
        "{% set final = namespace(at=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}"
        "{% set final.at = loop.index0 %}{% endif %}{% endfor %}"
        "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>"
        "{% endif %}{% if messages[0].role != 'system' %}<|im_system|>system<|im_middle|>"
        "You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>{% endif %}{% for m in messages %}"
        "{% set name = m.name or m.role %}{{ '<|im_user|>' if m.role == 'user' else '<|im_assistant|>' if m.role == "
        "'assistant' else '<|im_system|>' }}{{ name }}<|im_middle|>"
        "{% if m.role == 'assistant' %}" + thought + "{{ m.content }}{% if m.tool_calls %}<|tool_calls_section_begin|>"
        "{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
        "{{ c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}"
        "{% elif m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{{ m.content }}{% else %}{{ m.content }}"
        "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
    )


ROLE_COLON = (
    "{{ bos_token }}{% for m in messages %}{% if not (m.role == 'user' and loop.index0 and "
    "messages[loop.index0 - 1].role == 'assistant') %}{{ m.role | capitalize }}:{% endif %} {{ m.content }}\n\n"
    "{% if m.role == 'assistant' and ((loop.nextitem is defined and loop.nextitem.role == 'user') or (loop.last and not add_generation_prompt))"
    " %}User:{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()
    """Added tokens that are not flagged as special."""
    bos: str | None = None


_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_LLAMA_SPECIAL = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>",
)  # fmt: skip
_KIMI_SPECIAL = (
    "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
_DEEPSEEK_PLAIN = (
    "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip
_DEEPSEEK_SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")

FAMILIES = {
    "qwen3": Family(template=qwen3(QWEN_SWITCH, thinks=True), special=_QWEN_SPECIAL, plain=_QWEN_PLAIN),
    "qwen3_no_thinking": Family(template=qwen3(QWEN_SWITCH, thinks=True), special=_QWEN_SPECIAL, plain=_QWEN_PLAIN),
    "qwen3_thinking": Family(template=qwen3("<think>\n", thinks=True), special=_QWEN_SPECIAL, plain=_QWEN_PLAIN),
    "qwen3_instruct": Family(template=qwen3("", thinks=False), special=_QWEN_SPECIAL, plain=_QWEN_PLAIN),
    "qwen3_vl": Family(
        template=qwen3("", thinks=False), special=(*_QWEN_SPECIAL, *_QWEN_VISION), plain=_QWEN_PLAIN
    ),
    "llama3": Family(template=LLAMA3, special=_LLAMA_SPECIAL, bos="<|begin_of_text|>"),
    "llama3_1": Family(template=LLAMA31, special=_LLAMA_SPECIAL, bos="<|begin_of_text|>"),
    "gpt_oss": Family(
        template=GPT_OSS,
        special=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"),
    ),
    "deepseek_v3": Family(
        template=DEEPSEEK, special=_DEEPSEEK_SPECIAL, plain=_DEEPSEEK_PLAIN, bos="<｜begin▁of▁sentence｜>"
    ),
    "deepseek_v3_thinking": Family(
        template=DEEPSEEK, special=_DEEPSEEK_SPECIAL, plain=_DEEPSEEK_PLAIN, bos="<｜begin▁of▁sentence｜>"
    ),
    "kimi_k2": Family(template=kimi(thinks=False), special=_KIMI_SPECIAL),
    "kimi_k2_thinking": Family(
        template=kimi(thinks=True), special=_KIMI_SPECIAL, plain=("<think>", "</think>")
    ),
    "role_colon": Family(template=ROLE_COLON, special=("<s>", "</s>"), bos="<s>"),
}  # fmt: skip


def tokenizer_of(name: str, **changes: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the family's markers. `changes` go to its constructor."""
    family = FAMILIES[name]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core(family.special, family.plain)),
        clean_up_tokenization_spaces=False,
        **{"bos_token": family.bos, "chat_template": family.template, **changes},
    )


@cache
def _core(special: Sequence[str], plain: Sequence[str]) -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["user\n\n\nhello there the kettle", "assistant\n\n  the kettle", 'system analysis final {"name": "'] * 9
    core.train_from_iterator(text, trainer)
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return str(core.to_str())
