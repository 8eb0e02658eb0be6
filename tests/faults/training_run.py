"""A training script as a user writes it: `python training_run.py MODULE [STEPS]`, MODULE being `tinker` or `tinsmith`.

It says what it is about to do on stdout, and knows nothing of servers that die.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

MODULE = sys.argv[1]
STEPS = int(sys.argv[2]) if len(sys.argv) > 2 else 20

tinker: Any = importlib.import_module(MODULE)
types: Any = importlib.import_module(f"{MODULE}.types")


def say(what: str) -> None:
    print(what, flush=True)


def datum(step: int) -> Any:
    tokens = [(7 * step + 3 * i) % 200 + 1 for i in range(24)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 23},
    )


def main() -> None:
    service = tinker.ServiceClient()
    training = service.create_lora_training_client("tinsmith/tiny", rank=4, seed=3)
    training = training.result() if hasattr(training, "result") else training
    say("created")
    losses, drawn = [], []
    for step in range(STEPS):
        say(f"step {step}")
        backward = training.forward_backward([datum(step), datum(step + 100)], "cross_entropy")
        optimizer = training.optim_step(types.AdamParams(learning_rate=1e-3))
        losses.append(backward.result().metrics["loss:sum"])
        optimizer.result()
        if step % 5 == 4:
            say(f"save {step}")
            training.save_state(f"step-{step}").result()
            say(f"saved {step}")
        if step % 8 == 3:
            say(f"sample {step}")
            sampler = training.save_weights_and_get_sampling_client()
            prompt = types.ModelInput.from_ints([1, 2, 3])
            params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=step)
            drawn.append(sampler.sample(prompt, num_samples=2, sampling_params=params).result().sequences[1].tokens)
    say("save final")
    path = training.save_state("final").result().path
    say("end " + json.dumps({"path": path, "losses": losses, "drawn": drawn}))


main()
