"""What a user would do, in scenarios. Run as `script.py PACKAGE URL` with either client."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import urllib.request
from typing import Any

import torch

PACKAGE, URL = sys.argv[1:]
os.environ.update(TINKER_TELEMETRY="0", TINKER_API_KEY="tml-recorded", TINKER_TAGS="one")
tinker: Any = importlib.import_module(PACKAGE)
types: Any = importlib.import_module(f"{PACKAGE}.types")


def scenario(name: str, **faults: list[Any]) -> None:
    """Told to the server, so that it sorts what it sees. `faults` are answers by path."""
    body = json.dumps({"name": name, "faults": faults}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{URL}/api/v1/scenario", data=body)).read()


def data(count: int, first: int = 5) -> list[Any]:
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints([first + i, 6, 7]),
            loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [0.0, 1.0, 0.5]},
        )
        for i in range(count)
    ]


def made(client: Any) -> Any:
    """Ours come as futures that can be used at once; the official package waits."""
    return client.result() if hasattr(client, "result") else client


def policy_data() -> list[Any]:
    inputs = {"target_tokens": [6, 7], "logprobs": [-1.0, -2.0], "advantages": [0.5, -0.5]}
    return [types.Datum(model_input=types.ModelInput.from_ints([5, 6]), loss_fn_inputs=inputs)]


def training(service: Any) -> Any:
    scenario("create_lora_training_client")
    metadata = {"purpose": "record"}
    trainer = made(
        service.create_lora_training_client("stub", rank=8, seed=7, train_unembed=False, user_metadata=metadata)
    )
    scenario("a pass and a step together")
    adam = types.AdamParams(learning_rate=1e-4, weight_decay=0.1)
    passed, stepped = trainer.forward_backward(data(2), "cross_entropy"), trainer.optim_step(adam)
    passed.result()
    stepped.result()
    scenario("forward with a configured loss")
    trainer.forward(policy_data(), "ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.5}).result()
    scenario("five datums")
    trainer.forward_backward(data(5), "cross_entropy").result()
    scenario("saves")
    trainer.save_state("s0", ttl_seconds=60).result()
    trainer.save_weights_for_sampler("s1").result()
    trainer.load_state("tinker://sess-1:train:0/weights/s0").result()
    trainer.load_state_with_optimizer("tinker://sess-1:train:0/weights/s0").result()
    scenario("a custom loss")
    trainer.forward_backward_custom(data(3), lambda _, rows: (sum(row.sum() for row in rows) * 2, {"m": 1.0})).result()
    return trainer


def sampling(service: Any, trainer: Any) -> None:
    scenario("weights for a sampler of no name")
    sampler = made(trainer.save_weights_and_get_sampling_client())
    prompt = types.ModelInput.from_ints([5, 6, 7])
    scenario("sample")
    params = types.SamplingParams(max_tokens=3, seed=4, temperature=0.5, stop=["x"], top_p=0.9)
    sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result()
    scenario("more of sample")
    more = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2}
    sampler.sample(prompt=prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=1), **more).result()
    scenario("compute_logprobs")
    sampler.compute_logprobs(prompt).result()
    scenario("a sampler of saved weights")
    made(service.create_sampling_client(model_path="tinker://sess-1:train:0/sampler_weights/s1"))
    scenario("a sampler of a base model")
    made(service.create_sampling_client(base_model="stub"))
    scenario("a training client of saved weights and optimizer")
    made(service.create_training_client_from_state_with_optimizer("tinker://sess-1:train:0/weights/s0"))
    scenario("a pickled sampler")
    copy = pickle.loads(pickle.dumps(sampler))
    copy.sample(prompt=prompt, num_samples=1, sampling_params=types.SamplingParams(max_tokens=1)).result()


def faults(trainer: Any, sampler: Any) -> None:
    prompt, params = types.ModelInput.from_ints([5, 6, 7]), types.SamplingParams(max_tokens=1)
    adam = types.AdamParams(learning_rate=1e-4)
    again = {"type": "try_again", "request_id": "x", "queue_state": "active"}
    scenario("polls that find nothing yet", retrieve_future=[408, 408, again, 503])
    trainer.optim_step(adam).result()
    scenario("polls that are limited or dropped", retrieve_future=[429, "drop"])
    trainer.optim_step(adam).result()
    scenario("polls that are refused", retrieve_future=[400, 400])
    trainer.optim_step(adam).result()
    scenario("a step that meets a conflict", optim_step=[409, 409])
    trainer.optim_step(adam).result()
    scenario("a sample that is not taken yet", asample=[429, 503])
    sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result()
    scenario("a submit that is dropped", forward_backward=["drop"])
    trainer.forward_backward(data(1), "cross_entropy").result()


def rest(service: Any) -> None:
    scenario("a rest client")
    client = service.create_rest_client()
    path = "tinker://sess-1:train:0/weights/s0"
    calls = {
        "get_training_run": lambda: client.get_training_run("sess-1:train:0"),
        "get_training_run_by_tinker_path": lambda: client.get_training_run_by_tinker_path(path),
        "list_training_runs": lambda: client.list_training_runs(limit=5, offset=2),
        "list_checkpoints": lambda: client.list_checkpoints("sess-1:train:0"),
        "list_user_checkpoints": lambda: client.list_user_checkpoints(limit=3),
        "delete_checkpoint": lambda: client.delete_checkpoint("sess-1:train:0", "weights/s0"),
        "delete_checkpoint_from_tinker_path": lambda: client.delete_checkpoint_from_tinker_path(path),
        "publish": lambda: client.publish_checkpoint_from_tinker_path(path),
        "unpublish": lambda: client.unpublish_checkpoint_from_tinker_path(path),
        "set_ttl": lambda: client.set_checkpoint_ttl_from_tinker_path(path, 60),
        "weights_info": lambda: client.get_weights_info_by_tinker_path(path),
        "get_session": lambda: client.get_session("sess-1"),
        "list_sessions": lambda: client.list_sessions(limit=4),
        "get_sampler": lambda: client.get_sampler("sess-1:sample:0"),
        "capabilities": service.get_server_capabilities,
    }
    for name, call in calls.items():
        scenario(f"rest {name}")
        try:
            answer = call()
            if hasattr(answer, "result"):
                answer.result()
        except Exception as error:  # noqa: BLE001  the recorder answers `{}`, which may be no valid reply
            print(f"{name}: {type(error).__name__}", file=sys.stderr)


def main() -> None:
    torch.set_num_threads(1)
    scenario("a client alone")
    service = tinker.ServiceClient(base_url=URL, user_metadata={"who": "recorder"}, project_id="project-1")
    trainer = training(service)
    sampling(service, trainer)
    faults(trainer, made(trainer.save_weights_and_get_sampling_client()))
    rest(service)
    scenario("close")
    service.close("success").result()
    scenario("over")


main()
