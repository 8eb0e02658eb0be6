"""Several models trained by one script: `python many_models.py MODULE NUMBER MANNER`, MODULE `tinker` or `tinsmith`.

MANNER is `interleaved` (a step of each in turn, pipelined) or `alone` (each from its beginning to its end). Prints what
every model computed, drew and saved, as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

MODULE, NUMBER, MANNER = sys.argv[1], int(sys.argv[2]), sys.argv[3]
STEPS = 4

tinker: Any = importlib.import_module(MODULE)
types: Any = importlib.import_module(f"{MODULE}.types")


def datum(model: int, step: int) -> Any:
    tokens = [(11 * model + 7 * step + 3 * i) % 200 + 1 for i in range(16)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 15},
    )


class Run:
    def __init__(self, service: Any, model: int) -> None:
        training = service.create_lora_training_client("tinsmith/tiny", rank=4, seed=model)
        self.training = training.result() if hasattr(training, "result") else training
        self.model = model
        self.losses: list[float] = []
        self.samplers: list[Any] = []
        self.pending: list[Any] = []

    def begin(self, step: int) -> None:
        """Two passes for one optimizer step."""
        passes = [self.training.forward_backward([datum(self.model, step + k)], "cross_entropy") for k in (0, 50)]
        self.pending = [*passes, self.training.optim_step(types.AdamParams(learning_rate=1e-3, weight_decay=0.01))]

    def end(self, step: int) -> None:
        *passes, optimizer = [future.result() for future in self.pending]
        self.losses += [answer.metrics["loss:sum"] for answer in passes] + [optimizer.metrics["grad_norm:mean"]]
        if step in (0, 2):
            self.samplers.append(self.training.save_weights_and_get_sampling_client())

    def finish(self) -> dict[str, Any]:
        prompt, params = types.ModelInput.from_ints([1, 2, 3]), types.SamplingParams(max_tokens=8, seed=5)
        drawn = [s.sample(prompt, num_samples=1, sampling_params=params).result().sequences[0] for s in self.samplers]
        path = self.training.save_state("final").result().path
        return {"losses": self.losses, "drawn": [[s.tokens, s.logprobs] for s in drawn], "path": path}


def main() -> None:
    service = tinker.ServiceClient()
    groups = [range(NUMBER)] if MANNER == "interleaved" else [range(n, n + 1) for n in range(NUMBER)]
    ends = []
    for group in groups:
        runs = [Run(service, model) for model in group]
        for step in range(STEPS):
            for run in runs:
                run.begin(step)
            for run in runs:
                run.end(step)
        ends += [run.finish() for run in runs]
    print(json.dumps(ends))


main()
