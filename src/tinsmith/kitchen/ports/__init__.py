"""What workflows need of the world, as small Protocols. Adapters stand on the other side."""

from typing import Any, Final

from tinsmith.kitchen.ports.data import BlobStore, Dataset, DatasetStore, Record, dataset_of
from tinsmith.kitchen.ports.environment import (
    Environment,
    EnvironmentGroup,
    EnvironmentSource,
    Observation,
    SameTask,
    StepResult,
    TaskSet,
)
from tinsmith.kitchen.ports.services import (
    Completer,
    EmbeddingClient,
    EvalExample,
    EvalResult,
    Evaluator,
    Feedback,
    FeedbackClient,
    HubClient,
    LLMClient,
    MetricRow,
    MetricsStore,
    ModelRegistry,
    RegisteredModel,
    TokenizerClient,
    VectorStore,
)
from tinsmith.kitchen.ports.training import (
    CheckpointPaths,
    CustomLoss,
    LossGradient,
    Pending,
    Sampler,
    SamplingClient,
    SessionSpec,
    TrainingBackend,
    TrainingClient,
    TrainingSession,
    adam_params,
)

Outcome = StepResult
"""The name that `StepResult` has in older code."""

PORTS: Final[dict[str, Any]] = {
    "training_client": TrainingClient,
    "sampling_client": SamplingClient,
    "environment": EnvironmentSource,
    "dataset_store": DatasetStore,
    "blob_store": BlobStore,
    "metrics_store": MetricsStore,
    "tokenizer_client": TokenizerClient,
    "evaluator": Evaluator,
    "model_registry": ModelRegistry,
    "hub_client": HubClient,
    "feedback_client": FeedbackClient,
    "completer": Completer,
    "llm_client": LLMClient,
    "embedding_client": EmbeddingClient,
    "vector_store": VectorStore,
}
"""Names under which workflows ask for adapters."""

__all__ = [
    "PORTS",
    "BlobStore",
    "CheckpointPaths",
    "Completer",
    "CustomLoss",
    "Dataset",
    "DatasetStore",
    "EmbeddingClient",
    "Environment",
    "EnvironmentGroup",
    "EnvironmentSource",
    "EvalExample",
    "EvalResult",
    "Evaluator",
    "Feedback",
    "FeedbackClient",
    "HubClient",
    "LLMClient",
    "LossGradient",
    "MetricRow",
    "MetricsStore",
    "ModelRegistry",
    "Observation",
    "Outcome",
    "Pending",
    "Record",
    "RegisteredModel",
    "SameTask",
    "Sampler",
    "SamplingClient",
    "SessionSpec",
    "StepResult",
    "TaskSet",
    "TokenizerClient",
    "TrainingBackend",
    "TrainingClient",
    "TrainingSession",
    "VectorStore",
    "adam_params",
    "dataset_of",
]
