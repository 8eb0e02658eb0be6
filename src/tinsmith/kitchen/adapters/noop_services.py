"""In-memory adapters for every port: complete, deterministic, gone with the process."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinsmith.data import DEMO_CONVERSATIONS, ChatTokenizer, Message, ParsedAnswer, load_tokenizer
from tinsmith.kitchen.adapters.datasets import FileDatasets, MemoryDatasets
from tinsmith.kitchen.adapters.evaluators import ExactMatch
from tinsmith.kitchen.adapters.noop_training import NoopBackend
from tinsmith.kitchen.ports import (
    BlobStore,
    Completer,
    Dataset,
    EmbeddingClient,
    Environment,
    EnvironmentGroup,
    EnvironmentSource,
    Feedback,
    FeedbackClient,
    HubClient,
    LLMClient,
    MetricRow,
    MetricsStore,
    ModelRegistry,
    Observation,
    RegisteredModel,
    SameTask,
    StepResult,
    TokenizerClient,
    VectorStore,
)
from tinsmith.models import TINY
from tinsmith.types.errors import NotFound


def noop_adapters(**options: Any) -> dict[str, Any]:
    """One adapter per port. `options` go to the `NoopBackend`."""
    backend = NoopBackend(**options)
    return {
        "training_client": backend,
        "sampling_client": backend,
        "environment": EvenDigits(),
        "dataset_store": NoopDatasets(),
        "blob_store": MemoryBlobs(),
        "metrics_store": MemoryMetrics(),
        "tokenizer_client": TinyTokenizers(),
        "evaluator": ExactMatch(),
        "model_registry": MemoryRegistry(),
        "hub_client": MemoryHub(),
        "feedback_client": MemoryFeedback(),
        "completer": EchoCompleter(),
        "llm_client": EchoChat(),
        "embedding_client": HashEmbeddings(),
        "vector_store": MemoryVectors(),
    }


@dataclass(slots=True)
class EvenDigit(Environment):
    """Two turns; each answer that ends with an even digit is worth a half."""

    index: int
    turns: int = 0

    async def start(self) -> Observation:
        return Observation(messages=(Message(role="user", content=f"An even digit, please, for task {self.index}."),))

    async def step(self, answer: ParsedAnswer) -> StepResult:
        self.turns += 1
        reward = 0.5 if answer.message.content.strip()[-1:] in tuple("02468") else 0.0
        said = () if self.turns == 2 else (Message(role="user", content="Another one."),)
        return StepResult(reward=reward, done=self.turns == 2, messages=said)


class EvenDigits(EnvironmentSource):
    """What the noop backend's samples, digits that the seed draws, are sometimes right about."""

    def group(self, index: int, size: int) -> EnvironmentGroup:
        return SameTask(make_one=lambda: EvenDigit(index), size=size, tags={"task": f"even digits/{index}"})


@dataclass(slots=True)
class NoopDatasets(FileDatasets):
    """Rows in memory by name, and files. Without a name: the conversations that ship."""

    rows: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    default_data: str = str(DEMO_CONVERSATIONS)

    def load_dataset(self, name: str) -> Dataset:
        return MemoryDatasets(self.rows).load_dataset(name) if name in self.rows else FileDatasets().load_dataset(name)


@dataclass(slots=True)
class MemoryBlobs(BlobStore):
    blobs: dict[str, bytes] = field(default_factory=dict)

    def read(self, key: str) -> bytes:
        if key not in self.blobs:
            raise NotFound(f"no blob {key!r}")
        return self.blobs[key]

    def stream(self, key: str, *, chunk_size: int = 1 << 20) -> Iterator[bytes]:
        data = self.read(key)
        return (data[start : start + chunk_size] for start in range(0, len(data), chunk_size))

    def write(self, key: str, data: bytes) -> None:
        self.blobs[key] = bytes(data)

    def exists(self, key: str) -> bool:
        return key in self.blobs


@dataclass(slots=True)
class MemoryMetrics(MetricsStore):
    rows: list[MetricRow] = field(default_factory=list)

    def record(self, row: MetricRow) -> None:
        self.rows.append(row)

    def flush(self) -> None:
        return None

    def read(self, run_id: str, metric: str | None = None) -> list[MetricRow]:
        return [row for row in self.rows if row.run_id == run_id and metric in (None, row.metric)]


class TinyTokenizers(TokenizerClient):
    """The tokenizer of tinsmith/tiny, whatever the model."""

    def get_tokenizer(self, model: str) -> ChatTokenizer:
        return load_tokenizer(TINY)


@dataclass(slots=True)
class MemoryRegistry(ModelRegistry):
    models: list[RegisteredModel] = field(default_factory=list)

    def register(
        self, name: str, path: str, *, parent: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> RegisteredModel:
        if parent is not None:
            self._at(parent)
        version = sum(1 for model in self.models if model.name == name) + 1
        made = RegisteredModel(name=name, version=version, path=path, parent=parent, metadata=dict(metadata or {}))
        self.models.append(made)
        return made

    def get(self, name: str, version: int | None = None) -> RegisteredModel:
        found = [model for model in self.models if model.name == name and version in (None, model.version)]
        if not found:
            raise NotFound(f"no model {name!r}" + (f" of version {version}" if version is not None else ""))
        return found[-1]

    def lineage(self, name: str, version: int | None = None) -> list[RegisteredModel]:
        line = [self.get(name, version)]
        while (parent := line[-1].parent) is not None:
            line.append(self._at(parent))
        return line

    def list(self, name: str | None = None) -> list[RegisteredModel]:
        return [model for model in self.models if name in (None, model.name)]

    def _at(self, place: str) -> RegisteredModel:
        name, _, version = place.rpartition(":")
        if not name or not version.isdigit():
            raise NotFound(f"parent {place!r} is not of the form NAME:VERSION")
        return self.get(name, int(version))


@dataclass(slots=True)
class MemoryHub(HubClient):
    """Repositories in memory; downloads are written into `folder`."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    folder: Path | None = None

    def download(self, repo: str, file: str) -> Path:
        if file not in self.files.get(repo, {}):
            raise NotFound(f"no file {file!r} in {repo!r}")
        target = self._home() / repo / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.files[repo][file])
        return target

    def snapshot(self, repo: str) -> Path:
        for file in self.list_files(repo):
            self.download(repo, file)
        return self._home() / repo

    def list_files(self, repo: str) -> list[str]:
        if repo not in self.files:
            raise NotFound(f"no repository {repo!r}")
        return sorted(self.files[repo])

    def upload(self, repo: str, file: str, data: bytes) -> None:
        self.files.setdefault(repo, {})[file] = bytes(data)

    def _home(self) -> Path:
        if self.folder is None:
            from tempfile import mkdtemp

            self.folder = Path(mkdtemp(prefix="tinsmith-hub-"))
        return self.folder


@dataclass(slots=True)
class MemoryFeedback(FeedbackClient):
    entries: list[Feedback] = field(default_factory=list)

    def log(self, feedback: Feedback) -> None:
        self.entries.append(feedback)

    def read(self, *, after: int = 0) -> list[Feedback]:
        return self.entries[after:]

    def count(self) -> int:
        return len(self.entries)


class EchoCompleter(Completer):
    """Completes with the last word of the prompt."""

    def complete(self, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0) -> str:
        return (prompt.split() or [""])[-1]


class EchoChat(LLMClient):
    """Answers with the last message."""

    def chat(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int = 256, temperature: float = 0.0) -> str:
        return messages[-1]["content"] if messages else ""


class HashEmbeddings(EmbeddingClient):
    """Unit vectors of 16 numbers; equal texts have equal vectors."""

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [_unit([byte - 127.5 for byte in hashlib.sha256(text.encode()).digest()[:16]]) for text in texts]


@dataclass(slots=True)
class MemoryVectors(VectorStore):
    vectors: dict[str, list[float]] = field(default_factory=dict)

    def add(self, items: Iterable[tuple[str, Sequence[float]]]) -> None:
        self.vectors |= {key: _unit(vector) for key, vector in items}

    def search(self, vector: Sequence[float], *, limit: int = 10) -> list[tuple[str, float]]:
        wanted = _unit(vector)
        scored = [(key, sum(map(float.__mul__, wanted, other))) for key, other in self.vectors.items()]
        return sorted(scored, key=lambda pair: -pair[1])[:limit]


def _unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / length for value in vector]
