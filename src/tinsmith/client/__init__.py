"""The client: train and sample on any server that speaks the Tinker API, or in this process (`local:`)."""

from tinsmith.client.config import Timing
from tinsmith.client.custom_loss import LossHandle
from tinsmith.client.errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BillingError,
    ClientClosedError,
    ConfigurationError,
    ConflictError,
    InternalServerError,
    NotFoundError,
    PermissionDeniedError,
    PromiseExpiredError,
    RateLimitError,
    RequestFailedError,
    TinkerError,
    UnprocessableEntityError,
)
from tinsmith.client.futures import APIFuture
from tinsmith.client.rest import RestClient
from tinsmith.client.sampling import RetryConfig, SamplingClient
from tinsmith.client.service import ServiceClient
from tinsmith.client.training import TrainingClient

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BillingError",
    "ClientClosedError",
    "ConfigurationError",
    "ConflictError",
    "InternalServerError",
    "LossHandle",
    "NotFoundError",
    "PermissionDeniedError",
    "PromiseExpiredError",
    "RateLimitError",
    "RequestFailedError",
    "RestClient",
    "RetryConfig",
    "SamplingClient",
    "ServiceClient",
    "Timing",
    "TinkerError",
    "TrainingClient",
    "UnprocessableEntityError",
]
