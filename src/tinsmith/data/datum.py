"""From rendered tokens to training data."""

# N token of a rendered conversation; its datum has N-1 positions

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinsmith.types import Datum, ModelInput, TensorData


def to_datum(tokens_N: Sequence[int], weights_N: Sequence[float]) -> Datum:
    """Shift by one: position i reads token i and is trained to give token i+1 with the weight of token i+1.

    The first token is never a target, so its weight is not used. Raises `ValueError` for unequal lengths or fewer than
    two tokens.
    """
    if len(tokens_N) != len(weights_N):
        raise ValueError(f"{len(tokens_N)} tokens but {len(weights_N)} weights")
    if len(tokens_N) < 2:
        raise ValueError(f"a datum needs at least 2 tokens, not {len(tokens_N)}")
    return Datum(
        model_input=ModelInput.from_ints(tokens_N[:-1]),
        loss_fn_inputs={
            "target_tokens": TensorData.from_numpy(np.asarray(tokens_N[1:], dtype=np.int64)),
            "weights": TensorData.from_numpy(np.asarray(weights_N[1:], dtype=np.float32)),
        },
    )
