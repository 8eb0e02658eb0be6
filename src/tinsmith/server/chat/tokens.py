"""A base model's tokenizer as the dialects use it: prompts from text and messages, text and bytes from tokens."""

from __future__ import annotations

import copy
import inspect
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tinsmith.server.chat.fields import BadField
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.operations import BaseModelCard

Message = Mapping[str, Any]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def load_model_text(card: BaseModelCard) -> ModelText:
    """Imports transformers. Raises `Unsupported` if the model has no tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(card.source)
    except (OSError, ValueError) as error:
        raise Unsupported(
            f"base model {card.name!r} has no tokenizer files; sample it with token ids through the Tinker API"
        ) from error
    return ModelText(card, tokenizer)


class ModelText:
    """`encode` and `render` may run in any thread, one at a time; the rest belongs to the event loop."""

    def __init__(self, card: BaseModelCard, tokenizer: Any) -> None:
        self._card = card
        self._encoder = tokenizer
        self._lock = threading.Lock()
        self._decoder = copy.deepcopy(tokenizer)  # encoding changes a tokenizer's inner switches for a moment
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
        self._special_ids = {
            str(token.content): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._special = re.compile("|".join(map(re.escape, sorted(self._special_ids, key=len, reverse=True))) or "(?!)")
        self._is_byte_level = "ByteLevel" in _decoder_kind(tokenizer)
        self.token_text: Callable[[int], str] = lru_cache(maxsize=65_536)(self._token_text)
        self.chat_stop_tokens: tuple[int, ...] = tuple(dict.fromkeys([*card.eos_token_ids, *self._end_of_turn()]))
        """Tokens that end an assistant's turn."""

    # ---- prompts ----

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Special tokens in the text are taken as such: a raw prompt is the caller's own. Raises `BadField`."""
        _check_characters(text, "prompt")
        with self._lock:
            return list(self._encoder(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        continue_final: bool = False,
        add_prompt: bool = True,
    ) -> list[int]:
        """The prompt after which the model writes the next turn, or goes on with the last.

        Text of special tokens inside messages stays text: nobody ends a turn from within. Raises `BadField`.
        """
        with self._lock:
            self._check_tools(messages, tools, options or {})
            nonce = secrets.token_hex(4)
            marked = {f"\ue000{nonce}{i}\ue001": text for i, text in enumerate(self._special_ids)}
            sentinels = {text: sentinel for sentinel, text in marked.items()}
            harmless = [
                _map_text(m, lambda t: self._special.sub(lambda found: sentinels[found[0]], t)) for m in messages
            ]
            text = self._template(
                harmless, tools, options or {}, continue_final_message=continue_final, add_generation_prompt=add_prompt
            )
            _check_characters(text, "messages")
            if not any(sentinel in text for sentinel in marked):
                return self._encode_text(text)
            return self._encode_forged(text, marked)

    def takes_tool_calls(self, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        """Whether the template teaches the model to call tools as `<tool_call>…</tool_call>`."""
        return bool(tools) and "<tool_call>" in str(self._encoder.get_chat_template(tools=tools))

    def _template(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, options: Mapping[str, Any], **switches: bool
    ) -> str:
        from jinja2.exceptions import TemplateError

        if not self._encoder.chat_template:
            raise BadField("model", f"{self._card.name!r} has no chat template; use /v1/completions")
        self._check_options(options)
        try:
            return str(
                self._encoder.apply_chat_template(list(messages), tools=tools, tokenize=False, **switches, **options)
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise BadField("messages", f"the chat template of {self._card.name!r} refuses this: {error}") from error
        except RecursionError as error:
            raise BadField("messages", "the messages or tools are nested too deeply") from error

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Raises `BadField` for what is no variable of the template, or not the caller's to set."""
        template = str(self._encoder.chat_template)
        for name in options:
            if name in self._reserved or name not in template:
                where = f"chat_template_kwargs.{name}"
                raise BadField(where, f"{where}: the chat template of {self._card.name!r} has no such variable to set")

    def _check_tools(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> None:
        """Raises `BadField` if the template would drop what it is given."""
        if not tools and not any(message.get("tool_calls") for message in messages):
            return
        given = self._template(messages, tools, options)
        if tools and given == self._template(messages, None, options):
            raise BadField("tools", f"the chat template of {self._card.name!r} has no place for tools")
        for index, message in enumerate(messages):
            if not message.get("tool_calls"):
                continue
            without = {key: value for key, value in message.items() if key != "tool_calls"}
            if given == self._template([*messages[:index], without, *messages[index + 1 :]], tools, options):
                raise BadField(
                    f"messages[{index}].tool_calls",
                    f"the chat template of {self._card.name!r} has no place for tool calls",
                )

    def _encode_text(self, text: str, **options: bool) -> list[int]:
        return list(self._encoder(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def _encode_forged(self, text: str, marked: Mapping[str, str]) -> list[int]:
        """Raises `BadField` if this tokenizer cannot write a special token's text as plain text."""
        dashes = {sentinel: "-" * len(special) for sentinel, special in marked.items()}
        plain = text
        for sentinel, dash in dashes.items():
            plain = plain.replace(sentinel, dash)
        if self._encode_by_pieces(text, dashes) != self._encode_text(plain):
            raise BadField(
                "messages", f"a message holds the text of a special token ({', '.join(self._special_ids)}), which the "
                f"tokenizer of {self._card.name!r} cannot write as plain text; take it out"
            )  # fmt: skip
        return self._encode_by_pieces(text, marked)

    def _encode_by_pieces(self, text: str, meanings: Mapping[str, str]) -> list[int]:
        """Special tokens one by one, and what lies between them as plain text."""
        tokens: list[int] = []
        marks = [found.span() for found in self._special.finditer(text)]
        for (_, start), (end, after) in pairwise([(0, 0), *marks, (len(text), len(text))]):
            run = text[start:end]
            for sentinel, meaning in meanings.items():
                run = run.replace(sentinel, meaning)
            tokens += self._encode_text(run, split_special_tokens=True) if run else []
            if after > end:
                tokens.append(self._special_ids[text[end:after]])
        return tokens

    def _end_of_turn(self) -> list[int]:
        """The special token that the chat template writes after an assistant's words."""
        if not self._encoder.chat_template:
            return []
        words = "tinsmith"
        try:
            text = self._template([{"role": "user", "content": "1"}, {"role": "assistant", "content": words}], None, {})
        except InvalidInput:
            return []  # a template that takes no plain conversation: only the model's own end tokens count
        after = text.rpartition(words)[2].lstrip()
        found = self._special.match(after)
        return [self._special_ids[found[0]]] if found else []

    # ---- answers ----

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        return str(
            self._decoder.decode(list(tokens), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        )

    def decode_with_special(self, tokens: Sequence[int]) -> str:
        return self.decode(tokens, skip_special=False)

    def token_bytes(self, token: int) -> list[int]:
        """The bytes that a token stands for, half characters included."""
        piece = self._decoder.convert_ids_to_tokens(token)
        if isinstance(piece, str) and (byte := _BYTE.fullmatch(piece)):
            return [int(byte[1], 16)]
        if isinstance(piece, str) and self._is_byte_level and all(letter in _BYTE_OF for letter in piece):
            return [_BYTE_OF[letter] for letter in piece]
        return list(self.token_text(token).encode())

    def _token_text(self, token: int) -> str:
        return self.decode([token], skip_special=False)


def _check_characters(text: str, field: str) -> None:
    """JSON can spell half a character (`\\ud800`); tokenizers cannot. Raises `BadField`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadField(field, f"{field} holds {error.object[error.start]!r}, half of a surrogate pair") from error


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """`change` on every text inside, keys excepted."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_text(item, change) for item in value]
    return value


def _decoder_kind(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "" if backend is None else json.dumps(json.loads(backend.to_str()).get("decoder"))


def _byte_letters() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: printable ones as themselves, the rest from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
