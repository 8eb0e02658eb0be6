"""Everything else a workflow may want of the world."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tinsmith.data import ChatTokenizer
from tinsmith.types.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    run_id: str
    metric: str
    value: float
    step: int
    timestamp: float
    metadata: Mapping[str, Any] = field(default_factory=dict)


class MetricsStore(Protocol):
    def record(self, row: MetricRow) -> None: ...

    def flush(self) -> None:
        """What was recorded before is there after a crash."""

    def read(self, run_id: str, metric: str | None = None) -> list[MetricRow]:
        """In the order of recording."""


class TokenizerClient(Protocol):
    def get_tokenizer(self, model: str) -> ChatTokenizer:
        """Raises `OSError` if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalExample:
    prediction: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    metric: str
    score: float
    """From 0 to 1: the mean over the examples, unless the metric is one of a corpus."""
    scores: tuple[float, ...]


class Evaluator(Protocol):
    def evaluate(self, examples: Sequence[EvalExample]) -> EvalResult:
        """Raises `InvalidInput` for no examples."""

    def generate_report(self, result: EvalResult) -> str:
        """Markdown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    name: str
    version: int
    """From 1."""
    path: str
    parent: str | None = None
    """`NAME:VERSION` it was trained from."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


class ModelRegistry(Protocol):
    """Models by name and version. A registered version never changes."""

    def register(
        self, name: str, path: str, *, parent: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> RegisteredModel:
        """The next version of `name`. Raises `NotFound` for an unknown parent."""

    def get(self, name: str, version: int | None = None) -> RegisteredModel:
        """The newest without a version. Raises `NotFound`."""

    def lineage(self, name: str, version: int | None = None) -> list[RegisteredModel]:
        """The model and its ancestors, itself first."""

    def list(self, name: str | None = None) -> list[RegisteredModel]:
        """Of all names, or of one; in the order of registration."""


class HubClient(Protocol):
    """Repositories of files."""

    def download(self, repo: str, file: str) -> Path:
        """Raises `NotFound`."""

    def snapshot(self, repo: str) -> Path: ...

    def list_files(self, repo: str) -> list[str]:
        """Sorted."""

    def upload(self, repo: str, file: str, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    prompt: str
    response: str
    rating: float
    """From -1 (bad) to 1 (good)."""
    correction: str | None = None
    """What would have been a good response."""

    def __post_init__(self) -> None:
        for key in ("prompt", "response", "correction"):
            value = getattr(self, key)
            if not isinstance(value, str) and not (key == "correction" and value is None):
                raise InvalidInput(f"{key} must be a text, not {value!r}")
        if self.correction == "":
            raise InvalidInput("correction is empty; leave it out where there is none")
        if isinstance(self.rating, bool) or not isinstance(self.rating, (int, float)) or not -1 <= self.rating <= 1:
            raise InvalidInput(f"rating must be a number from -1 to 1, not {self.rating!r}")


class FeedbackClient(Protocol):
    def log(self, feedback: Feedback) -> None: ...

    def read(self, *, after: int = 0) -> list[Feedback]:
        """In the order of logging, the first `after` left out."""

    def count(self) -> int: ...


class Completer(Protocol):
    """Text in, text out."""

    def complete(self, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0) -> str: ...


class LLMClient(Protocol):
    """A conversation in, the next message out."""

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int = 256, temperature: float = 0.0
    ) -> str: ...


class EmbeddingClient(Protocol):
    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text, all of one length."""


class VectorStore(Protocol):
    def add(self, items: Iterable[tuple[str, Sequence[float]]]) -> None:
        """Keys and vectors; an existing key is replaced."""

    def search(self, vector: Sequence[float], *, limit: int = 10) -> list[tuple[str, float]]:
        """Keys and cosine similarities, the most similar first."""
