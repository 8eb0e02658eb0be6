"""Work for a server through the official SDK, timed where a user would: run by `bench.wire` in the SDK's environment.

Reads one line per task from stdin (`train`, `smallest`, `publish`, `sample`), answers each with its seconds.
Arguments: server URL, base model, rank, vocabulary, lengths of the sequences (comma-separated).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import tinker
from tinker import types


def main(url: str, base_model: str, rank: str, vocab: str, lengths: str) -> None:
    rng = random.Random(0)
    service = tinker.ServiceClient(base_url=url, api_key="tml-bench")
    trainer = service.create_lora_training_client(base_model=base_model, rank=int(rank), seed=1).result()
    data = [datum(rng, int(vocab), int(length)) for length in lengths.split(",")]
    sixteen = [datum(rng, int(vocab), 16)]
    prompt = types.ModelInput.from_ints([rng.randrange(int(vocab)) for _ in range(16)])
    one_token = types.SamplingParams(max_tokens=1, seed=0)
    adam = types.AdamParams(learning_rate=1e-4)
    samplers = [trainer.save_weights_and_get_sampling_client().result()]

    def train() -> None:
        passed = trainer.forward_backward(data, "cross_entropy")
        trainer.optim_step(adam).result()
        passed.result()

    def smallest() -> None:
        trainer.forward_backward(sixteen, "cross_entropy").result()

    def publish() -> None:
        trainer.optim_step(adam)
        samplers[0] = trainer.save_weights_and_get_sampling_client().result()
        sample()

    def sample() -> None:
        samplers[0].sample(prompt=prompt, num_samples=1, sampling_params=one_token).result()

    tasks: dict[str, Callable[[], None]] = {t.__name__: t for t in (train, smallest, publish, sample)}
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        tasks[line.strip()]()
        print(time.perf_counter() - start, flush=True)


def datum(rng: random.Random, vocab: int, length: int) -> types.Datum:
    tokens = [rng.randrange(vocab) for _ in range(length + 1)]
    inputs = {
        "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[length]),
        "weights": types.TensorData(data=[1.0] * length, dtype="float32", shape=[length]),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
