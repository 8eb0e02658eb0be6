"""Tinsmith: train and sample language models through the Tinker API, on your own machine.

Names load when used, so that `import tinsmith` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "tinsmith.types": (
        "AdamOptimizerConfig AdamParams Checkpoint CheckpointType Datum DimuonOptimizerConfig DimuonParams DmelChunk "
        "EncodedTextChunk ForwardBackwardOutput LoraConfig ModelInput ModelInputChunk OptimParams OptimStepResponse "
        "ParsedCheckpointTinkerPath PromptProvenanceSpan SampleResponse SampledProvenanceSpan SampledSequence "
        "SamplingParams StopReason TensorData TensorDtype TrainingRun"
    ),
    "tinsmith.client": (
        "APIConnectionError APIError APIFuture APIResponseValidationError APIStatusError APITimeoutError "
        "AuthenticationError BadRequestError BillingError ConflictError InternalServerError NotFoundError "
        "PermissionDeniedError RateLimitError RequestFailedError RestClient RetryConfig SamplingClient ServiceClient "
        "TinkerError TrainingClient UnprocessableEntityError"
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = ["__version__", "types", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    if name == "types":
        return import_module("tinsmith.types")
    raise AttributeError(f"module 'tinsmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
