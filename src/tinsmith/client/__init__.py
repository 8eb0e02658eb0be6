"""The client: train and sample on any server that speaks the Tinker API, or in this process (`local:`)."""

from tinsmith.client.admin import AdminClient
from tinsmith.client.config import RequestOptions, Timeout, Timing
from tinsmith.client.custom_loss import LossHandle, PerDatumLoss
from tinsmith.client.downloads import download_checkpoint
from tinsmith.client.errors import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BillingError,
    CircuitOpenError,
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
from tinsmith.client.futures import APIFuture, ClientFuture
from tinsmith.client.rest import ExperimentalWarning, RestClient
from tinsmith.client.retries import RetryConfig
from tinsmith.client.sampling import SamplingClient
from tinsmith.client.service import ServiceClient
from tinsmith.client.training import TrainingClient

BackcompatTrainingClientFuture = ClientFuture
BackcompatSamplingClientFuture = ClientFuture
PerDatumLossFn = PerDatumLoss

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdminClient",
    "AuthenticationError",
    "BackcompatSamplingClientFuture",
    "BackcompatTrainingClientFuture",
    "BadRequestError",
    "BillingError",
    "CircuitOpenError",
    "ClientClosedError",
    "ClientFuture",
    "ConfigurationError",
    "ConflictError",
    "ExperimentalWarning",
    "InternalServerError",
    "LossHandle",
    "NotFoundError",
    "PerDatumLoss",
    "PerDatumLossFn",
    "PermissionDeniedError",
    "PromiseExpiredError",
    "RateLimitError",
    "RequestFailedError",
    "RequestOptions",
    "RestClient",
    "RetryConfig",
    "SamplingClient",
    "ServiceClient",
    "Timeout",
    "Timing",
    "TinkerError",
    "TrainingClient",
    "UnprocessableEntityError",
    "download_checkpoint",
]
