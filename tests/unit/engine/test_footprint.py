"""Memory reckoned from a configuration, and the refusal that follows from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tinsmith.engine.footprint import (
    Footprint,
    ModelShape,
    adapter_memory,
    check_adapter_fits,
    check_fits,
    footprint,
    in_words,
)
from tinsmith.types.engine_options import EngineOptions, parse_size
from tinsmith.types.errors import InvalidInput

GIB = 2**30
QWEN3_8B = SimpleNamespace(
    num_hidden_layers=36,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)
SHAPE = ModelShape.of(QWEN3_8B, 8_190_735_360)


def test_weights_head_and_cache_of_an_8b_model_in_bfloat16() -> None:
    needed = footprint(SHAPE, EngineOptions(kv_cache_bytes=2 * GIB), itemsize=2)
    assert needed.weights == 2 * 8_190_735_360
    assert needed.unembedding == 151936 * 4096 * 4
    assert needed.kv_cache == 2 * GIB
    assert needed.total == sum(
        (needed.weights, needed.unembedding, needed.kv_cache, needed.activations, needed.adapter)
    )
    assert 20 * GIB < needed.total < 23 * GIB


def test_float32_weights_take_twice_as_much_but_need_no_second_unembedding() -> None:
    needed = footprint(SHAPE, EngineOptions(), itemsize=4)
    assert needed.weights == 4 * 8_190_735_360
    assert needed.unembedding == 0


def test_one_cached_token_of_an_8b_model_is_144_kib() -> None:
    assert SHAPE.kv_bytes_per_token(itemsize=2) == 147_456


def test_latent_attention_is_cached_after_its_expansion() -> None:
    latent = SimpleNamespace(
        **vars(QWEN3_8B), kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert ModelShape.of(latent, 1).kv_bytes_per_token(2) == 36 * 32 * (128 + 64 + 128) * 2


def test_a_mixture_passes_each_token_through_the_experts_it_chose() -> None:
    mixture = SimpleNamespace(**vars(QWEN3_8B), num_experts_per_tok=8, moe_intermediate_size=768)
    assert ModelShape.of(mixture, 1).mlp == 12288
    mixture.intermediate_size = 4096
    shape = ModelShape.of(mixture, 1)
    assert shape.mlp == 8 * 768
    dense = ModelShape.of(SimpleNamespace(**{**vars(QWEN3_8B), "intermediate_size": 8 * 768}), 1)
    repeated = 2 * 8 * 4096 * 2
    assert shape.layer_activation_bytes(2) - dense.layer_activation_bytes(2) == repeated


def test_an_adapter_that_does_not_fit_is_refused_with_both_numbers_and_a_way_out() -> None:
    check_adapter_fits(1_300_000_000, 4, None)
    check_adapter_fits(1_300_000_000, 4, 20 * GIB)
    with pytest.raises(InvalidInput, match=r"1300 M parameters and needs 19.4 GiB, but only 8.0 GiB .* lower .*rank"):
        check_adapter_fits(1_300_000_000, 4, 8 * GIB)


def test_recomputed_layers_keep_only_their_input() -> None:
    kept, recomputed = (SHAPE.activation_bytes(2048, 2, recomputed=flag) for flag in (False, True))
    per_layer = SHAPE.layer_activation_bytes(2) - SHAPE.hidden * 2
    assert kept - recomputed == 2048 * SHAPE.num_layers * per_layer
    assert kept > 10 * recomputed


def test_a_model_that_does_not_fit_is_refused_with_both_numbers_and_a_way_out() -> None:
    needed = Footprint(weights=30 * GIB, unembedding=0, kv_cache=GIB, activations=GIB // 2, adapter=GIB // 2)
    with pytest.raises(InvalidInput) as refusal:
        check_fits("Qwen/Qwen3-8B", needed, 16 * GIB, dtype="float32", device="cpu")
    assert str(refusal.value) == (
        "base model 'Qwen/Qwen3-8B' needs about 32.0 GiB on cpu in float32 (weights 30.0 GiB, unembedding 0 MiB, "
        "kv cache 1.0 GiB, activations 512 MiB, adapter 512 MiB), but only 16.0 GiB are free; "
        "try --dtype bfloat16, which halves its weights; take a smaller model, or free memory"
    )


@pytest.mark.parametrize(
    ("available", "hint"),
    [(int(31.5 * GIB), "lower the option kv_cache_bytes"), (int(30.6 * GIB), "kv_cache_bytes and max_micro_batch")],
)
def test_the_refusal_names_the_limits_that_would_make_room(available: int, hint: str) -> None:
    needed = Footprint(weights=30 * GIB, unembedding=0, kv_cache=GIB, activations=GIB // 2, adapter=GIB // 2)
    with pytest.raises(InvalidInput, match=hint):
        check_fits("m", needed, available, dtype="bfloat16", device="cuda")


@pytest.mark.parametrize("available", [32 * GIB, None], ids=["enough", "unknown"])
def test_a_model_that_fits_or_of_which_nobody_knows_is_not_refused(available: int | None) -> None:
    needed = Footprint(weights=30 * GIB, unembedding=0, kv_cache=GIB, activations=GIB // 2, adapter=GIB // 2)
    check_fits("m", needed, available, dtype="bfloat16", device="cuda")


def test_sizes_in_words() -> None:
    assert (in_words(3 * 2**20), in_words(GIB), in_words(int(1.26 * GIB))) == ("3 MiB", "1.0 GiB", "1.3 GiB")


def test_the_memory_for_adapters_is_reckoned_with_or_is_a_share_of_what_is_left() -> None:
    asked = EngineOptions(adapter_memory_bytes=3 * GIB)
    assert footprint(SHAPE, asked, 4).adapter == 3 * GIB
    assert adapter_memory(footprint(SHAPE, asked, 4), asked, 100 * GIB, is_host=False) == 3 * GIB
    needed = Footprint(weights=0, unembedding=0, kv_cache=2 * GIB, activations=8 * GIB, adapter=GIB)
    assert adapter_memory(needed, EngineOptions(), 50 * GIB, is_host=True) == 20 * GIB
    assert adapter_memory(needed, EngineOptions(), 50 * GIB, is_host=False) == 32 * GIB
    assert adapter_memory(needed, EngineOptions(), 9 * GIB, is_host=False) == GIB  # one, whatever else
    assert adapter_memory(needed, EngineOptions(), None, is_host=False) is None


def test_a_size_is_read_from_words_and_refused_by_name() -> None:
    assert parse_size("--adapter-memory", "2GiB") == 2 * GIB
    assert parse_size("--adapter-memory", "512MiB") == GIB // 2
    for text in ("much", "-1GiB", "10kB", ""):
        with pytest.raises(InvalidInput, match="--adapter-memory"):
            parse_size("--adapter-memory", text)
