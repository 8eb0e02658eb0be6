"""Tiny random models of the architectures people use, each with what sets it apart switched on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.numerics.driver import VOCAB

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True, slots=True)
class Family:
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    mlp_sites: int = 6
    """Linear layers and stacks of experts that `train_mlp` adapts, all layers together."""


FAMILIES = {
    "qwen3": Family("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen2": Family("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "llama3": Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": Family("mistral", {"head_dim": 8, "sliding_window": 7}),
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": Family("phi3", {"sliding_window": 9}, mlp_sites=4),
    "phi": Family("phi", {"num_key_value_heads": 4}, mlp_sites=4),
    "gpt_oss": Family(
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
        mlp_sites=4,
    ),
    "qwen3_moe": Family("qwen3_moe", {"head_dim": 8, "num_experts": 4, **_EXPERTS}, mlp_sites=4),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, mlp_sites=4),
    "qwen2_moe": Family(
        "qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 40, **_EXPERTS}, mlp_sites=10
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            **_EXPERTS,
        },
        mlp_sites=8,
    ),
    "gpt_neox": Family("gpt_neox", {"num_key_value_heads": None}, mlp_sites=4),
    "olmo2": Family("olmo2"),
    "granite": Family(
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "cohere": Family("cohere", {"logit_scale": 0.3}),
    "glm4": Family("glm4", {"head_dim": 8}, mlp_sites=4),
    "stablelm": Family("stablelm"),
    "nemotron": Family("nemotron", mlp_sites=4),
    "starcoder2": Family("starcoder2", {"sliding_window": 8}, mlp_sites=4),
    "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, mlp_sites=4),
}


def save_tiny(folder: Path, model_type: str, **config: Any) -> Path:
    """A random model whose tokens are not all equally likely, whose norms, biases and sinks are not all alike."""
    torch.manual_seed(0)
    settings = {key: value for key, value in {**_COMMON, **config}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.mul_(4)
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder
