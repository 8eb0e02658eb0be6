"""A tiny random Qwen2.5-VL on disk, pictures, and what transformers computes for sequences with them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.numerics.driver import VOCAB
from tinsmith.types import Datum, EncodedTextChunk, ImageChunk, ModelInput

CELL = 8
"""Pixels on each side of what becomes one token."""
IMAGE_TOKEN = 150


def save_vision_model(folder: Path) -> Path:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": CELL // 2,
            "spatial_merge_size": 2,
            "window_size": 2 * CELL,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=151,
        vision_start_token_id=152,
        vision_end_token_id=153,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for parameter in model.parameters():
        # the default initialization is so small that every token is equally likely
        parameter.data.mul_(4 if parameter.ndim >= 2 else 1)
    model.save_pretrained(folder)
    size = {"shortest_edge": 2 * CELL**2, "longest_edge": 40 * CELL**2}
    Qwen2VLImageProcessorPil(patch_size=CELL // 2, merge_size=2, size=size).save_pretrained(folder)
    return folder


def plain_vision_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def picture(seed: int, width: int, height: int, kind: str = "png", **fields: Any) -> ImageChunk:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return ImageChunk(data=buffer.getvalue(), format=kind, **fields)


def text(rng: np.random.Generator, length: int) -> EncodedTextChunk:
    return EncodedTextChunk(tokens=rng.integers(0, IMAGE_TOKEN, length).tolist())


def cross_entropy_datum(rng: np.random.Generator, *chunks: Any, length: int) -> Datum:
    """`length`: of all chunks, expanded."""
    inputs = {"target_tokens": rng.integers(0, VOCAB, length), "weights": rng.random(length).astype(np.float32)}
    return Datum(ModelInput(chunks=list(chunks)), inputs)


def reference_inputs(folder: Path, model_input: ModelInput) -> dict[str, torch.Tensor]:
    """What transformers takes: placeholder ids, their kinds, patches and grids."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    ids: list[int] = []
    kinds: list[int] = []
    pictures = []
    for chunk in model_input.chunks:
        if isinstance(chunk, EncodedTextChunk):
            ids += chunk.tokens
            kinds += [0] * len(chunk.tokens)
            continue
        pictures.append(Image.open(io.BytesIO(chunk.data)).convert("RGB"))
        grid = processor.preprocess([pictures[-1]], return_tensors="pt")["image_grid_thw"][0]
        count = int(grid.prod()) // 4
        ids += [IMAGE_TOKEN] * count
        kinds += [1] * count
    inputs = {"input_ids": torch.tensor([ids])}
    if pictures:
        inputs |= {"mm_token_type_ids": torch.tensor([kinds])}
        inputs |= dict(processor.preprocess(pictures, return_tensors="pt"))
    return inputs


def reference_target_logprobs(model: Any, folder: Path, datum: Datum) -> torch.Tensor:
    logits = model(**reference_inputs(folder, datum.model_input)).logits[0]
    targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"].to_numpy())
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
