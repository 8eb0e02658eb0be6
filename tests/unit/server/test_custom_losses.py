"""Uploading a traced loss and training with it: the route, and graphs made to do harm."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from tests.unit.server.tinker_client import Client, OpenServer, datum
from tinsmith.types.operations import TrainItem

pytestmark = pytest.mark.anyio

INPUTS = [{"name": "logprobs", "rank": 1}, {"name": "advantages", "rank": 1}]


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


def node(op: str, name: str, target: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


def function(name: str, target: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return node("call_function", name, target, *args, **kwargs)


def method(name: str, target: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return node("call_method", name, target, *args, **kwargs)


def graph(*calls: dict[str, Any], loss: Any = None, metrics: Any = None) -> dict[str, Any]:
    """`calls` between `(logprobs * advantages).sum()` and the output."""
    return {
        "format": 1,
        "nodes": [
            node("placeholder", "logprobs", "logprobs"),
            node("placeholder", "advantages", "advantages"),
            function("mul", "operator.mul", ref("logprobs"), ref("advantages")),
            method("sum_1", "sum", ref("mul")),
            *calls,
            node("output", "output", "output", {"tuple": [loss or ref("sum_1"), {"dict": metrics or {}}]}),
        ],
    }


def loss_body(session_id: str, seq_id: int = 0, **changes: Any) -> dict[str, Any]:
    fields = {"name": "weighted", "inputs": INPUTS, "graph": graph(), "type": "create_custom_loss"}
    return {"session_id": session_id, "custom_loss_seq_id": seq_id, **fields, **changes}


def policy_datum() -> Any:
    return datum([1, 2, 3], advantages=np.ones(3, dtype=np.float32))


# ---- the way of a loss ----


async def test_clients_are_told_that_losses_run_here(client: Client) -> None:
    assert (await client.post("client/config", {})).json()["custom_loss_server_side"] is True


async def test_a_loss_is_kept_and_goes_to_the_engine_with_the_request_that_names_it(client: Client) -> None:
    session_id = await client.session()
    model_id = await client.model(session_id)
    made = await client.result(
        await client.post(
            "create_custom_loss", loss_body(session_id, graph=graph(metrics={"custom/a:mean": ref("mul")}))
        )
    )
    assert made == {"loss_id": f"{session_id}:loss:0", "type": "create_custom_loss"}
    receipt = await client.train(
        model_id, 1, data=(policy_datum(),), loss_fn="custom", loss_fn_config={"loss_id": made["loss_id"]}
    )
    assert "error" not in await client.result(receipt)
    item = next(op for op in client.engine.operations if isinstance(op, TrainItem))
    assert item.custom_loss is not None
    assert [call.target for call in item.custom_loss.calls] == ["operator.mul", "sum"]
    assert list(item.custom_loss.metrics) == ["custom/a:mean"]


async def test_the_same_upload_again_is_the_same_request_and_another_a_conflict(client: Client) -> None:
    session_id = await client.session()
    body = loss_body(session_id)
    first, again = [await client.post("create_custom_loss", body) for _ in range(2)]
    assert first.json() == again.json()
    other = await client.result(await client.post("create_custom_loss", body | {"name": "other"}))
    assert other["category"] == "user"
    assert "custom_loss_seq_id 0" in other["error"]


async def test_a_loss_belongs_to_its_session(client: Client) -> None:
    mine, theirs = await client.session(), await client.session()
    made = await client.result(await client.post("create_custom_loss", loss_body(mine)))
    model_id = await client.model(theirs)
    for seq_id, config in enumerate(({"loss_id": made["loss_id"]}, {"loss_id": 3.0}, {}, {"beta": 1.0}), 1):
        receipt = await client.train(model_id, seq_id, data=(policy_datum(),), loss_fn="custom", loss_fn_config=config)
        failed = await client.result(receipt)
        assert failed["category"] == "user"
        assert (
            "beta" in failed["error"]
            if "beta" in config
            else "loss_id" in failed["error"] or made["loss_id"] in failed["error"]
        )
    assert "error" not in await client.result(await client.train(model_id, 5))


async def test_losses_end_with_their_session(client: Client) -> None:
    session_id = await client.session()
    await client.post("create_custom_loss", loss_body(session_id))
    await client.post(f"sessions/{session_id}/finish", {"reason": {"type": "success"}})
    failed = await client.result(await client.post("create_custom_loss", loss_body(session_id, 1)))
    assert "has ended" in failed["error"]


async def test_a_session_keeps_a_limited_number_of_losses(open_server: OpenServer) -> None:
    async with open_server(control={"max_custom_losses_per_session": 2}) as client:
        session_id = await client.session()
        results = [
            await client.result(await client.post("create_custom_loss", loss_body(session_id, i))) for i in range(3)
        ]
        assert [("loss_id" in result) for result in results] == [True, True, False]
        assert "has 2 custom losses" in results[2]["error"]


async def test_data_that_lack_an_input_fail_the_request_that_carried_them(client: Client) -> None:
    session_id = await client.session()
    model_id = await client.model(session_id)
    made = await client.result(await client.post("create_custom_loss", loss_body(session_id)))
    receipt = await client.train(model_id, 1, loss_fn="custom", loss_fn_config={"loss_id": made["loss_id"]})
    failed = await client.result(receipt)
    assert "data[0].loss_fn_inputs['advantages'] is missing; custom loss 'weighted' takes it" in failed["error"]


# ---- graphs that are refused ----

HOSTILE: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (target, graph(function("bad", target, *args)), ("'bad'", target.split(".")[-1]))
    for target, args in [
        ("builtins.eval", ("1",)),
        ("eval", ("1",)),
        ("exec", ("1",)),
        ("__import__", ("os",)),
        ("os.system", ("true",)),
        ("torch.load", ("/etc/passwd",)),
        ("torch.save", (ref("mul"), "/tmp/x")),
        ("torch.hub.load", ("a", "b")),
        ("torch.from_file", ("/etc/passwd",)),
        ("torch.ops.aten.mul_", (ref("mul"), 2)),
        ("torch.exp_", (ref("mul"),)),
        ("torch.rand_like", (ref("mul"),)),
        ("torch.manual_seed", (0,)),
        ("torch.set_default_dtype", ({"dtype": "float64"},)),
        ("torch.set_num_threads", (1,)),
        ("torch.empty", (10,)),
        ("torch.as_strided", (ref("mul"), [9], [1])),
        ("torch.utils.checkpoint.checkpoint", (ref("mul"),)),
        ("torch.nn.functional.dropout", (ref("mul"),)),
        ("torch.linalg.svd", (ref("mul"),)),
        ("torch.Tensor.exp", (ref("mul"),)),
        ("torch.functional.einsum", ("i->", ref("mul"))),
        ("operator.setitem", (ref("mul"), 0, 1)),
        ("operator.iadd", (ref("mul"), 1)),
        ("operator.attrgetter", ("__class__",)),
        ("operator.methodcaller", ("exp_",)),
        ("operator.concat", ([1], [2])),
        ("math.factorial", (10**6,)),
        ("math.comb", (10**6, 10**5)),
        ("setattr", (ref("mul"), "data", 1)),
        ("hasattr", (ref("mul"), "data")),
        ("torch", ()),
        ("torch.__dict__", ()),
        ("torch.nn.functional.__builtins__", ()),
        ("torch..exp", (ref("mul"),)),
    ]
]
HOSTILE += [
    (f"attribute {name}", graph(function("bad", "getattr", ref("mul"), name)), ("'bad'", name))
    for name in ("__class__", "__dict__", "__globals__", "__reduce__", "data", "grad", "grad_fn", "storage", "_base")
]
HOSTILE += [
    (f"method {name}", graph(method("bad", name, ref("mul"))), ("'bad'", name))
    for name in (
        *("__class__", "__reduce__", "__reduce_ex__", "__setstate__", "__setitem__", "__getattribute__", "backward"),
        *("exp_", "mul_", "set_", "resize_", "copy_", "requires_grad_", "share_memory_", "apply_", "map_", "random_"),
        *("item", "tolist", "numpy", "data_ptr", "untyped_storage", "register_hook", "as_strided", "cuda", "type", ""),
    )
]
HOSTILE += [
    ("computed attribute", graph(function("bad", "getattr", ref("mul"), ref("logprobs"))), ("'bad'", "attribute")),
    ("attribute by keyword", graph(function("bad", "getattr", ref("mul"), attribute="shape")), ("'bad'", "attribute")),
    ("attribute default", graph(function("bad", "getattr", ref("mul"), "shape", 1)), ("'bad'", "attribute")),
    ("attribute of a text", graph(function("bad", "getattr", "x", "shape")), ("'bad'", "attribute")),
    ("write into out", graph(function("bad", "torch.exp", ref("mul"), out=ref("advantages"))), ("'bad'", "'out'")),
    (
        "write in place",
        graph(function("bad", "torch.nn.functional.relu", ref("mul"), inplace=True)),
        ("'bad'", "'inplace'"),
    ),
    ("unknown keyword", graph(method("bad", "sum", ref("mul"), generator=None)), ("'bad'", "'generator'")),
    ("a device", graph(method("bad", "to", ref("mul"), {"device": "cuda:0"})), ("'bad'", "cuda:0")),
    ("no data", graph(method("bad", "to", ref("mul"), {"device": "meta"})), ("'bad'", "meta")),
    ("a device by text", graph(method("bad", "to", ref("mul"), "cuda")), ("'bad'", "'cuda'")),
    ("a text", graph(function("bad", "torch.exp", "/etc/passwd")), ("'bad'", "/etc/passwd")),
    ("a dtype", graph(method("bad", "to", ref("mul"), {"dtype": "complex64"})), ("'bad'", "complex64")),
    ("a dtype's attribute", graph(method("bad", "to", ref("mul"), {"dtype": "hub"})), ("'bad'", "hub")),
    ("a layout", graph(method("bad", "to", ref("mul"), {"layout": "sparse_coo"})), ("'bad'", "sparse_coo")),
    ("a missing node", graph(method("bad", "exp", ref("nowhere"))), ("'bad'", "'nowhere'")),
    ("itself", graph(method("bad", "exp", ref("bad"))), ("'bad'", "no earlier node")),
    (
        "a cycle",
        graph(method("bad", "exp", ref("worse")), method("worse", "exp", ref("bad"))),
        ("'bad'", "'worse'", "no earlier node"),
    ),
    ("two of a name", graph(method("mul", "exp", ref("logprobs"))), ("'mul'", "two nodes")),
    ("a strange name", graph(method("a.b", "exp", ref("logprobs"))), ("'a.b'", "name of a node")),
    ("a long integer", graph(function("bad", "operator.mul", ref("mul"), 2**70)), ("'bad'", "64 bits")),
    ("an unknown tag", graph(function("bad", "torch.exp", {"pickle": "gASV"})), ("'bad'", "pickle")),
    ("two tags", graph(function("bad", "torch.exp", {"ref": "mul", "tuple": []})), ("'bad'", "2 keys")),
    ("no tag", graph(function("bad", "torch.exp", {})), ("'bad'", "0 keys")),
    ("a dict", graph(function("bad", "torch.exp", {"dict": {"a": 1}})), ("'bad'", "dict")),
    ("a wrong ref", graph(function("bad", "torch.exp", {"ref": 3})), ("'bad'", "ref")),
    ("a wrong slice", graph(function("bad", "operator.getitem", ref("mul"), {"slice": [1]})), ("'bad'", "slice")),
    ("a wrong float", graph(function("bad", "torch.exp", {"float": "1e9"})), ("'bad'", "1e9")),
    ("deep lists", graph(function("bad", "torch.exp", [[[[[[[[1]]]]]]]])), ("'bad'", "nested deeper")),
    ("a module", graph(node("call_module", "bad", "linear", ref("mul"))), ("'bad'", "call of a function or a method")),
    ("a captured tensor", graph(node("get_attr", "bad", "_tensor")), ("'bad'", "call of a function or a method")),
    ("a late placeholder", graph(node("placeholder", "bad", "x")), ("'bad'", "call of a function or a method")),
    ("an early output", graph(node("output", "bad", "output", 1)), ("'bad'", "call of a function or a method")),
    (
        "too many nodes",
        graph(*(method(f"n{i}", "exp", ref("mul")) for i in range(2001))),
        ("2003 calls", "at most 2000"),
    ),
    ("far too many nodes", graph(*(method(f"n{i}", "exp", ref("mul")) for i in range(4000))), ("4005", "at most")),
    ("too many arguments", graph(function("bad", "torch.stack", [ref("mul")] * 20_001)), ("20000 arguments",)),
    ("a loss that is no node", graph(loss=1.0), ("'output'", "(loss, metrics)")),
    ("a loss that is missing", graph(loss=ref("nowhere")), ("the loss", "'nowhere'")),
    ("a metric that is missing", graph(metrics={"custom/a:sum": ref("nowhere")}), ("custom/a:sum", "'nowhere'")),
    ("a metric that is no node", graph(metrics={"custom/a:sum": 1.0}), ("custom/a:sum", "1.0")),
    ("a metric that hides ours", graph(metrics={"loss:sum": ref("mul")}), ("'loss:sum'", "custom/<name>")),
    ("a metric of two colons", graph(metrics={"custom/a:b:sum": ref("mul")}), ("'custom/a:b:sum'",)),
    ("a metric of another reduction", graph(metrics={"custom/a:max": ref("mul")}), ("'custom/a:max'",)),
]


@pytest.mark.parametrize(("bad", "named"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
async def test_a_graph_that_could_do_harm_is_refused_by_name(
    client: Client, bad: dict[str, Any], named: tuple[str, ...]
) -> None:
    session_id = await client.session()
    answer = await client.post("create_custom_loss", loss_body(session_id, graph=bad))
    assert answer.status_code == 400
    for words in ("custom loss 'weighted'", *named):
        assert words in answer.json()["detail"]
    assert (await client.post("create_custom_loss", loss_body(session_id))).status_code == 200


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"graph": {}}, "graph.nodes"),
        ({"graph": {"nodes": []}}, "graph.nodes"),
        ({"graph": {"nodes": "torch.exp"}}, "graph.nodes"),
        ({"graph": {"nodes": [1]}}, "graph.nodes[0]"),
        ({"graph": {"nodes": [{"op": "output"}]}}, "graph.nodes[0].name"),
        ({"graph": graph() | {"format": 2}}, "format 2"),
        ({"graph": {"nodes": [node("placeholder", "logprobs", "logprobs")]}}, "2 placeholders first"),
        ({"graph": [1]}, "graph"),
        ({"inputs": []}, "logprobs"),
        ({"inputs": INPUTS[::-1]}, "'advantages'"),
        ({"inputs": [{"name": "logprobs", "rank": 0}, INPUTS[1]]}, "logprobs"),
        ({"inputs": [INPUTS[0], {"name": "advantages", "rank": 3}]}, "advantages"),
        ({"inputs": [INPUTS[0], {"name": "advantages", "rank": "1"}]}, "rank"),
        ({"inputs": [INPUTS[0], {"name": "Old", "rank": 1}]}, "'advantages'"),
        ({"name": ""}, "1 to 128 characters"),
        ({"name": "x" * 200}, "1 to 128 characters"),
        ({"custom_loss_seq_id": -1}, "custom_loss_seq_id"),
        ({"session_id": 5}, "session_id"),
    ],
)
async def test_an_upload_that_cannot_be_read_is_refused_by_field(
    client: Client, changes: dict[str, Any], named: str
) -> None:
    answer = await client.post("create_custom_loss", loss_body(await client.session()) | copy.deepcopy(changes))
    assert answer.status_code == 400
    assert named in json.dumps(answer.json()["detail"]).replace('\\"', '"')


async def test_an_upload_of_an_unknown_session_is_a_failed_future(client: Client) -> None:
    failed = await client.result(await client.post("create_custom_loss", loss_body("nobody")))
    assert failed["category"] == "user"
    assert "'nobody'" in failed["error"]


# ---- other optimizers ----


async def test_another_optimizer_is_refused_by_its_name(client: Client) -> None:
    body = {"session_id": await client.session(), "model_seq_id": 0, "base_model": client.engine.card.name}
    for seq_id, config in enumerate(({"type": "dimuon", "version": 1}, {"type": "sgd", "momentum": 0.9})):
        receipt = await client.post("create_model", body | {"model_seq_id": seq_id, "optimizer_config": config})
        failed = await client.result(receipt)
        assert failed["category"] == "user"
        assert f"{config['type']!r} is not supported; this server has 'adamw'" in failed["error"]
