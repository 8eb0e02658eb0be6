"""An adapter that calls a tool, because a few steps of training taught it to."""

from __future__ import annotations

import json
from typing import Any

from tinsmith import ServiceClient
from tinsmith.data import load_tokenizer, to_datum
from tinsmith.models import tiny_folder
from tinsmith.types import AdamParams

CALL: dict[str, Any] = {"name": "look", "arguments": {"where": "here"}}
PARAMETERS = {"type": "object", "properties": {"where": {"type": "string"}}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": PARAMETERS},
}
STEPS = 40


def teach_to_call(service: ServiceClient, base_model: str, prompt: list[int]) -> str:
    """Train until the answer to `prompt` is a call of the tool; returns the path of the sampler's checkpoint.

    The same weights are kept for training under the same name.
    """
    tokenizer: Any = load_tokenizer(str(tiny_folder()))
    text = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call><|im_end|>"
    answer = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    datum = to_datum([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer))
    trainer = service.create_lora_training_client(base_model=base_model, rank=8, seed=1).result()
    for _ in range(STEPS):
        output = trainer.forward_backward([datum], "cross_entropy")
        trainer.optim_step(AdamParams(learning_rate=0.01)).result()
        if output.result().loss_sum < 0.05:
            break
    trainer.save_state("calls").result()
    return trainer.save_weights_for_sampler("calls").result().path
