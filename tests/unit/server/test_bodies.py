"""What a server does with bodies that are not what they should be."""

from __future__ import annotations

import base64
import json
import os
import struct
from typing import Any

import pytest

from tests.unit.server.tinker_client import PROTOBUF, Client, OpenServer, sample_body, train_body
from tinsmith.server.bodies import parse_json_object
from tinsmith.server.tinker.decode import sample
from tinsmith.server.tinker.legible import ids_in_json, ids_in_protobuf, ids_in_sample
from tinsmith.types.errors import InvalidInput
from tinsmith.types.operations import Sample
from tinsmith.wire.compression import compress, decompress
from tinsmith.wire.tinker_proto import WireError

pytestmark = pytest.mark.anyio


async def post_raw(client: Client, path: str, body: bytes, **headers: str) -> tuple[int, str]:
    headers = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    answer = await client.http.post(f"/api/v1/{path}", content=body, headers=headers)
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, answer.json()["detail"]


# ---- JSON ----


@pytest.mark.parametrize("body", [b"", b"{", b"[1, 2]", b"nonsense", b'{"a": }', b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("path", ["optim_step", "asample", "create_session", "retrieve_future", "load_weights"])
async def test_a_body_that_is_no_json_object_is_400(client: Client, path: str, body: bytes) -> None:
    status, detail = await post_raw(client, path, body)
    assert status == 400
    assert detail


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"session_id": 5}, ("session_id", "5")),
        ({"session_id": None}, ("session_id", "missing")),
        ({"model_seq_id": True}, ("model_seq_id", "True")),
        ({"model_seq_id": 1.0}, ("model_seq_id", "1.0")),
        ({"model_seq_id": "0"}, ("model_seq_id", "'0'")),
        ({"model_seq_id": -1}, ("model_seq_id", "-1")),
        ({"lora_config": {"rank": "big"}}, ("lora_config.rank", "'big'")),
        ({"lora_config": {"rank": 4, "train_mlp": "yes"}}, ("lora_config.train_mlp", "'yes'")),
        ({"lora_config": {"rank": 4, "dropout": 0.1}}, ("dropout", "0.1")),
        ({"warmup": {"steps": 3}}, ("warmup", "steps")),
        ({"user_metadata": {"a": 1}}, ("user_metadata.a", "1")),
    ],
)
async def test_a_bad_field_is_named_with_its_value(
    client: Client, fields: dict[str, Any], named: tuple[str, ...]
) -> None:
    body = {"session_id": await client.session(), "model_seq_id": 0, "base_model": "tinsmith/fake"}
    answer = await client.post("create_model", body | fields)
    assert answer.status_code == 400
    for part in named:
        assert part in answer.json()["detail"]


@pytest.mark.parametrize("off", [None, False, 0, "", [], {}])
async def test_unknown_fields_of_newer_sdks_pass_where_they_are_off(client: Client, off: Any) -> None:
    session_id = await client.session()
    body = {"session_id": session_id, "model_seq_id": 0, "base_model": "tinsmith/fake", "type": "create_model"}
    body |= {"brand_new": off, "lora_config": {"rank": 4, "brand_new": off}, "optimizer_config": {"type": "adamw"}}
    assert "error" not in await client.result(await client.post("create_model", body))
    sampler = await client.sampler(session_id)
    drawn = await client.sample(sampler, brand_new=off, sampling_params={"max_tokens": 2, "brand_new": off})
    assert "error" not in await client.result(drawn)


async def test_the_type_field_is_never_required_nor_checked(client: Client) -> None:
    answer = await client.post("create_session", {"type": "something_else"})
    assert answer.status_code == 200


async def test_numbers_that_are_no_json_are_named_by_their_field(client: Client) -> None:
    model_id = await client.model()
    body = f'{{"model_id": "{model_id}", "seq_id": 1, "adam_params": {{"learning_rate": NaN}}}}'
    answer = await client.http.post("/api/v1/optim_step", content=body)
    failed = await client.result(answer)
    assert failed["category"] == "user"
    assert "learning_rate" in failed["error"]
    assert "nan" in failed["error"]


async def test_seeds_of_any_size_are_taken(client: Client) -> None:
    sampler = await client.sampler()
    for number, seed in enumerate([0, 2**63, 2**64 - 1, 2**64, 10**40, -1, -(10**25)]):
        receipt = await client.sample(sampler, number, sampling_params={"max_tokens": 3, "seed": seed})
        assert "error" not in await client.result(receipt), seed
    seeds = [operation.seed for operation in client.engine.operations if isinstance(operation, Sample)]
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_sample_numbers_up_to_a_billion_billions_are_exact(client: Client) -> None:
    sampler = await client.sampler()
    receipts = [await client.sample(sampler, 10**18 + k) for k in range(2)]
    assert receipts[0].json()["request_id"] != receipts[1].json()["request_id"]


def test_big_integers_stay_exact() -> None:
    for number in (10**18 + 1, 2**63 + 1, 2**64 + 1, -(10**30) - 1):
        assert parse_json_object(b'{"seed": %d}' % number) == {"seed": number}


# ---- samples ----


def test_pictures_of_older_clients_may_say_their_size_if_it_is_true() -> None:
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + struct.pack(">II", 24, 16)

    def asked(**fields: int) -> Any:
        chunk = {"type": "image", "data": base64.b64encode(head).decode(), "format": "png", **fields}
        return sample({**sample_body("s", 0), "prompt": {"chunks": [chunk]}}).prompt.chunks[0]

    chunk = asked(width=24, height=16, tokens=6)
    assert (chunk.width, chunk.height, chunk.length) == (24, 16, 6)
    with pytest.raises(InvalidInput, match=r"prompt\.chunks\[0\].*width is 25, but the picture's own width is 24"):
        asked(width=25, height=16, tokens=6)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, True]}]}}, "prompt.chunks[0].tokens[1]"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2.5]}]}}, "2.5"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, -4]}]}}, "-4"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2**40]}]}}, str(2**40)),
        ({"prompt": {"chunks": [{"type": "hologram", "tokens": [1]}]}}, "'hologram'"),
        ({"prompt": {"chunks": 5}}, "prompt.chunks"),
        ({"prompt": {"chunks": [{"type": "image", "data": "!!!", "format": "png"}]}}, "prompt.chunks[0]"),
        ({"prompt": {"chunks": [{"type": "image", "data": "aGk=", "format": "gif"}]}}, "'gif'"),
        ({"prompt": {"chunks": [{"type": "image", "data": "aGk=", "format": "png"}]}}, "image"),
        ({"prompt": {"chunks": []}}, "prompt"),
        ({"sampling_params": {"max_tokens": "many"}}, "sampling_params.max_tokens"),
        ({"sampling_params": {"max_tokens": 2, "min_p": 0.3}}, "min_p"),
        ({"sampling_params": {"max_tokens": 2, "stop": [1, "a"]}}, "stop"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k"),
        ({"prompt_alt_tokens_k": True}, "prompt_alt_tokens_k"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [9, 1]}}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": {"data": [1.5], "dtype": "int64", "shape": [1, 1]}}, "logprobs.data[0]"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int8"}}, "target_prompt_logprobs.dtype"),
        (
            {
                "target_prompt_logprobs": {
                    "data": [1],
                    "dtype": "int64",
                    "shape": [1, 1],
                    "sparse_crow_indices": [0, 1],
                    "sparse_col_indices": [4],
                }
            },
            "target_prompt_logprobs",
        ),
        ({"record_stability_info": True}, "record_stability_info"),
        ({"beam_width": 4}, "beam_width = 4"),
        ({"num_samples": "two"}, "num_samples"),
    ],
)
async def test_a_bad_sample_is_a_failed_future_that_names_the_field(
    client: Client, fields: dict[str, Any], named: str
) -> None:
    sampler = await client.sampler()
    receipt = await client.sample(sampler, 0, **fields)
    assert receipt.status_code == 200
    assert len(receipt.json()["sample_sequence_ids"]) == 1
    failed = await client.result(receipt)
    assert failed["category"] == "user"
    assert named in failed["error"]
    assert "error" not in await client.result(await client.sample(sampler, 1))


async def test_a_sample_without_a_session_is_400(client: Client) -> None:
    body = sample_body("x")
    del body["sampling_session_id"]
    answer = await client.post("asample", body)
    assert answer.status_code == 400
    assert "sampling_session_id" in answer.json()["detail"]


async def test_a_chunk_without_type_is_told_by_its_fields(client: Client) -> None:
    receipt = await client.sample(await client.sampler(), prompt={"chunks": [{"tokens": [1, 2]}]})
    assert "error" not in await client.result(receipt)


# ---- compressed and large bodies ----


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd, gzip"])
async def test_an_unknown_content_encoding_is_named(client: Client, encoding: str) -> None:
    status, detail = await post_raw(client, "optim_step", b"{}", content_encoding=encoding)
    assert status == 400
    assert encoding in detail


async def test_a_body_that_only_claims_to_be_zstd_is_400(client: Client) -> None:
    status, detail = await post_raw(client, "asample", b"{}", content_encoding="zstd")
    assert status == 400
    assert "zstd" in detail


async def test_any_queued_operation_may_come_compressed(client: Client) -> None:
    model_id = await client.model()
    headers = {"content-type": "application/json", "content-encoding": "zstd"}
    saved = await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "a"}))
    load = {"model_id": model_id, "seq_id": 2, "path": saved["path"], "optimizer": True}
    sample = sample_body(await client.sampler())
    for path, body in (("load_weights", load), ("asample", sample)):
        content = compress(json.dumps(body).encode())
        receipt = await client.http.post(f"/api/v1/{path}", content=content, headers=headers)
        assert "error" not in await client.result(receipt)


def test_a_cut_or_continued_zstd_frame_is_refused() -> None:
    for size in (10, 1000, 1024, 5000):
        body = compress(os.urandom(size))
        assert len(decompress(body, max_bytes=size)) == size
        with pytest.raises(WireError, match="too early"):
            decompress(body[:-3], max_bytes=size)
        with pytest.raises(WireError, match="goes on"):
            decompress(body + b"more", max_bytes=size)
        with pytest.raises(WireError, match="limit"):
            decompress(body, max_bytes=size - 1)


async def test_a_body_over_the_limit_is_413(open_server: OpenServer) -> None:
    async with open_server(max_body_bytes=2000) as client:
        for path in ("asample", "create_session", "telemetry", "forward_backward"):
            status, detail = await post_raw(client, path, b" " * 2001)
            assert status == 413
            assert "2000" in detail

            async def pieces() -> Any:
                for _ in range(10):
                    yield b" " * 1000

            answer = await client.http.post(f"/api/v1/{path}", content=pieces())
            assert answer.status_code == 413


async def test_large_bodies_are_read_in_a_thread_with_the_same_result(open_server: OpenServer) -> None:
    async with open_server(offload_bytes=0) as client:
        model_id = await client.model()
        threaded = await client.result(await client.train(model_id, 1))
        sampler = await client.sampler()
        assert "error" not in await client.result(await client.sample(sampler))
    async with open_server() as client:
        assert threaded == await client.result(await client.train(await client.model(), 1))


# ---- protobuf ----


@pytest.mark.parametrize("body", [b"", b"\x07", b"hello, this is text", os.urandom(200)])
async def test_a_body_without_legible_ids_is_400(client: Client, body: bytes) -> None:
    answer = await client.http.post("/api/v1/forward_backward", content=body, headers=PROTOBUF)
    assert answer.status_code == 400


def test_ids_are_read_up_to_the_damage() -> None:
    body = train_body("sess:train:0", 70_000)
    readable = [ids_in_protobuf(body[:length]) for length in range(len(body) + 1)]
    assert readable[-1] == ("sess:train:0", 70_000)
    first = readable.index(("sess:train:0", 70_000))
    assert first < 25
    assert set(readable[:first]) == {None}
    assert set(readable[first:]) == {("sess:train:0", 70_000)}
    for _ in range(300):
        ids_in_protobuf(os.urandom(60))


def test_ids_that_make_no_sense_are_not_taken() -> None:
    assert ids_in_json({"model_id": "m", "seq_id": 1}) == ("m", 1)
    for bad in ({"model_id": 1, "seq_id": 1}, {"model_id": "m", "seq_id": True}, {"model_id": "m", "seq_id": 1.0}, {}):
        assert ids_in_json(bad) is None
    assert ids_in_sample({"sampling_session_id": "s", "seq_id": 0, "num_samples": 10**9}) == ("s", 0, 1)


# ---- JSON bodies of older SDKs ----


def json_datum(**changes: Any) -> dict[str, Any]:
    inputs = {
        "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
        "weights": {"data": [1, 1.0, 0.5], "dtype": "float32", "shape": [3]},
    }
    return {
        "model_input": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
        "loss_fn_inputs": inputs | changes,
    }


def json_train(
    model_id: str, seq_id: int, *data: dict[str, Any], key: str = "forward_backward_input"
) -> dict[str, Any]:
    return {"model_id": model_id, "seq_id": seq_id, key: {"data": list(data), "loss_fn": "cross_entropy"}}


async def test_older_json_bodies_train_like_protobuf(client: Client) -> None:
    from tests.unit.server.tinker_client import datum

    model_id = await client.model()
    modern = await client.train(model_id, 1, data=(datum([1, 2, 3], weights=[1.0, 1.0, 0.5]),))
    older = await client.post("forward_backward", json_train(model_id, 2, json_datum()))
    forward = await client.post("forward", json_train(model_id, 3, json_datum(), key="forward_input"))
    results = [await client.result(receipt) for receipt in (modern, older, forward)]
    assert results[0] == results[1] == results[2]
    logprobs = results[0]["loss_fn_outputs"][0]["logprobs"]
    assert logprobs["dtype"] == "float32"
    assert logprobs["shape"] == [3]
    assert len(logprobs["data"]) == 3


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"data": [2, 3, True], "dtype": "int64", "shape": [3]}, "data[0].loss_fn_inputs['target_tokens'].data[2]"),
        ({"data": [2, 3, 4.5], "dtype": "int64", "shape": [3]}, "4.5"),
        ({"data": [2, 3, 2**70], "dtype": "int64", "shape": [3]}, "int64"),
        ({"data": [2, 3, 4], "dtype": "int8", "shape": [3]}, "'int8'"),
        ({"data": [2, 3, 4], "dtype": "int64", "shape": [4]}, "shape"),
        ({"data": [2, 3, 4], "dtype": "int64", "shape": [-3]}, "-3"),
        ({"data": "abc", "dtype": "int64"}, "'abc'"),
        ([2, 3, 4], "target_tokens"),
    ],
)
async def test_bad_json_tensors_fail_the_future(client: Client, bad: Any, named: str) -> None:
    model_id = await client.model()
    failed = await client.result(
        await client.post("forward_backward", json_train(model_id, 1, json_datum(target_tokens=bad)))
    )
    assert failed["category"] == "user"
    assert named in failed["error"]


async def test_a_json_training_body_without_data_says_where_it_belongs(client: Client) -> None:
    model_id = await client.model()
    failed = await client.result(await client.post("forward_backward", {"model_id": model_id, "seq_id": 1, "data": []}))
    assert "forward_backward_input" in failed["error"]


# ---- model operations ----


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("optim_step", {}, "adam_params"),
        ("optim_step", {"adam_params": {"momentum": 0.5}}, "momentum = 0.5"),
        ("optim_step", {"optimizer_params": {"type": "dimuon", "learning_rate": 1.0}}, "'dimuon'"),
        ("save_weights", {}, "path is missing"),
        ("save_weights", {"path": "a/b"}, "'a/b'"),
        ("save_weights", {"path": "a", "ttl_seconds": 5}, "ttl_seconds"),
        ("save_weights", {"path": "a", "overwrite": "no"}, "overwrite"),
        ("save_weights_for_sampler", {}, "sampling_session_seq_id"),
        ("save_weights_for_sampler", {"path": "a", "kind": "live"}, "'live'"),
        ("save_weights_for_sampler", {"path": "a", "kind": "inflight"}, "'inflight'"),
        ("save_weights_external", {}, "path is missing"),
        ("save_weights_external", {"path": "a b"}, "'a b'"),
        ("save_weights_external", {"path": "a", "age_encryption_recipients": ["age1x"]}, "age_encryption_recipients"),
        ("load_weights", {"path": "/etc/passwd", "optimizer": False}, "/etc/passwd"),
        ("load_weights", {"path": "tinker://x/weights/y", "weights_access_token": "tml-secret"}, "weights/y"),
    ],
)
async def test_bad_operations_fail_their_future_and_harm_nobody(
    client: Client, path: str, fields: dict[str, Any], named: str
) -> None:
    model_id = await client.model()
    failed = await client.result(await client.post(path, {"model_id": model_id, "seq_id": 1} | fields))
    assert failed["category"] == "user"
    assert named in failed["error"]
    assert "tml-secret" not in failed["error"]
    assert "error" not in await client.result(await client.train(model_id, 2))


async def test_load_weights_wants_one_of_its_two_forms(client: Client) -> None:
    both = {"session_id": "s", "model_seq_id": 0, "model_id": "m", "seq_id": 1, "path": "tinker://x/weights/y"}
    assert (await client.post("load_weights", both)).status_code == 400
    assert (await client.post("load_weights", {"path": "tinker://x/weights/y"})).status_code == 400
