"""Tinsmith: train and sample language models through the Tinker API, on your own machine.

Names load when used, so that `import tinsmith` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__title__ = "tinsmith"
__version__ = "0.1.0"

_HOMES = {
    "tinsmith.types": (
        "AdamOptimizerConfig AdamParams Checkpoint CheckpointType Datum DimuonOptimizerConfig DimuonParams DmelChunk "
        "EncodedTextChunk ForwardBackwardOutput LoraConfig ModelID ModelInput ModelInputChunk OptimParams "
        "OptimStepRequest OptimStepResponse SampleRequest "
        "ParsedCheckpointTinkerPath PromptProvenanceSpan SampleResponse SampledProvenanceSpan SampledSequence "
        "SamplingParams StopReason TensorData TensorDtype TrainingRun"
    ),
    "tinsmith.client": (
        "APIConnectionError AdminClient APIError APIFuture APIResponseValidationError APIStatusError APITimeoutError "
        "AuthenticationError BackcompatSamplingClientFuture BackcompatTrainingClientFuture BadRequestError "
        "BillingError ConflictError ExperimentalWarning InternalServerError LossHandle NotFoundError "
        "PerDatumLossFn PermissionDeniedError RateLimitError RequestFailedError RequestOptions RestClient RetryConfig "
        "SamplingClient ServiceClient Timeout TinkerError TrainingClient UnprocessableEntityError"
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

_MODULES = {"auth": "tinsmith.auth", "types": "tinsmith.types"}

__all__ = ["__title__", "__version__", *_MODULES, *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'tinsmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
