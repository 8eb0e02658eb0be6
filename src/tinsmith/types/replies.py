"""Answers on the Tinker wire beside results and REST records: settings, acknowledgements, futures."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from tinsmith.types.errors import RequestErrorCategory


class ReplyModel(BaseModel):
    """Fields of newer servers are ignored; values are immutable."""

    model_config = ConfigDict(frozen=True, defer_build=True, protected_namespaces=())


class ClientConfigResponse(ReplyModel):
    """What the server tells its clients at the start; what it leaves out keeps its default."""

    pjwt_auth_enabled: bool = False
    """Keys are exchanged for short-lived tokens (`auth/token`)."""
    credential_default_source: str = "api_key"
    """`credential_cmd` takes credentials from TINKER_CREDENTIAL_CMD even where a key is known."""
    sample_dispatch_bytes_semaphore_size: int = 10_485_760
    inflight_response_bytes_semaphore_size: int = 52_428_800
    fwdbwd_dispatch_bytes_semaphore_size: int = 50_000_000
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    billing_exception_max_pause_duration_sec: int = 3600
    """How long an answer 402 is waited out."""
    sample_no_retries: bool = False
    sample_enable_stuck_detection: bool = True
    sample_max_concurrent_requests: int = 2000
    use_pyqwest_transport: bool = True
    """Of no meaning here: this client has one transport."""
    sample_use_retrieve_futures: bool = False
    """One poller per sampling session (`retrieve_futures`) in place of one poll per sample."""
    custom_loss_server_side: bool = False
    sample_join_sampling_session: bool = False


class ClientDynamicConfigResponse(ReplyModel):
    """Settings that are fetched again every `refresh_interval_sec` seconds (10 at least)."""

    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = False
    """Whether samples that were given up are cancelled on the server."""
    sample_cancel_max_batch_size: int = 64


class AuthTokenResponse(ReplyModel):
    jwt: str = Field(repr=False)


class WhoamiResponse(ReplyModel):
    user_urn: str
    org_urn: str
    email: str | None = None


class HealthResponse(ReplyModel):
    status: Literal["ok"]


class UntypedAPIFuture(ReplyModel):
    """The acknowledgement of an accepted request."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


class CreateSessionResponse(ReplyModel):
    type: Literal["create_session"] = "create_session"
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None
    session_id: str


class SessionHeartbeatResponse(ReplyModel):
    type: Literal["session_heartbeat"] = "session_heartbeat"


class CreateModelResponse(ReplyModel):
    model_id: str
    type: Literal["create_model"] = "create_model"


class UnloadModelResponse(ReplyModel):
    model_id: str
    type: Literal["unload_model"] | None = None


class CreateSamplingSessionResponse(ReplyModel):
    type: Literal["create_sampling_session"] = "create_sampling_session"
    sampling_session_id: str


class JoinSamplingSessionResponse(ReplyModel):
    type: Literal["join_sampling_session"] = "join_sampling_session"
    client_counter: int


class CreateCustomLossResponse(ReplyModel):
    loss_id: str
    type: Literal["create_custom_loss"] = "create_custom_loss"


class SaveWeightsExternalResponse(ReplyModel):
    path: str
    type: Literal["save_weights_external"] | None = None


class SaveWeightsExternalResponseInternal(ReplyModel):
    path: str | None = None
    size_bytes: int | None = None
    type: Literal["save_weights_external"] | None = None


class SaveWeightsForSamplerResponseInternal(ReplyModel):
    path: str | None = None
    sampling_session_id: str | None = None
    """Of a save without a name."""
    type: Literal["save_weights_for_sampler"] | None = None


class ExternalWeightsUrlsResponse(ReplyModel):
    """Signed addresses of the files of an external checkpoint, by file name."""

    urls: dict[str, str] = Field(repr=False)
    expires: datetime


class CopyWeightsResponse(ReplyModel):
    tinker_path: str


class RequestFailedResponse(ReplyModel):
    error: str
    category: RequestErrorCategory


class FutureFinished(ReplyModel):
    state: Literal["finished"] = "finished"
    request_id: str
    response_payload_uncompressed_size: int | None = None


class FutureFailed(ReplyModel):
    state: Literal["failed"] = "failed"
    request_id: str


FutureCompletion: TypeAlias = Annotated[FutureFinished | FutureFailed, Field(discriminator="state")]


class FuturesRetrieveResponse(ReplyModel):
    completions: list[FutureCompletion]
    cursor: int


class TryAgainResponse(ReplyModel):
    """A result that is not ready."""

    type: Literal["try_again"] = "try_again"
    request_id: str
    queue_state: str
    queue_state_reason: str | None = None
