"""The frozen base: loaded once, its linear layers opened to adapters, its attention ours."""

# T packed token, H hidden, V vocabulary

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tinsmith.engine.attention import ATTENTION, PassLayout
from tinsmith.engine.lora import LoraLayout, LoraLinear, LoraRouter, LoraSite, Segment
from tinsmith.engine.loss_head import Unembedding, logits_of
from tinsmith.engine.self_attention import plan_blocks
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.operations import BaseModelCard, LoraSpec

_ATTN_LINEARS = re.compile(r"(^|\.)(self_attn|attn|attention)\.[a-z_]*proj$")
_MLP_LINEARS = re.compile(r"(^|\.)(mlp|feed_forward|block_sparse_moe)\.([a-z_]*\.)*[a-z_]*proj$")
_CHECK_TOKENS = 12
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest difference from the model's own logits, relative to their spread."""


class BaseModel:
    """A transformers causal language model that computes packed rows for many adapters at once."""

    def __init__(self, source: ModelSource, options: EngineOptions) -> None:
        """Raises `InvalidInput` if the model cannot be found, `Unsupported` if its architecture is not ours to run."""
        self.device = pick_device(options.device)
        config = _load_config(source)
        self.dtype = pick_dtype(options.dtype, self.device, config.get_text_config().hidden_size // 4 * 4)
        self._model = _load(source, config, self.dtype).to(self.device)
        self._router = LoraRouter()
        reference = _reference_logits(self._model)
        self.sites = self._open_sites()
        self._model.set_attn_implementation(ATTENTION)
        self._backbone = self._model.get_decoder()
        self._embed = self._model.get_input_embeddings()
        self.head = self._unembedding()
        self._check_against(reference)
        self.card = self._describe(source, options)

    def layout(self, spec: LoraSpec) -> LoraLayout:
        """Raises `InvalidInput` if the spec trains nothing here or its rank exceeds the limit."""
        if spec.rank > self.card.max_rank:
            raise InvalidInput(f"lora_config.rank is {spec.rank}; this server allows at most {self.card.max_rank}")
        return LoraLayout(self.sites, spec)

    def hidden(
        self, input_ids_T: Tensor, position_ids_T: Tensor, segments: Sequence[Segment], packing: PassLayout
    ) -> Tensor:
        """Final hidden states `[T, H]` of packed rows. With gradients enabled, `backward` may follow."""
        with torch.no_grad():
            embeds_1TH = self._embed(input_ids_T[None])
        if torch.is_grad_enabled():
            embeds_1TH = embeds_1TH.detach().requires_grad_()
        self._router.segments = segments
        try:
            output = self._backbone(
                inputs_embeds=embeds_1TH, position_ids=position_ids_T[None], use_cache=False, packing=packing
            )
        finally:
            self._router.segments = ()
        hidden_TH: Tensor = output.last_hidden_state[0]
        return hidden_TH

    def backward(self, logprobs_M: Tensor, grad_M: Tensor, segments: Sequence[Segment]) -> None:
        """Carry dL/dlogprob through the model into the segments' gradient buffers."""
        torch.autograd.backward(logprobs_M, grad_M)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached token takes over all layers."""
        config = self._model.config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(2 * config.num_hidden_layers * key_heads * head_size * self.dtype.itemsize)

    def _open_sites(self) -> tuple[LoraSite, ...]:
        """Replace every targeted `nn.Linear`; returns the sites in module order, the unembedding last."""
        head = self._model.get_output_embeddings()
        sites: list[LoraSite] = []
        for name, module in list(self._model.named_modules()):
            group = _group(name)
            if group is None or not isinstance(module, nn.Linear) or module is head:
                continue
            parent, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(parent), leaf, LoraLinear(module, len(sites), self._router))
            sites.append(LoraSite(name, group, module.in_features, module.out_features))
        if isinstance(head, nn.Linear):
            head_name = next(name for name, module in self._model.named_modules() if module is head)
            sites.append(LoraSite(head_name, "unembed", head.in_features, head.out_features))
        if not any(site.group == "attn" for site in sites):
            raise Unsupported(
                f"{type(self._model).__name__} has no attention projections that adapters could attach to"
            )
        return tuple(sites)

    def _unembedding(self) -> Unembedding:
        head = self._model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise Unsupported(f"{type(self._model).__name__} has no linear unembedding")
        bias = head.bias.detach().float() if head.bias is not None else None
        return Unembedding(head.weight.detach().float(), bias, len(self.sites) - 1)

    def _check_against(self, reference_TV: Tensor) -> None:
        """Compare our packed pass with the model's own: an architecture that does more than we compute is refused."""
        ids_T = _check_ids(self._model)
        positions_T = torch.arange(len(ids_T), device=self.device)
        with torch.inference_mode():
            layout = PassLayout(blocks=plan_blocks([len(ids_T)], self.device))
            ours_TV = logits_of(self.hidden(ids_T, positions_T, (), layout), self.head, ())
        worst = float((ours_TV - reference_TV).abs().max() / reference_TV.std().clamp_min(1e-6))
        if not worst <= _CHECK_TOLERANCE[self.dtype]:
            raise Unsupported(
                f"{type(self._model).__name__} computes logits that this engine does not reproduce "
                f"(largest difference {worst:.3g} of their spread); the architecture is not supported"
            )

    def _describe(self, source: ModelSource, options: EngineOptions) -> BaseModelCard:
        config = self._model.config.get_text_config()
        eos = self._model.generation_config.eos_token_id if self._model.generation_config else None
        eos = config.eos_token_id if eos is None else eos
        return BaseModelCard(
            name=source.name,
            source=source.load_from,
            architecture=type(self._model).__name__,
            vocab_size=self.head.vocab_size,
            max_context=int(config.max_position_embeddings),
            num_parameters=self._model.num_parameters(),
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            max_rank=options.max_rank,
        )


def pick_device(choice: str) -> torch.device:
    """Raises `InvalidInput` if the device asked for is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if choice == "auto":
        choice = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[choice]:
        raise InvalidInput(f"device {choice!r} is not available on this machine")
    return torch.device(choice)


def pick_dtype(choice: str, device: torch.device, hidden_size: int) -> torch.dtype:
    """`auto`: bfloat16 on a GPU that has it; on a CPU, for models that are not narrow, if it measures faster."""
    if choice != "auto":
        return torch.float32 if choice == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "mps" or hidden_size < _BF16_MIN_WIDTH:
        return torch.float32
    seconds = {dtype: _layer_seconds(dtype, hidden_size) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if seconds[torch.bfloat16] * _BF16_ADVANTAGE < seconds[torch.float32] else torch.float32


_BF16_ADVANTAGE = 1.5
"""How much faster bfloat16 must be before its lost precision is worth it."""
_BF16_MIN_WIDTH = 384
"""Narrower models spend their time between the products: at width 192 whole training steps were slower in bfloat16."""


def _layer_seconds(dtype: torch.dtype, hidden_size: int) -> float:
    """Best of a few passes through something like one layer: small models spend their time between the products."""
    x_TH = torch.full((256, hidden_size), 0.01, dtype=dtype)
    up, down = (
        torch.full(shape, 0.01, dtype=dtype)
        for shape in ((4 * hidden_size, hidden_size), (hidden_size, 4 * hidden_size))
    )
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        with torch.inference_mode():
            wide = nn.functional.silu(nn.functional.linear(x_TH, up))
            y_TH = nn.functional.linear(wide, down)
            q = y_TH.view(1, 256, 4, -1).transpose(1, 2)
            nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            nn.functional.rms_norm(y_TH.float(), (hidden_size,)).to(dtype) + x_TH
        best = min(best, time.perf_counter() - start)
    return best


def _load_config(source: ModelSource) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.load_from)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(source, error) from error
    return config


def _load(source: ModelSource, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.load_from, config=config, dtype=dtype, attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(source, error) from error
    return model.eval().requires_grad_(False)


def _cannot_load(source: ModelSource, error: Exception) -> InvalidInput:
    return InvalidInput(f"base model {source.name!r} cannot be loaded from {source.location!r}: {error}")


def _group(name: str) -> str | None:
    if _ATTN_LINEARS.search(name):
        return "attn"
    return "mlp" if _MLP_LINEARS.search(name) else None


def _check_ids(model: PreTrainedModel) -> Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    return torch.arange(_CHECK_TOKENS, device=model.device) * 7919 % vocab_size


@torch.inference_mode()
def _reference_logits(model: PreTrainedModel) -> Tensor:
    """Logits of a fixed short input by the model's own code, fp32 `[T, V]`."""
    logits: Tensor = model(input_ids=_check_ids(model)[None], use_cache=False).logits[0]
    return logits.float()
