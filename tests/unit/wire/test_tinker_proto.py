"""The protobuf codecs: round trips, the rules for odd encodings, and bytes that are no message."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from tinsmith.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
    PromptAltTokens,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    SampledSequence,
    SampleResponse,
    TensorData,
    TopkLogprobs,
)
from tinsmith.types.errors import InvalidInput
from tinsmith.wire import tinker_pb2 as pb
from tinsmith.wire import tinker_proto as wire


def request(*data: Datum, **fields: object) -> wire.TrainRequest:
    defaults = {
        "model_id": "s:train:0",
        "seq_id": 3,
        "data": data,
        "loss_fn": "ppo",
        "loss_fn_config": {},
        "forward_only": False,
    }
    return wire.TrainRequest(**{**defaults, **fields})  # type: ignore[arg-type]


def test_a_request_survives_the_wire_whole() -> None:
    chunks = [
        EncodedTextChunk(tokens=[0, 1, 2**31 - 1]),
        ImageChunk(data=b"\x89PNG", format="png", expected_tokens=7),
        ImageChunk(data=b"\xff\xd8", format="jpeg"),
        DmelChunk(dmel=b"abc"),
    ]
    inputs = {"target_tokens": np.arange(6).reshape(2, 3), "weights": [0.5, -1.0]}
    spans = (
        [PromptProvenanceSpan(sequence_id="q", length=3)],
        [SampledProvenanceSpan(sequence_id="q", offset=2, length=1)],
    )
    datum = Datum(ModelInput(chunks=chunks), inputs, *spans)
    sent = request(datum, loss_fn_config={"clip_low_threshold": 0.8, "mode": "x"}, forward_only=True)
    assert wire.decode_train_request(wire.encode_train_request(sent)) == sent


def test_numbers_of_the_config_go_into_both_maps_and_texts_into_the_second() -> None:
    message = pb.ForwardBackwardRequest.FromString(
        wire.encode_train_request(request(loss_fn_config={"beta": 0.25, "mode": "x"}))
    )
    assert dict(message.loss_fn_config) == {"beta": 0.25}
    assert message.loss_fn_config_v2["beta"].number == 0.25
    assert message.loss_fn_config_v2["mode"].text == "x"


def test_an_old_request_without_the_second_map_keeps_its_config() -> None:
    message = pb.ForwardBackwardRequest(model_id="m", loss_fn="dro", loss_fn_config={"beta": 0.5})
    assert wire.decode_train_request(message.SerializeToString()).loss_fn_config == {"beta": 0.5}


@given(
    st_numpy.arrays(
        np.float32, st_numpy.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.sampled_from([0.0, 1.5])
    )
)
def test_sparse_matrices_become_the_same_dense_ones(dense: np.ndarray) -> None:
    sparse = TensorData.from_torch_sparse(torch.from_numpy(dense))
    message = pb.Tensor.FromString(wire.tensor_message(sparse).SerializeToString())
    assert message.WhichOneof("encoding") == "sparse_csr"
    assert np.array_equal(wire.tensor_data(message, "t").to_numpy(), dense)


def test_two_dimensional_torch_inputs_go_sparse_only_where_that_is_smaller() -> None:
    mostly_zero = torch.zeros(10, 50)
    mostly_zero[3, 7] = 2
    datum = Datum(
        ModelInput.from_ints(range(10)),
        {"weights": mostly_zero, "target_tokens": torch.ones(10, 5, dtype=torch.int64), "advantages": mostly_zero},
    )
    assert datum.loss_fn_inputs["weights"].is_sparse
    assert not datum.loss_fn_inputs["target_tokens"].is_sparse
    assert not datum.loss_fn_inputs["advantages"].is_sparse


def test_half_and_int32_tensors_are_widened() -> None:
    halves = torch.tensor([1.0, -2.5, 3e38], dtype=torch.bfloat16)
    message = pb.Tensor(dense=halves.view(torch.int16).numpy().tobytes(), dtype=pb.DTYPE_BFLOAT16, shape=[3])
    assert wire.tensor_data(message, "t") == TensorData.from_torch(halves)
    message = pb.Tensor(dense=np.array([1, -2], "<i4").tobytes(), dtype=pb.DTYPE_INT32)
    assert wire.tensor_data(message, "t").to_numpy().tolist() == [1, -2]
    assert wire.tensor_data(message, "t").dtype == "int64"


def test_results_with_ragged_alternatives_survive_as_several_records() -> None:
    outputs = [
        {"logprobs": TensorData.from_numpy(np.random.default_rng(n).normal(size=shape).astype(np.float32))}
        for n, shape in enumerate([(3,), (2,), (4, 2), (1, 2), (5, 3), (0,)])
    ]
    sent = ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": 1.25, "tokens:sum": 9})
    body = wire.encode_forward_backward_output(sent)
    assert [r.num_datums for r in pb.ForwardBackwardOutput.FromString(body).loss_fn_outputs] == [2, 2, 1, 1]
    assert wire.decode_forward_backward_output(body) == sent


def test_a_result_record_may_leave_its_number_of_datums_to_its_first_field() -> None:
    offsets = np.array([0, 8, 12], "<i8").tobytes()
    values = np.arange(3, dtype="<f4").tobytes()
    batched = pb.BatchedTensor(data=values, offsets=offsets, dtype=pb.DTYPE_FLOAT32)
    message = pb.ForwardBackwardOutput(
        loss_fn_output_type="module:TorchLossReturn",
        loss_fn_outputs=[pb.ArrayRecord(fields={"logprobs": batched}), pb.ArrayRecord(num_datums=2)],
    )
    output = wire.decode_forward_backward_output(message.SerializeToString())
    assert output.loss_fn_output_type == "TorchLossReturn"
    assert [{k: v.tolist() for k, v in d.items()} for d in output.loss_fn_outputs] == [
        {"logprobs": [0.0, 1.0]},
        {"logprobs": [2.0]},
        {},
        {},
    ]


def test_a_sample_survives_with_nan_as_none_and_length_as_length() -> None:
    topk = TopkLogprobs(np.array([[0, 0], [5, 9]]), np.array([[-99999.0, -99999.0], [-0.5, -1.5]], np.float32))
    sent = SampleResponse(
        sequences=[
            SampledSequence(
                "length", tokens_np=np.array([1, 2]), logprobs_np=np.array([-1, -2], np.float32), topk_logprobs_np=topk
            ),
            SampledSequence("stop", tokens_np=np.array([], np.int64), logprobs_np=np.array([], np.float32)),
        ],
        prompt_logprobs_np=np.array([np.nan, -0.5], np.float32),
        topk_prompt_logprobs_np=topk,
        target_prompt_logprobs=TensorData(np.zeros((1, 2), np.float32)),
        prompt_cache_hit_tokens=4,
        prompt_alt_tokens=PromptAltTokens(
            TensorData(np.ones((1, 2), np.int64)), TensorData(np.ones((1, 2), np.float32))
        ),
    )
    got = wire.decode_sample_response(wire.encode_sample_response(sent), ["a", "b"])
    assert [s.stop_reason for s in got.sequences] == ["length", "stop"]
    assert [s.sequence_id for s in got.sequences] == ["a", "b"]
    assert [s.tokens for s in got.sequences] == [[1, 2], []]
    assert [s.logprobs for s in got.sequences] == [[-1.0, -2.0], None]
    assert got.prompt_logprobs == [None, -0.5]
    assert got.topk_prompt_logprobs == [None, [(5, -0.5), (9, -1.5)]]
    assert got.sequences[0].topk_logprobs == [None, [(5, -0.5), (9, -1.5)]]
    assert got.target_prompt_logprobs == sent.target_prompt_logprobs
    assert got.prompt_alt_tokens is not None
    assert got.prompt_alt_tokens.tokens.tolist() == [[1, 1]]
    assert got.prompt_cache_hit_tokens == 4


def test_the_number_of_sequence_ids_must_match() -> None:
    body = wire.encode_sample_response(SampleResponse(sequences=[SampledSequence("stop")]))
    with pytest.raises(wire.WireError, match="1 sequences came back for 2"):
        wire.decode_sample_response(body, ["a", "b"])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (pb.Tensor(dense=b"12345", dtype=pb.DTYPE_FLOAT32), "5 bytes are no whole number of float32"),
        (pb.Tensor(dense=b"1234", dtype=pb.DTYPE_FLOAT32, shape=[2]), "1 values do not fill shape \\[2\\]"),
        (pb.Tensor(dense=b"1234"), "dtype 0"),
        (pb.Tensor(dtype=pb.DTYPE_INT64), "has no values"),
        (
            pb.Tensor(
                sparse_csr=pb.SparseCsr(
                    values=b"1234",
                    crow_indices=np.array([0, 1], "<i8").tobytes(),
                    col_indices=np.array([5], "<i8").tobytes(),
                ),
                dtype=pb.DTYPE_FLOAT32,
                shape=[1, 3],
            ),
            "column index lies outside 0..2",
        ),
        (
            pb.Tensor(
                sparse_csr=pb.SparseCsr(
                    values=np.array([1, 2], "<f4").tobytes(),
                    crow_indices=np.array([0, 2], "<i8").tobytes(),
                    col_indices=np.array([1, 1], "<i8").tobytes(),
                ),
                dtype=pb.DTYPE_FLOAT32,
                shape=[1, 3],
            ),
            "names one column twice",
        ),
    ],
)
def test_a_malformed_tensor_is_named(tensor: pb.Tensor, message: str) -> None:
    body = pb.ForwardBackwardRequest(data=[pb.Datum(loss_fn_inputs={"weights": tensor})]).SerializeToString()
    with pytest.raises(wire.WireError, match=f"data\\[0\\].*weights.*{message}"):
        wire.decode_train_request(body)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_never_raise_anything_but_wire_errors(body: bytes) -> None:
    for decode in (
        wire.decode_train_request,
        wire.decode_forward_backward_output,
        lambda b: wire.decode_sample_response(b, []),
    ):
        with contextlib.suppress(wire.WireError):
            decode(body)


def test_tokens_and_chunks_that_do_not_fit_the_wire_are_refused() -> None:
    with pytest.raises(InvalidInput, match="2147483648 does not fit"):
        wire.encode_train_request(request(Datum(ModelInput.from_ints([2**31]), {})))
    pointer = ImageAssetPointerChunk(format="png", location="x")
    with pytest.raises(InvalidInput, match="image_asset_pointer"):
        wire.encode_train_request(request(Datum(ModelInput(chunks=[pointer]), {})))


def test_dimensions_that_override_those_of_a_picture_are_refused_not_ignored() -> None:
    image = pb.ImageChunk(data=b"x", format="png", override_dimensions=pb.ImageDimensions(width=2, height=2))
    message = pb.ForwardBackwardRequest(data=[pb.Datum(model_input=[pb.Chunk(image=image)])])
    with pytest.raises(wire.WireError, match=r"data\[0\].model_input\[0\].override_dimensions"):
        wire.decode_train_request(message.SerializeToString())
