"""Settings of torch that hold for a whole process, for engines that have one to themselves."""

from __future__ import annotations

import torch


def multiply_float32_in_bfloat16() -> None:
    """Let fp32 matrix products on the CPU round their factors to bfloat16; sums and results stay fp32.

    Beside a bfloat16 base this loses nothing where it matters: hidden states and unembedding are bfloat16 values
    already, so the logits are exact products summed in fp32, and several times faster.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
