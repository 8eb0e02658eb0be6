"""The same with an SDK, whose module is named first: tinker (the official one) or tinsmith (ours).

Usage: sdk_loop.py MODULE SEED STEPS; the server is in TINKER_BASE_URL.
"""

import importlib
import json
import sys
import time

tinker, seed, steps = importlib.import_module(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def main() -> None:
    service = tinker.ServiceClient()
    trainer = service.create_lora_training_client(base_model="tinsmith/tiny", rank=8, seed=seed)
    trainer = trainer.result() if hasattr(trainer, "result") else trainer
    tokens = list(range(40 + seed, 72 + seed))
    datum = tinker.types.Datum(
        model_input=tinker.types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * 31},
    )
    trainer.forward([datum], "cross_entropy").result()
    print("ready", flush=True)
    sys.stdin.readline()
    began, losses = time.time(), []
    for _ in range(steps):
        trained = trainer.forward_backward([datum], "cross_entropy")
        stepped = trainer.optim_step(tinker.types.AdamParams(learning_rate=0.001))
        losses.append(trained.result().metrics["loss:sum"] / 31)
        stepped.result()
    print(json.dumps({"losses": losses, "began": began, "ended": time.time()}), flush=True)


main()
