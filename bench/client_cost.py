"""What a client costs: CPU seconds and memory of the program that trains, per pipelined step, side by side.

    python -m bench.client_cost --official .venv-tinker/bin/python

Both clients send the same 64 datums of 256 tokens to a stub that answers at once, in a process of its own, and submit
each step before they read the one before. Only the client's own process is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DATUMS, TOKENS, STEPS, WARM_UP = 64, 256, 60, 5

CLIENT = """
import json, os, resource, sys, time, warnings
warnings.simplefilter("ignore")
package, url, datums, tokens, steps, warm_up = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
os.environ["TINKER_TELEMETRY"] = "0"
import importlib
import numpy as np
tinker = importlib.import_module(package)
types = importlib.import_module(package + ".types")
service = tinker.ServiceClient(base_url=url, api_key="tml-x")
trainer = service.create_lora_training_client(base_model="stub", rank=8).result()
rows = np.random.default_rng(0).integers(0, 30000, size=(datums, tokens + 1))
data = [
    types.Datum(
        types.ModelInput.from_ints(row[:-1].tolist()),
        {"target_tokens": row[1:], "weights": np.ones(tokens, dtype=np.float32)},
    )
    for row in rows
]
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
waiting, began, wall = [], 0.0, 0.0
for step in range(warm_up + steps):
    if step == warm_up:
        began, wall = used(), time.perf_counter()
    passed = trainer.forward_backward(data, "cross_entropy")
    waiting.append((passed, trainer.optim_step(types.AdamParams(learning_rate=1e-4))))
    if len(waiting) == 2:
        passed, stepped = waiting.pop(0)
        assert len(passed.result().loss_fn_outputs) == datums
        stepped.result()
took, wall = used() - began, time.perf_counter() - wall
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
per_step = {"cpu_ms_per_step": 1000 * took / steps, "wall_ms_per_step": 1000 * wall / steps}
print(json.dumps({**per_step, "max_rss_mb": memory / 1024}), flush=True)
service.close("success").result()
os._exit(0)  # threads that the official SDK leaves behind abort some of its exits
"""


def stub() -> Any:
    """An ASGI application that answers every request of a training loop at once."""
    import numpy as np

    from tinsmith.types import ForwardBackwardOutput, TensorData
    from tinsmith.wire.tinker_proto import encode_forward_backward_output

    outputs = [{"logprobs": TensorData.from_numpy(np.full(TOKENS, -1.0, np.float32))} for _ in range(DATUMS)]
    passed = encode_forward_backward_output(ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": 1.0}))
    answers: dict[str, Any] = {
        "create_session": {"session_id": "s"},
        "create_model": {"request_id": "create"},
        "get_info": {"model_id": "s:train:0", "model_data": {"model_name": "stub"}},
        "forward_backward": {"request_id": "pass"},
        "optim_step": {"request_id": "step"},
    }
    results = {"create": {"model_id": "s:train:0"}, "step": {"metrics": {}}}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        name = scope["path"].rpartition("/api/v1/")[2]
        content, kind = json.dumps(answers.get(name, {})).encode(), b"application/json"
        if name == "retrieve_future":
            await asyncio.sleep(0.002)
            request_id = json.loads(body)["request_id"]
            content = passed if request_id == "pass" else json.dumps(results[request_id]).encode()
            kind = b"application/x-protobuf" if request_id == "pass" else kind
        headers = [(b"content-type", kind), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


def serve(port: int) -> None:
    import uvicorn

    uvicorn.run(stub(), port=port, log_level="error", lifespan="off")


def measure(python: str, package: str, url: str, environment: dict[str, str] | None) -> dict[str, float]:
    numbers = [str(n) for n in (DATUMS, TOKENS, STEPS, WARM_UP)]
    command = [python, "-c", CLIENT, package, url, *numbers]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    measured: dict[str, float] = json.loads(shown.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--official", default=".venv-tinker/bin/python", help="Python that has the official package")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clients = {"tinsmith": (sys.executable, dict(os.environ)), "tinker": (arguments.official, bare)}
    found: dict[str, list[dict[str, float]]] = {package: [] for package in clients}
    with stub_process() as url:
        for _ in range(arguments.rounds):
            for package, (python, environment) in clients.items():
                if Path(python).exists():
                    found[package].append(measure(python, package, url, environment))
                    print(package, {name: round(value, 1) for name, value in found[package][-1].items()}, flush=True)
    if all(found.values()):
        # not before: a child's peak memory counts what its parent had at the fork
        from bench.compare import write_record

        write_record("client-cost", "stub", side_by_side(found["tinsmith"], found["tinker"]))


@contextmanager
def stub_process() -> Iterator[str]:
    """The URL of a server that answers at once, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, "-m", "bench.client_cost", "--serve", str(port)]) as server:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def side_by_side(ours: list[dict[str, float]], official: list[dict[str, float]]) -> dict[str, float]:
    """Medians of both, and ours over the official."""
    medians = {
        title: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for title, runs in (("tinsmith", ours), ("tinker", official))
    }
    return {
        **{f"{name}_ratio": value / medians["tinker"][name] for name, value in medians["tinsmith"].items()},
        **{f"{title}: {name}": value for title, values in medians.items() for name, value in values.items()},
    }


if __name__ == "__main__":
    main()
