"""What a training-side request must satisfy before it may wait for its turn."""

from __future__ import annotations

from tinsmith.control.metadata import check_checkpoint_metadata
from tinsmith.control.requests import (
    ApplyOptimizer,
    ForwardBackward,
    LoadState,
    ModelRequest,
    Rejected,
    SaveExternal,
    SaveForSampler,
    SaveState,
    UnloadModel,
)
from tinsmith.control.validation import check_adam, check_training, check_ttl
from tinsmith.types.checkpoint import ParsedCheckpointTinkerPath, check_checkpoint_name
from tinsmith.types.datum import EncodedTextChunk, ImageChunk, ModelInputChunk
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.images import cells_of
from tinsmith.types.operations import BaseModelCard


def num_train_tokens(request: ModelRequest, card: BaseModelCard) -> int:
    """What the request weighs in the queue. Chunks that `check_request` is going to refuse weigh nothing."""
    if not isinstance(request, ForwardBackward):
        return 0
    return sum(_num_tokens(chunk, card) for datum in request.data for chunk in datum.model_input.chunks)


def _num_tokens(chunk: ModelInputChunk, card: BaseModelCard) -> int:
    if isinstance(chunk, EncodedTextChunk):
        return len(chunk.tokens)
    if not isinstance(chunk, ImageChunk) or card.images is None:
        return 0
    try:
        rows, columns = cells_of(chunk, card.images, "chunk")
    except InvalidInput:
        return 0
    return rows * columns


def check_request(request: ModelRequest, card: BaseModelCard) -> None:
    """Raises the `UserError` that the request's future should end with. Pure; large data take a while."""
    match request:
        case ForwardBackward():
            check_training(request.data, request.loss_fn, request.loss_fn_config, card, request.custom_loss)
        case ApplyOptimizer():
            check_adam(request.params)
        case SaveState() | SaveExternal():
            check_checkpoint_name(request.name)
            check_ttl(request.ttl_seconds)
            check_checkpoint_metadata(request.user_metadata)
        case SaveForSampler():
            _check_save_for_sampler(request)
        case LoadState():
            check_load(request.path, optimizer=request.optimizer)
        case UnloadModel():
            pass
        case Rejected():
            raise request.error


def check_load(path: str, *, optimizer: bool) -> None:
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
    if parsed.checkpoint_type == "external":
        raise Unsupported(f"checkpoint {path!r} is external; only weights and sampler_weights can be loaded")
    if optimizer and parsed.checkpoint_type == "sampler":
        raise InvalidInput(
            f"checkpoint {path!r} is a sampler checkpoint and has no optimizer state; load it with optimizer=false"
        )


def _check_save_for_sampler(request: SaveForSampler) -> None:
    if request.kind != "snapshot" and request.name is not None:
        raise InvalidInput(f"kind {request.kind!r} is for samplers without a name; a checkpoint is a 'snapshot'")
    if request.name is None and request.sampling_session_seq_id is None:
        raise InvalidInput("save_weights_for_sampler needs a path (a name) or a sampling_session_seq_id")
    if request.name is not None:
        check_checkpoint_name(request.name)
    if request.sampling_session_seq_id is not None and request.sampling_session_seq_id < 0:
        raise InvalidInput(f"sampling_session_seq_id must be at least 0, not {request.sampling_session_seq_id!r}")
    check_ttl(request.ttl_seconds)
    check_checkpoint_metadata(request.user_metadata)
