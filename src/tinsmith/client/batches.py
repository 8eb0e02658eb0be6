"""From the datums of one call to the bodies of its requests."""

# N token positions of one datum

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinsmith.client.config import ServerFlags
from tinsmith.client.errors import in_context
from tinsmith.types.datum import LIST_DTYPE, Datum, EncodedTextChunk
from tinsmith.types.results import ForwardBackwardOutput
from tinsmith.wire.chunking import chunk_datums
from tinsmith.wire.compression import compress
from tinsmith.wire.metrics import merge_metrics
from tinsmith.wire.tinker_json import encode_train_request_json, with_seq_id
from tinsmith.wire.tinker_proto import TrainRequest, encode_train_request

_PER_TOKEN_KEYS = ("target_tokens", "weights", "advantages", "logprobs")
_COMPRESS_IN_THREAD_BYTES = 262_144


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainChunk:
    """One request of a call: everything but its sequence number."""

    index: int
    num_chunks: int
    first_datum: int
    num_datums: int
    forward_only: bool
    body: bytes
    """The message without `seq_id`: protobuf, or JSON for servers that know only that."""

    def name(self, seq_id: int) -> str:
        last = self.first_datum + self.num_datums - 1
        return f"chunk {self.index + 1} of {self.num_chunks} (data[{self.first_datum}..{last}], seq {seq_id})"

    def in_context(self, error: BaseException, seq_id: int) -> BaseException:
        """`error`, naming this chunk where the call has several."""
        return error if self.num_chunks == 1 else in_context(error, self.name(seq_id))

    async def wire_body(self, seq_id: int, flags: ServerFlags) -> bytes:
        """The body to send, compressed if the server wants that.

        Protobuf messages merge when concatenated, so the sequence number is simply appended
        (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
        """
        if flags.json_only:
            return with_seq_id(self.body, seq_id)
        number = TrainRequest(model_id="", seq_id=seq_id, data=(), loss_fn="", loss_fn_config={}, forward_only=False)
        body = self.body + encode_train_request(number)
        if not flags.proto_compress_fwdbwd:
            return body
        if len(body) < _COMPRESS_IN_THREAD_BYTES:
            return compress(body)
        return await asyncio.to_thread(compress, body)


def split(data: Sequence[Datum], flags: ServerFlags) -> list[list[Datum]]:
    """The datums of one call, checked, in as many pieces as the server's limits ask for.

    Raises `ValueError` naming what is wrong.
    """
    data = list(data)
    if not data:
        raise ValueError("data is empty: forward and forward_backward need at least one Datum")
    for index, datum in enumerate(data):
        check_datum(datum, index)
    return list(chunk_datums(data, max_datums=flags.fwdbwd_max_chunk_len, max_bytes=flags.fwdbwd_max_chunk_bytes_count))


def encode_pieces(
    pieces: Sequence[Sequence[Datum]],
    *,
    model_id: str,
    loss_fn: str,
    loss_fn_config: Mapping[str, float | str] | None,
    forward_only: bool,
    json_only: bool = False,
) -> list[TrainChunk]:
    """Raises `ValueError` for what protobuf cannot carry: chunks of unknown kinds, token ids beyond 32 bits."""
    config = _checked_config(loss_fn_config)
    chunks, first = [], 0
    for index, piece in enumerate(pieces):
        request = TrainRequest(
            model_id=model_id,
            seq_id=None,
            data=tuple(piece),
            loss_fn=loss_fn,
            loss_fn_config=config,
            forward_only=forward_only,
        )
        body = encode_train_request_json(request) if json_only else encode_train_request(request)
        chunk = TrainChunk(
            index=index,
            num_chunks=len(pieces),
            first_datum=first,
            num_datums=len(piece),
            forward_only=forward_only,
            body=body,
        )
        chunks.append(chunk)
        first += len(piece)
    return chunks


def split_like(data: Sequence[Datum], chunks: Sequence[TrainChunk]) -> list[list[Datum]]:
    """The same boundaries as an earlier pass over as many datums."""
    return [list(data[chunk.first_datum : chunk.first_datum + chunk.num_datums]) for chunk in chunks]


def check_datum(datum: Datum, index: int) -> None:
    """Raises `ValueError` if a loss input has another dtype than its name asks for, or not one row per token.

    Whether the loss knows the input is for the server to say.
    """
    if not isinstance(datum, Datum):
        raise ValueError(f"data[{index}] is a {type(datum).__name__}, not a Datum")
    text_only = all(isinstance(chunk, EncodedTextChunk) for chunk in datum.model_input.chunks)
    num_tokens = datum.model_input.length if text_only else None
    for key, tensor in datum.loss_fn_inputs.items():
        wanted = LIST_DTYPE.get(key)
        if wanted is not None and tensor.dtype != wanted:
            raise ValueError(f"data[{index}].loss_fn_inputs[{key!r}] must be {wanted}, not {tensor.dtype}")
        if key in _PER_TOKEN_KEYS and num_tokens is not None:
            shape = tensor.shape
            rows = len(tensor.flat) if shape is None else (shape or [0])[0]
            if rows != num_tokens:
                where = f"data[{index}].loss_fn_inputs[{key!r}]"
                raise ValueError(f"{where} has {rows} rows for a model_input of {num_tokens} tokens")


def _checked_config(config: Mapping[str, float | str] | None) -> Mapping[str, float | str]:
    for key, value in (config or {}).items():
        if not isinstance(value, str | int | float):
            raise ValueError(f"loss_fn_config[{key!r}] must be a number or a string, not {value!r}")
    return config or {}


def merge_outputs(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """One output for all chunks of a call, datums in the order they were given."""
    if len(outputs) == 1:
        return outputs[0]
    return ForwardBackwardOutput(
        loss_fn_output_type=outputs[0].loss_fn_output_type,
        loss_fn_outputs=[datum for output in outputs for datum in output.loss_fn_outputs],
        metrics=merge_metrics(
            [output.metrics for output in outputs], [len(output.loss_fn_outputs) for output in outputs]
        ),
    )
