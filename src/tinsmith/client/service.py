"""`ServiceClient`: the entry. Everything else is made from it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx2

from tinsmith.client import custom_loss
from tinsmith.client.config import Timing, resolve_config
from tinsmith.client.connection import Connection
from tinsmith.client.errors import TinkerError
from tinsmith.client.events import Events
from tinsmith.client.futures import APIFuture, ClientFuture, value_twin, warn_deprecated
from tinsmith.client.http import json_bytes, post
from tinsmith.client.rest import RestClient
from tinsmith.client.retries import RetryConfig
from tinsmith.client.sampling import SamplingClient
from tinsmith.client.session import CloseStatus, SessionSpec
from tinsmith.client.telemetry import chosen_sinks
from tinsmith.client.training import TrainingClient
from tinsmith.types.checkpoint import ParsedCheckpointTinkerPath
from tinsmith.types.events import EventSink
from tinsmith.types.params import AdamOptimizerConfig, DimuonOptimizerConfig, LoraConfig, OptimizerConfig
from tinsmith.types.replies import CreateModelResponse
from tinsmith.types.rest import GetInfoResponse, GetServerCapabilitiesResponse, LoadWeightsResponse

logger = logging.getLogger("tinsmith.client")

_CLOSE_STATUSES = ("success", "errored", "interrupted")


class ServiceClient:
    """One session on one server.

    `base_url` is an `http(s)://` address or `local:`, the server embedded in this process. Without it,
    `TINKER_BASE_URL` or `TINSMITH_BASE_URL` decide; without those the client is embedded, with the base model that
    ships. A key comes from `api_key` or `TINKER_API_KEY`; local and loopback servers need none.

    Nothing is sent before the first call. Use it as a context manager, or call `close`, to end the session.

    `timing` sets every wait, retry and limit of this client, `timeout` only that of one request. `telemetry` says where
    this client's events go: sinks, or a text such as `"console,jsonl:events.jsonl"`; nothing is recorded without it.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        timeout: float | None = None,
        timing: Timing | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        telemetry: str | Sequence[EventSink] = (),
        **ignored: Any,
    ) -> None:
        if ignored:
            names = ", ".join(sorted(ignored))
            warnings.warn(f"ServiceClient ignores unsupported arguments: {names}", FutureWarning, stacklevel=2)
        timing = timing or (Timing() if timeout is None else Timing(request_timeout=timeout))
        config = resolve_config(
            base_url=base_url,
            api_key=api_key,
            headers=default_headers_overrides,
            timing=timing,
            transport=transport,
            sinks=chosen_sinks(telemetry),
        )
        spec = SessionSpec(
            user_metadata=user_metadata or {},
            project_id=project_id or os.environ.get("TINKER_PROJECT_ID") or None,
            display_name=display_name,
        )
        self._connection = Connection(config, spec=spec)

    def __repr__(self) -> str:
        return f"<ServiceClient of {self._connection.config.base_url}>"

    @property
    def holder(self) -> Connection:
        """The connection that all clients made from this one share."""
        return self._connection

    def reopen(self) -> ServiceClient:
        """A client of the same server with the same settings, in a session of its own. This one stays as it is."""
        other = ServiceClient.__new__(ServiceClient)
        other._connection = Connection(self._connection.config, spec=self._connection.spec)
        return other

    # ---- training clients ----

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: OptimizerConfig | AdamOptimizerConfig | DimuonOptimizerConfig | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A new LoRA adapter on `base_model`. The same `seed` gives the same initial weights."""

        def prepare() -> Coroutine[Any, Any, TrainingClient]:
            if not (train_mlp or train_attn or train_unembed):
                raise ValueError("at least one of train_mlp, train_attn and train_unembed must be true")
            lora = LoraConfig(
                rank=rank, seed=seed, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed
            )
            if isinstance(rank, bool) or lora.rank < 1:
                raise ValueError(f"rank must be at least 1, not {rank!r}")
            body = {
                "base_model": base_model,
                "lora_config": lora.model_dump(exclude_none=True),
                "optimizer_config": (optimizer or AdamOptimizerConfig()).model_dump(),
                "user_metadata": user_metadata,
                "type": "create_model",
            }
            return self._create_model("create_model", "CreateModel", body)

        return ClientFuture.of(self._connection.begin(prepare))

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: OptimizerConfig | AdamOptimizerConfig | DimuonOptimizerConfig | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A new adapter that starts with the weights of a checkpoint, and a fresh optimizer."""
        config = None if optimizer is None else optimizer.model_dump()
        return self._from_state(path, base_model, user_metadata, weights_access_token, config, with_optimizer=False)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> ClientFuture[TrainingClient]:
        """A new adapter that goes on where a checkpoint was saved, optimizer state included."""
        return self._from_state(path, base_model, user_metadata, weights_access_token, None, with_optimizer=True)

    # ---- sampling clients ----

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        record_stability_info: bool = False,
    ) -> ClientFuture[SamplingClient]:
        """A sampler of a saved checkpoint or of a base model; with both, the checkpoint wins.

        Raises `ValueError` if neither is given.
        """
        if model_path is None and base_model is None:
            raise ValueError("a sampling client needs a model_path or a base_model")
        return ClientFuture.of(
            SamplingClient.create(
                self._connection,
                model_path=model_path,
                base_model=base_model,
                retry_config=retry_config,
                record_stability_info=record_stability_info,
            )
        )

    # ---- the rest ----

    def create_custom_loss(
        self, fn: custom_loss.PerDatumLoss, input_ranks: Mapping[str, int]
    ) -> APIFuture[custom_loss.LossHandle]:
        """A loss for `TrainingClient.forward_backward_custom` that runs once per datum, here in this process.

        `fn(logprobs, …)` takes the datum's target log-probabilities and any of its `loss_fn_inputs` by name, and
        returns `(loss, metrics)`, metrics named `custom/<name>:sum` or `custom/<name>:mean`. `input_ranks` gives the
        number of dimensions of each parameter.
        """

        async def make() -> custom_loss.LossHandle:
            return custom_loss.make_handle(fn, input_ranks)

        return self._connection.begin(make)

    def copy_weights(
        self, path: str, *, ttl_seconds: int | None = None, weights_access_token: str | None = None
    ) -> APIFuture[str]:
        """Copy a checkpoint into a new training run of this session; gives the path of the copy."""

        def prepare() -> Coroutine[Any, Any, str]:
            ParsedCheckpointTinkerPath.from_tinker_path(path)
            return self._copy_weights(path, ttl_seconds, weights_access_token)

        return self._connection.begin(prepare)

    def create_rest_client(self) -> RestClient:
        """Deprecated: `RestClient()` needs no service client."""
        warn_deprecated("create_rest_client() is deprecated: use RestClient()")
        return RestClient(self._connection)

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """Deprecated: use `RestClient().get_server_capabilities()`."""
        warn_deprecated("get_server_capabilities() is deprecated: use RestClient().get_server_capabilities()")
        return RestClient(self._connection).get_server_capabilities().result()

    async def get_server_capabilities_async(self) -> GetServerCapabilitiesResponse:
        """Deprecated: use `RestClient().get_server_capabilities()`."""
        warn_deprecated("get_server_capabilities_async() is deprecated: use RestClient().get_server_capabilities()")
        return await RestClient(self._connection).get_server_capabilities()

    create_lora_training_client_async = value_twin(create_lora_training_client)
    create_training_client_from_state_async = value_twin(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = value_twin(
        create_training_client_from_state_with_optimizer
    )
    create_sampling_client_async = value_twin(create_sampling_client)

    def get_console_url(self) -> str:
        """Where the server shows its pages."""
        return self._connection.config.base_url

    def get_telemetry(self) -> Events:
        """Where this client's events go."""
        return self._connection.link.events

    # ---- the end ----

    def close(self, status: CloseStatus = "success", detail: str | None = None) -> APIFuture[None]:
        """End the session: the server is told `status`, heartbeats and connections stop. The first call decides.

        Requests still under way fail with `ClientClosedError`. Raises `ValueError` for an unknown status.
        """
        if status not in _CLOSE_STATUSES:
            raise ValueError(f"status must be one of {', '.join(_CLOSE_STATUSES)}, not {status!r}")
        return self._connection.close(status, detail)

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status: CloseStatus = "success"
        if error is not None:
            status = "errored" if isinstance(error, Exception) else "interrupted"
        closing = self.close(status, None if error is None else f"{type(error).__name__}: {error}")
        try:
            closing.result(timeout=2 * self._connection.config.timing.close_timeout)
        except (TinkerError, TimeoutError) as failure:
            logger.warning("the end of the session could not be reported: %s", failure)
        self._connection.join()

    # ---- making models ----

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        weights_access_token: str | None,
        optimizer_config: Mapping[str, Any] | None,
        *,
        with_optimizer: bool,
    ) -> ClientFuture[TrainingClient]:
        def prepare() -> Coroutine[Any, Any, TrainingClient]:
            ParsedCheckpointTinkerPath.from_tinker_path(path)
            body = {
                "path": path,
                "optimizer": with_optimizer,
                "base_model": base_model,
                "user_metadata": user_metadata,
                "optimizer_config": optimizer_config,
                "weights_access_token": weights_access_token,
                "type": "load_weights",
            }
            return self._create_model("load_weights", "LoadWeights", body)

        return ClientFuture.of(self._connection.begin(prepare))

    def _create_model(
        self, path: str, request_type: str, fields: Mapping[str, Any]
    ) -> Coroutine[Any, Any, TrainingClient]:
        """Number the model now; the coroutine creates it and asks what it is."""
        body = {name: value for name, value in fields.items() if value is not None}
        json_bytes(body)
        body["model_seq_id"] = next(self._connection.model_seq_ids)
        return self._run_create_model(path, request_type, body)

    async def _run_create_model(self, path: str, request_type: str, body: dict[str, Any]) -> TrainingClient:
        link = self._connection.link
        session_id = await link.session_id()
        reply = await link.submit(path, {"session_id": session_id, **body})
        finished = await link.result(reply.request_id, request_type)
        if request_type == "CreateModel":
            model_id = finished.json_as(CreateModelResponse).model_id
        else:
            loaded = finished.json_as(LoadWeightsResponse)
            model_id = loaded.model_id or f"{session_id}:train:{body['model_seq_id']}"
        call = post("get_info", {"model_id": model_id, "type": "get_info"})
        info = await link.http.send_for(call, GetInfoResponse, link.submit_retry)
        return TrainingClient(self._connection, model_id, info)

    async def _copy_weights(self, path: str, ttl_seconds: int | None, token: str | None) -> str:
        session_id = await self._connection.link.session_id()
        destination = {"session_id": session_id, "model_seq_id": next(self._connection.model_seq_ids)}
        return await RestClient(self._connection).copy_to(path, destination, ttl_seconds, token)
