"""Many samples at once through the official SDK: run by `bench.overload` in the SDK's environment.

Arguments: server URL, base model, project, number of samples, tokens of each. Prints one JSON line.
"""

from __future__ import annotations

import json
import random
import sys
import time

import tinker
from tinker import types


def main(url: str, base_model: str, project: str, count: str, max_tokens: str) -> None:
    rng = random.Random(0)
    service = tinker.ServiceClient(base_url=url, api_key="tml-bench", project_id=project)
    sampler = service.create_sampling_client(base_model=base_model)
    begun = time.perf_counter()
    futures = []
    for number in range(int(count)):
        prompt = types.ModelInput.from_ints([rng.randrange(3, 1500) for _ in range(16)])
        params = types.SamplingParams(max_tokens=int(max_tokens), seed=number, stop=[])
        futures.append(sampler.sample(prompt=prompt, num_samples=1, sampling_params=params))
    errors = []
    num_tokens = 0
    for future in futures:
        try:
            num_tokens += len(future.result().sequences[0].tokens)
        except Exception as error:  # noqa: BLE001 - it is counted and shown
            errors.append(repr(error))
    report = {
        "seconds": time.perf_counter() - begun,
        "num_failed": len(errors),
        "num_tokens": num_tokens,
        "first_error": errors[0] if errors else None,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
